"""Fields whose effect only the real engine can show, over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
LONG = "The lighthouse keeper wrote down the weather, the ships and the birds of every day. " * 8


@pytest.fixture(scope="module")
def real(start_real: Any) -> Any:
    # float32: in 16 bits what runs beside a request rounds its logits another way, and a draw may fall elsewhere.
    flags = (
        "--dtype=float32",
        "--kv-cache-memory-bytes=128M",
        "--max-num-seqs=8",
        "--block-size=16",
        "--enable-prompt-tokens-details",
    )
    return start_real(*flags, ready=False).wait_ready(60)


async def ask(http: Any, server: Any, path: str = TEXT, **body: Any) -> Any:
    async with http.post(server.url + path, json=body) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


async def test_only_requests_with_the_same_salt_share_the_cache(real, http) -> None:
    async def cached(salt: str | None) -> int:
        body = await ask(http, real, prompt=LONG, max_tokens=1, cache_salt=salt)
        return int(body["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert await cached(None) == 0
    assert await cached(None) > 100
    assert await cached("mine") == 0
    assert await cached("mine") > 100
    assert await cached("yours") == 0


async def test_a_seed_repeats_an_answer_and_its_n_answers_differ(real, http) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 1.2, "seed": 7, "n": 3}
    first, second = await ask(http, real, **body), await ask(http, real, **body)
    other = await ask(http, real, **{**body, "seed": 100})  # the answers of one request have seeds 7, 8 and 9

    def texts(answer: Any) -> list[str]:
        return [choice["text"] for choice in answer["choices"]]

    assert texts(first) == texts(second)
    assert len(set(texts(first))) == 3
    assert not set(texts(first)) & set(texts(other))


async def test_min_tokens_ignore_eos_and_stop_ids_decide_where_an_answer_ends(real, http) -> None:
    chat = {"messages": [{"role": "user", "content": "Say only: Hi"}], "temperature": 0, "path": CHAT}
    plain = await ask(http, real, **chat, max_tokens=60)
    longer = await ask(http, real, **chat, max_tokens=60, ignore_eos=True)
    (ids,) = [choice["token_ids"] for choice in (await ask(http, real, **chat, return_token_ids=True))["choices"]]
    stopped = await ask(http, real, **chat, stop_token_ids=[ids[1]], return_token_ids=True)
    later = await ask(http, real, **chat, stop_token_ids=[ids[1]], min_tokens=3, max_tokens=60)

    assert plain["choices"][0]["finish_reason"] == "stop"
    assert longer["usage"]["completion_tokens"] == 60
    assert stopped["choices"][0]["stop_reason"] == ids[1]
    assert stopped["choices"][0]["token_ids"] == ids[:2]
    assert later["usage"]["completion_tokens"] >= 3


@pytest.mark.parametrize("stream", [False, True])
async def test_a_character_of_several_tokens_arrives_whole_and_can_stop_the_answer(real, http, stream) -> None:
    # Said again word by word: the tokenizer spells most of these characters in two to four tokens.
    text = "漢字 😀 naïve"
    (ids,) = [(await ask(http, real, "/tokenize", prompt=text, add_special_tokens=False))["tokens"]]
    bias = {"prompt": "x", "temperature": 0, "max_tokens": len(ids), "ignore_eos": True}
    said = ""
    for count, token in enumerate(ids):  # force one token after the other
        body = await ask(
            http, real, prompt=[1, *ids[:count]], max_tokens=1, allowed_token_ids=[token], return_token_ids=True
        )
        assert body["choices"][0]["token_ids"] == [token]
        said += body["choices"][0]["text"]
    assert "�" in said  # one by one they are pieces of characters …

    echoed = await ask(http, real, **{**bias, "prompt": ids, "max_tokens": 1}, echo=True)
    assert echoed["choices"][0]["text"].startswith(text)  # … and together they are not
    allowed = {"allowed_token_ids": sorted(set(ids)), "logit_bias": {str(token): 50 for token in ids[:3]}}
    sampled = {"prompt": text, "max_tokens": 40, "seed": 1, "ignore_eos": True, "stop": ["漢"], **allowed}
    if stream:
        async with http.post(real.url + TEXT, json={**sampled, "stream": True}) as answer:
            events = [e[6:] for e in (await answer.text()).split("\n\n") if e.startswith("data: {")]
        choices = [json.loads(event)["choices"][0] for event in events]
        text, end = "".join(choice["text"] for choice in choices), choices[-1]
    else:
        (end,) = (await ask(http, real, **sampled))["choices"]
        text = end["text"]
    assert "漢" not in text
    assert (end["finish_reason"], end["stop_reason"]) == ("stop", "漢")


async def test_what_the_model_says_of_itself_holds_for_requests_that_say_nothing(
    start_real, smollm2_tokenizer: Path, tmp_path: Path, http
) -> None:
    """generation_config.json: greedy, three tokens; a request's own words go before it."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"):
        (folder / name).symlink_to(smollm2_tokenizer / name)
    own = {"eos_token_id": 2, "temperature": 0.0, "max_new_tokens": 3}
    (folder / "generation_config.json").write_text(json.dumps(own))
    server = start_real(f"--model={folder}", "--kv-cache-memory-bytes=64M", ready=False).wait_ready(60)

    plain = [await ask(http, server, prompt="Once upon a time", ignore_eos=True) for _ in range(2)]
    hot = [await ask(http, server, prompt="Once upon a time", temperature=1.5, seed=seed) for seed in (1, 2, 3)]

    assert plain[0]["choices"][0]["text"] == plain[1]["choices"][0]["text"]
    assert plain[0]["usage"]["completion_tokens"] == 3
    assert len({answer["choices"][0]["text"] for answer in hot}) > 1
