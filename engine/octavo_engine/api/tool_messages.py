"""Tools in a conversation's messages: calls that the assistant made, and what came of them. Used by protocol.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from octavo_engine.api.errors import bad_request

MAX_CALLS = 1024


def check_message_tools(index: int, role: str, has_no_content: bool, extra: Mapping[str, Any]) -> None:
    """extra: the message's fields beside role and content. Raises ApiError."""
    where = f"messages.{index}"
    if extra.get("function_call"):
        raise bad_request(
            f"{where}.function_call is the older form, which is not supported; use tool_calls.",
            f"{where}.function_call",
        )
    if role == "tool" and has_no_content:
        raise bad_request(f"{where}.content: a tool's message needs what the tool answered.", f"{where}.content")
    for name in ("reasoning", "reasoning_content"):
        if extra.get(name) is not None and not isinstance(extra[name], str):
            raise bad_request(f"{where}.{name} must be text.", f"{where}.{name}")
    calls = extra.get("tool_calls")
    if calls is None:
        return
    where += ".tool_calls"
    if not isinstance(calls, list) or len(calls) > MAX_CALLS:
        raise bad_request(f"{where} must be a list of at most {MAX_CALLS} calls.", where)
    if calls and role != "assistant":
        raise bad_request(f"{where}: only the assistant's messages have tool calls.", where)
    for number, call in enumerate(calls):
        _check_call(f"{where}.{number}", call)


def calls_for_template(message: dict[str, Any]) -> None:
    """Make a checked message what templates expect: arguments as objects, and both names of the reasoning."""
    calls = message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _arguments(call["function"].get("arguments"))}}
            for call in calls
        ]
        if message.get("content") is None:
            message["content"] = ""
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    if reasoning:
        message["reasoning"] = message["reasoning_content"] = reasoning


def _check_call(where: str, call: object) -> None:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or call.get("type", "function") != "function" or not isinstance(function, dict):
        raise bad_request(f'{where} must be {{"id": …, "type": "function", "function": {{…}}}}.', where)
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise bad_request(f"{where}.function.name must be a function's name.", f"{where}.function.name")
    try:
        arguments = _arguments(function.get("arguments"))
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise bad_request(
            f"{where}.function.arguments must be a JSON object, written as text.", f"{where}.function.arguments"
        )


def _arguments(value: object) -> object:
    # Clients leave the text empty for a function without parameters.
    if value is None or value == "":
        return {}
    return json.loads(value) if isinstance(value, str) else value
