"""For every test: processes that a test starts find this checkout's packages, whatever is installed."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "engine"), str(ROOT / "operator")])
