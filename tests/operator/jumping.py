"""`octavo-operator run` whose clock is off by as many hours as a file says at that moment. Run by test_faults.py.

    jumping.py FILE

Only the clock that people read: the other one, by which durations are measured, cannot be set on any machine.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from octavo_operator.logs import set_up
from octavo_operator.run import run
from octavo_operator.settings import from_environment

HOURS = Path(sys.argv[1])


def clock() -> datetime:
    return datetime.now(UTC) + timedelta(hours=float(HOURS.read_text()))


settings = from_environment()
set_up(settings.log_level, settings.log_format)
sys.exit(asyncio.run(run(settings, clock)))
