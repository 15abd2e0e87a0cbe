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

from octavo_engine.core.step import Admission, Sampled, StepItem, StepPlan
from octavo_engine.kernels import sampling
from octavo_engine.kernels.gpu.apply_mask import apply_mask, sample_masked, upload
from octavo_engine.kernels.gpu.decode_attention import PART_WORDS, max_parts
from octavo_engine.kernels.gpu.invariant_attention import tile_tokens
from octavo_engine.kernels.gpu.prebuilt import Compilations
from octavo_engine.kernels.gpu.prefill_attention import max_tiles
from octavo_engine.kernels.gpu.sample import SamplingScratch, SamplingState, sample
from octavo_engine.kernels.gpu.state import SAMPLING_WORDS, set_blocks, set_sampling
from octavo_engine.kernels.sampling import SampleRow
from octavo_engine.models.config import DecoderConfig
from octavo_engine.models.gpu_decoder import DeviceStep, GpuDecoder
from octavo_engine.plan import Plan
from octavo_engine.runner.chances import (
    Chances,
    Scores,
    read_logprobs,
    read_scores,
    start_logprobs,
    start_scores,
)
from octavo_engine.runner.layout import MIXED_CHUNKS, Layout, Tiling, exact, pack

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


MIXED_DECODES = (8, 32, 64, 128, 256)
MIXED_TOKENS = (*range(64, 513, 64), 640, 768, 1024)
"""Decodes and prompt tokens of graphs for steps with both: launching such a step's 350 kernels one by one takes a host
9 ms, longer than a GPU takes for them. Beyond, the GPU takes longer."""


@dataclass(frozen=True)
class Launched:
    """A step under way. host: pinned, filled when done is reached; its ids lie at `places`."""

    host: Tensor
    places: Sequence[int]
    done: torch.cuda.Event
    rows: tuple[int, ...]
    chances: list[Chances]
    scores: list[Scores]


