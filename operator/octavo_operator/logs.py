"""The operator's log: lines for people or JSON for collectors, each with the server that it is about. Set up by cli.py.

A worker looks after one server in a task of its own, and binds its name there: whatever is logged below it, by the
client too, carries it.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

SERVER: ContextVar[str | None] = ContextVar("server", default=None)
"""namespace/name of the LLMServer that the present task looks after."""
FORMATS = ("text", "json")


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if server := SERVER.get():
            document["server"] = server
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, ensure_ascii=False)


def set_up(level: str, kind: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    handler.setFormatter(JsonFormatter() if kind == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # One line for every request and every watch is not a story that a person acts on.
    logging.getLogger("aiohttp").setLevel(logging.WARNING)
