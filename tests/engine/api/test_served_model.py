"""Prompts on their way to the engine: what the model has no room or no embedding for is refused here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from octavo_engine.api.chat_template import ChatTemplate
from octavo_engine.api.errors import ApiError
from octavo_engine.api.protocol import ChatRequest, CompletionRequest
from octavo_engine.api.served_model import ServedModel
from octavo_engine.api.tokenizer import GenerationDefaults, Tokenizer

END = "<|end|>"  # id 256, which a model of 256 tokens does not have


@pytest.fixture
def served(model_folder: Path, tmp_path: Path) -> ServedModel:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"vocab_size": 256}))
    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate.load(folder, tokenizer.special_tokens)
    return ServedModel(("m",), "m", tokenizer, template, GenerationDefaults(), max_model_len=64, created=0)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [("ab", [[64, 65]]), (["a", "b"], [[64], [65]]), ([1, 255], [[1, 255]]), ([[1], [2]], [[1], [2]])],
)
def test_every_form_of_a_prompt_becomes_ids(served: ServedModel, prompt: Any, ids: list[list[int]]) -> None:
    assert served.completion_prompts(CompletionRequest(prompt=prompt)) == ids


@pytest.mark.parametrize("prompt", [f"say {END}", [5, 256], ["fine", END], [[1], [256]]])
def test_a_token_without_an_embedding_is_refused_wherever_it_comes_from(served: ServedModel, prompt: Any) -> None:
    """As text it went through to the engine, whose look-up it ended, and with it everybody's requests."""
    with pytest.raises(ApiError) as refused:
        served.completion_prompts(CompletionRequest(prompt=prompt))

    assert (refused.value.status, refused.value.param) == (400, "prompt")
    assert refused.value.message == "Token id 256 is out of vocabulary: ids are 0 to 255."


def test_such_a_token_in_a_message_is_the_messages_fault(served: ServedModel) -> None:
    with pytest.raises(ApiError) as refused:
        served.chat_prompt(ChatRequest.model_validate({"messages": [{"role": "user", "content": END}]}))

    assert (refused.value.status, refused.value.param) == (400, "messages")


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["a", ""], None])
def test_an_empty_prompt_is_refused(served: ServedModel, prompt: Any) -> None:
    with pytest.raises(ApiError, match="non-empty"):
        served.completion_prompts(CompletionRequest(prompt=prompt))


@pytest.mark.parametrize(("length", "fits"), [(63, True), (64, False), (100_000, False)])
def test_a_prompt_must_leave_room_for_one_token(served: ServedModel, length: int, fits: bool) -> None:
    request = CompletionRequest(prompt="a" * length)
    if fits:
        assert len(served.completion_prompts(request)[0]) == length
        return
    with pytest.raises(ApiError, match="maximum context length is 64 tokens"):
        served.completion_prompts(request)


@pytest.mark.parametrize(
    ("asked", "prompt_tokens", "given"), [(None, 10, 54), (5, 10, 5), (60, 10, 54), (64, 1, 63), (1, 63, 1)]
)
def test_an_answer_gets_what_was_asked_for_within_the_room(
    served: ServedModel, asked: int | None, prompt_tokens: int, given: int
) -> None:
    assert served.max_tokens(asked, prompt_tokens, "max_tokens") == given


def test_more_than_the_context_is_refused_under_the_name_it_was_asked_by(served: ServedModel) -> None:
    with pytest.raises(ApiError, match="max_completion_tokens=65 cannot be greater than max_model_len=64") as refused:
        served.max_tokens(65, 1, "max_completion_tokens")

    assert refused.value.param == "max_completion_tokens"