class GpuSteps:
    """kv_cache has one block more than the plan: padding tokens write there, in a row of state of their own."""

    depth = 1

    def __init__(
        self, decoder: GpuDecoder, plan: Plan, max_tokens: int, max_seqs: int, kv_cache: Tensor, token_ids: Tensor,
        block_tables: Tensor, compilations: Compilations, tiling: Tiling,
    ) -> None:  # fmt: skip
        """tiling: one that the decoder's attention takes (`tiling_of`)."""
        self._decoder, self._plan = decoder, plan
        self._kv_cache, self._token_ids, self._block_tables = kv_cache, token_ids, block_tables
        self._device = kv_cache.device
        self._max_seqs, self._max_tokens = max_seqs, max_tokens
        self._kv_heads = decoder.config.num_kv_heads
        self._tiling = tiling
        self._windows = sorted(set(decoder.config.windows), key=lambda w: (w is not None, w))
        self._state = SamplingState.allocate(max_seqs + 1, self._device)
        self._scratch = SamplingScratch.allocate(max_seqs, decoder.config.vocab_size, self._device)
        self._out = torch.zeros(max_seqs, dtype=torch.int32, device=self._device)
        self._every_token = torch.arange(max_seqs, dtype=torch.int32, device=self._device)
        block_tables[max_seqs].fill_(plan.num_blocks)

        parts = max_parts(max_seqs, self._kv_heads)
        described = 3 * max_tokens + len(self._windows) * PART_WORDS * parts
        described += 4 * max_tiles(max_tokens, max_seqs, tiling.tokens) + max_seqs + 64
        updates = 3 * block_tables.numel() + SAMPLING_WORDS * max_seqs
        self._described = torch.zeros(described, dtype=torch.int32, device=self._device)
        self._updates = torch.zeros(updates, dtype=torch.int32, device=self._device)
        self._pinned = [_Pinned(described) for _ in range(RING)]
        self._pinned_updates = [_Pinned(updates) for _ in range(RING)]
        self._hosts = [torch.zeros(max_seqs, dtype=torch.int32, pin_memory=True) for _ in range(RING)]
        self._compilations = compilations
        self._launches = 0
        self._admissions: dict[int, Admission] = {}
        self._num_blocks_of: dict[int, int] = {}
        self._slow: set[int] = set()
        """Rows whose sampling needs their history: those go through the reference sampler after the fast one."""
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
        # The one buffer that every step's logits are written to; in a graph with prompts nobody asks for more than ids.
        logits = self._decoder.logits[: len(sampled)]
        if slow := [index for index, item in enumerate(sampled) if item.row in self._slow]:
            self._sample_slowly(slow, sampled, logits)
        if masked := [i for i, item in enumerate(sampled) if item.mask is not None and item.row not in self._slow]:
            self._sample_masked(masked, sampled, logits, self._step(layout))
        asked = [self._admissions[item.row].sampling.logprobs for item in sampled]
        chances = start_logprobs(logits, self._out[: len(sampled)], asked)
        scores = start_scores(plan.items, self._admissions, self._decoder.logits_of)
        host, filled = self._hosts[turn], places[-1] + 1 if places else 0
        host[:filled].copy_(self._out[:filled], non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return Launched(host, places, done, tuple(item.row for item in sampled), chances, scores)

    def collect(self, launched: Launched) -> Sampled:
        places = launched.places
        if not places and not launched.scores:
            return Sampled([])
        launched.done.synchronize()
        ids = launched.host[: places[-1] + 1].tolist() if places else []
        tokens: list[int] = [ids[place] for place in places]
        for row, token in zip(launched.rows, tokens, strict=True):
            if token < 0:
                self._scrub(row)
        return Sampled(tokens, read_logprobs(launched.chances, len(places)), read_scores(launched.scores))

    def _scrub(self, row: int) -> None:
        """Zero the blocks of a request that gave NaN: attention multiplies what lies behind a sequence's end by 0."""
        blocks = self._block_tables[row, : self._num_blocks_of[row]].long()
        self._kv_cache[:, :, blocks] = 0

    def _graph_for(self, plan: StepPlan, sampled: list[StepItem]) -> Layout | None:
        """The smallest graph that fits this step, or None."""
        items = plan.items
        decodes = sum(item.count == 1 for item in items)
        prompt_tokens = plan.num_tokens - decodes
        if sum(item.count == 1 for item in sampled) != decodes:
            return None  # a prompt's single token that is not its last
        if prompt_tokens and (len(items) - decodes > MIXED_CHUNKS or any(self._is_special(item) for item in items)):
            return None
        fitting = (
            layout
            for layout in self._graphs
            if layout.decodes >= decodes
            and (layout.prompt_tokens > prompt_tokens if prompt_tokens else not layout.prompt_tokens)
        )
        return min(fitting, key=lambda layout: layout.tokens, default=None)

    def _is_special(self, item: StepItem) -> bool:
        """Whether more is wanted of it than the id that the sampler in the graph gives."""
        sampling = self._admissions[item.row].sampling
        asks = sampling.logprobs is not None or item.mask is not None
        return asks or item.row in self._slow or item.num_scored > 0

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
                self._num_blocks_of[row] = 0
                admitted += _sampling_words(row, admission)
                (self._slow.add if admission.sampling.reshapes else self._slow.discard)(row)
            if item.new_blocks:
                first = self._num_blocks_of[row]
                self._num_blocks_of[row] = first + len(item.new_blocks)
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
        tiles = self._described[at : at + 4 * layout.tiles].view(-1, 4) if layout.tiles else None
        at += 4 * layout.tiles
        ends = None if layout.ends is None else self._described[at : at + layout.ends]
        return DeviceStep(ids, rows, positions, layout.decodes, parts, tiles, ends)

    # ---- sampling under a grammar

    def _sample_masked(self, indices: list[int], sampled: list[StepItem], logits: Tensor, step: DeviceStep) -> None:
        """What was drawn from all tokens is drawn again for these; steps without a grammar pay nothing."""
        masks = upload([item.mask for i in indices if (item := sampled[i]).mask is not None], self._device)
        select = torch.tensor(indices, dtype=torch.int32).pin_memory().to(self._device, non_blocking=True)
        sample_masked(
            logits, select, masks, step.logit_tokens, step.rows, step.positions, self._state, self._scratch,
            self._token_ids, self._out,
        )  # fmt: skip

    # ---- sampling that needs a request's history

    def _sample_slowly(self, indices: list[int], sampled: list[StepItem], logits: Tensor) -> None:
        rows = []
        for index in indices:
            item = sampled[index]
            admission, length = self._admissions[item.row], item.start + item.count
            banned = admission.min_tokens_ids if length - admission.num_prompt < admission.sampling.min_tokens else ()
            history = self._token_ids[item.row, :length]
            mask = None if item.mask is None else upload([item.mask], self._device)[0]
            rows.append(SampleRow(admission.sampling, admission.seed, history, admission.num_prompt, banned, mask))
        select = torch.tensor(indices, device=self._device)
        tokens = sampling.reference(logits[select], rows).int()
        self._out[select] = tokens
        for index, token in zip(indices, tokens.unbind(), strict=True):
            item = sampled[index]
            if item.start + item.count < self._plan.max_model_len:
                self._token_ids[item.row, item.start + item.count] = token.clamp(min=0)

    # ---- graphs

    def capture(self, between: Callable[[], None], eager: bool = False) -> None:
        """Capture the first graphs, the largest first, so that their pool is sized once. Calls `between` them.

        The weights need not be there yet: a graph holds their addresses. eager: compile and load the kernels only.
        """
        self._eager = eager
        sizes = {*(size for size in GRAPH_SIZES if size < self._max_seqs), min(self._max_seqs, GRAPH_SIZES[-1])}
        first = {size for size in sizes if size in FIRST_GRAPH_SIZES} | {max(sizes)}
        mixed = [Layout.mixed(decodes, tokens, self._tiling) for decodes in MIXED_DECODES for tokens in MIXED_TOKENS]
        self._uncaptured = [
            *(Layout.of_decodes(size, self._tiling) for size in sorted(sizes - first)),
            *(m for m in mixed if m.tokens <= self._max_tokens and m.decodes + MIXED_CHUNKS <= self._max_seqs),
        ]
        # No graph has it, and the first grammar must not wait for a compiler.
        vocab = self._decoder.config.vocab_size
        apply_mask(self._decoder.logits[:1], upload([bytes(4 * -(-vocab // 32))], self._device))
        for size in sorted(first, reverse=True):
            between()
            self._capture(Layout.of_decodes(size, self._tiling))
        if eager:
            self._uncaptured = []

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
        self._describe(0, [], layout)
        step = self._step(layout)
        self._run(step)  # compiles what is not in the cache yet, which a capture could not
        torch.cuda.synchronize()
        if self._eager:
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._run(step)
        self._graphs[layout] = graph
        torch.cuda.synchronize()


def tiling_of(model: DecoderConfig, deterministic: bool) -> Tiling:
    return Tiling(tile_tokens(model.num_heads // model.num_kv_heads), alike=True) if deterministic else Tiling()


class _Pinned:
    """int32 words in page-locked memory, written from Python without a tensor operation for each piece."""

    def __init__(self, words: int) -> None:
        self.tensor = torch.zeros(words, dtype=torch.int32, pin_memory=True)
        raw = (ctypes.c_int32 * words).from_address(self.tensor.data_ptr())
        self._view = memoryview(raw).cast("B").cast("i")

    def write(self, at: int, words: list[int] | array[int]) -> None:
        self._view[at : at + len(words)] = words if isinstance(words, array) else array("i", words)


def _sampling_words(row: int, admission: Admission) -> tuple[int, ...]:
    """SAMPLING_WORDS int32 words, as kernels/gpu/state.py reads them."""
    s = admission.sampling
    seed = admission.seed & 0xFFFFFFFFFFFFFFFF
    packed = struct.pack(
        "=ififfIIi", row, s.temperature, max(s.top_k, 0), s.top_p, s.min_p, seed & 0xFFFFFFFF, seed >> 32, 0
    )
    return struct.unpack("=8i", packed)
