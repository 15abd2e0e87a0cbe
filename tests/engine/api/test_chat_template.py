"""Chat templates: what transformers makes of the same messages, and nothing that a template should not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo_engine.api.chat_template import ChatTemplate, TemplateRefusedError
from octavo_engine.api.tokenizer import Tokenizer
from octavo_engine.status import FailureCode, FatalError

HELLO = [{"role": "user", "content": "Hello"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 < 2 & 'x'? <b>ü 漢 \U0001f600</b>"},
    {"role": "assistant", "content": "True.  "},
    {"role": "user", "content": ""},
]
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"


def render(source: str, messages: list[dict[str, Any]] = HELLO, **settings: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(messages, **settings)


@pytest.fixture(scope="module")
def theirs(smollm2_tokenizer: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(smollm2_tokenizer))


@pytest.mark.parametrize("messages", [HELLO, TALK, TALK[1:], TALK[:3]])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_real_template_gives_the_tokens_of_transformers(
    theirs: Any, smollm2_tokenizer: Path, messages: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    tokenizer = Tokenizer.load(smollm2_tokenizer)
    template = ChatTemplate.load(smollm2_tokenizer, tokenizer.special_tokens)
    assert template is not None
    text = template.render(messages, add_generation_prompt=add_generation_prompt)

    expected = theirs.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    assert text == expected
    ids = theirs(expected, add_special_tokens=False).input_ids
    assert tokenizer.encode(text, add_special_tokens=False) == ids


def test_a_final_message_is_continued_where_it_ends(theirs: Any, smollm2_tokenizer: Path) -> None:
    tokenizer = Tokenizer.load(smollm2_tokenizer)
    template = ChatTemplate.load(smollm2_tokenizer, tokenizer.special_tokens)
    assert template is not None
    messages = [*HELLO, {"role": "assistant", "content": "My name is"}]

    text = template.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text == theirs.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    assert text.endswith("My name is")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (PLAIN, "[user]Hello[a]"),
        ("{{ bos_token }}{{ eos_token }}", "<s></s>"),
        ("{{ messages | tojson }}", json.dumps(HELLO)),
        ("{{ {'a': '<ü>'} | tojson }}", '{"a": "<ü>"}'),  # not escaped for HTML
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{% for m in messages %}{% break %}{% endfor %}y", "y"),
        ("a\n  {% if true %}\n  b\n  {% endif %}\n", "a\n  b\n"),
        ("{% if tools %}tools{% else %}none{% endif %}", "none"),
    ],
)
def test_templates_have_what_transformers_gives_them(source: str, expected: str) -> None:
    assert render(source) == expected


def test_variables_of_the_request_reach_the_template_and_hide_nothing() -> None:
    assert render("{{ enable_thinking }}", variables={"enable_thinking": False}) == "False"
    assert render(PLAIN, variables={"messages": [], "add_generation_prompt": False}) == "[user]Hello[a]"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception('no') }}",
        "{{ unknown.field }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + none }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_what_a_template_may_not_do_or_trips_over_is_a_refusal_of_the_messages(source: str) -> None:
    messages = [dict(HELLO[0])]
    with pytest.raises(TemplateRefusedError, match="chat template"):
        render(source, messages)

    assert messages == HELLO


@pytest.mark.parametrize(
    ("source", "final"),
    [
        (PLAIN, {"role": "assistant", "content": None}),
        (PLAIN, {"role": "assistant"}),
        ("{{ messages[0].content }}", {"role": "assistant", "content": "x"}),
    ],
)
def test_a_final_message_that_cannot_be_continued_is_refused(source: str, final: dict[str, Any]) -> None:
    with pytest.raises(TemplateRefusedError, match="continue_final_message"):
        render(source, [*HELLO, final], continue_final_message=True)


def test_a_template_that_trims_is_continued_without_the_blank_that_it_took() -> None:
    source = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"

    assert render(source, [{"role": "assistant", "content": "so "}], continue_final_message=True) == "[so"


def test_a_template_is_looked_for_where_transformers_looks(tmp_path: Path) -> None:
    def load() -> str | None:
        template = ChatTemplate.load(tmp_path, {})
        return None if template is None else template.render(HELLO)

    assert load() is None
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]})
    )
    assert load() == "d"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "in settings"}))
    assert load() == "in settings"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "in json"}))
    assert load() == "in json"
    (tmp_path / "chat_template.jinja").write_text("in jinja")
    assert load() == "in jinja"


def test_a_template_that_is_not_jinja_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(FatalError) as refused:
        ChatTemplate.load(tmp_path, {})
    assert refused.value.failure.code is FailureCode.MODEL_INVALID
    with pytest.raises(FatalError) as refused:
        ChatTemplate.load(tmp_path, {}, override=tmp_path / "chat_template.jinja")

    assert refused.value.failure.code is FailureCode.INVALID_CONFIG
    assert "is not valid Jinja" in refused.value.failure.message
