"""Octavo's inference engine. Importing this package loads no torch; LLM does, when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo_engine.llm import LLM
    from octavo_engine.outputs import CompletionOutput, RequestOutput
    from octavo_engine.sampling_params import SamplingParams
    from octavo_engine.structured.params import StructuredOutputsParams

__version__ = "0.1.0"

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "StructuredOutputsParams", "__version__"]

_HOMES = {
    "LLM": "octavo_engine.llm",
    "CompletionOutput": "octavo_engine.outputs",
    "RequestOutput": "octavo_engine.outputs",
    "SamplingParams": "octavo_engine.sampling_params",
    "StructuredOutputsParams": "octavo_engine.structured.params",
}


def __getattr__(name: str) -> Any:
    """The public names, imported on first use: `import octavo_engine` stays free for the operator and the CLI."""
    if name not in _HOMES:
        raise AttributeError(f"module 'octavo_engine' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
