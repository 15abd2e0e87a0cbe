"""Requests to measure with: random ones, ones with shared beginnings, or those of a file. Pure but for the file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from octavo_engine.config import ConfigError

DATASETS = ("random", "prefix_repetition", "sharegpt")
FIRST_ID = 100
"""Random prompts leave out the lowest ids, where tokenizers keep their special tokens."""
MIN_TOKENS, MAX_PROMPT, MAX_TOTAL = 4, 1024, 2048
"""Conversations of a ShareGPT file outside these bounds are skipped, as by the tools it is compared with."""


@dataclass(frozen=True)
class Sample:
    """One request: the prompt's ids, and how many tokens it is to be answered with."""

    prompt: list[int]
    output_len: int


@dataclass(frozen=True)
class Shape:
    """Lengths of made-up requests, in tokens. range_ratio: lengths are drawn from ±that share of the given ones.

    A prompt is prefix_len shared tokens and input_len of its own behind them, as vLLM's flags of these names say.
    """

    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.0
    prefix_len: int = 0
    num_prefixes: int = 10

    def check(self) -> None:
        """Raises ConfigError."""
        for name, value, low in (
            ("input-len", self.input_len, 1), ("output-len", self.output_len, 1), ("prefix-len", self.prefix_len, 0),
            ("num-prefixes", self.num_prefixes, 1),
        ):  # fmt: skip
            if value < low:
                raise ConfigError(f"--{name}", value, f"{low} or more")
        if not 0 <= self.range_ratio < 1:
            raise ConfigError("--range-ratio", self.range_ratio, "a share from 0 up to, not including, 1")


SHAPES = {"random": Shape(), "prefix_repetition": Shape(256, 128, prefix_len=256)}
"""What is made up where no flag says otherwise."""


def made_up(kind: str, count: int, shape: Shape, vocab_size: int, seed: int) -> list[Sample]:
    """`random`: prompts with nothing in common but prefix_len tokens; `prefix_repetition`: num_prefixes of those."""
    shape.check()
    if vocab_size <= FIRST_ID:
        raise ConfigError("--vocab-size", vocab_size, f"more than {FIRST_ID}")
    draw = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [draw.randrange(FIRST_ID, vocab_size) for _ in range(length)]

    def near(length: int) -> int:
        spread = int(length * shape.range_ratio)
        return max(draw.randint(length - spread, length + spread), 1)

    prefixes = [ids(shape.prefix_len) for _ in range(shape.num_prefixes if kind == "prefix_repetition" else 1)]
    return [
        Sample(prefixes[index % len(prefixes)] + ids(near(shape.input_len)), near(shape.output_len))
        for index in range(count)
    ]


def sharegpt(
    path: Path, count: int, encode: Callable[[str], list[int]], seed: int, output_len: int | None = None
) -> list[Sample]:
    """Up to `count` conversations of a ShareGPT file: the first turn asks, the second says how long the answer was.

    The file is a list of {"conversations": [{"value": text}, …]}. Raises ConfigError when it is not, or holds none that
    fits. output_len: of every answer, whatever the second turn says.
    """
    if output_len is not None and output_len < 1:
        raise ConfigError("--output-len", output_len, "1 or more")
    try:
        document = json.loads(path.read_text())
        turns = [[turn["value"] for turn in entry["conversations"][:2]] for entry in document]
        if not all(isinstance(text, str) for pair in turns for text in pair):
            raise TypeError("a turn's value is no text")
    except (OSError, ValueError, TypeError, KeyError) as error:
        expected = f"a ShareGPT file, a list of conversations ({type(error).__name__}: {error})"
        raise ConfigError("--dataset-path", str(path), expected) from error
    pairs = [pair for pair in turns if len(pair) == 2]
    random.Random(seed).shuffle(pairs)
    samples: list[Sample] = []
    for question, answer in pairs:
        if len(samples) == count:
            break
        prompt, length = encode(question), output_len or len(encode(answer))
        # An answer's length that was asked for is meant, however short or long.
        short = len(prompt) < MIN_TOKENS or (output_len is None and length < MIN_TOKENS)
        long = len(prompt) > MAX_PROMPT or (output_len is None and len(prompt) + length > MAX_TOTAL)
        if not short and not long:
            samples.append(Sample(prompt, length))
    if not samples:
        raise ConfigError("--dataset-path", str(path), "at least one conversation of two turns and ordinary length")
    return samples


def total_tokens(samples: Sequence[Sample]) -> tuple[int, int]:
    """(prompt tokens, output tokens)"""
    return sum(len(s.prompt) for s in samples), sum(s.output_len for s in samples)
