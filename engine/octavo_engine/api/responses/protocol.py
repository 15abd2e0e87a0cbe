"""POST /v1/responses: OpenAI's newer request turned into the chat request that it means. Nothing is kept between two
requests, so what refers to an earlier response is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from octavo_engine.api.errors import ApiError, bad_request
from octavo_engine.api.protocol import MAX_MESSAGES, ChatRequest, Strict, Whole, build

CHAT_NAMES = {
    "messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}  # fmt: skip
"""Fields of the chat request under the names that this API has for them."""


class Reasoning(Strict):
    """summary: what OpenAI shows of a thinking that it hides. generate_summary: the same, by its earlier name."""

    model_config = ConfigDict(extra="allow")

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class TextSettings(Strict):
    model_config = ConfigDict(extra="allow")

    format: dict[str, Any] | None = None


class ResponsesRequest(Strict):
    model_config = ConfigDict(extra="allow")

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Whole | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextSettings | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None


def chat_request(request: ResponsesRequest) -> ChatRequest:
    """Fields that only chat completions have (seed, top_k, …) are taken too. Raises ApiError."""
    extra = dict(request.model_extra or {})
    for name, (harmless, why) in _REFUSED.items():
        if not harmless(extra.pop(name, None)):
            raise bad_request(f"{name} {why}.", name)
    include = request.include or []
    if unknown := [one for one in include if one not in _INCLUDED]:
        raise bad_request(f"include: {unknown[0][:100]!r} is not supported.", "include")
    wants_logprobs = _LOGPROBS in include
    if request.top_logprobs and not wants_logprobs:
        raise bad_request(f"top_logprobs needs include: [{_LOGPROBS!r}].", "top_logprobs")
    messages = _messages(request)
    body: dict[str, Any] = {
        **extra, "model": request.model, "messages": messages, "max_completion_tokens": request.max_output_tokens,
        "temperature": request.temperature, "top_p": request.top_p, "stream": request.stream,
        "parallel_tool_calls": request.parallel_tool_calls, "logprobs": wants_logprobs or None,
        "top_logprobs": request.top_logprobs if wants_logprobs else None,
    }  # fmt: skip
    if request.stream_options is not None:
        # Obfuscation hides lengths from who listens to the network; a switch to leave it off asks for nothing here.
        options = {name: value for name, value in request.stream_options.items() if name != "include_obfuscation"}
        body["stream_options"] = options or None
    if request.reasoning is not None:
        _check_summary(request.reasoning)
        if request.reasoning.effort is not None:
            body["reasoning_effort"] = request.reasoning.effort
    if request.text is not None and request.text.format is not None:
        body["response_format"] = _format(request.text.format)
    if request.tools:
        body["tools"] = [_tool(index, tool) for index, tool in enumerate(request.tools)]
    choice = request.tool_choice
    if isinstance(choice, dict):
        if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
            raise bad_request('tool_choice must be a word or {"type": "function", "name": …}.', "tool_choice")
        choice = {"type": "function", "function": {"name": choice["name"]}}
    if choice is not None and (request.tools or choice != "auto"):
        body["tool_choice"] = choice
    return build(ChatRequest, body)


def summary_of(request: ResponsesRequest) -> str | None:
    """How much of a summary of the thinking is asked for."""
    reasoning = request.reasoning
    return (reasoning.summary or reasoning.generate_summary) if reasoning is not None else None


def _check_summary(reasoning: Reasoning) -> None:
    """Nothing is hidden here, so the summary is the thinking itself; a shorter one nobody makes."""
    for name in ("summary", "generate_summary"):
        if (value := getattr(reasoning, name)) not in (None, "auto", "detailed"):
            raise bad_request(
                f"reasoning.{name} must be 'auto' or 'detailed', got {value[:50]!r}: the thinking is its own "
                "summary, and no shorter one is made.",
                f"reasoning.{name}",
            )


def renamed(error: ApiError) -> ApiError:
    """A refusal of the chat request, under the names that the client knows."""
    return error.renamed(CHAT_NAMES)


_LOGPROBS = "message.output_text.logprobs"
_INCLUDED = frozenset({_LOGPROBS, "reasoning.encrypted_content"})
"""The second asks for what a stateless client sends back; here reasoning is sent as it is."""


def _only(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "previous_response_id": (_only(None), "needs stored responses, and none are stored; send the whole conversation"),
    "conversation": (_only(None), "needs stored conversations, and none are stored; send the whole conversation"),
    "background": (_only(None, False), "is not supported; stream instead"),
    "prompt": (_only(None), "names a stored template, and none are stored"),
    "truncation": (_only(None, "disabled"), "other than disabled is not supported"),
    "max_tool_calls": (_only(None), "counts calls of built-in tools, and there are none"),
    "context_management": (_only(None, []), "is not supported"),
    "previous_input_messages": (_only(None), "is not supported; send the whole conversation as input"),
    "enable_response_messages": (_only(None, False), "is not supported"),
    "store": (_only(None, True, False), "must be true or false"),
}
"""What may be left unsaid, and why the rest is refused. store is OpenAI's default, so true is no mistake; the answer
says that it was not stored."""


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    thoughts = ""
    for index, item in enumerate(request.input):
        where = f"input.{index}"
        kind = item.get("type", "message")
        if kind == "reasoning":
            part = "content" if item.get("content") else "summary"  # clients that show summaries send nothing else back
            thoughts += _text(item.get(part) or [], f"{where}.{part}")
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = _text(item.get("output"), f"{where}.output")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        elif kind == "message":
            role = "system" if item.get("role") == "developer" else item.get("role")
            if role not in ("system", "user", "assistant"):
                got = str(role)[:50]
                raise bad_request(
                    f"{where}.role must be system, developer, user or assistant, got {got!r}.",
                    f"{where}.role",
                )
            messages.append({"role": role, "content": _text(item.get("content"), f"{where}.content")})
        else:
            raise bad_request(f"{where}: items of type {str(kind)[:50]!r} are not supported.", f"{where}.type")
        if thoughts and messages and messages[-1]["role"] == "assistant" and kind != "reasoning":
            messages[-1]["reasoning"], thoughts = thoughts, ""
    if not messages:
        raise bad_request("input has no message.", "input")
    return messages


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{where} must be text or a list of text parts.", where)
    texts = []
    for part in content:
        part = part if isinstance(part, dict) else {}
        kind = str(part.get("type"))[:50]
        text = part.get("refusal" if kind == "refusal" else "text")
        if kind not in _TEXTS or not isinstance(text, str):
            raise bad_request(f"{where}: parts of type {kind!r} are not supported; this model reads text.", where)
        texts.append(text)
    return "\n".join(texts)


_TEXTS = frozenset({"input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"})


def _tool(index: int, tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise bad_request(
            f"tools.{index}: tools of type {str(tool.get('type'))[:50]!r} run at OpenAI and not here; only functions "
            "are supported.",
            "tools",
        )
    function = {name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None}
    if tool.get("strict"):
        function["strict"] = tool["strict"]
    return {"type": "function", "function": function}


def _format(format: dict[str, Any]) -> dict[str, Any]:
    if format.get("type") != "json_schema":
        return format
    inner = {name: value for name, value in format.items() if name != "type"}
    return {"type": "json_schema", "json_schema": inner}
