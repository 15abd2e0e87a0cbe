"""How much memory a model needs and what is left for the KV cache: the one calculation of sizes.

The engine allocates by it, `octavo plan` prints it, the operator explains with it. Pure: configuration, the
checkpoint's shape and an amount of memory in; sizes or a failure with the fix out. No profiling run:
`activation_bytes` bounds all that is neither weights nor KV cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from octavo_engine.config import ConfigError, EngineConfig
from octavo_engine.host import computes_bfloat16
from octavo_engine.models.config import DTYPE_BYTES, DecoderConfig
from octavo_engine.status import Failure, FailureCode, FatalError

GIB = 2**30
DTYPE_ALIASES = {"half": "float16", "float": "float32"}
ATTENTION_SCRATCH_BYTES = 256 * 2**20
"""Bound on the keys and values that reference attention gathers at once."""
LARGE_GPU_BYTES = 60 * GIB
"""From here on a step may be four times as large by default, as in vLLM (70 there; a card of 64 has room too)."""
LARGE_STEP, SMALL_STEP = (1024, 8192), (256, 2048)
"""Requests and tokens of the largest step on such a GPU and elsewhere, where nothing is set."""
CPU_KV_CACHE_LIMIT_BYTES = 4 * GIB
"""On a CPU more cache than this is rarely used and is memory that other processes want."""
RUNTIME_BYTES = {"cpu": 0, "cuda": 864 * 2**20}
"""Taken by the driver's context and the libraries' workspaces before the engine allocates anything."""
MUCH_HELD_BYTES = 2 * GIB
"""Of a GPU in use from here on others are told of: our own context and what the driver keeps are less."""
USUAL_UTILIZATION = 0.9
"""config.py's default, for figures that would be absurd with a much smaller share."""


@dataclass(frozen=True)
class DeviceMemory:
    """What the device offers. For a CPU, total is what this process may use (its cgroup's limit)."""

    kind: str
    name: str
    total_bytes: int
    free_bytes: int

    def budget_bytes(self, utilization: float) -> int:
        """On a GPU a share of the whole card, less what others hold; on a CPU a share of what is free now."""
        if self.kind == "cpu":
            return int(self.free_bytes * utilization)
        return min(int(self.total_bytes * utilization), self.free_bytes) - RUNTIME_BYTES[self.kind]


@dataclass(frozen=True)
class Plan:
    """What the engine will allocate, in bytes and tokens."""

    dtype: str
    kv_dtype: str
    budget_bytes: int
    weights_bytes: int
    activation_bytes: int
    kv_bytes_per_token: int
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int

    @property
    def kv_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def kv_bytes(self) -> int:
        return self.kv_tokens * self.kv_bytes_per_token

    @property
    def context_share(self) -> float:
        """What a token of context adds to the bytes that a step reads, as a share of the weights."""
        return self.kv_bytes_per_token / self.weights_bytes

    @property
    def max_concurrency(self) -> float:
        """Requests of the full length that fit at once."""
        return self.kv_tokens / self.max_model_len


def choose_dtype(config: EngineConfig, checkpoint_dtype: str, kind: str) -> str:
    """float32, float16 or bfloat16, for a device of this kind (cpu, cuda)."""
    if config.dtype != "auto":
        return DTYPE_ALIASES.get(config.dtype, config.dtype)
    native = checkpoint_dtype == "float32" or (checkpoint_dtype == "bfloat16" and computes_bfloat16())
    if kind == "cpu" and not native:  # float16 products are emulated on nearly every CPU
        return "float32"
    return checkpoint_dtype


def choose_kv_dtype(config: EngineConfig, dtype: str) -> str:
    """One of models/config.py's KV_DTYPE_BYTES, for weights of this type."""
    return {"auto": dtype, "fp8": "fp8_e4m3"}.get(config.kv_cache_dtype, config.kv_cache_dtype)


def step_size(config: EngineConfig, memory: DeviceMemory) -> tuple[int, int]:
    """Requests and tokens of the largest step, as configured or, where that is left open, as suits the device."""
    large = memory.kind == "cuda" and memory.total_bytes >= LARGE_GPU_BYTES
    usual_requests, usual_tokens = LARGE_STEP if large else SMALL_STEP
    requests, tokens = config.max_num_seqs, config.max_num_batched_tokens
    if requests is None:
        requests = min(usual_requests, tokens or usual_requests)
    if tokens is None:
        whole_prompt = 0 if config.enable_chunked_prefill else config.max_model_len or 0
        tokens = max(usual_tokens, requests, whole_prompt)
    return requests, tokens


