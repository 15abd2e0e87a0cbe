"""Sampling parameters: what is refused, by name; what is accepted in more than one spelling."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any

import pytest

from octavo_engine.core.channel import HEADER, decode, encode
from octavo_engine.core.messages import Submit
from octavo_engine.sampling_params import MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, SamplingError, SamplingParams

HUGE = 2**31


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("n", [0, -1, 129, 1.0, True, "1", None]),
        ("presence_penalty", [-2.1, 2.1, math.nan, math.inf, "1", None, True]),
        ("frequency_penalty", [-2.1, 2.1, math.nan, "1"]),
        ("repetition_penalty", [0, 1e-300, -1.0, 101, math.inf, math.nan, "1"]),
        ("temperature", [-0.1, 2.1, math.nan, math.inf, "hot", None, True]),
        ("top_p", [0, -0.1, 1.1, math.nan, None]),
        ("top_k", [-2, HUGE, 1.5, True, None]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("seed", [2**63, -(2**63) - 1, 1.5, "7"]),
        ("max_tokens", [0, -1, HUGE, 1.5, True, "16"]),
        ("min_tokens", [-1, HUGE, 17, 1.5]),
        ("stop", ["", ["a", ""], ["a"] * (MAX_STOP_STRINGS + 1), [1], 5, b"x"]),
        ("stop_token_ids", [[-1], [HUGE], [1.5], ["a"], [1] * (MAX_STOP_TOKEN_IDS + 1), 5, "12"]),
        ("ignore_eos", [1, "no", None]),
        ("detokenize", [0]),
        ("skip_special_tokens", ["yes"]),
        ("include_stop_str_in_output", [None]),
    ],
)
def test_a_value_outside_its_range_is_refused_with_its_name(name: str, values: list[Any]):
    for value in values:
        settings: dict[str, Any] = {name: value}
        with pytest.raises(SamplingError) as refused:
            SamplingParams(**settings)
        assert refused.value.param == name
        assert str(refused.value).startswith(f"{name} must be ")


def test_spellings_of_bad_words_are_bounded_together():
    with pytest.raises(SamplingError, match="at most 4096 tokens in all spellings") as refused:
        SamplingParams(bad_words=("a",), bad_words_ids=((5,) * 4000, (6,) * 97))

    assert refused.value.param == "bad_words"


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"n": 2, "temperature": 0.0}, "n"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stop": ["a"], "detokenize": False}, "detokenize"),
    ],
)
def test_values_that_contradict_each_other_are_refused(settings: dict[str, Any], param: str):
    with pytest.raises(SamplingError) as refused:
        SamplingParams(**settings)

    assert refused.value.param == param


@pytest.mark.parametrize(
    "settings",
    [
        {"n": 1}, {"n": 128}, {"temperature": 0}, {"temperature": 2}, {"top_p": 1}, {"top_p": 1e-6}, {"min_p": 0},
        {"min_p": 1}, {"top_k": 0}, {"top_k": -1}, {"top_k": 1}, {"seed": -(2**63)}, {"seed": 2**63 - 1},
        {"max_tokens": None, "min_tokens": 1000}, {"max_tokens": 1}, {"presence_penalty": -2},
        {"frequency_penalty": 2}, {"repetition_penalty": 0.01}, {"repetition_penalty": 100},
        {"stop": ["x"] * MAX_STOP_STRINGS},
    ],
)  # fmt: skip
def test_the_ends_of_each_range_belong_to_it(settings: dict[str, Any]):
    assert SamplingParams(**settings)


@pytest.mark.parametrize(
    ("given", "kept"),
    [(None, ()), ([], ()), ("end", ("end",)), (["a", "b"], ("a", "b")), (("a",), ("a",))],
)
def test_stop_strings_may_be_one_many_or_none(given: Any, kept: tuple[str, ...]):
    assert SamplingParams(stop=given).stop == kept


def test_lists_become_tuples_so_that_the_value_can_be_shared():
    params = SamplingParams(stop_token_ids=[1, 2])  # type: ignore[arg-type]

    assert params.stop_token_ids == (1, 2)
    assert hash(params) == hash(dataclasses.replace(params))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(("given", "kept"), [(-1, None), (None, None), (0, 0), (-2, -2)])
def test_a_seed_of_minus_one_is_none_as_in_vllm(given: int | None, kept: int | None):
    assert SamplingParams(seed=given).seed == kept


@pytest.mark.parametrize(("given", "kept"), [(0.0, 0.0), (1e-9, 0.01), (0.01, 0.01), (0.5, 0.5)])
def test_a_tiny_temperature_is_raised_to_what_logits_can_be_divided_by(given: float, kept: float):
    params = SamplingParams(temperature=given)

    assert params.temperature == kept
    assert params.greedy == (given == 0)


def test_what_type_checkers_are_shown_names_every_field_in_order():
    tree = ast.parse(Path(inspect.getfile(SamplingParams)).read_text())
    (shown,) = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__"
        and any(argument.arg == "temperature" for argument in node.args.args)
    ]  # fmt: skip

    assert [argument.arg for argument in shown.args.args[1:]] == [f.name for f in dataclasses.fields(SamplingParams)]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"logits_processors": [print]}, "no code"), ({"best_of": 3}, "choose"),
        ({"thinking_token_budget": 5}, "not have"), ({"thinking_token_budget": 0}, "not have"),
        ({"guided_decoding": {"json": {}}}, "structured_outputs"), ({"extra_args": {"a": 1}}, "extra_args"),
        ({"skip_reading_prefix_cache": True}, "cache_salt"), ({"truncate_prompt_tokens": 5}, "last token ids"),
        ({"flat_logprobs": True}, "lists"), ({"repetition_detection": {"min_count": 3}}, "not have"),
        ({"logprob_token_ids": [1]}, "not have"),
    ],
)  # fmt: skip
def test_what_vllm_has_and_this_version_does_not_is_refused_with_the_reason(given: dict[str, Any], why: str):
    with pytest.raises(SamplingError, match=why):
        SamplingParams(**given)


def test_what_vllm_has_may_be_given_where_it_asks_for_nothing():
    params = SamplingParams(
        extra_args={}, logits_processors=[], best_of=1, flat_logprobs=False, spaces_between_special_tokens=False,  # type: ignore[arg-type]
        skip_reading_prefix_cache=False, thinking_token_budget=None, skip_clone=True,
    )  # fmt: skip

    assert params.extra_args is None
    assert hash(params) == hash(params.clone())
    assert decode(*_frame(params)).sampling == params  # type: ignore[union-attr]


def _frame(params: SamplingParams) -> tuple[int, bytes]:
    frame = encode(Submit("a", [1], params))
    return HEADER.unpack_from(frame)[1], frame[HEADER.size :]


def test_none_of_what_is_optional_is_the_default_and_none_of_max_tokens_is_a_value():
    assert SamplingParams.from_optional(n=None, temperature=0.5, max_tokens=None) == SamplingParams(
        temperature=0.5, max_tokens=None
    )


def test_a_copy_with_known_values_is_equal_to_one_that_was_checked_and_leaves_its_origin_as_it_was():
    origin = SamplingParams(temperature=0.5, stop=["a"], logit_bias={3: 1.0}, seed=7, max_tokens=20)

    copy = origin.with_known(seed=8, max_tokens=5)

    assert copy == dataclasses.replace(origin, seed=8, max_tokens=5)
    assert hash(copy) == hash(dataclasses.replace(origin, seed=8, max_tokens=5))
    assert (origin.seed, origin.max_tokens) == (7, 20)
