"""Write the death certificate: the one JSON object that says why the process ended."""

from __future__ import annotations

import os
from pathlib import Path

from octavo_engine.status import Failure


def write_certificate(failure: Failure, path: str) -> bool:
    """Whether it was written. Only where the folder exists; in /dev only over a file that exists already:
    there it is the kubelet's mount, and on a laptop nothing should be left in /dev."""
    file = Path(path)
    if not path or not file.parent.is_dir() or (file.parent == Path("/dev") and not file.exists()):
        return False
    try:
        with open(file, "w", encoding="utf-8") as stream:
            stream.write(failure.to_json())
            stream.flush()
            if file.is_file():
                os.fsync(stream.fileno())
    except OSError:
        return False  # the same failure is on stderr
    return True
