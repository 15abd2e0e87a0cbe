"""Run steps on a GPU so that planning one overlaps with computing the one before it.

A step's description is packed into one pinned buffer and copied to the device at once. Steps of decodes alone, and
those with few prompt tokens beside them, replay a CUDA graph from embedding to sampled token; others launch the same
kernels one by one. Sampled ids stay on the device, where the next step reads them, and come to the host one step later.
Called by model_runner.py.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_engine.core.messages import TokenLogprobs
from octavo_engine.core.step import Admission, Sampled, StepItem, StepPlan
from octavo_engine.kernels.gpu.adjusted import sample_adjusted
from octavo_engine.kernels.gpu.adjustments import SPECIAL_WORDS, Adjustments, mask_words, record_words
from octavo_engine.kernels.gpu.decode_attention import PART_WORDS, max_parts
from octavo_engine.kernels.gpu.logprobs import MOST, TOLD_WORDS, LogprobScratch, logprobs
from octavo_engine.kernels.gpu.prebuilt import Compilations
from octavo_engine.kernels.gpu.prefill_attention import TILE_WORDS, max_tiles
from octavo_engine.kernels.gpu.sample import SamplingScratch, SamplingState, sample
from octavo_engine.kernels.gpu.state import SAMPLING_WORDS, set_blocks, set_sampling
from octavo_engine.models.gpu_decoder import GATED_TOKENS, DeviceStep, GpuDecoder
from octavo_engine.plan import Plan
from octavo_engine.runner.chances import Scores, read_scores, start_scores
from octavo_engine.runner.layout import MIXED_CHUNKS, NARROW_TOKENS, Layout, Tiling, exact, pack
from octavo_engine.runner.records import pack_record, pack_words

RING = 3
"""Pinned buffers: one being filled and one for each step that may be under way, whose copy may not have run yet."""
GRAPH_SIZES = (
    *(1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256),
    *range(320, 1025, 64),
)
"""Decodes in a graph; a step takes the next larger one. Padding is at most a fifth of a step above 8."""
FIRST_GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
"""Captured before it is ready; the others come when nobody waits. Up to 64 decodes padding to these costs nothing, as
the products' tiles have those sizes anyway, beyond up to a fifth of a step."""

PADDING_TOKENS = (NARROW_TOKENS + 8, GATED_TOKENS)
"""Of steps that are tried before it is ready, for kernels that neither the first graphs nor the warm-up have: wide
tiles, and the gated product of more than FUSED_TOKENS, whose tile may be full or not.
"""
MIXED_DECODES = (56, 120, 248)
MIXED_TOKENS = (*range(64, 513, 64), 640, 768, 896, 960)
"""Decodes and prompt tokens of graphs for steps with both: launching such a step's 350 kernels one by one takes a host
9 ms, longer than a GPU takes for them. Beyond, the GPU takes longer.

With the eight tokens of padding the two sum up to multiples of 64, of which kernels/gpu/cublas_table.json knows the
best algorithms: elsewhere cuBLAS's own choice takes 5 % longer, at 448 tokens 38 % (H200). 8 decodes padded to 56 cost
0.2 ms of 4.2."""


LEAST_MORE_DECODES = 16
"""That a size between those of MIXED_DECODES must add to be worth its graphs, one for each of MIXED_TOKENS."""


@dataclass(frozen=True)
class Launched:
    """A step under way. host: pinned, filled when done is reached; its ids lie at `places`.

    blocks: of the request of each of them; more may come to the list. asked: how many log-probabilities each of them
    wants; told: pinned, [n, TOLD_WORDS] of those that want some.
    """

    host: Tensor
    places: Sequence[int]
    done: torch.cuda.Event
    blocks: tuple[list[int], ...]
    asked: Sequence[int | None]
    told: Tensor
    scores: list[Scores]


