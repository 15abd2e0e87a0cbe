"""A step as the words that a GPU reads: ids, rows and positions of its tokens, parts, tiles, tokens that yield logits.

Decodes come first, then prompts; both may be padded to the size of a graph. Pure; used by gpu_steps.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from octavo_engine.core.step import Admission, StepItem
from octavo_engine.kernels.gpu.decode_attention import PART_WORDS, max_parts, plan_parts
from octavo_engine.kernels.gpu.prefill_attention import TILE_ROWS, TILE_WORDS, Chunk, max_tiles, plan_tiles

MIXED_CHUNKS = 8
"""Prompts that a graph with prompts may hold."""


NARROW_TOKENS = 72
"""Prompt tokens up to which a step has narrow tiles where there are wide ones, which would be half empty."""
WIDE_RATE = 1.5
"""Rows times keys of wide tiles in the time of one of narrow ones, on an H200: 1.54 in prompts of 8,192 tokens, 1.57 in
48 of 170, which are more of padding with wide tiles and take 158 us for 124."""
NARROW_KEYS = 64
"""That a narrow tile reads at a time, from blocks of the usual size; a wide one reads as many as it has tokens."""


@dataclass(frozen=True)
class Tiling:
    """How attention is cut.

    tokens: of a tile. wide: of a tile where there are many prompt tokens, None: the same. room, wide_room: parts that
    fill the chip; 0: none is split. wide_step: blocks that wide tiles read at a time. alike: decodes are tiles too,
    instead of parts (--deterministic).
    """

    tokens: int = TILE_ROWS
    wide: int | None = None
    room: int = 0
    wide_room: int = 0
    wide_step: int = 1
    alike: bool = False

    def is_wide(self, prompt_tokens: int) -> bool:
        """Whether a step of so many has wide tiles, whatever prompts they are of."""
        return self.wide is not None and prompt_tokens > NARROW_TOKENS

    def is_wide_for(self, chunks: Sequence[StepItem]) -> bool:
        """Whether a step of these has: many short prompts fill narrow ones better."""
        if self.wide is None or not self.is_wide(sum(chunk.count for chunk in chunks)):
            return False
        wide, narrow = _padded(chunks, self.wide, self.wide), _padded(chunks, self.tokens, NARROW_KEYS)
        return wide <= WIDE_RATE * narrow

    def of(self, wide: bool) -> tuple[int, int]:
        """(tokens of a tile, room) of a step."""
        return (self.wide, self.wide_room) if self.wide and wide else (self.tokens, self.room)

    def step(self, wide: bool) -> int:
        """Blocks of a part are a multiple of this."""
        return self.wide_step if wide else 1


def _padded(chunks: Sequence[StepItem], rows: int, keys: int) -> int:
    """Rows times keys of all tiles, with what they are filled up by."""
    reads = [
        -(-(chunk.start + min(at + rows, chunk.count)) // keys)
        for chunk in chunks
        for at in range(0, chunk.count, rows)
    ]
    return rows * keys * sum(reads)


@dataclass(frozen=True)
class Layout:
    """How a step is described: decodes, prompt tokens, their tiles, and tokens that yield logits, padding included.

    ends is None where each token does, which are decodes then. scored: prompts' log-probabilities are asked for, which
    need logits of tokens that yield none. wide: its tiles are.
    """

    decodes: int
    prompt_tokens: int = 0
    tiles: int = 0
    ends: int | None = None
    scored: bool = False
    wide: bool = False

    @property
    def tokens(self) -> int:
        return self.decodes + self.prompt_tokens

    @classmethod
    def of_decodes(cls, decodes: int, tiling: Tiling) -> Layout:
        return cls(decodes, tiles=decodes if tiling.alike else 0)

    @classmethod
    def of_nobody(cls, tokens: int, tiling: Tiling) -> Layout:
        """A step of padding alone, as of one prompt."""
        return cls(0, tokens, tiles=1, ends=1, wide=tiling.is_wide(tokens))

    @classmethod
    def mixed(cls, decodes: int, prompt_tokens: int, tiling: Tiling) -> Layout:
        """Eight tokens more, as padding needs one, and matrices like multiples of eight."""
        wide = tiling.is_wide(prompt_tokens + 8)
        rows, room = tiling.of(wide)
        tiles = max_tiles(prompt_tokens, MIXED_CHUNKS, rows, room) + decodes * tiling.alike
        return cls(decodes, prompt_tokens + 8, tiles, decodes + MIXED_CHUNKS, wide=wide)


def exact(items: Sequence[StepItem], tiling: Tiling) -> Layout:
    """A step without padding."""
    decodes = sum(item.count == 1 for item in items)
    sampled = sum(item.samples for item in items)
    tokens = sum(item.count for item in items)
    wide = tiling.is_wide_for([item for item in items if item.count > 1])
    rows, room = tiling.of(wide)
    tiles = sum(-(-item.count // rows) for item in items if item.count > 1 or tiling.alike)
    tiles += room * (tiles > 0)
    scored = any(item.num_scored for item in items)
    return Layout(decodes, tokens - decodes, tiles, None if sampled == tokens else sampled, scored, wide)


def pack(
    items: Sequence[StepItem], layout: Layout, admissions: Mapping[int, Admission], nobody: int,
    windows: Sequence[int | None], block_size: int, kv_heads: int, tiling: Tiling,
) -> array[int]:  # fmt: skip
    """The step's words in the order of the layout's properties. nobody: the row whose tokens are padding.

    ids are -1 where an earlier step left the id on the device.
    """
    singles = [item for item in items if item.count == 1]
    decodes = len(singles)
    ids = array("i", [_id_of(item, admissions[item.row]) for item in singles])
    rows = array("i", [item.row for item in singles])
    positions = array("i", [item.start for item in singles])
    _pad(ids, rows, positions, layout.decodes, nobody)
    last = layout.tokens - 1
    # A prompt's single token that is not its last yields nothing; steps with one are never padded.
    ends = [index for index, item in enumerate(singles) if item.samples] + [last] * (layout.decodes - decodes)
    chunks = [Chunk(i, item.row, item.start, 1) for i, item in enumerate(singles)] if tiling.alike else []
    for item in items:
        if item.count > 1:
            tokens = admissions[item.row].tokens
            chunks.append(Chunk(len(ids), item.row, item.start, item.count))
            ids.extend(tokens[item.start : item.start + item.count])
            rows.extend([item.row] * item.count)
            positions.extend(range(item.start, item.start + item.count))
            if item.samples:
                ends.append(len(ids) - 1)
    _pad(ids, rows, positions, layout.tokens, nobody)
    words = ids + rows + positions
    for window in windows if layout.decodes and not tiling.alike else ():
        parts = plan_parts(rows[: layout.decodes], positions[: layout.decodes], block_size, kv_heads, window)
        _extend(words, parts, PART_WORDS * max_parts(layout.decodes, kv_heads), 0)
    tile_rows, room = tiling.of(layout.wide)
    tiles = plan_tiles(chunks, tile_rows, block_size, room, tiling.step(layout.wide))
    _extend(words, tiles, TILE_WORDS * layout.tiles, 0)
    if layout.ends is not None:
        _extend(words, ends, layout.ends, last)
    return words


def _id_of(item: StepItem, admission: Admission) -> int:
    return admission.tokens[item.start] if item.start < len(admission.tokens) else -1


def _pad(ids: array[int], rows: array[int], positions: array[int], to: int, nobody: int) -> None:
    """Up to `to` tokens: the first one of the row that belongs to nobody."""
    missing = to - len(ids)
    ids.extend([0] * missing)
    rows.extend([nobody] * missing)
    positions.extend([0] * missing)


def _extend(words: array[int], by: Sequence[int], to: int, filler: int) -> None:
    assert len(by) <= to, (len(by), to)
    words.extend(by)
    words.extend([filler] * (to - len(by)))
