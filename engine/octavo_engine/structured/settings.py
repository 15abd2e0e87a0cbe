"""What --structured-outputs-config says, in vLLM's names. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from octavo_engine.structured.params import StructuredOutputsParams

BACKENDS = ("auto", "xgrammar", "guidance", "outlines", "lm-format-enforcer")
_MOOT = {"backend": BACKENDS, "disable_fallback": (True, False)}
"""llguidance makes all of it, and nothing falls back on anything else: the answers' form is the same."""


@dataclass(frozen=True)
class StructuredOutputsSettings:
    """Defaults of requests that do not say otherwise. enable_in_reasoning: the grammar holds for the thinking too."""

    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    enable_in_reasoning: bool = False

    @classmethod
    def of(cls, document: str | Mapping[str, Any] | None) -> StructuredOutputsSettings:
        """Raises ValueError."""
        given = json.loads(document) if isinstance(document, str) else document or {}
        if not isinstance(given, Mapping):
            raise ValueError("must be a JSON object")
        values = {}
        for name, value in given.items():
            if name in cls.__dataclass_fields__:
                if not isinstance(value, bool):
                    raise ValueError(f"{name} must be true or false")
                values[name] = value
            elif name in _MOOT:
                if value not in _MOOT[name]:
                    raise ValueError(f"{name} must be one of {', '.join(map(str, _MOOT[name]))}")
            elif name == "reasoning_parser" and value in ("", None):
                pass
            elif name == "reasoning_parser":
                raise ValueError("reasoning_parser is set with --reasoning-parser")
            else:
                raise ValueError(f"there is no {name!r}; known are {', '.join([*cls.__dataclass_fields__, *_MOOT])}")
        return cls(**values)

    def applied(self, params: StructuredOutputsParams) -> StructuredOutputsParams:
        return replace(
            params,
            disable_any_whitespace=params.disable_any_whitespace or self.disable_any_whitespace,
            disable_additional_properties=params.disable_additional_properties or self.disable_additional_properties,
        )
