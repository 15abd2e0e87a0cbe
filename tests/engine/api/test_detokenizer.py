"""The pieces of a streamed answer are the text that decoding everything at once gives."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tokenizers

from octavo_engine.api.detokenizer import ByteLevelDecoder, StopMatcher, TextStream, WindowDecoder, make_decoder
from octavo_engine.api.tokenizer import Tokenizer
from octavo_engine.sampling_params import SamplingParams

TEXT = "Grüße, 你好! 👩‍👩‍👧‍👦 naïve  café\n\tمرحبا 𝔘𝔫𝔦 the end."


def byte_level_tokenizer() -> Tokenizer:
    """GPT-2's scheme without merges: one token per byte, the worst case for characters, plus added tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(["<|end|>", "<|start|>"])
    core.add_tokens(["<tool>", "ünïcode", "two words"])
    return wrap(core)


def byte_fallback_tokenizer() -> Tokenizer:
    """Llama 2's scheme: ▁ for blanks, <0xNN> for bytes without a token."""
    vocab: dict[str, int] = {"<unk>": 0, "</s>": 1}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for character in "▁abcdefghijklmnopqrstuvwxyzéGTN.,!":
        vocab[character] = len(vocab)
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    core.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    core.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens(["</s>"])
    return wrap(core)


def wrap(core: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(core, vocab_size=core.get_vocab_size(), eos_token_ids=(), special_tokens={})


def chunked(rng: random.Random, ids: list[int]) -> list[list[int]]:
    chunks = []
    while ids:
        size = rng.choice((1, 1, 1, 2, 3, 8))
        chunks.append(ids[:size])
        ids = ids[size:]
    return chunks


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_random_byte_level_tokens_decode_as_in_one_shot(seed: int, skip_special_tokens: bool) -> None:
    rng = random.Random(seed)
    tokenizer = byte_level_tokenizer()
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 120))]

    decoder = make_decoder(tokenizer, skip_special_tokens=skip_special_tokens)
    text = "".join(decoder.push(chunk) for chunk in chunked(rng, ids)) + decoder.finish()

    assert isinstance(decoder, ByteLevelDecoder)
    assert text == tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
@pytest.mark.parametrize("seed", range(20))
def test_text_in_many_scripts_comes_back_whole_and_never_with_a_replacement_character(make, seed: int) -> None:
    rng = random.Random(seed)
    tokenizer = make()
    ids = tokenizer.encode(TEXT)

    decoder = make_decoder(tokenizer, skip_special_tokens=True)
    pieces = [decoder.push(chunk) for chunk in chunked(rng, ids)]

    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + decoder.finish() == TEXT


def test_a_byte_fallback_tokenizer_uses_the_window() -> None:
    assert isinstance(make_decoder(byte_fallback_tokenizer(), skip_special_tokens=True), WindowDecoder)


def test_an_incomplete_character_shows_only_at_the_end() -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer.encode("a€")[:-1]

    decoder = make_decoder(tokenizer, skip_special_tokens=True)

    assert decoder.push(ids) == "a"
    assert decoder.finish() == "\ufffd"


def test_the_window_does_not_grow_with_invalid_bytes_or_skipped_tokens() -> None:
    tokenizer = byte_fallback_tokenizer()
    bad, end = tokenizer.core.token_to_id("<0xFF>"), tokenizer.core.token_to_id("</s>")
    decoder = WindowDecoder(tokenizer, skip_special_tokens=True)

    text = "".join(decoder.push((token,)) for token in [bad] * 100 + [end] * 100) + decoder.finish()

    assert text == "\ufffd" * 100
    assert len(decoder._context) + len(decoder._pending) < 50


def test_ids_outside_the_vocabulary_have_no_text() -> None:
    decoder = make_decoder(byte_level_tokenizer(), skip_special_tokens=True)

    assert decoder.push([10**6]) == ""


def stream_text(text: str, seed: int, **sampling: object) -> tuple[str, str | None, int]:
    """The streamed text, the stop string found and the tokens counted, with tokens arriving in random groups."""
    tokenizer = byte_level_tokenizer()
    stream = TextStream(tokenizer, SamplingParams(**sampling))  # type: ignore[arg-type]
    out, count = "", 0
    chunks = chunked(random.Random(seed), tokenizer.encode(text))
    for index, chunk in enumerate(chunks):
        delta = stream.push(chunk, last=index == len(chunks) - 1)
        out, count = out + delta.text, count + delta.num_tokens
        if delta.stop is not None:
            return out, delta.stop, count
    return out, None, count


