"""One request of our own before the first of anybody's: --verify-prompt. Called by server.py once the engine is loaded.

The warm-up shows that numbers are finite; this shows that the model answers as it should and as fast as it should, on
this device, by the same road that requests take. A new revision that does not is never Ready, so that a rollout keeps
the pods before it.
"""

from __future__ import annotations

import asyncio
import logging
import time

from octavo_engine.api.engine_client import EngineClient, EngineGoneError, Prompt
from octavo_engine.api.errors import ApiError
from octavo_engine.api.protocol import ChatRequest, CompletionRequest
from octavo_engine.api.served_model import ServedModel
from octavo_engine.config import ServerConfig
from octavo_engine.core.messages import FinishReason
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.status import Failure, FailureCode, FatalError

log = logging.getLogger("octavo")

SHOWN = 200
"""Characters of an answer in a message."""


async def verify(client: EngineClient, model: ServedModel, config: ServerConfig) -> None:
    """Raises FatalError where the answer is not as it should be. Nothing is asked without a --verify-prompt."""
    if config.verify_prompt is None:
        return
    prompt = await asyncio.to_thread(_prompt, model, config.verify_prompt)
    started = time.monotonic()
    token_ids = await _generate(client, model, prompt, config.verify_max_tokens)
    seconds = time.monotonic() - started
    text, speed = model.tokenizer.decode(token_ids), len(token_ids) / seconds
    if (failure := judge(config, text, len(token_ids), speed)) is not None:
        raise FatalError(failure)
    log.info("verified answer=%r tokens=%d tokens_per_s=%.1f", text[:SHOWN], len(token_ids), speed)


def judge(config: ServerConfig, text: str, num_tokens: int, tokens_per_s: float) -> Failure | None:
    """What is wrong with the answer to --verify-prompt; None when nothing is."""
    if not num_tokens:
        return _failure("The model answered --verify-prompt with nothing.", "ask it something that it answers")
    if config.verify_expect is not None and config.verify_expect not in text:
        return _failure(
            f"The answer to --verify-prompt lacks {config.verify_expect!r}: {text[:SHOWN]!r}.",
            "check model and revision; or correct --verify-expect, or give the answer more room by --verify-max-tokens",
        )
    if config.verify_min_tokens_per_s is not None and tokens_per_s < config.verify_min_tokens_per_s:
        return _failure(
            f"The answer to --verify-prompt came at {tokens_per_s:.1f} tokens a second, expected "
            f"{config.verify_min_tokens_per_s:g} or more.",
            "see what else uses this device, or lower --verify-min-tokens-per-s",
        )
    return None


def _failure(message: str, fix: str) -> Failure:
    return Failure(FailureCode.SELF_TEST_FAILED, message, fix)


def _prompt(model: ServedModel, text: str) -> list[int]:
    """As a client would ask: a user's message where the model has a chat template, else a text to be gone on with."""
    try:
        if model.template is None:
            return model.completion_prompts(CompletionRequest(model=model.name, prompt=text))[0]
        messages = [{"role": "user", "content": text}]
        return model.chat_prompt(ChatRequest.model_validate({"model": model.name, "messages": messages})).token_ids
    except ApiError as error:
        failure = _failure(f"--verify-prompt cannot be asked: {error}", "correct it, or leave it out")
        raise FatalError(failure) from error


async def _generate(client: EngineClient, model: ServedModel, prompt: list[int], max_tokens: int) -> list[int]:
    room = min(max_tokens, model.max_model_len - len(prompt))
    sampling = SamplingParams(temperature=0.0, max_tokens=room)
    try:
        eos = model.tokenizer.eos_token_ids
        stream = client.submit([Prompt(prompt, sampling)], n=1, eos_token_ids=eos, cache_salt=None)
    except EngineGoneError:
        await asyncio.Event().wait()  # what it died of is the cause, and it is being told already
        raise
    token_ids: list[int] = []
    try:
        while not stream.finished:
            for output in await stream.next():
                token_ids += output.token_ids
                if output.finish_reason is FinishReason.ERROR:
                    raise FatalError(
                        _failure(f"The generation for --verify-prompt failed: {output.error}", "see the engine's log")
                    )
    finally:
        stream.close()
    return token_ids
