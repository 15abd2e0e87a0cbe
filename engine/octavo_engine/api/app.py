"""The OpenAI API on port 8000: routes, and what surrounds every one of them (keys, ids, errors, counting).

One road for every generating route: parse → refuse → prompt off the event loop → submit → pieces → bytes. Every
accepted request ends in exactly one final event, one error, or the client's own hanging up.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from octavo_engine import __version__
from octavo_engine.api import openapi, orca, sse, ui
from octavo_engine.api.access_log import AccessLog
from octavo_engine.api.answer import Answer, Piece, PromptToken, TokenChance
from octavo_engine.api.anthropic import protocol as anthropic
from octavo_engine.api.anthropic.writer import MessagesWriter, error_body
from octavo_engine.api.auth import OPEN_PATHS, Keys
from octavo_engine.api.board import Board
from octavo_engine.api.cors import Cors
from octavo_engine.api.engine_client import EngineClient, EngineGoneError, Prompt, QueueFullError, one_sequence
from octavo_engine.api.errors import (
    ApiError,
    bad_request,
    internal,
    malformed,
    overloaded,
    unauthorized,
    unavailable,
    without_folders,
)
from octavo_engine.api.metrics import CONTENT_TYPE, Metrics
from octavo_engine.api.output.parser import OutputFormat, ToolCall, joined
from octavo_engine.api.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    TokenizeRequest,
    chat_generation,
    check_conversation,
    completion_generation,
    parse_body,
    role_and_echo,
)
from octavo_engine.api.push import PUSHED, Push, chunks_of
from octavo_engine.api.responses import protocol as responses
from octavo_engine.api.responses.writer import ResponsesWriter
from octavo_engine.api.served_model import ServedModel, prompts_of
from octavo_engine.api.structured import Grammars
from octavo_engine.api.tools import check_tools, output_format
from octavo_engine.api.tracing import Asked, Tracer
from octavo_engine.api.watch import Watch
from octavo_engine.config import ServerConfig
from octavo_engine.status import Stage
from octavo_engine.structured.settings import StructuredOutputsSettings

log = logging.getLogger(__name__)

TEXT_THREADS = 4
"""Threads for templates and encoding. More than one, so that one slow template does not hold up the others."""
SMALL_BODY_BYTES = 16 * 1024
"""Bodies up to this size are parsed on the event loop: a thread would cost more than the parsing."""
FEW_IDS = 8192
"""Prompts of up to so many token ids are checked on the event loop, which takes 0.2 ms at most: for a thread's turn a
request may wait five, while the interpreter is busy."""
MAX_REQUEST_ID_CHARS = 128

REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
ROUTE: web.RequestKey[str] = web.RequestKey("route", str)
_UNSAFE = re.compile(r"[^A-Za-z0-9._:-]")

T = TypeVar("T")


@dataclass
class Api:
    """What the routes share. model is None until the engine is ready."""

    board: Board
    client: EngineClient
    metrics: Metrics
    keys: Keys
    config: ServerConfig
    tracer: Tracer | None = None
    model: ServedModel | None = None
    active: int = 0
    """Generating requests that have been accepted and not answered to their end."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
    )

    def __post_init__(self) -> None:
        self.idle.set()
        self.grammars = Grammars(StructuredOutputsSettings.of(self.config.structured_outputs_config))
        self.cors = Cors.from_config(self.config)
        self.access_log = AccessLog.from_config(self.config)
        self.routes = _Routes(self.config.root_path)
        self.watch = Watch(self.metrics, self.config.enable_log_requests, self.tracer)

    # ---- the application

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._edge], client_max_size=self.config.max_request_bytes)
        app.on_response_prepare.append(self._name_response)
        routes = _Routes(self.config.root_path)
        routes.add(
            [
                web.get("/v1/models", self.models),
                web.get("/v1/models/{model:.+}", self.model_card),
                web.post("/v1/chat/completions", self.chat_completions),
                web.post("/v1/completions", self.completions),
                web.post("/v1/responses", self.responses),
                web.get("/v1/responses/{id}", self.no_response),
                web.delete("/v1/responses/{id}", self.no_response),
                web.post("/v1/responses/{id}/cancel", self.no_response),
                web.post("/v1/messages", self.messages),
                web.post("/v1/messages/count_tokens", self.count_tokens),
                web.post("/tokenize", self.tokenize),
                web.post("/detokenize", self.detokenize),
                web.get("/health", self.health),
                web.get("/ping", self.health),
                web.post("/ping", self.health),
                web.get("/version", self.version),
                web.get("/load", self.load),
            ]
        )
        if not self.config.disable_fastapi_docs:
            routes.add([web.get("/openapi.json", self.openapi_document), web.get("/docs", self.docs)])
        if self.config.ui:
            routes.add([web.get("/", self.page), web.get("/ui/status", self.ui_status)])
        if self.config.ui and self.config.root_path:
            app.add_routes([web.get(self.config.root_path, self.page_with_slash)])
            routes.alias(self.config.root_path, "/")
        if self.config.enable_metrics:
            routes.add([web.get("/metrics", self.prometheus)])
        app.add_routes(routes.all)
        self.routes = routes
        return app

    @property
    def _edge(self) -> Middleware:
        """The outermost layer of every request."""

        @web.middleware
        async def edge(request: web.Request, handler: Handler) -> web.StreamResponse:
            began = time.monotonic()
            resource = request.match_info.route.resource
            # The matched route decides, never the path as sent: two parsers of a path have been two truths before.
            route = self.routes.name(resource.canonical) if resource is not None else "none"
            request[REQUEST_ID] = request_id(request.headers.get("X-Request-Id"))
            request[ROUTE] = route
            if request.method == "OPTIONS" and (answer := self.cors.preflight(request.headers)) is not None:
                status, headers, text = answer
                return web.Response(status=status, headers=headers, text=text)
            try:
                if route not in OPEN_PATHS and not self.keys.admits(*_credentials(request)):
                    raise unauthorized()
                response = await handler(request)
            except ApiError as error:
                response = _error_response(error, route)
            except web.HTTPException as error:
                response = _error_response(_from_http(error, request), route)
            except ConnectionError:
                raise  # the client has gone: nobody to tell
            except Exception:
                log.exception("request failed id=%s route=%s", request[REQUEST_ID], route)
                response = _error_response(internal(), route)
            if request.content.exception() is not None:
                response.force_close()  # what follows on this connection cannot be read
            seconds, sent = time.monotonic() - began, _num_bytes(response)
            self.metrics.http.add(route, request.method, response.status, seconds, request.content_length or 0, sent)
            if self.access_log is not None:
                self.access_log.add(request, request[REQUEST_ID], response.status, seconds)
            return response

        return edge

    async def _name_response(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers["Server"] = "octavo"  # and not the versions of what it is made of
        if REQUEST_ID in request:
            response.headers["X-Request-Id"] = request[REQUEST_ID]
        response.headers.update(self.cors.response(request.headers.get("Origin")))
        if (format := request.headers.get(orca.ASKS)) is not None and response.status < 400:
            response.headers.update(orca.report(format, self.board.load))

    # ---- generating

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        body = await self._parse(ChatRequest, request)
        role, echo = role_and_echo(body)

        def writer(id: str, created: int, name: str) -> sse.Writer:
            return sse.ChatWriter(f"chatcmpl-{id}", created, name, role, echo)

        return await self._chat(request, body, writer)

    async def messages(self, request: web.Request) -> web.StreamResponse:
        asked = await self._parse(anthropic.MessagesRequest, request)

        def writer(id: str, created: int, name: str) -> sse.Writer:
            return MessagesWriter(f"msg_{id}", name)

        try:
            return await self._chat(request, anthropic.chat_request(asked), writer)
        except ApiError as error:
            raise anthropic.renamed(error) from None

    async def responses(self, request: web.Request) -> web.StreamResponse:
        asked = await self._parse(responses.ResponsesRequest, request)

        def writer(id: str, created: int, name: str) -> sse.Writer:
            return ResponsesWriter(id, created, name, asked)

        try:
            return await self._chat(request, responses.chat_request(asked), writer)
        except ApiError as error:
            raise responses.renamed(error) from None

    async def no_response(self, request: web.Request) -> web.StreamResponse:
        id = request.match_info["id"][:MAX_REQUEST_ID_CHARS]
        raise ApiError(
            404, "NotFoundError", f"Response with id {id!r} not found: no response is stored here.", param="id"
        )

    async def _chat(
        self, request: web.Request, body: ChatRequest, make_writer: Callable[[str, int, str], sse.Writer]
    ) -> web.StreamResponse:
        """make_writer: from the request's id, the time and the model's name."""
        model = self._serving()
        model.check_name(body.model)
        generation = chat_generation(body, model.defaults)
        format = output_format(body, self.config)
        if format is not None and format.tools is not None and format.tools.shows_special_tokens:
            # The format's marks are special tokens: left out, there would be nothing to find calls by.
            generation = replace(generation, sampling=replace(generation.sampling, skip_special_tokens=False))
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        self._check_fan_out(1, generation.sampling.n)
        with self._accepted():
            prompt = await self._in_thread(model.chat_prompt, body)
            if format is not None and format.reasoning is not None:
                format = replace(format, begun=prompt.begun)
            writer = make_writer(self._base_id(request, generation), int(time.time()), body.model or model.name)
            return await self._generate(request, model, generation, [prompt.token_ids], writer, name, format)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        model = self._serving()
        body = await self._parse(CompletionRequest, request)
        model.check_name(body.model)
        generation = completion_generation(body, model.defaults)
        given = prompts_of(body)
        self._check_fan_out(len(given), generation.sampling.n)
        with self._accepted():
            if any(isinstance(prompt, str) for prompt in given) or sum(map(len, given)) > FEW_IDS:
                prompts = await self._in_thread(model.completion_prompts, body)
            else:
                prompts = model.completion_prompts(body)
            prefixes: list[str] = []
            if generation.echo:
                n = generation.sampling.n
                # As they were sent, unless not all of it was used.
                sent = given if body.truncate_prompt_tokens is None else prompts
                texts = [p if isinstance(p, str) else model.tokenizer.decode(p) for p in sent]
                prefixes = [text for text in texts for _ in range(n)]
            writer = sse.CompletionWriter(
                f"cmpl-{self._base_id(request, generation)}",
                int(time.time()),
                body.model or model.name,
                prefixes,
                tells_prompt=body.prompt_logprobs is not None,
            )
            return await self._generate(request, model, generation, prompts, writer, "max_tokens")

    async def _generate(
        self,
        request: web.Request,
        model: ServedModel,
        generation: Generation,
        prompts: list[list[int]],
        writer: sse.Writer,
        max_tokens_param: str,
        format: OutputFormat | None = None,
    ) -> web.StreamResponse:
        if self.config.enable_force_include_usage:
            generation = replace(generation, include_usage=True)
        sampling = model.resolved(generation.sampling)
        most = self.config.max_logprobs
        for param, count in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
            if (count or 0) > most:
                kind = "sample" if param == "logprobs" else "prompt"
                raise bad_request(
                    f"Requested {kind} logprobs of {count}, which is greater than max allowed: {most}", param
                )
        n = sampling.n
        form = sampling.structured_outputs
        grammar = await self.grammars.of(form, format, model.tokenizer, generation.form_param)
        sequences = []
        for prompt in prompts:
            max_tokens = model.max_tokens(generation.max_tokens, len(prompt), max_tokens_param)
            sequences += [Prompt(prompt, one_sequence(sampling, i, max_tokens), grammar) for i in range(n)]
        try:
            stream = self.client.submit(
                sequences,
                n=n,
                eos_token_ids=model.tokenizer.eos_token_ids,
                cache_salt=generation.cache_salt,
                priority=generation.priority,
            )
        except QueueFullError as error:
            raise overloaded(f"The server is busy: {error}. Please retry.", error.retry_after_s) from None
        except EngineGoneError:
            raise self._not_serving() from None
        answer = Answer(
            model.tokenizer,
            stream,
            sampling,
            prompts,
            format,
            prompt_only=generation.prompt_only,
            tells_ids=generation.tells_ids,
            names_ids=generation.names_ids,
        )
        answer.tells_cached = self.config.enable_prompt_tokens_details
        asked = Asked(
            id=request[REQUEST_ID],
            route=request[ROUTE],
            model=model.name,
            sampling=sampling,
            max_tokens=generation.max_tokens,
            stream=generation.stream,
            prompt_tokens=sum(map(len, prompts)),
            num_sequences=len(sequences),
            headers=request.headers,
        )
        with self.watch.over(asked, answer):
            if generation.stream:
                return await _stream(request, generation, answer, writer)
            return await _whole(answer, writer, len(sequences))

    def _check_fan_out(self, num_prompts: int, n: int) -> None:
        most = self.client.limits.most_sequences
        if num_prompts * n > most:
            raise bad_request(
                f"{num_prompts} prompts with n={n} are {num_prompts * n} sequences; at most {most} are taken at once.",
                "prompt" if num_prompts > 1 else "n",
            )

    # ---- text

    async def tokenize(self, request: web.Request) -> web.StreamResponse:
        model = self._serving()
        body = await self._parse(TokenizeRequest, request)
        model.check_name(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("Give either prompt or messages.", "prompt")
        if body.messages is not None:
            check_conversation(body)
            check_tools(body.tools)
            tokens = (await self._in_thread(model.chat_prompt, body)).token_ids
        else:
            special = True if body.add_special_tokens is None else body.add_special_tokens
            encode = functools.partial(model.text_prompt, add_special_tokens=special)
            tokens = await self._in_thread(encode, body.prompt or "")
        strings = [model.tokenizer.token(token) for token in tokens] if body.return_token_strs else None
        return web.json_response(
            {
                "count": len(tokens),
                "max_model_len": model.max_model_len,
                "tokens": tokens,
                "token_strs": strings,
            }
        )

    async def count_tokens(self, request: web.Request) -> web.StreamResponse:
        model = self._serving()
        asked = await self._parse(anthropic.CountRequest, request)
        model.check_name(asked.model)
        try:
            body = anthropic.chat_request(asked)
            check_conversation(body)
            check_tools(body.tools)
            prompt = await self._in_thread(model.chat_prompt, body)
        except ApiError as error:
            raise anthropic.renamed(error) from None
        return web.json_response({"input_tokens": len(prompt.token_ids)})

    async def detokenize(self, request: web.Request) -> web.StreamResponse:
        model = self._serving()
        body = await self._parse(DetokenizeRequest, request)
        model.check_name(body.model)
        model.check_ids(body.tokens, "tokens")
        decode = functools.partial(model.tokenizer.decode, skip_special_tokens=False)
        return web.json_response({"prompt": await self._in_thread(decode, body.tokens)})

    # ---- about the server

    async def models(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self._serving().card())

    async def model_card(self, request: web.Request) -> web.StreamResponse:
        model = self._serving()
        name = request.match_info["model"]
        model.check_name(name)
        return web.json_response(next(card for card in model.card()["data"] if card["id"] == name))

    async def health(self, request: web.Request) -> web.StreamResponse:
        if self.model is not None and self.board.stage is Stage.READY:
            return web.Response()
        statusz = self.board.statusz()
        return web.json_response(
            {
                "status": str(statusz.stage),
                "stage": str(statusz.stage),
                "percent": statusz.progress.percent,
                "eta_s": statusz.progress.eta_s,
                "message": self._not_serving().message,
            },
            status=503,
            headers={"Retry-After": str(self.board.retry_after_s())},
        )

    async def page(self, request: web.Request) -> web.StreamResponse:
        html, headers = ui.page()
        return web.Response(text=html, content_type="text/html", headers=headers)

    async def page_with_slash(self, request: web.Request) -> web.StreamResponse:
        """What the page asks for is relative to it: without the slash it would ask beside the prefix."""
        return web.Response(status=308, headers={"Location": self.config.root_path + "/"})

    async def ui_status(self, request: web.Request) -> web.StreamResponse:
        name = self.metrics.model_name if self.model is None else self.model.name
        return web.json_response(ui.status(self.board, self.metrics, name))

    async def version(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"version": __version__})

    async def load(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"server_load": self.active})

    async def openapi_document(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(await self._in_thread(openapi.document))

    async def docs(self, request: web.Request) -> web.StreamResponse:
        policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return web.Response(text=await self._in_thread(openapi.page), content_type="text/html", headers=policy)

    async def prometheus(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=await self._in_thread(self.metrics.render), headers={"Content-Type": CONTENT_TYPE})

    # ---- what routes are made of

    def _serving(self) -> ServedModel:
        """The model, when new requests are welcome. Raises ApiError: 503."""
        if self.model is None or self.board.stage is not Stage.READY:
            raise self._not_serving()
        return self.model

    def _not_serving(self) -> ApiError:
        statusz = self.board.statusz()
        retry = self.board.retry_after_s()
        if statusz.failure is not None:
            return unavailable(f"The engine has failed: {without_folders(statusz.failure.message)}", retry)
        if statusz.stage is Stage.DRAINING:
            return unavailable("The server is shutting down and takes no new requests.", retry)
        percent = f", {statusz.progress.percent:.0f}%" if statusz.progress.total_bytes else ""
        return unavailable(
            f"The model is not ready yet (stage {statusz.stage}{percent}). Retry in {retry} seconds.", retry
        )

    async def _parse(self, kind: type[Any], request: web.Request) -> Any:
        self._serving()  # before the body is read: what cannot be answered need not be sent
        if request.content_type != "application/json":
            raise malformed("Unsupported Media Type: only application/json is allowed.", "body")
        try:
            body = await request.read()
        except web.RequestPayloadError:
            raise malformed("The body is not what its headers say: it cannot be decoded.", "body") from None
        if len(body) <= SMALL_BODY_BYTES:
            return parse_body(kind, body)
        return await self._in_thread(functools.partial(parse_body, kind), body)

    async def _in_thread(self, work: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.pool, work, *args)

    def _accepted(self) -> _Accepted:
        """Raises ApiError when draining began while the body was read: what is accepted now would not be waited for."""
        self._serving()
        return _Accepted(self)

    def _base_id(self, request: web.Request, generation: Generation) -> str:
        return request_id(generation.base_id) if generation.base_id else request[REQUEST_ID]


class _Routes:
    """The routes, also under the prefix of a proxy that leaves it in the path."""

    def __init__(self, root_path: str) -> None:
        self._root = root_path
        self._names: dict[str, str] = {}
        self.all: list[web.RouteDef] = []

    def add(self, routes: Sequence[web.RouteDef]) -> None:
        for route in routes:
            for prefix in dict.fromkeys(("", self._root)):
                path = prefix + route.path
                self._names[canonical(path)] = canonical(route.path)
                self.all.append(web.RouteDef(route.method, path, route.handler, route.kwargs))

    def alias(self, path: str, name: str) -> None:
        self._names[path] = name

    def name(self, path: str) -> str:
        """A matched route's name without the prefix."""
        return self._names[path]


def canonical(path: str) -> str:
    """'/v1/models/{model:.+}' → '/v1/models/{model}': how aiohttp names a route with a pattern."""
    return re.sub(r"\{(\w+):[^}]*\}", r"{\1}", path)


class _Accepted:
    """Counts a request while it is answered, so that a drain can wait for it."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def __enter__(self) -> None:
        self._api.active += 1
        self._api.idle.clear()

    def __exit__(self, *_: object) -> None:
        self._api.active -= 1
        if self._api.active == 0:
            self._api.idle.set()


async def _whole(answer: Answer, writer: sse.Writer, num_choices: int) -> web.StreamResponse:
    texts: list[list[str]] = [[] for _ in range(num_choices)]
    tokens: list[list[TokenChance]] = [[] for _ in range(num_choices)]
    prompts: list[list[PromptToken]] = [[] for _ in range(num_choices)]
    ids: list[list[int]] = [[] for _ in range(num_choices)]
    prompt_ids: dict[int, Sequence[int]] = {}
    reasoning: list[list[str]] = [[] for _ in range(num_choices)]
    calls: list[list[ToolCall]] = [[] for _ in range(num_choices)]
    last: dict[int, Piece] = {}
    while not answer.finished:
        for piece in await answer.next():
            texts[piece.index].append(piece.text)
            tokens[piece.index] += piece.tokens
            prompts[piece.index] += piece.prompt
            ids[piece.index] += piece.token_ids or ()
            if piece.prompt_ids is not None:
                prompt_ids[piece.index] = piece.prompt_ids
            reasoning[piece.index].append(piece.reasoning)
            calls[piece.index] += piece.calls
            last[piece.index] = piece
    choices = [
        replace(
            last[i],
            text="".join(texts[i]),
            first=True,
            tokens=tokens[i],
            prompt=prompts[i],
            token_ids=ids[i] if i in prompt_ids else None,
            prompt_ids=prompt_ids.get(i),
            reasoning="".join(reasoning[i]),
            calls=joined(calls[i]),
        )
        for i in range(num_choices)
    ]
    return web.Response(body=writer.body(choices, answer.usage()), content_type="application/json")


async def _stream(
    request: web.Request, generation: Generation, answer: Answer, writer: sse.Writer
) -> web.StreamResponse:
    counts = generation.continuous_usage
    # Headers go out with the first output: until then a failure can still be told with its own status code.
    pieces = await answer.next()
    response = web.StreamResponse(headers=sse.HEADERS)
    try:
        await response.prepare(request)
    except ConnectionError:
        return response  # hung up before the first token
    push, wrote = Push(request, response, answer, writer), False
    try:
        while True:
            chunks = chunks_of(writer, answer, pieces, counts)
            if chunks:
                await response.write(chunks)
                wrote = True
            if wrote and not answer.finished and push.possible:
                await push.run(counts)
            if answer.finished:
                break
            pieces = await answer.next()
        end = writer.end(answer.usage(), include_usage=generation.include_usage)
    except ApiError as error:
        end = writer.failure(error)
    except ConnectionError:
        return response
    except Exception:
        log.exception("stream failed id=%s", request[REQUEST_ID])
        end = writer.failure(internal())
    try:
        await response.write(end)
        await response.write_eof()
    except ConnectionError:
        pass  # hung up after the last token
    return response


def request_id(given: str | None) -> str:
    """A client's own id made safe for headers and logs, or a new one."""
    safe = _UNSAFE.sub("", given or "")[:MAX_REQUEST_ID_CHARS]
    return safe or secrets.token_hex(16)


def _credentials(request: web.Request) -> list[str]:
    """What a client may have put its key into; Anthropic's clients send it bare."""
    bare = [f"Bearer {key}" for key in request.headers.getall("X-Api-Key", ())]
    return [*request.headers.getall("Authorization", ()), *bare]


def _num_bytes(response: web.StreamResponse) -> int:
    """Of the body: of a whole one before it is sent, of a stream after."""
    if isinstance(response, web.Response):
        return len(response.body) if isinstance(response.body, (bytes, bytearray)) else 0
    pushed: int = response.get(PUSHED, 0)
    return response.body_length + pushed


def _error_response(error: ApiError, route: str) -> web.Response:
    body = error_body(error) if route.startswith("/v1/messages") else error.body_bytes()
    return web.Response(status=error.status, body=body, content_type="application/json", headers=error.headers())


def _from_http(error: web.HTTPException, request: web.Request) -> ApiError:
    """aiohttp's own refusals (unknown route, wrong method, too large a body) in the OpenAI shape."""
    message = {
        404: f"There is no route {json.dumps(request.path[:200])}.",
        405: f"{request.method[:20]} is not allowed on this route.",
        413: "The request body is too large.",
    }.get(error.status, error.reason)
    return ApiError(error.status, error.reason, message)
