"""Where the command `octavo` and `python -m octavo_engine` begin: Ctrl-C ends them without a word, from here on."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import NoReturn


def main() -> int:
    try:
        # Here and not above: importing takes a quarter of a second, more on a busy machine.
        from octavo_engine import cli

        return cli.main()
    except KeyboardInterrupt:
        _interrupted()


def _interrupted() -> NoReturn:
    """End by the signal itself, so that a shell's loop around this command ends too.

    At once: a thread that downloads or computes would be waited for otherwise, and files are left as a SIGKILL would
    leave them, from which all that writes them goes on.
    """
    with contextlib.suppress(OSError):  # a pipe that is closed
        sys.stdout.flush()
        if sys.stderr.isatty():
            sys.stderr.write("\n")
        sys.stderr.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(128 + signal.SIGINT)  # the first process of a container, which no signal ends


if __name__ == "__main__":
    sys.exit(main())
