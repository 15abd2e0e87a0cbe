"""What a request says of tools and reasoning, checked against what the server was started with."""

from __future__ import annotations

from typing import Any

from octavo_engine.api.errors import bad_request
from octavo_engine.api.output.parser import REASONING_PARSERS, TOOL_PARSERS, OutputFormat
from octavo_engine.api.protocol import ChatRequest, NamedTool, Tool
from octavo_engine.config import ServerConfig


def output_format(request: ChatRequest, config: ServerConfig) -> OutputFormat | None:
    """How the request's answers are to be read; None: as they are. Raises ApiError."""
    reasoning = REASONING_PARSERS[config.reasoning_parser] if config.reasoning_parser else None
    calls = _wants_calls(request, config)
    if reasoning is None and not calls:
        return None
    tools, choice = request.tools or [], request.tool_choice
    demanded: tuple[str, ...] | None = None
    if isinstance(choice, NamedTool):
        demanded = (choice.function.name,)
    elif choice == "required":
        demanded = tuple(tool.function.name for tool in tools)
    return OutputFormat(
        tools=TOOL_PARSERS[config.tool_call_parser] if calls and config.tool_call_parser else None,
        schemas={tool.function.name: tool.function.parameters or {} for tool in tools},
        parallel=request.parallel_tool_calls is not False,
        reasoning=reasoning,
        include_reasoning=request.include_reasoning is not False,
        demanded=demanded,
        named=isinstance(choice, NamedTool),
        strict=frozenset(tool.function.name for tool in tools if tool.function.strict),
    )


def check_tools(tools: list[Tool] | None) -> None:
    """Raises ApiError."""
    if tools is not None and not tools:
        raise bad_request("tools must not be empty; leave it out when there are none.", "tools")


def tools_for_template(tools: list[Tool] | None) -> list[dict[str, Any]] | None:
    return [tool.model_dump(exclude_unset=True) for tool in tools] if tools else None


def _wants_calls(request: ChatRequest, config: ServerConfig) -> bool:
    """Whether the model may call tools."""
    check_tools(request.tools)
    choice = request.tool_choice
    if not request.tools:
        if choice is not None and choice != "none":
            raise bad_request("When using `tool_choice`, `tools` must be set.", "tool_choice")
        return False
    if choice == "none":
        return False
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in {tool.function.name for tool in request.tools}:
            raise bad_request(f"tool_choice: there is no tool {name[:200]!r} in tools.", "tool_choice")
    if choice is not None and choice != "auto":
        if config.tool_call_parser is None:
            raise bad_request(
                "tool_choice: required and named tools need a server with --tool-call-parser.", "tool_choice"
            )
        return True
    if not config.enable_auto_tool_choice:
        raise bad_request(
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set', "tool_choice"
        )
    return True
