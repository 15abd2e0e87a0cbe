"""torch, imported in two thirds of its time.

A third of `import torch` goes into `torch._meta_registrations`: shapes without numbers (device "meta"), which nothing
but its compiler and its exporter asks for. 2.11.0, processor seconds: 3.5 -> 2.4. Start-up waits for it. For the
engine's own process alone, as whoever calls `LLM` may use all of torch; pyproject.toml names one version of it.
"""

from __future__ import annotations

import sys
from types import ModuleType

LEFT_OUT = "torch._meta_registrations"


def import_torch() -> None:
    """Whoever needs what is left out imports it as ever: `import torch._meta_registrations`."""
    if "torch" in sys.modules:
        return
    sys.modules[LEFT_OUT] = ModuleType(LEFT_OUT)
    try:
        import torch
    finally:
        del sys.modules[LEFT_OUT]
    del torch._meta_registrations
