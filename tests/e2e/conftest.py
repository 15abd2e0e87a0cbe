"""Fixtures of the end-to-end tests: a running cluster, and the project's images on its node."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cluster"))

from fixtures import cluster, loaded_images

__all__ = ["cluster", "loaded_images"]