def make_plan(config: EngineConfig, model: DecoderConfig, dtype: str, memory: DeviceMemory) -> Plan:
    """Raises ConfigError for lengths that the model cannot have, FatalError when the memory does not suffice."""
    limit = model.max_position
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError("--max-model-len", config.max_model_len, f"at most {limit}, the model's own limit")
    requests, tokens = step_size(config, memory)
    if not config.enable_chunked_prefill:
        limit = min(limit, tokens)
    wanted = config.max_model_len or limit

    kv_dtype = choose_kv_dtype(config, dtype)
    per_token = model.kv_bytes_per_token(kv_dtype)
    weights = model.num_parameters * DTYPE_BYTES[dtype]
    activation = activation_bytes(tokens, requests, config.block_size, model, dtype, wanted)
    demand = _Demand(config, memory, weights, activation, per_token * config.block_size, wanted)
    budget = memory.budget_bytes(demand.share)
    if demand.fixed > budget:
        raise _too_large(demand, budget)

    room = budget - demand.fixed
    kv_budget = min(room, demand.most_kv if demand.asked is None else demand.asked)
    num_blocks = kv_budget // demand.block_bytes
    fits = num_blocks * config.block_size
    max_model_len = min(wanted, fits) if config.max_model_len is None else config.max_model_len
    if fits < max_model_len or max_model_len < 2:
        raise _kv_too_small(demand, max(max_model_len, 2), fits, kv_budget)
    # What was asked for is not cut down silently, and what cannot be is told before anything is loaded.
    if demand.asked is not None and demand.asked > room:
        raise _asked_too_much(demand, room)
    return Plan(
        dtype=dtype, kv_dtype=kv_dtype, budget_bytes=budget, weights_bytes=weights, activation_bytes=activation,
        kv_bytes_per_token=per_token, block_size=config.block_size, num_blocks=num_blocks,
        max_model_len=max_model_len, max_num_seqs=requests, max_num_batched_tokens=tokens,
    )  # fmt: skip