class GpuSteps:
    """kv_cache has one block more than the plan: padding tokens write there, in a row of state of their own."""

    depth = 1

    def __init__(
        self, decoder: GpuDecoder, plan: Plan, max_tokens: int, max_seqs: int, kv_cache: Tensor, token_ids: Tensor,
        block_tables: Tensor, compilations: Compilations,
    ) -> None:  # fmt: skip
        self._decoder, self._plan = decoder, plan
        self._kv_cache, self._token_ids, self._block_tables = kv_cache, token_ids, block_tables
        self._device = kv_cache.device
        self._max_seqs, self._max_tokens = max_seqs, max_tokens
        self._kv_heads = decoder.config.num_kv_heads
        self._tiling = tiling = Tiling(
            decoder.tile_tokens, decoder.wide_tile_tokens, decoder.tile_room, decoder.wide_tile_room,
            decoder.wide_tile_step, decoder.deterministic,
        )  # fmt: skip
        self._windows = sorted(set(decoder.config.windows), key=lambda w: (w is not None, w))
        self._state = SamplingState.allocate(max_seqs + 1, self._device)
        self._scratch = SamplingScratch.allocate(max_seqs, decoder.config.vocab_size, self._device)
        self._out = torch.zeros(max_seqs, dtype=torch.int32, device=self._device)
        self._every_token = torch.arange(max_seqs, dtype=torch.int32, device=self._device)
        block_tables[max_seqs].fill_(plan.num_blocks)

        parts = max_parts(max_seqs, self._kv_heads)
        described = 3 * max_tokens + len(self._windows) * PART_WORDS * parts
        described += TILE_WORDS * max_tiles(max_tokens, max_seqs, tiling.tokens, tiling.room) + max_seqs + 64
        updates = 3 * block_tables.numel() + SAMPLING_WORDS * max_seqs
        self._described = torch.zeros(described, dtype=torch.int32, device=self._device)
        self._updates = torch.zeros(updates, dtype=torch.int32, device=self._device)
        self._pinned = [_Pinned(described) for _ in range(RING)]
        self._pinned_updates = [_Pinned(updates) for _ in range(RING)]
        self._hosts = [torch.zeros(max_seqs, dtype=torch.int32, pin_memory=True) for _ in range(RING)]
        self._compilations = compilations
        self._launches = 0
        self._admissions: dict[int, Admission] = {}
        self._blocks_of: dict[int, list[int]] = {}
        self._broken: set[int] = set()
        """Blocks of requests that gave NaN, until they are handed out anew."""
        vocab = decoder.config.vocab_size
        self._adjustments = Adjustments.allocate(max_seqs, vocab, self._device)
        self._adjusted: set[int] = set()
        """Rows that change their logits: they are drawn again after the step's sampler."""
        self._records = [_Record(vocab) for _ in range(RING)]
        self._num_records = 0
        self._masks = torch.zeros((max_seqs, mask_words(vocab)), dtype=torch.int32, device=self._device)
        self._pinned_masks = [_Pinned(self._masks.numel()) for _ in range(RING)]
        self._special = torch.zeros((SPECIAL_WORDS + 1) * max_seqs, dtype=torch.int32, device=self._device)
        self._pinned_special = [_Pinned(self._special.numel()) for _ in range(RING)]
        self._logprob_scratch = LogprobScratch.allocate(max_seqs, vocab, self._device)
        self._told = torch.zeros((max_seqs, TOLD_WORDS), dtype=torch.int32, device=self._device)
        self._told_hosts = [
            torch.zeros((max_seqs, TOLD_WORDS), dtype=torch.int32, pin_memory=True) for _ in range(RING)
        ]
        self._graphs: dict[Layout, torch.cuda.CUDAGraph] = {}
        self._uncaptured: list[Layout] = []
        self._eager = False
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def num_compilations(self) -> int:
        return self._compilations.late

    def is_ready(self) -> None:
        """From here on requests wait for what is compiled: nothing should be left to compile."""
        self._compilations.ready = True

    # ---- steps

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        turn = self._launches % RING
        self._launches += 1
        self._update(plan, turn)
        sampled = [item for item in plan.items if item.samples]
        layout = self._graph_for(plan, sampled)
        if layout is not None:
            self._describe(turn, plan.items, layout)
            self._graphs[layout].replay()
            # Ids of decodes come first, then those of their padding, then those of prompts.
            decodes = sum(item.count == 1 for item in sampled)
            places = [*range(decodes), *range(layout.decodes, layout.decodes + len(sampled) - decodes)]
        else:
            layout = exact(plan.items, self._tiling)
            self._describe(turn, plan.items, layout)
            self._run(self._step(layout))
            places = list(range(len(sampled)))
        asked = [self._admissions[item.row].sampling.logprobs for item in sampled]
        told = self._sample_specially(turn, sampled, places, asked, layout)
        scores = start_scores(plan.items, self._admissions, self._decoder.logits_of)
        host, filled = self._hosts[turn], places[-1] + 1 if places else 0
        host[:filled].copy_(self._out[:filled], non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return Launched(host, places, done, tuple(self._blocks_of[item.row] for item in sampled), asked, told, scores)

    def is_done(self, launched: Launched) -> bool:
        return bool(launched.done.query())

    def collect(self, launched: Launched) -> Sampled:
        places = launched.places
        # Also where a step gives nothing: what it was described in is written again RING steps later.
        launched.done.synchronize()
        ids = launched.host[: places[-1] + 1].tolist() if places else []
        tokens: list[int] = [ids[place] for place in places]
        for blocks, token in zip(launched.blocks, tokens, strict=True):
            if token < 0:
                self._broken.update(blocks)
        return Sampled(tokens, _read_told(launched.asked, launched.told), read_scores(launched.scores))

    def _clean(self, item: StepItem) -> None:
        """Zero what a broken request left in this one's new blocks: attention multiplies what lies behind its end by 0.

        Not before: others share the prefix, and find it by its hash. A cached prefix, which comes first, is kept.
        """
        cached = 0 if item.admission is None else item.start // self._plan.block_size
        if found := self._broken.intersection(item.new_blocks[cached:]):
            self._broken -= found
            blocks = torch.tensor(sorted(found), device=self._device)
            self._kv_cache.view(torch.uint8).index_fill_(2, blocks, 0)  # eight-bit floats cannot be filled

    def _graph_for(self, plan: StepPlan, sampled: list[StepItem]) -> Layout | None:
        """The smallest graph that fits this step, or None."""
        items = plan.items
        decodes = sum(item.count == 1 for item in items)
        prompt_tokens = plan.num_tokens - decodes
        if sum(item.count == 1 for item in sampled) != decodes:
            return None  # a prompt's single token that is not its last
        if prompt_tokens and (len(items) - decodes > MIXED_CHUNKS or any(item.num_scored for item in items)):
            return None
        fitting = (
            layout
            for layout in self._graphs
            if layout.decodes >= decodes
            and (layout.prompt_tokens > prompt_tokens if prompt_tokens else not layout.prompt_tokens)
        )
        return min(fitting, key=lambda layout: layout.tokens, default=None)

    def _run(self, step: DeviceStep) -> None:
        logits = self._decoder.forward(step)
        tokens = self._every_token[: logits.shape[0]] if step.logit_tokens is None else step.logit_tokens
        sample(
            logits, tokens, step.rows, step.positions, self._state, self._scratch, self._token_ids,
            self._out[: logits.shape[0]],
        )  # fmt: skip

    # ---- description

    def _update(self, plan: StepPlan, turn: int) -> None:
        """Tell the device of new blocks and new rows. Most steps have neither."""
        blocks: list[int] = []
        admitted: list[int] = []
        for item in plan.items:
            row = item.row
            if (admission := item.admission) is not None:
                self._admissions[row] = admission
                self._blocks_of[row] = []
                admitted += _sampling_words(row, admission)
                self._adjusted.discard(row)
                if admission.sampling.reshapes:
                    self._adjusted.add(row)
                    self._write_record(row, admission)
            if item.new_blocks:
                if self._broken:
                    self._clean(item)
                first = len(self._blocks_of[row])
                self._blocks_of[row] += item.new_blocks
                for index, block in enumerate(item.new_blocks, first):
                    blocks += (row, index, block)
        if not blocks and not admitted:
            return
        pinned = self._pinned_updates[turn]
        pinned.write(0, blocks)
        pinned.write(len(blocks), admitted)
        total = len(blocks) + len(admitted)
        self._updates[:total].copy_(pinned.tensor[:total], non_blocking=True)
        if blocks:
            set_blocks(self._updates[: len(blocks)].view(-1, 3), self._block_tables)
        if admitted:
            set_sampling(self._updates[len(blocks) : total].view(-1, SAMPLING_WORDS), self._state)

    def _describe(self, turn: int, items: Sequence[StepItem], layout: Layout) -> None:
        """Copy the step to the device as `layout` says."""
        words = pack(
            items, layout, self._admissions, self._max_seqs, self._windows, self._plan.block_size, self._kv_heads,
            self._tiling,
        )  # fmt: skip
        pinned = self._pinned[turn]
        pinned.write(0, words)
        self._described[: len(words)].copy_(pinned.tensor[: len(words)], non_blocking=True)

    def _step(self, layout: Layout) -> DeviceStep:
        """What `_describe` copies, as views of the device's buffer."""
        ids, rows, positions = self._described[: 3 * layout.tokens].view(3, layout.tokens)
        parts, at = {}, 3 * layout.tokens
        for window in self._windows if layout.decodes and not self._tiling.alike else ():
            end = at + PART_WORDS * max_parts(layout.decodes, self._kv_heads)
            parts[window], at = self._described[at:end].view(-1, PART_WORDS), end
        end = at + TILE_WORDS * layout.tiles
        tiles, at = self._described[at:end].view(-1, TILE_WORDS) if layout.tiles else None, end
        ends = None if layout.ends is None else self._described[at : at + layout.ends]
        return DeviceStep(ids, rows, positions, layout.decodes, parts, tiles, ends, layout.scored, layout.wide)

    # ---- rows that want more than the draw of the step's sampler

    def _sample_specially(
        self, turn: int, sampled: Sequence[StepItem], places: Sequence[int], asked: Sequence[int | None], layout: Layout
    ) -> Tensor:
        """Draw again what is drawn from changed logits, and work out log-probabilities; steps without pay nothing.

        Returns the pinned words of the rows that asked for log-probabilities; filled when the step is done.
        """
        masks = [item.mask for item in sampled if item.mask is not None]
        numbers = iter(range(len(masks)))
        special: list[int] = []
        for item, place in zip(sampled, places, strict=True):
            changed = item.row in self._adjusted
            if changed or item.mask is not None:
                special += (place, -1 if item.mask is None else next(numbers), int(changed))
        telling = [place for place, count in zip(places, asked, strict=True) if count is not None]
        told = self._told_hosts[turn][: len(telling)]
        if not special and not telling:
            return told
        pinned = self._pinned_special[turn]
        pinned.write(0, special)
        pinned.write(len(special), telling)
        total = len(special) + len(telling)
        self._special[:total].copy_(pinned.tensor[:total], non_blocking=True)
        if special:
            if masks:
                self._upload(turn, masks)
            step = self._step(layout)
            sample_adjusted(
                self._decoder.logits, self._special[: len(special)].view(-1, SPECIAL_WORDS), self._masks,
                self._every_token if step.logit_tokens is None else step.logit_tokens, step.rows, step.positions,
                self._state, self._adjustments, self._scratch, self._token_ids, self._out,
            )  # fmt: skip
        if telling:
            logprobs(
                self._decoder.logits, self._special[len(special) : total], self._out,
                max(count for count in asked if count is not None), self._logprob_scratch, self._told[: len(telling)],
            )  # fmt: skip
            told.copy_(self._told[: len(telling)], non_blocking=True)
        return told

    def _upload(self, turn: int, masks: Sequence[bytes]) -> None:
        pinned = self._pinned_masks[turn].tensor
        words = self._masks.shape[1]
        for index, mask in enumerate(masks):
            ctypes.memmove(pinned.data_ptr() + 4 * index * words, mask, min(len(mask), 4 * words))
        total = len(masks) * words
        self._masks.view(-1)[:total].copy_(pinned[:total], non_blocking=True)

    def _write_record(self, row: int, admission: Admission) -> None:
        record = self._records[self._num_records % RING]
        self._num_records += 1
        record.copied.synchronize()  # waits only where more than RING of them begin at once
        record.words.write(0, pack_record(admission, self._decoder.config.vocab_size))
        pack_words(admission, record.of_ids)
        self._adjustments.records[row].copy_(record.words.tensor, non_blocking=True)
        self._adjustments.words[row].copy_(record.of_ids, non_blocking=True)
        record.copied.record()

    # ---- graphs

    def capture(self, between: Callable[[], None], eager: bool = False) -> None:
        """Capture the first graphs, the largest first, so that their pool is sized once. Calls `between` them.

        The weights need not be there yet: a graph holds their addresses. eager: compile and load the kernels only.
        """
        self._eager = eager
        sizes = {*(size for size in GRAPH_SIZES if size < self._max_seqs), min(self._max_seqs, GRAPH_SIZES[-1])}
        # Where no graph pads them, steps whose tokens fill no tile have other kernels, which all sizes bring along.
        first = {size for size in sizes if eager or size in FIRST_GRAPH_SIZES} | {max(sizes)}
        self._uncaptured = [
            *(Layout.of_decodes(size, self._tiling) for size in sorted(sizes - first)),
            *mixed_layouts(self._max_seqs, self._max_tokens, self._tiling),
        ]
        # None of the first graphs has these, and the first one who asks for them must not wait for a compiler.
        self._sample_nobody()
        if not self._tiling.alike:
            for tokens in sorted({min(most, self._max_tokens) for most in PADDING_TOKENS}):
                self._try(Layout.of_nobody(tokens, self._tiling))
        for size in sorted(first, reverse=True):
            between()
            self._capture(Layout.of_decodes(size, self._tiling))
        if eager:
            self._uncaptured = []

    def _sample_nobody(self) -> None:
        nobody = torch.full((1,), self._max_seqs, dtype=torch.int32, device=self._device)
        place, special = self._special[:1].zero_(), torch.tensor([[0, -1, 0]], dtype=torch.int32, device=self._device)
        sample_adjusted(
            self._decoder.logits, special, self._masks, self._every_token, nobody, place, self._state,
            self._adjustments, self._scratch, self._token_ids, self._out,
        )  # fmt: skip
        logprobs(self._decoder.logits, place, self._out, MOST, self._logprob_scratch, self._told[:1])

    def prepare(self) -> bool:
        """Capture one more graph, while no step is under way; whether there was one left."""
        if not self._uncaptured:
            return False
        self._compilations.ready = False  # nobody waits for what is compiled here
        self._capture(self._uncaptured.pop(0))
        self._compilations.ready = True
        return True

    @torch.inference_mode()
    def _capture(self, layout: Layout) -> None:
        step = self._try(layout)
        if self._eager:
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._run(step)
        self._graphs[layout] = graph
        torch.cuda.synchronize()

    @torch.inference_mode()
    def _try(self, layout: Layout) -> DeviceStep:
        """A step of padding alone: it compiles what is not in the cache yet, which a capture could not."""
        self._describe(0, [], layout)
        step = self._step(layout)
        self._run(step)
        torch.cuda.synchronize()
        return step


def mixed_layouts(max_seqs: int, max_tokens: int, tiling: Tiling) -> list[Layout]:
    """Of the graphs for steps with prompts: up to as many decodes as there may be beside them, or a few less."""
    most = min(max_seqs - MIXED_CHUNKS, MIXED_DECODES[-1])
    sizes = [decodes for decodes in MIXED_DECODES if decodes <= most]
    if most > 0 and (not sizes or most - sizes[-1] >= LEAST_MORE_DECODES):
        sizes.append(most)
    layouts = [Layout.mixed(decodes, tokens, tiling) for decodes in sizes for tokens in MIXED_TOKENS]
    return [layout for layout in layouts if layout.tokens <= max_tokens]


class _Pinned:
    """int32 words in page-locked memory, written from Python without a tensor operation for each piece."""

    def __init__(self, words: int) -> None:
        self.tensor = torch.zeros(words, dtype=torch.int32, pin_memory=True)
        raw = (ctypes.c_int32 * words).from_address(self.tensor.data_ptr())
        self._view = memoryview(raw).cast("B").cast("i")

    def write(self, at: int, words: list[int] | array[int]) -> None:
        self._view[at : at + len(words)] = words if isinstance(words, array) else array("i", words)


class _Record:
    """What one request's record is copied from."""

    def __init__(self, vocab: int) -> None:
        self.words = _Pinned(record_words(vocab))
        self.of_ids = torch.zeros(vocab, dtype=torch.int16, pin_memory=True)
        self.copied = torch.cuda.Event()


def _read_told(asked: Sequence[int | None], told: Tensor) -> list[TokenLogprobs | None] | None:
    """What `asked` wanted, from the words of kernels/gpu/logprobs.py; None when nobody asked."""
    if not len(told):
        return None
    rows = iter(zip(told.tolist(), told.view(torch.float32).tolist(), strict=True))
    read: list[TokenLogprobs | None] = []
    for count in asked:
        if count is None:
            read.append(None)
            continue
        words, floats = next(rows)
        likeliest = zip(words[2 : 2 + count], floats[2 + MOST : 2 + MOST + count], strict=True)
        read.append(TokenLogprobs(floats[0], words[1], list(likeliest)))
    return read


def _sampling_words(row: int, admission: Admission) -> tuple[int, ...]:
    """SAMPLING_WORDS int32 words, as kernels/gpu/state.py reads them."""
    s = admission.sampling
    seed = admission.seed & 0xFFFFFFFFFFFFFFFF
    packed = struct.pack(
        "=ififfIIi", row, s.temperature, max(s.top_k, 0), s.top_p, s.min_p, seed & 0xFFFFFFFF, seed >> 32, 0
    )
    return struct.unpack("=8i", packed)
