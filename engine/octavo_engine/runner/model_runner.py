"""Computes steps on one device: weights, KV cache, the rows of request state, the sampler.

The engine calls `load` once and `execute` for each step. Request state stays on the device and is changed by what
each step brings: admissions write a row, new blocks extend its table, sampled tokens are appended in place.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octavo_engine import __version__
from octavo_engine.config import EngineConfig
from octavo_engine.core.step import Admission, Sampled, StepItem, StepPlan
from octavo_engine.host import available_cpus
from octavo_engine.kernels import sampling
from octavo_engine.kernels.invariant import Invariant, block_rows
from octavo_engine.kernels.kv_scales import UNSCALED, is_scaled
from octavo_engine.kernels.paged_attention import plan_gathers
from octavo_engine.kernels.sampling import SampleRow
from octavo_engine.layers import rotary
from octavo_engine.loader import weights
from octavo_engine.models.config import DecoderConfig, load_config
from octavo_engine.models.decoder import Batch, Decoder
from octavo_engine.plan import ATTENTION_SCRATCH_BYTES, Plan, choose_dtype, make_plan
from octavo_engine.runner.chances import read_logprobs, read_scores, start_logprobs, start_scores
from octavo_engine.runner.device import TORCH_DTYPES, check_block_size, check_kv_dtype, choose_device, memory_of
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.status import Effective, Failure, FailureCode, FatalError, Stage

if TYPE_CHECKING:
    from octavo_engine.runner.gpu_steps import GpuSteps

OnStage = Callable[[Stage, int, int], None]
"""(stage, bytes done, bytes in all)"""
POLL_S = 0.05
"""Progress of the weights is looked for so often while graphs are captured."""


@dataclass(frozen=True)
class Loaded:
    """What the engine needs to know of a loaded model."""

    model: DecoderConfig
    plan: Plan
    effective: Effective


class ModelRunner:
    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._gpu: GpuSteps | None = None

    def load(self, folder: Path, on_stage: OnStage, revision: str | None = None) -> Loaded:
        """Everything up to the first step. Raises FatalError and ConfigError; sizes are checked before any load."""
        config = self._config
        on_stage(Stage.LOADING_WEIGHTS, 0, 0)
        model = load_config(folder)
        device = choose_device(config)
        if device.type == "cpu":
            torch.set_num_threads(config.cpu_threads or available_cpus())
        dtype_name = choose_dtype(config, model.dtype, device.type)
        memory = memory_of(device)
        plan = make_plan(config, model, dtype_name, memory)
        dtype, kv_dtype = TORCH_DTYPES[dtype_name], TORCH_DTYPES[plan.kv_dtype]
        check_kv_dtype(plan.kv_dtype, device)
        if dtype != torch.float32:  # which no kernel computes
            check_block_size(plan.block_size, model.head_dim, plan.kv_dtype, device)
        # Read before anything else of the checkpoint: graphs hold them as numbers.
        scaled = is_scaled(kv_dtype) and config.load_format != "dummy"
        self._kv_scales = weights.kv_scales(folder, model.num_layers) if scaled else [UNSCALED] * model.num_layers
        with _out_of_memory(plan):
            tensors = weights.allocate(model, dtype, device)
            # A row and a block more than planned: what pads a step to the size of a CUDA graph needs a place.
            padding = int(device.type == "cuda")
            # On a CPU pages that no block has used yet must not be touched: four gigabytes of zeros take seconds.
            fresh = torch.empty if device.type == "cpu" else torch.zeros
            self._kv_cache = fresh(
                (model.num_layers, 2, plan.num_blocks + padding, model.num_kv_heads, plan.block_size, model.head_dim),
                dtype=kv_dtype, device=device,
            )  # fmt: skip
            rows, columns = plan.max_num_seqs + padding, -(-plan.max_model_len // plan.block_size)
            self._token_ids = torch.zeros((rows, plan.max_model_len), dtype=torch.int32, device=device)
            self._block_tables = torch.zeros((rows, columns), dtype=torch.int32, device=device)
        loading = None
        progress = functools.partial(on_stage, Stage.LOADING_WEIGHTS)
        if config.load_format == "dummy":
            weights.fill_with_noise(model, tensors, config.seed, progress)
        else:
            loading = weights.Loading(folder, model, tensors)
        cos, sin = rotary.tables(model.rope, model.head_dim, plan.max_model_len, device)
        self._model, self._plan, self._device = model, plan, device
        self._admissions: dict[int, Admission] = {}
        self._num_blocks_of: dict[int, int] = {}
        with weights.readers_first():
            # The kernels compute in 16 bits; float32 on a GPU is for comparisons and takes the references.
            if device.type == "cuda" and dtype != torch.float32:
                # Only here: a CPU needs no triton, and importing it takes a fifth of a second.
                from octavo_engine.kernels.gpu.prebuilt import filling
                from octavo_engine.runner.compile_beside import fill_at_start

                self._gpu = self._gpu_steps(tensors, cos, sin)
                with filling(functools.partial(fill_at_start, folder, device, plan.block_size, plan.dtype)):
                    _capture(self._gpu, loading, config.enforce_eager, on_stage)
            elif loading:
                loading.wait(progress)
        operations = None
        if config.deterministic and self._gpu is None:
            operations = Invariant(block_rows(tensor for tensor in tensors.values() if tensor.dim() == 2))
        self._decoder = Decoder(model, tensors, cos, sin, operations, self._kv_scales)
        on_stage(Stage.WARMING_UP, 0, 0)
        self._warm_up()
        if self._gpu:
            self._gpu.is_ready()
        effective = Effective(
            model=config.model, resolved_revision=revision, dtype=plan.dtype, kv_dtype=plan.kv_dtype,
            max_model_len=plan.max_model_len, block_size=plan.block_size, num_blocks=plan.num_blocks,
            kv_tokens=plan.kv_tokens, max_concurrency_at_max_len=round(plan.max_concurrency, 2),
            attention_backend="triton" if self._gpu else "torch",
            cuda_graphs=self._gpu is not None and not config.enforce_eager,
            gpu=memory.name if device.type == "cuda" else "",
            driver=torch.version.cuda if device.type == "cuda" else None, tensor_parallel=1,
            engine_version=__version__, quantization=None, weights_bytes=plan.weights_bytes, kv_bytes=plan.kv_bytes,
        )  # fmt: skip
        return Loaded(model, plan, effective)

    @property
    def depth(self) -> int:
        """Steps that may be under way: on a CPU results are there when launch returns, so nothing can overlap."""
        return self._gpu.depth if self._gpu else 0

    @property
    def num_compilations(self) -> int:
        return self._gpu.num_compilations if self._gpu else 0

    def prepare(self) -> bool:
        """Use a moment in which no request waits; whether there is more to do."""
        return self._gpu is not None and self._gpu.prepare()

    def launch(self, plan: StepPlan) -> Any:
        return self._gpu.launch(plan) if self._gpu else self.execute(plan)

    def is_done(self, launched: Any) -> bool:
        return self._gpu is None or self._gpu.is_done(launched)

    def collect(self, launched: Any) -> Sampled:
        """The result of the oldest step that was launched and not collected."""
        sampled: Sampled = self._gpu.collect(launched) if self._gpu else launched
        return sampled

    def _gpu_steps(self, tensors: dict[str, Tensor], cos: Tensor, sin: Tensor) -> GpuSteps:
        from octavo_engine.kernels.gpu import prebuilt
        from octavo_engine.models.gpu_decoder import GpuDecoder
        from octavo_engine.runner.gpu_steps import GpuSteps

        compilations = prebuilt.use()
        plan, half = self._plan, self._model.head_dim // 2
        dtype = tensors["embedding"].dtype
        decoder = GpuDecoder(
            self._model, tensors, cos[:, :half].to(dtype).contiguous(), sin[:, half:].to(dtype).contiguous(),
            self._kv_cache, self._token_ids, self._block_tables, plan.max_num_batched_tokens, plan.max_num_seqs,
            self._config.deterministic, self._kv_scales,
        )  # fmt: skip
        return GpuSteps(
            decoder, plan, plan.max_num_batched_tokens, plan.max_num_seqs, self._kv_cache, self._token_ids,
            self._block_tables, compilations,
        )  # fmt: skip

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Sampled:
        """A step with the kernels' torch references."""
        self._apply(plan)
        batch = self._batch(plan)
        hidden = self._decoder.hidden(batch, self._kv_cache)
        logits_of = lambda first, end: self._decoder.logits(hidden, slice(first, end))  # noqa: E731
        scores = read_scores(start_scores(plan.items, self._admissions, logits_of))
        sampled = [item for item in plan.items if item.samples]
        if not sampled:
            return Sampled([], scores=scores)
        logits = self._decoder.logits(hidden, batch.logit_rows)
        # Row by row where it must not matter how many there are: torch sums a single row in another order.
        at_once = 1 if self._config.deterministic else len(sampled)
        rows = [self._sample_row(item) for item in sampled]
        some = [slice(at, at + at_once) for at in range(0, len(rows), at_once)]
        tokens = torch.cat([sampling.reference(logits[few], rows[few]) for few in some])
        places, columns = torch.tensor([(i.row, i.start + i.count) for i in sampled]).to(self._device).unbind(1)
        # A request that just reached the longest length ends with this token: there is no column for it.
        inside = columns < self._plan.max_model_len
        # A -1 stays out of it: the warm-up's second step would look it up in the embedding and fail on that.
        self._token_ids[places[inside], columns[inside]] = tokens[inside].clamp(min=0).int()
        asked = [self._admissions[item.row].sampling.logprobs for item in sampled]
        logprobs = read_logprobs(start_logprobs(logits, tokens, asked), len(asked))
        return Sampled(tokens.tolist(), logprobs, scores)

    def _apply(self, plan: StepPlan) -> None:
        """Bring the rows of state up to date."""
        for item in plan.items:
            if (admission := item.admission) is not None:
                self._admissions[item.row] = admission
                self._num_blocks_of[item.row] = 0
                ids = torch.tensor(admission.tokens, dtype=torch.int32)
                self._token_ids[item.row, : len(ids)] = ids.to(self._device)
            if item.new_blocks:
                first = self._num_blocks_of[item.row]
                last = self._num_blocks_of[item.row] = first + len(item.new_blocks)
                blocks = torch.tensor(item.new_blocks).to(self._device)
                self._block_tables[item.row, first:last] = blocks.int()
                # What a broken request left in a block would reach the next one: a masked position weighs nothing,
                # but nothing times a NaN is a NaN. Blocks of a cached prefix, which come first, keep their content.
                cached = item.start // self._plan.block_size if item.admission is not None else 0
                self._kv_cache.view(torch.uint8).index_fill_(2, blocks[cached:], 0)

    def _batch(self, plan: StepPlan) -> Batch:
        device, size = self._device, self._plan.block_size
        # One descriptor, one copy to the device: row, start, count of each item.
        items = torch.tensor([(i.row, i.start, i.count) for i in plan.items]).to(device)
        rows, starts, counts = items.unbind(1)
        total = plan.num_tokens
        segment = torch.repeat_interleave(torch.arange(len(plan.items), device=device), counts, output_size=total)
        ends = counts.cumsum(0)
        positions = torch.arange(total, device=device) - (ends - counts)[segment] + starts[segment]
        token_rows = rows[segment]
        longest = max(-(-(i.start + i.count) // size) for i in plan.items)
        tables = self._block_tables[rows, :longest].long()
        samples = [i.samples for i in plan.items]
        logit_rows = None
        if total > len(plan.items) or not all(samples):
            logit_rows = (ends - 1)[torch.tensor(samples, device=device)]
        model = self._model
        block_bytes = 2 * model.num_kv_heads * size * model.head_dim * self._kv_cache.element_size()
        return Batch(
            input_ids=self._token_ids[token_rows, positions].long(),
            positions=positions,
            blocks=self._block_tables[token_rows, positions // size].long(),
            offsets=positions % size,
            gathers=plan_gathers(
                [i.start for i in plan.items], [i.count for i in plan.items], tables, size, model.num_kv_heads,
                block_bytes, ATTENTION_SCRATCH_BYTES,
            ),
            logit_rows=logit_rows,
        )  # fmt: skip

    def _sample_row(self, item: StepItem) -> SampleRow:
        admission = self._admissions[item.row]
        length = item.start + item.count
        num_output = length - admission.num_prompt
        banned = admission.min_tokens_ids if num_output < admission.sampling.min_tokens else ()
        history = self._token_ids[item.row, :length]
        mask = None if item.mask is None else torch.frombuffer(bytearray(item.mask), dtype=torch.int32).to(self._device)
        return SampleRow(admission.sampling, admission.seed, history, admission.num_prompt, banned, mask)

    def _warm_up(self) -> None:
        """One generation of two steps, so that the first request meets no lazy set-up. Raises FatalError on NaN."""
        length = min(16, self._plan.max_model_len - 1)
        blocks = list(range(-(-(length + 1) // self._plan.block_size)))
        greedy = SamplingParams(temperature=0.0, max_tokens=2)
        tokens = [i % self._model.vocab_size for i in range(1, length + 1)]
        admission = Admission(tokens, length, greedy, (), 0)
        first = self.collect(self.launch(StepPlan([StepItem(0, 0, length, blocks, True, admission)])))  # type: ignore[arg-type]
        second = self.collect(self.launch(StepPlan([StepItem(0, length, 1, [], True)])))
        if first.tokens[0] < 0 or second.tokens[0] < 0:
            raise FatalError(
                Failure(
                    FailureCode.SELF_TEST_FAILED,
                    f"The warm-up generation gave values that are not finite ({self._plan.dtype}).",
                    "try --dtype bfloat16 or float32; if that does not help, the weights are damaged",
                )
            )


def _capture(gpu: GpuSteps, loading: weights.Loading | None, eager: bool, on_stage: OnStage) -> None:
    """Capture the first graphs while the weights still come, as graphs hold addresses; return when both are done.

    The stage is the weights' as long as one is missing, then the graphs'. A thread tells it: compiling one kernel may
    take half a minute, in which nothing here is called, and weights came within seconds of it.
    """
    if loading is None:
        on_stage(Stage.CAPTURING, 0, 0)
        gpu.capture(lambda: None, eager)
        return
    is_captured = threading.Event()
    failed: list[Exception] = []
    progress = functools.partial(on_stage, Stage.LOADING_WEIGHTS)

    def follow() -> None:
        try:
            while not is_captured.wait(POLL_S):
                loading.poll(progress)
                if loading.done_bytes == loading.total_bytes:
                    on_stage(Stage.CAPTURING, 0, 0)
                    return
        except Exception as error:  # noqa: BLE001 - raised again by `check`
            failed.append(error)

    def check() -> None:
        if failed:
            raise failed[0]

    follower = threading.Thread(target=follow, name="stages", daemon=True)
    follower.start()
    try:
        gpu.capture(check, eager)
    finally:
        # Before anything else is sent, a failure too: one thread at a time may use the channel.
        is_captured.set()
        follower.join()
    check()
    # Where the capture took longer its stage is told already, and no stage comes twice.
    told = loading.done_bytes == loading.total_bytes
    loading.wait((lambda done, total: None) if told else progress)


@contextlib.contextmanager
def _out_of_memory(plan: Plan) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise
        need = plan.weights_bytes + plan.kv_bytes
        raise FatalError(
            Failure(
                FailureCode.OUT_OF_MEMORY,
                "The device refused the memory that its own figures promised.",
                "another process is using it: stop that one or lower --gpu-memory-utilization",
                need=f"{need / 2**30:.2f} GiB",
                detail=str(error)[:400],
            )
        ) from error
