"""Lets the tests beside it import the cluster's modules the way its own program does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
