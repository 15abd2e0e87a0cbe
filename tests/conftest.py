"""For every test: processes that a test starts find this checkout's packages, whatever is installed."""

import os
from pathlib import Path

from fixtures import cluster, helm, promtool

# Not beside the tests that use them: the chart's and the operator's have one cluster so.
__all__ = ["cluster", "helm", "promtool"]

ROOT = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "engine"), str(ROOT / "operator")])
# As the engine sets it for itself, but tests import torch first: threads that spin while they wait starve each other,
# and a suite beside another busy process would take many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