def activation_bytes(
    tokens: int, requests: int, block_size: int, model: DecoderConfig, dtype: str, max_model_len: int
) -> int:
    """A bound on everything but weights and KV cache, for the largest step: tokens and requests at their maximum.

    Counted are the buffers of the torch references, which a CPU and float32 on a GPU have. The kernels of a GPU have
    others in their place, which take less: of a row, 4.4 bytes of logits in 16 bits, of words and masks of changed
    logits and of scratch for each id of the vocabulary and 68 KiB of a record, where the references have 12 bytes for
    each id (what a vocabulary below 9,000 lacks then is in ATTENTION_SCRATCH_BYTES, which no kernel needs; so are the
    copies of prompt_logprobs' 32 rows). tests/engine/test_plan_on_gpu.py adds up what a GPU's runner allocates.
    """
    size = DTYPE_BYTES[dtype]
    # Alive together at most: residual, normed input, merged QKV, attention's output, gate-up and its product.
    per_token = 3 * model.hidden_size + model.qkv_size + model.num_heads * model.head_dim + 3 * model.intermediate_size
    step = tokens * per_token * size
    # Float32 logits and two working copies (probabilities, their order) of the rows that sample.
    sampling = 3 * requests * model.vocab_size * 4
    state = requests * (max_model_len + -(-max_model_len // block_size)) * 4
    rope = 2 * max_model_len * model.head_dim * 4  # cosines and sines
    return step + sampling + state + rope + ATTENTION_SCRATCH_BYTES


def describe(plan: Plan, model: DecoderConfig, memory: DeviceMemory) -> str:
    """The table that `octavo plan` prints."""
    lines = [
        f"{model.architecture}, {model.num_parameters / 1e9:.2f} billion parameters, {plan.dtype}, on {memory.name}",
        f"  {'memory the engine may use':<34}{plan.budget_bytes / GIB:>9.2f} GiB",
        f"  {'weights':<34}{plan.weights_bytes / GIB:>9.2f} GiB",
        f"  {'activations, logits, state':<34}{plan.activation_bytes / GIB:>9.2f} GiB",
        f"  {'KV cache':<34}{plan.kv_bytes / GIB:>9.2f} GiB",
        f"  {'KV cache per token':<34}{plan.kv_bytes_per_token / 1024:>9.1f} KiB",
        f"  {'tokens in the KV cache':<34}{plan.kv_tokens:>9,}  ({plan.num_blocks:,} blocks of {plan.block_size})",
        f"  {'longest request (max model len)':<34}{plan.max_model_len:>9,}  tokens",
        f"  {'requests of that length at once':<34}{plan.max_concurrency:>9.1f}",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Demand:
    """What is wanted of the memory, for what is said where it does not suffice. wanted: tokens of the longest request,
    as set or else the model's own.
    """

    config: EngineConfig
    memory: DeviceMemory
    weights: int
    activation: int
    block_bytes: int
    wanted: int

    @property
    def fixed(self) -> int:
        return self.weights + self.activation

    @property
    def asked(self) -> int | None:
        """The cache's size where a setting gives it."""
        if self.config.num_gpu_blocks_override is not None:
            return self.config.num_gpu_blocks_override * self.block_bytes
        return self.config.kv_cache_memory_bytes

    @property
    def share(self) -> float:
        """Of the memory. All of it may be asked for: a size that is given overrides the utilization."""
        return self.config.gpu_memory_utilization if self.asked is None else 1.0

    @property
    def most_kv(self) -> int:
        """Of a cache whose size is not given."""
        return CPU_KV_CACHE_LIMIT_BYTES if self.memory.kind == "cpu" else self.memory.total_bytes

    @property
    def least_kv(self) -> int:
        """A cache with less is refused."""
        return self.kv(self.config.max_model_len or 2) if self.asked is None else self.asked

    def kv(self, tokens: int) -> int:
        """Bytes of the blocks of so many tokens."""
        return -(-tokens // self.config.block_size) * self.block_bytes

    def enough(self, memory: DeviceMemory) -> float | None:
        """The smallest utilization, in hundredths, with which this memory suffices; None where even 1 does not.

        For the model's whole length if that is possible, where none is set: one that suffices for a block would give a
        server of 64 tokens.
        """
        if self.asked is not None:
            return 1.0 if memory.budget_bytes(1.0) >= self.fixed + self.asked else None
        if self.least_kv > self.most_kv:
            return None
        shares = [percent / 100 for percent in range(1, 101)]
        for kv in (min(self.kv(self.wanted), self.most_kv), self.least_kv):
            for share in shares:
                if memory.budget_bytes(share) >= self.fixed + kv:
                    return share
        return None


def _too_large(demand: _Demand, budget: int) -> FatalError:
    memory, need, have = demand.memory, demand.fixed, max(budget, 0)
    if (share := demand.enough(memory)) is not None:
        fix = f"raise --gpu-memory-utilization to {share:.2f} at least"
    elif memory.kind == "cpu":
        share = max(demand.share, USUAL_UTILIZATION)
        amount = math.ceil(100 * ((need + demand.least_kv) / share + 64 * 2**20) / GIB) / 100
        setting = f" and --gpu-memory-utilization {share}" if share > demand.share else ""
        fix = f"give the process at least {amount:.2f} GiB of memory{setting}, or choose a smaller model"
    elif (share := _without_others(demand)) is not None:
        fix = "stop the other processes on this GPU"
        if share > demand.share:
            fix += f" and raise --gpu-memory-utilization to {share:.2f} at least"
        fix += ", or choose a GPU with more free memory"
    else:
        fix = (
            "choose a GPU with more memory or a smaller model; lower --max-num-seqs or --max-num-batched-tokens "
            "if only the activations are too large"
        )
    message = (
        f"The model does not fit on {memory.name}: weights {_gib(demand.weights)} and activations "
        f"{_gib(demand.activation)} need {_gib(need)}, the engine may use {_gib(have)}.{_of_others(memory)}"
    )
    return FatalError(Failure(FailureCode.WEIGHTS_TOO_LARGE, message, fix, need=_gib(need), have=_gib(have)))


def _kv_too_small(demand: _Demand, length: int, fits: int, kv_budget: int) -> FatalError:
    config, memory, need = demand.config, demand.memory, demand.kv(length)
    source = f"{_size(kv_budget)} are left for it"
    if config.num_gpu_blocks_override is not None:
        source = f"--num-gpu-blocks-override {config.num_gpu_blocks_override} gives it {_size(kv_budget)}"
    elif config.kv_cache_memory_bytes is not None:
        source = f"--kv-cache-memory-bytes gives it {_size(kv_budget)}"
    if demand.asked is not None and kv_budget < demand.asked:  # not the setting, but the memory is what it lacks
        source = f"{_size(kv_budget)} are left for it"
    message = (
        f"The KV cache is too small for one request of {length:,} tokens: it needs {_size(need)}, {source} "
        f"({fits:,} tokens).{_of_others(memory)}"
    )
    fixes = [f"set --max-model-len <= {fits}"] if fits >= 2 else []
    if (larger := _larger_cache(demand, length)) is not None:
        fixes.append(larger)
    elif not fixes and _without_others(demand) is not None:
        fixes.append("stop the other processes on this GPU")
    elif not fixes:
        fixes.append("use a device with more memory")
    # The number of blocks that is set stays what it is, however small they are.
    if config.kv_cache_dtype == "auto" and config.num_gpu_blocks_override is None and 2 * fits >= length:
        fixes.append("set --kv-cache-dtype fp8")
    return FatalError(
        Failure(FailureCode.KV_CACHE_TOO_SMALL, message, ", or ".join(fixes), need=_size(need), have=_size(kv_budget))
    )


def _larger_cache(demand: _Demand, length: int) -> str | None:
    """The setting that makes room for a request of this length, or None where the memory does not allow it."""
    config, memory, need = demand.config, demand.memory, demand.kv(length)
    room = memory.budget_bytes(1.0) - demand.fixed
    if config.num_gpu_blocks_override is not None:
        return f"raise --num-gpu-blocks-override to {need // demand.block_bytes} at least" if need <= room else None
    mebibytes = -(-need // 2**20)
    by_size = f"to {mebibytes}M at least" if mebibytes * 2**20 <= room else None
    if config.kv_cache_memory_bytes is not None:
        return by_size and f"raise --kv-cache-memory-bytes {by_size}"
    if (share := demand.enough(memory)) is not None:
        return f"raise --gpu-memory-utilization to {share:.2f} at least"
    # Only on a CPU, whose cache stays small where nothing is set.
    return by_size and f"set --kv-cache-memory-bytes {by_size}"


def _asked_too_much(demand: _Demand, room: int) -> ConfigError:
    config, memory = demand.config, demand.memory
    taken = [f"the weights take {_gib(demand.weights)}", f"activations {_gib(demand.activation)}"]
    if runtime := RUNTIME_BYTES[memory.kind]:
        taken.append(f"the driver and its libraries {_gib(runtime)}")
    if held := _held_by_others(memory):
        taken.append(f"other processes {held}")
    why = f"{memory.name} has {_gib(memory.free_bytes)} free and {', '.join(taken)}"
    if (blocks := config.num_gpu_blocks_override) is not None:
        return ConfigError("--num-gpu-blocks-override", blocks, f"at most {room // demand.block_bytes}: {why}")
    return ConfigError("--kv-cache-memory-bytes", config.kv_cache_memory_bytes, f"at most {room}: {why}")


def _without_others(demand: _Demand) -> float | None:
    """The utilization that would suffice if other processes held nothing of this GPU; None where none would."""
    if not _held_by_others(demand.memory):
        return None
    return demand.enough(replace(demand.memory, free_bytes=demand.memory.total_bytes))


def _of_others(memory: DeviceMemory) -> str:
    held = _held_by_others(memory)
    return f" Other processes hold {held}." if held else ""


def _held_by_others(memory: DeviceMemory) -> str:
    """How much, where it is much; else nothing."""
    held = memory.total_bytes - memory.free_bytes
    if memory.kind == "cpu" or held < MUCH_HELD_BYTES:
        return ""
    return f"about {_gib(held)} of its {_gib(memory.total_bytes)}"


def _size(count: int) -> str:
    """In MiB where GiB would be mostly zeros."""
    return _gib(count) if count >= GIB // 10 else f"{count / 2**20:.2f} MiB"


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"
