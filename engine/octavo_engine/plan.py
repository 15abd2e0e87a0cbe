"""How much memory a model needs and what is left for the KV cache: the one calculation of sizes.

The engine allocates by it, `octavo plan` prints it, the operator explains with it. Pure: configuration, the
checkpoint's shape and an amount of memory in; sizes or a failure with the fix out. No profiling run:
`activation_bytes` bounds all that is neither weights nor KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo_engine.config import ConfigError, EngineConfig
from octavo_engine.device_memory import GIB, DeviceMemory
from octavo_engine.host import computes_bfloat16
from octavo_engine.models.config import DTYPE_BYTES, DecoderConfig
from octavo_engine.shortage import Demand, asked_too_much, kv_too_small, too_large

DTYPE_ALIASES = {"half": "float16", "float": "float32"}
ATTENTION_SCRATCH_BYTES = 256 * 2**20
"""Bound on the keys and values that reference attention gathers at once."""
LARGE_GPU_BYTES = 60 * GIB
"""From here on a step may be four times as large by default, as in vLLM (70 there; a card of 64 has room too)."""
LARGE_STEP, SMALL_STEP = (1024, 8192), (256, 2048)
"""Requests and tokens of the largest step on such a GPU and elsewhere, where nothing is set."""


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
    demand = Demand(config, memory, weights, activation, per_token * config.block_size, wanted)
    budget = memory.budget_bytes(demand.share)
    if demand.fixed > budget:
        raise too_large(demand, budget)

    room = budget - demand.fixed
    kv_budget = min(room, demand.most_kv if demand.asked is None else demand.asked)
    num_blocks = kv_budget // demand.block_bytes
    fits = num_blocks * config.block_size
    max_model_len = min(wanted, fits) if config.max_model_len is None else config.max_model_len
    if fits < max_model_len or max_model_len < 2:
        raise kv_too_small(demand, max(max_model_len, 2), fits, kv_budget)
    # What was asked for is not cut down silently, and what cannot be is told before anything is loaded.
    if demand.asked is not None and demand.asked > room:
        raise asked_too_much(demand, room)
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
