"""POST /v1/messages: Anthropic's request turned into the chat request that it means. Nothing is generated here."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from octavo_engine.api.errors import ApiError, bad_request
from octavo_engine.api.protocol import MAX_MESSAGES, MAX_TOOLS, ChatRequest, Strict, Whole, build

CHAT_NAMES = {
    "messages": "messages", "max_tokens": "max_tokens", "stop": "stop_sequences",
    "response_format": "output_config.format", "reasoning_effort": "output_config.effort",
}  # fmt: skip
"""Fields of the chat request under the names that this API has for them."""


class Block(Strict):
    model_config = ConfigDict(extra="allow")

    type: str


class Message(Strict):
    model_config = ConfigDict(extra="allow")

    role: Literal["user", "assistant"]
    content: str | list[Block]


class Tool(Strict):
    model_config = ConfigDict(extra="allow")

    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Strict):
    model_config = ConfigDict(extra="allow")

    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountRequest(Strict):
    """POST /v1/messages/count_tokens."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[Block] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None


class MessagesRequest(CountRequest):
    max_tokens: Whole
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: Whole | None = None
    top_p: float | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    """The older place of output_config.format."""


def chat_request(request: CountRequest) -> ChatRequest:
    """Fields that only chat completions have (seed, ignore_eos, …) are taken too. Raises ApiError."""
    extra = dict(request.model_extra or {})
    for name, why in _REFUSED.items():
        if extra.pop(name, None):
            raise bad_request(f"{name} {why}.", name)
    if extra.get("service_tier") == "standard_only":
        del extra["service_tier"]
    messages = [{"role": "system", "content": text}] if (text := _text(request.system, "system")) else []
    for index, message in enumerate(request.messages):
        messages += _converted(f"messages.{index}.content", message)
    body: dict[str, Any] = {**extra, "model": request.model, "messages": messages}
    if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        # Words put into the model's mouth: the answer goes on from them.
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    if isinstance(request, MessagesRequest):
        body |= {
            "max_tokens": request.max_tokens, "stop": request.stop_sequences, "stream": request.stream,
            "temperature": request.temperature, "top_k": request.top_k, "top_p": request.top_p,
            **_output(request),
        }  # fmt: skip
    if request.tools:
        body["tools"] = [_tool(index, tool) for index, tool in enumerate(request.tools)]
    if request.tool_choice is not None:
        body |= _choice(request.tool_choice)
    if request.thinking is not None:
        variables = extra.get("chat_template_kwargs")
        known = variables if isinstance(variables, dict) else {}
        body["chat_template_kwargs"] = {**known, "enable_thinking": _thinks(request.thinking)}
    return build(ChatRequest, body)


def renamed(error: ApiError) -> ApiError:
    """A refusal of the chat request, under the names that the client knows."""
    return error.renamed(CHAT_NAMES)


_REFUSED = {
    "mcp_servers": "are not called from here; call them yourself and pass tools",
    "container": "is not supported",
    "context_management": "is not supported",
}


def _text(content: str | list[Block] | None, where: str) -> str:
    """The text of a content that can only be text."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for index, block in enumerate(content):
        text = (block.model_extra or {}).get("text")
        if block.type != "text" or not isinstance(text, str):
            raise bad_request(
                f"{where}.{index}: blocks of type {block.type!r} are not supported here; this model reads text.",
                f"{where}.{index}",
            )
        texts.append(text)
    return "\n".join(texts)


def _converted(where: str, message: Message) -> list[dict[str, Any]]:
    """A message as chat messages: results of tools become messages of their own, in the order of the blocks."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for index, block in enumerate(message.content):
        place, fields = f"{where}.{index}", block.model_extra or {}
        match message.role, block.type:
            case _, "text":
                texts.append(_field(fields, "text", str, place))
            case "assistant", "tool_use":
                arguments = json.dumps(_field(fields, "input", dict, place), ensure_ascii=False)
                function = {"name": _field(fields, "name", str, place), "arguments": arguments}
                calls.append({"id": _field(fields, "id", str, place), "type": "function", "function": function})
            case "assistant", "thinking":
                thoughts.append(_field(fields, "thinking", str, place))
            case "user", "tool_result":
                id = _field(fields, "tool_use_id", str, place)
                results.append({"role": "tool", "tool_call_id": id, "content": _result(fields, place)})
            case _:
                raise bad_request(
                    f"{place}: blocks of type {block.type!r} are not supported in messages of the {message.role}; "
                    "this model reads text.",
                    place,
                )
    converted: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
    if thoughts:
        converted["reasoning"] = "\n".join(thoughts)
    if calls:
        converted["tool_calls"] = calls
    return results if results and not texts else [*results, converted]


def _result(fields: dict[str, Any], place: str) -> str:
    content = fields.get("content")
    if isinstance(content, list):
        blocks = [build(Block, block) for block in content if isinstance(block, dict)]
        return _text(blocks, f"{place}.content")
    if content is not None and not isinstance(content, str):
        raise bad_request(f"{place}.content must be text or a list of text blocks.", f"{place}.content")
    return content or ""


def _field(fields: dict[str, Any], name: str, kind: type[Any], place: str) -> Any:
    value = fields.get(name)
    if not isinstance(value, kind):
        word = "an object" if kind is dict else "text"
        raise bad_request(f"{place}.{name} must be {word}.", f"{place}.{name}")
    return value


def _tool(index: int, tool: Tool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise bad_request(
            f"tools.{index}: tools of type {tool.type!r} run at Anthropic and not here; only your own are supported.",
            "tools",
        )
    if tool.defer_loading:
        raise bad_request(
            f"tools.{index}: defer_loading needs the search for tools that runs at Anthropic; every tool is told here.",
            "tools",
        )
    function: dict[str, Any] = {
        "name": tool.name,
        "parameters": tool.input_schema or {"type": "object", "properties": {}},
    }
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _output(request: MessagesRequest) -> dict[str, Any]:
    config = request.output_config or OutputConfig()
    fields: dict[str, Any] = {}
    if (format := config.format or request.output_format) is not None:
        schema = {"name": "answer", "schema": format.schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if config.effort is not None:
        fields["reasoning_effort"] = config.effort
    return fields


def _choice(choice: ToolChoice) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    match choice.type:
        case "any":
            return {**fields, "tool_choice": "required"}
        case "tool":
            if not choice.name:
                raise bad_request("tool_choice.name must name the tool.", "tool_choice")
            return {**fields, "tool_choice": {"type": "function", "function": {"name": choice.name}}}
        case simple:
            return {**fields, "tool_choice": simple}


def _thinks(thinking: Thinking) -> bool:
    if thinking.type == "enabled" and (thinking.model_extra or {}).get("budget_tokens") is not None:
        raise bad_request(
            'thinking.budget_tokens is not supported yet; send {"type": "adaptive"} to think without a budget.',
            "thinking",
        )
    return thinking.type != "disabled"
