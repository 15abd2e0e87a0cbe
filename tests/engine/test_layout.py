"""What a GPU is told of a step: the same whether it is padded to a graph or not."""

from __future__ import annotations

import random

import pytest

from octavo_engine.core.step import Admission, StepItem
from octavo_engine.kernels.gpu.decode_attention import PART_WORDS, max_parts
from octavo_engine.kernels.gpu.prefill_attention import TILE_WORDS
from octavo_engine.runner.gpu_steps import mixed_layouts
from octavo_engine.runner.layout import Layout, Tiling, exact, pack
from octavo_engine.sampling_params import SamplingParams

NOBODY, BLOCK_SIZE, KV_HEADS = 99, 64, 8
USUAL = Tiling()


def read(words: list[int], layout: Layout, windows: list[int | None], tiling: Tiling) -> dict[str, list]:
    """The words again as what they mean, without the padding."""
    n = layout.tokens
    ids, rows, positions = words[:n], words[n : 2 * n], words[2 * n : 3 * n]
    at = 3 * n
    found: dict[str, list] = {"parts": []}
    for _ in windows if layout.decodes and not tiling.alike else ():
        end = at + PART_WORDS * max_parts(layout.decodes, KV_HEADS)
        parts = [tuple(words[i : i + PART_WORDS]) for i in range(at, end, PART_WORDS)]
        found["parts"].append(sorted((p[1], p[2], p[3], p[4]) for p in parts if p[4] and p[1] != NOBODY))
        at = end
    tiles = {tuple(words[i : i + 4]) for i in range(at, at + TILE_WORDS * layout.tiles, TILE_WORDS)}
    found["tiles"] = sorted((row, position, count) for token, count, row, position in tiles if count)
    assert all(rows[token] == row and positions[token] == position for token, n, row, position in tiles if n)
    at += TILE_WORDS * layout.tiles
    ends = list(range(n)) if layout.ends is None else words[at : at + layout.ends]
    found["ends"] = [(rows[end], positions[end]) for end in ends if rows[end] != NOBODY]
    found["tokens"] = [(r, p, i) for r, p, i in zip(rows, positions, ids, strict=True) if r != NOBODY]
    assert len(words) == at + (layout.ends or 0)
    return found


def make_step(rng: random.Random, decodes: int, chunks: int, most: int) -> tuple[list[StepItem], dict[int, Admission]]:
    items, admissions = [], {}
    for row in range(decodes + chunks):
        start = rng.randrange(500)
        count = 1 if row < decodes else rng.randrange(2, most)
        samples = row < decodes or rng.random() < 0.5
        known = rng.randrange(start) if row < decodes and start else start + count
        items.append(StepItem(row, start, count, [], samples))
        admissions[row] = Admission([7 * t + row for t in range(known)], known, SamplingParams(), (), 0)
    return items, admissions


@pytest.mark.parametrize("tiling", [USUAL, Tiling(21, alike=True), Tiling(64, wide=128, room=33)])
@pytest.mark.parametrize("windows", [[None], [None, 100]])
def test_a_padded_step_says_what_the_exact_one_says(windows, tiling):
    rng = random.Random(3)
    for _ in range(60):
        decodes, chunks = rng.randrange(9), rng.randrange(9)
        items, admissions = make_step(rng, decodes, chunks, 24)
        if not items:
            continue
        plain = exact(items, tiling)
        padded = Layout.mixed(8, 192, tiling) if chunks else Layout.of_decodes(8, tiling)

        first, second = (
            read(
                list(pack(items, layout, admissions, NOBODY, windows, BLOCK_SIZE, KV_HEADS, tiling)),
                layout,
                windows,
                tiling,
            )
            for layout in (plain, padded)
        )

        if decodes:
            assert second == first
        else:
            assert {**second, "parts": None} == {**first, "parts": None}
        if tiling.alike:  # every token lies in one tile, of at most so many
            assert sum(count for _, _, count in first["tiles"]) == len(first["tokens"])
            assert max(count for _, _, count in first["tiles"]) <= 21
        assert first["ends"] == [(i.row, i.start + i.count - 1) for i in items if i.samples]
        assert [t[0] for t in first["tokens"]] == [item.row for item in items for _ in range(item.count)]


