"""Octavo's inference engine. Importing this package loads no torch; LLM does, when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo_engine.async_llm import AsyncLLM
    from octavo_engine.beam_search import BeamSearchParams
    from octavo_engine.llm import LLM
    from octavo_engine.outputs import CompletionOutput, RequestOutput
    from octavo_engine.sampling_params import RequestOutputKind, SamplingParams
    from octavo_engine.structured.params import StructuredOutputsParams

__version__ = "0.1.0"

__all__ = [
    "LLM", "AsyncLLM", "BeamSearchParams", "CompletionOutput", "RequestOutput", "RequestOutputKind", "SamplingParams",
    "StructuredOutputsParams", "__version__",
]  # fmt: skip

_HOMES = {
    "LLM": "octavo_engine.llm",
    "AsyncLLM": "octavo_engine.async_llm",
    "BeamSearchParams": "octavo_engine.beam_search",
    "CompletionOutput": "octavo_engine.outputs",
    "RequestOutput": "octavo_engine.outputs",
    "RequestOutputKind": "octavo_engine.sampling_params",
    "SamplingParams": "octavo_engine.sampling_params",
    "StructuredOutputsParams": "octavo_engine.structured.params",
}


def __getattr__(name: str) -> Any:
    """The public names, imported on first use: `import octavo_engine` stays free for the operator and the CLI."""
    if name not in _HOMES:
        raise AttributeError(f"module 'octavo_engine' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