STOP_CASES = [
    # text, stops, text that comes out, the stop found
    ("hello world", ["wor"], "hello ", "wor"),
    ("hello world", ["xyz"], "hello world", None),
    ("hello wor", ["world"], "hello wor", None),
    ("aaab", ["aab"], "a", "aab"),
    ("abcabd", ["abd"], "abc", "abd"),
    ("abcd", ["bcd", "bc"], "a", "bc"),  # the one that ends first
    ("abcd", ["c", "abc"], "", "abc"),  # both end together: the longest
    ("你好€uro", ["€"], "你好", "€"),
    ("<<end>>", ["<end>"], "<", "<end>"),
    ("no stop\n\nhere", ["\n\n"], "no stop", "\n\n"),
    ("x", ["x"], "", "x"),
]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("text", "stops", "expected", "stop"), STOP_CASES)
def test_stop_strings_end_the_text_wherever_tokens_and_chunks_are_cut(text, stops, expected, stop, seed) -> None:
    assert stream_text(text, seed, stop=stops)[:2] == (expected, stop)


@pytest.mark.parametrize("seed", range(6))
def test_the_number_of_tokens_up_to_a_stop_string_does_not_depend_on_how_they_arrive(seed: int) -> None:
    assert stream_text("abcdef", seed, stop=["cd"])[2] == 4


@pytest.mark.parametrize("seed", range(6))
def test_the_stop_string_is_part_of_the_text_when_asked_for(seed: int) -> None:
    assert stream_text("one END two", seed, stop=["END"], include_stop_str_in_output=True)[0] == "one END"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("min_tokens", "expected"), [(0, "a"), (1, "a"), (2, "aXb"), (4, "aXbXc"), (6, "aXbXcX"), (5, "aXbXc")]
)
def test_stop_strings_are_not_looked_for_before_min_tokens(min_tokens: int, expected: str, seed: int) -> None:
    assert stream_text("aXbXcX", seed, stop=["X"], min_tokens=min_tokens, max_tokens=9)[0] == expected


def test_a_stop_string_that_begins_before_min_tokens_and_ends_after_counts() -> None:
    assert stream_text("abEND", 0, stop=["END"], min_tokens=3, max_tokens=9)[:2] == ("ab", "END")


def test_text_is_held_back_only_while_it_can_become_a_stop_string() -> None:
    matcher = StopMatcher(["END"])

    assert matcher.push("xE") == ("x", None)
    assert matcher.push("N") == ("", None)
    assert matcher.push("E") == ("EN", None)
    assert matcher.push("ND") == ("", "END")


@pytest.mark.parametrize("seed", range(60))
def test_random_texts_and_stops_agree_with_looking_at_the_whole_text(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("ab€") for _ in range(30))
    stops = ["".join(rng.choice("ab€") for _ in range(rng.randrange(2, 6))) for _ in range(3)]

    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    expected = (text[: min(ends)[1]], min(ends)[2]) if ends else (text, None)

    assert stream_text(text, seed, stop=stops)[:2] == expected


def test_the_text_of_the_token_that_ended_the_output_is_left_out() -> None:
    tokenizer = byte_level_tokenizer()
    tool = tokenizer.core.token_to_id("<tool>")

    left_out = TextStream(tokenizer, SamplingParams()).push([0, tool], last=True, stop_token_id=tool)
    kept = TextStream(tokenizer, SamplingParams(include_stop_str_in_output=True)).push(
        [0, tool], last=True, stop_token_id=tool
    )

    assert left_out.text == "!"
    assert left_out.num_tokens == 2
    assert kept.text == "!<tool>"


def test_a_real_tokenizer_decodes_random_ids_as_in_one_shot(smollm2_tokenizer: Path) -> None:
    tokenizer = Tokenizer.load(smollm2_tokenizer)
    rng = random.Random(7)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(40)]
        for skip in (True, False):
            decoder = make_decoder(tokenizer, skip_special_tokens=skip)
            text = "".join(decoder.push(chunk) for chunk in chunked(rng, list(ids))) + decoder.finish()
            assert text == tokenizer.decode(ids, skip_special_tokens=skip)
