"""Every field that vLLM 0.25.1 reads is honoured here, refused by name, or known to change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from octavo_engine.api import protocol
from octavo_engine.api.anthropic import protocol as anthropic
from octavo_engine.api.responses import protocol as responses

FIELDS: dict[str, list[str]] = json.loads((Path(__file__).parent / "vllm-0.25.1-fields.json").read_text())
"""Of vLLM's classes of requests, by their names."""
CHAT = {*protocol.ChatRequest.model_fields, *protocol._REFUSED[protocol.ChatRequest]}


@pytest.mark.parametrize(
    ("vllms", "ours", "more"),
    [
        ("ChatCompletionRequest", protocol.ChatRequest, protocol._REFUSED[protocol.ChatRequest]),
        ("CompletionRequest", protocol.CompletionRequest, protocol._REFUSED[protocol.CompletionRequest]),
        ("TokenizeChatRequest", protocol.TokenizeRequest, protocol._REFUSED[protocol.TokenizeRequest]),
        ("TokenizeCompletionRequest", protocol.TokenizeRequest, protocol._REFUSED[protocol.TokenizeRequest]),
        ("DetokenizeRequest", protocol.DetokenizeRequest, {}),
        # What these two do not know themselves, the chat request that they come to does.
        ("ResponsesRequest", responses.ResponsesRequest, {*responses._REFUSED, *CHAT}),
        ("AnthropicMessagesRequest", anthropic.MessagesRequest, {*anthropic._REFUSED, *CHAT}),
        ("AnthropicCountTokensRequest", anthropic.CountRequest, {*anthropic._REFUSED, *CHAT}),
        ("AnthropicOutputConfig", anthropic.OutputConfig, {}),
        ("AnthropicTool", anthropic.Tool, {}),
        ("AnthropicToolChoice", anthropic.ToolChoice, {}),
        ("StreamOptions", protocol.StreamOptions, {}),
    ],
)
def test_no_field_of_vllms_is_unknown(vllms: str, ours: type[BaseModel], more: Any) -> None:
    known = {*ours.model_fields, *more, *protocol._HARMLESS}

    assert [name for name in FIELDS[vllms] if name not in known] == []
