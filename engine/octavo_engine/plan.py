"""How much memory a model needs and what is left for the KV cache: the one calculation of sizes.

The engine allocates by it, `octavo plan` prints it, the operator explains with it. Pure: configuration, the
checkpoint's shape and an amount of memory in; sizes or a failure with the fix out. No profiling run: every buffer
of the engine has its line in `activation_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    weights = model.num_parameters * DTYPE_BYTES[dtype]
    budget = memory.budget_bytes(config.gpu_memory_utilization)
    kv_dtype = choose_kv_dtype(config, dtype)
    per_token = model.kv_bytes_per_token(kv_dtype)
    block_bytes = per_token * config.block_size
    activation = activation_bytes(tokens, requests, config.block_size, model, dtype, wanted)
    fixed = config.kv_cache_memory_bytes is not None or config.num_gpu_blocks_override is not None
    if weights + activation > budget and not fixed:
        raise _too_large(memory, weights, activation, budget)

    kv_budget = budget - weights - activation
    if memory.kind == "cpu":
        kv_budget = min(kv_budget, CPU_KV_CACHE_LIMIT_BYTES)
    if config.kv_cache_memory_bytes is not None:
        kv_budget = config.kv_cache_memory_bytes
        # What was asked for is not cut down silently, and what cannot be is told before anything is loaded.
        if kv_budget > (room := memory.free_bytes - weights):
            raise ConfigError(
                "--kv-cache-memory-bytes", kv_budget,
                f"at most {max(room, 0)}: {memory.name} has {_gib(memory.free_bytes)} free and the weights take "
                f"{_gib(weights)}",
            )  # fmt: skip
    if config.num_gpu_blocks_override is not None:
        kv_budget = config.num_gpu_blocks_override * block_bytes
        if kv_budget > (room := memory.free_bytes - weights):
            most = max(room, 0) // block_bytes
            raise ConfigError("--num-gpu-blocks-override", config.num_gpu_blocks_override, f"at most {most}")
    num_blocks = max(kv_budget // block_bytes, 0)
    fits = num_blocks * config.block_size
    max_model_len = min(wanted, fits) if config.max_model_len is None else config.max_model_len
    if fits < max_model_len or max_model_len < 2:
        raise _kv_too_small(config, max(max_model_len, 2), fits, per_token, kv_budget)
    return Plan(
        dtype=dtype, kv_dtype=kv_dtype, budget_bytes=budget, weights_bytes=weights, activation_bytes=activation,
        kv_bytes_per_token=per_token, block_size=config.block_size, num_blocks=num_blocks,
        max_model_len=max_model_len, max_num_seqs=requests, max_num_batched_tokens=tokens,
    )  # fmt: skip


def activation_bytes(
    tokens: int, requests: int, block_size: int, model: DecoderConfig, dtype: str, max_model_len: int
) -> int:
    """Everything but weights and KV cache, for the largest step: tokens and requests at their maximum."""
    size = DTYPE_BYTES[dtype]
    # Alive together at most: residual, normed input, merged QKV, attention's output, gate-up and its product.
    per_token = 3 * model.hidden_size + model.qkv_size + model.num_heads * model.head_dim + 3 * model.intermediate_size
    step = tokens * per_token * size
    # Float32 logits and two working copies (probabilities, their order) of the rows that sample.
    sampling = 3 * requests * model.vocab_size * 4
    state = requests * (max_model_len + -(-max_model_len // block_size)) * 4
    rope = max_model_len * model.head_dim * 4
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


def _too_large(memory: DeviceMemory, weights: int, activation: int, budget: int) -> FatalError:
    need, have = weights + activation, max(budget, 0)
    if memory.kind == "cpu":
        fix = f"give the process at least {_gib(need / 0.9 + 64 * 2**20)} of memory, or choose a smaller model"
    else:
        fix = (
            "choose a GPU with more memory or a smaller model; lower --max-num-seqs or --max-num-batched-tokens "
            "if only the activations are too large"
        )
    message = (
        f"The model does not fit on {memory.name}: weights {_gib(weights)} and activations {_gib(activation)} "
        f"need {_gib(need)}, the engine may use {_gib(have)}."
    )
    return FatalError(Failure(FailureCode.WEIGHTS_TOO_LARGE, message, fix, need=_gib(need), have=_gib(have)))


def _kv_too_small(config: EngineConfig, wanted: int, fits: int, per_token: int, kv_budget: int) -> FatalError:
    need, have = -(-wanted // config.block_size) * config.block_size * per_token, max(kv_budget, 0)
    message = (
        f"The KV cache is too small for one request of {wanted:,} tokens: it needs {_size(need)}, "
        f"{_size(have)} are left for it ({fits:,} tokens)."
    )
    larger = "--gpu-memory-utilization"
    if config.kv_cache_memory_bytes is not None:
        larger = f"--kv-cache-memory-bytes to {-(-need // 2**20)}M at least,"
    fix = f"set --max-model-len <= {fits}" if fits >= 2 else f"raise {larger} or use a device with more memory"
    if config.kv_cache_dtype == "auto" and 2 * fits >= wanted:
        fix += ", or set --kv-cache-dtype fp8"
    return FatalError(Failure(FailureCode.KV_CACHE_TOO_SMALL, message, fix, need=_size(need), have=_size(have)))


def _size(count: int) -> str:
    """In MiB where GiB would be mostly zeros."""
    return _gib(count) if count >= GIB // 10 else f"{count / 2**20:.2f} MiB"


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"