def test_a_single_token_that_is_not_a_prompts_last_yields_nothing():
    items = [StepItem(0, 5, 1, [], True), StepItem(1, 3, 1, [], False), *(StepItem(r, 0, 9, [], True) for r in (2, 3))]
    admissions = {row: Admission(list(range(9)), 9, SamplingParams(), (), 0) for row in range(4)}
    layout = exact(items, USUAL)

    words = pack(items, layout, admissions, NOBODY, [None], BLOCK_SIZE, KV_HEADS, USUAL)

    assert read(list(words), layout, [None], USUAL)["ends"] == [(0, 5), (2, 8), (3, 8)]


def test_many_prompt_tokens_have_wide_tiles_and_few_tiles_are_split():
    tiling = Tiling(64, wide=128, room=8, wide_room=4, wide_step=2)
    items = {count: [StepItem(0, 16_000, count, [], True)] for count in (2, 72, 73, 256, 264)}
    admissions = {0: Admission([7] * 16_300, 16_300, SamplingParams(), (), 0)}
    tiles = {}
    for count, of_step in items.items():
        layout = exact(of_step, tiling)
        words = pack(of_step, layout, admissions, NOBODY, [None], BLOCK_SIZE, KV_HEADS, tiling)
        at = 3 * layout.tokens
        tiles[count] = [tuple(words[i : i + TILE_WORDS]) for i in range(at, at + TILE_WORDS * layout.tiles, TILE_WORDS)]

    assert [tile[1] for tile in tiles[2]] == [2] * 8 + [0]
    assert {tile[7] for tile in tiles[2][:8]} == {8}
    assert [(tile[1], tile[7]) for tile in tiles[72] if tile[1]] == [(8, 4)] * 4 + [(64, 4)] * 4
    assert [(tile[1], tile[7]) for tile in tiles[73] if tile[1]] == [(73, 4)] * 4
    assert [(tile[1], tile[7]) for tile in tiles[256] if tile[1]] == [(128, 2)] * 4
    assert [(tile[1], tile[7]) for tile in tiles[264] if tile[1]] == [(8, 1), (128, 1), (128, 1)]
    assert all(tile[4] % 2 == 0 for count in (73, 256) for tile in tiles[count])


def test_many_short_prompts_have_narrow_tiles_which_they_fill_better():
    tiling = Tiling(64, wide=128, room=8, wide_room=4, wide_step=2)

    def of(*counts: int, start: int = 0) -> Layout:
        return exact([StepItem(row, start, count, [], True) for row, count in enumerate(counts)], tiling)

    assert not of(*[170] * 48).wide
    assert of(*[170] * 48).tiles == 48 * 3 + 8
    assert of(*[2048] * 4).wide
    assert of(*[256] * 32).wide, "they fill both"
    assert of(*[170] * 10, 4096).wide, "the long one has nearly all of the work"
    assert of(*[170] * 48, start=8000).wide, "half of a wide tile is empty, but it is quicker by more"
    assert Layout.mixed(8, 192, tiling).wide, "of a graph, whatever prompts it will hold"
    assert not of(*[30] * 2).wide


def test_an_id_that_is_on_the_device_only_is_left_to_it():
    items = [StepItem(0, 5, 1, [], True), StepItem(1, 2, 1, [], True)]
    admissions = {row: Admission([10, 11, 12], 3, SamplingParams(), (), 0) for row in range(2)}

    words = pack(items, exact(items, USUAL), admissions, NOBODY, [None], BLOCK_SIZE, KV_HEADS, USUAL)

    assert list(words[:2]) == [-1, 12]


@pytest.mark.parametrize("num_scored", [0, 3])
def test_a_step_says_whether_prompts_are_scored(num_scored):
    items = [StepItem(0, 5, 1, [], True), StepItem(1, 0, 4, [], True, num_scored=num_scored)]

    assert exact(items, USUAL).scored == (num_scored > 0)


@pytest.mark.parametrize(
    ("max_seqs", "decodes"),
    [
        (8, set()), (9, {1}), (32, {24}), (63, {55}), (64, {56}), (79, {56}), (100, {56, 92}), (128, {56, 120}),
        (200, {56, 120, 192}), (256, {56, 120, 248}), (1024, {56, 120, 248}),
    ],
)  # fmt: skip
def test_graphs_with_prompts_have_room_for_eight_of_them_and_for_most_decodes_beside(max_seqs, decodes):
    layouts = mixed_layouts(max_seqs, 600, USUAL)

    assert {layout.decodes for layout in layouts} == decodes
    assert all(layout.tokens <= 600 and layout.ends <= max_seqs for layout in layouts)
