"""Logging, of both processes: lines for people, or one JSON object a line. Standard library only.

What a line may hold: names, counts, times, ids. Never a prompt, an answer or a key.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from octavo_engine.status import Failure, FailureCode, FatalError

FORMAT_VARIABLE = "OCTAVO_ENGINE_LOG"
"""Tells the engine process how the API process logs: LEVEL:FORMAT."""
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def configure(level: str, format: str, process: str = "api") -> None:
    """To stderr. process: the part of the server that logs, told in each line."""
    handler = logging.StreamHandler(sys.stderr)
    if format == "json":
        handler.setFormatter(JsonFormatter(process))
    else:
        name = "%(name)s" if process == "api" else process
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {name}: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def configure_from_file(path: str) -> None:
    """Python's own configuration of logging, as JSON. Raises FatalError(INVALID_CONFIG)."""
    import logging.config  # brings sockets and mail; ports are bound before

    try:
        # Loggers are made as modules are imported, which has begun: by default all of those would fall silent.
        given = {"disable_existing_loggers": False, **json.loads(Path(path).read_text(encoding="utf-8"))}
        logging.config.dictConfig(given)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise FatalError(
            Failure(
                FailureCode.INVALID_CONFIG,
                f"--log-config-file: {path} is not a configuration of Python's logging.",
                "write a JSON object as logging.config.dictConfig takes it",
                detail=str(error),
            )
        ) from error


def for_engine(level: str, format: str) -> dict[str, str]:
    """The variable by which the engine process learns of it."""
    return {FORMAT_VARIABLE: f"{level}:{format}"}


def configure_engine(environ: Mapping[str, str]) -> None:
    level, _, format = environ.get(FORMAT_VARIABLE, "info:console").partition(":")
    configure(level, format, "engine")


class JsonFormatter(logging.Formatter):
    """time, level, logger, process, message; then what the line's `extra` gave."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
            "message": record.getMessage(),
        }
        document |= {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, ensure_ascii=False, default=str)
