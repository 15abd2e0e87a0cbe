"""Start the engine process, and say how it ended. Called by serve.py before anything heavy is imported."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import octavo_engine
from octavo_engine.api.auth import KEY_VARIABLES
from octavo_engine.config import EngineConfig, to_args
from octavo_engine.status import ExitStatus, Failure, FailureCode

ENGINE_COMMAND = (sys.executable, "-m", "octavo_engine.core.process")
EXIT_WAIT_S = 5.0
"""How long an engine that closed its socket may take to exit before it is killed."""


@dataclass
class EngineProcess:
    """A running engine and our end of the socket to it."""

    process: subprocess.Popen[bytes]
    sock: socket.socket

    @classmethod
    def start(
        cls, config: EngineConfig, command: Sequence[str] = ENGINE_COMMAND, variables: Mapping[str, str] | None = None
    ) -> EngineProcess:
        """variables: for the engine's environment, beside our own less the keys."""
        ours, theirs = socket.socketpair()
        environ = {name: value for name, value in os.environ.items() if name not in KEY_VARIABLES}
        environ |= variables or {}
        # The same package again, also when it was found through sys.path and not installed.
        root = str(Path(octavo_engine.__file__).parents[1])
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))
        with theirs:
            process = subprocess.Popen(
                [*command, "--fd", str(theirs.fileno()), *to_args(config)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environ,
                # A group of its own: Ctrl-C is for us, and we tell the engine when to end.
                process_group=0,
            )
        return cls(process, ours)

    def end(self) -> int:
        """Wait for the exit that the engine was asked for or has announced; kill it when it does not come.

        Its exit status, negative for a signal. Blocks up to EXIT_WAIT_S.
        """
        try:
            return self.process.wait(EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def died(status: int) -> Failure:
    """The death certificate of an engine that gave no account itself. status: of EngineProcess.end."""
    if status == -signal.SIGKILL:
        return Failure(
            FailureCode.ENGINE_DIED,
            "The engine process was killed (SIGKILL), most likely by the kernel for using too much memory.",
            "raise the container's memory limit, or lower --gpu-memory-utilization on a CPU; "
            "`dmesg` or the pod's last state (OOMKilled) tells for certain",
        )
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return Failure(
            FailureCode.ENGINE_DIED,
            f"The engine process was ended by {name}.",
            "restart; if it comes back, please report it with the engine's last lines of log",
        )
    code = next((code for code in FailureCode if code.exit_status == status), None)
    if code is not None and status != ExitStatus.OK:
        return Failure(
            code, f"The engine process ended with exit status {status} ({code}).", "its last lines of log say more"
        )
    return Failure(
        FailureCode.ENGINE_DIED,
        f"The engine process ended with exit status {status} and without a reason.",
        "its last lines of log say more; please report it",
    )
