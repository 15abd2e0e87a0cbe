"""GET /openapi.json and /docs: what the routes take, from the same models that parse their bodies."""

from __future__ import annotations

import functools
import html
import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from octavo_engine import __version__
from octavo_engine.api.anthropic.protocol import CountRequest, MessagesRequest
from octavo_engine.api.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from octavo_engine.api.responses.protocol import ResponsesRequest


@dataclass(frozen=True)
class Route:
    """body: what it takes, or None. open: needs no key even where others do."""

    method: str
    path: str
    summary: str
    body: type[BaseModel] | None = None
    streams: bool = False
    open: bool = False


ROUTES = (
    Route("GET", "/v1/models", "The served model under each of its names."),
    Route("GET", "/v1/models/{model}", "One of them."),
    Route("POST", "/v1/chat/completions", "Answer a conversation (OpenAI).", ChatRequest, streams=True),
    Route("POST", "/v1/completions", "Continue a text (OpenAI).", CompletionRequest, streams=True),
    Route("POST", "/v1/responses", "Answer a conversation (OpenAI, stateless).", ResponsesRequest, streams=True),
    Route("POST", "/v1/messages", "Answer a conversation (Anthropic).", MessagesRequest, streams=True),
    Route("POST", "/v1/messages/count_tokens", "The size of a conversation in tokens (Anthropic).", CountRequest),
    Route("POST", "/tokenize", "Text or a conversation to token ids.", TokenizeRequest),
    Route("POST", "/detokenize", "Token ids to text.", DetokenizeRequest),
    Route("GET", "/health", "200 when ready, else 503 with stage and percent.", open=True),
    Route("GET", "/ping", "As /health.", open=True),
    Route("POST", "/ping", "As /health.", open=True),
    Route("GET", "/version", "The server's version.", open=True),
    Route("GET", "/load", "How many requests are being answered."),
    Route("GET", "/metrics", "Prometheus metrics.", open=True),
    Route("GET", "/openapi.json", "This description as OpenAPI 3.1."),
    Route("GET", "/docs", "This description as a page."),
)


@functools.cache
def document() -> dict[str, Any]:
    kinds = [route.body for route in ROUTES if route.body is not None]
    _, definitions = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Octavo", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**definitions.get("$defs", {}), "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


@functools.cache
def page() -> str:
    """One page of plain HTML: no scripts and nothing from elsewhere."""
    rows = "".join(_section(route) for route in ROUTES)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Octavo {html.escape(__version__)} API</title><style>{_STYLE}</style>"
        f'<h1>Octavo {html.escape(__version__)}</h1><p>The same as <a href="openapi.json">OpenAPI 3.1</a>. '
        f"Fields that are not listed are accepted and named in the debug log.</p>{rows}</html>"
    )


_STYLE = (
    ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;"
    "padding:0 1rem}code{font-size:.95em}td{padding:.1rem 1rem .1rem 0;vertical-align:top}summary{cursor:pointer}"
)
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "integer"},
            },
        }
    },
}


def _operation(route: Route) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {}}
    if route.streams:
        content["text/event-stream"] = {}
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.method.lower()}{route.path.replace('/', '_').replace('{', '').replace('}', '')}",
        "responses": {"200": {"description": "OK", "content": content}, "default": {"description": "Error", **error}},
    }
    if route.open:
        operation["security"] = []
    if "{model}" in route.path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if route.body is not None:
        schema = {"$ref": f"#/components/schemas/{_name_of(route.body)}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


@functools.cache
def _names() -> dict[type[BaseModel], str]:
    kinds = [route.body for route in ROUTES if route.body is not None]
    named, _ = models_json_schema([(kind, "validation") for kind in kinds], ref_template="{model}")
    return {kind: named[kind, "validation"]["$ref"] for kind in kinds}


def _name_of(kind: type[BaseModel]) -> str:
    return _names()[kind]


def _section(route: Route) -> str:
    head = f"<code>{route.method} {html.escape(route.path)}</code> {html.escape(route.summary)}"
    if route.body is None:
        return f"<p>{head}</p>"
    schema = route.body.model_json_schema()
    required = set(schema.get("required", ()))
    rows = "".join(
        f"<tr><td><code>{html.escape(name)}</code>{' *' if name in required else ''}</td>"
        f"<td>{html.escape(_type_of(field))}</td></tr>"
        for name, field in schema["properties"].items()
    )
    return f"<details><summary>{head}</summary><table>{rows}</table><p>* required</p></details>"


def _type_of(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " | ".join(_type_of(one) for one in field["anyOf"] if one.get("type") != "null")
    if "enum" in field:
        return " | ".join(json.dumps(value) for value in field["enum"])
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if field.get("type") == "array":
        return f"list of {_type_of(field.get('items', {}))}"
    return str(field.get("type", "any"))
