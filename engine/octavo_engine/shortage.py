"""What is said where the memory of a device does not suffice: the numbers, and the setting that would do. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from octavo_engine.config import ConfigError, EngineConfig
from octavo_engine.device_memory import GIB, RUNTIME_BYTES, DeviceMemory
from octavo_engine.status import Failure, FailureCode, FatalError

CPU_KV_CACHE_LIMIT_BYTES = 4 * GIB
"""On a CPU more cache than this is rarely used and is memory that other processes want."""
MUCH_HELD_BYTES = 2 * GIB
"""Of a GPU in use from here on others are told of: our own context and what the driver keeps are less."""
USUAL_UTILIZATION = 0.9
"""config.py's default, for figures that would be absurd with a much smaller share."""


@dataclass(frozen=True)
class Demand:
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

    @property
    def alone(self) -> Demand | None:
        """The same where other processes hold nothing of this GPU; None where they do not hold much."""
        if not _held_by_others(self.memory):
            return None
        return replace(self, memory=replace(self.memory, free_bytes=self.memory.total_bytes))

    def enough(self) -> float | None:
        """The smallest utilization, in hundredths, with which the memory suffices; None where even 1 does not.

        For the model's whole length if that is possible, where none is set: one that suffices for a block would give a
        server of 64 tokens.
        """
        if self.asked is not None:
            return 1.0 if self.memory.budget_bytes(1.0) >= self.fixed + self.asked else None
        if self.least_kv > self.most_kv:
            return None
        shares = [percent / 100 for percent in range(1, 101)]
        for kv in (min(self.kv(self.wanted), self.most_kv), self.least_kv):
            for share in shares:
                if self.memory.budget_bytes(share) >= self.fixed + kv:
                    return share
        return None


def too_large(demand: Demand, budget: int) -> FatalError:
    memory, need, have = demand.memory, demand.fixed, max(budget, 0)
    if (share := demand.enough()) is not None:
        fix = f"raise --gpu-memory-utilization to {share:.2f} at least"
    elif memory.kind == "cpu":
        share = max(demand.share, USUAL_UTILIZATION)
        amount = math.ceil(100 * ((need + demand.least_kv) / share + 64 * 2**20) / GIB) / 100
        setting = f" and --gpu-memory-utilization {share}" if share > demand.share else ""
        if demand.asked is None and demand.least_kv > demand.most_kv:
            setting = f" and set --kv-cache-memory-bytes to {-(-demand.least_kv // 2**20)}M"
        fix = f"give the process at least {amount:.2f} GiB of memory{setting}, or choose a smaller model"
    elif (alone := demand.alone) is not None and (share := alone.enough()) is not None:
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


def kv_too_small(demand: Demand, length: int, fits: int, kv_budget: int) -> FatalError:
    config, memory, need = demand.config, demand.memory, demand.kv(length)
    # Where the memory has less than was asked for, it is the memory and not the setting that the cache lacks.
    is_short = demand.asked is not None and kv_budget < demand.asked
    source = f"{_size(kv_budget)} are left for it"
    if config.num_gpu_blocks_override is not None and not is_short:
        source = f"--num-gpu-blocks-override {config.num_gpu_blocks_override} gives it {_size(kv_budget)}"
    elif config.kv_cache_memory_bytes is not None and not is_short:
        source = f"--kv-cache-memory-bytes gives it {_size(kv_budget)}"
    message = (
        f"The KV cache is too small for one request of {length:,} tokens: it needs {_size(need)}, {source} "
        f"({fits:,} tokens).{_of_others(memory)}"
    )
    fixes = [f"set --max-model-len <= {fits}"] if fits >= 2 else []
    if fixes and is_short:
        fixes[0] += f" and {_size_setting(demand, kv_budget)}"
    if (larger := _larger_cache(demand, length)) is not None:
        fixes.append(larger)
    elif not fixes and (stopping := _with_others_stopped(demand, length)) is not None:
        fixes.append(stopping)
    elif not fixes:
        fixes.append("use a device with more memory")
    # The number of blocks that is set stays what it is, however small they are.
    if config.kv_cache_dtype == "auto" and config.num_gpu_blocks_override is None and 2 * fits >= length:
        fixes.append("set --kv-cache-dtype fp8")
    return FatalError(
        Failure(FailureCode.KV_CACHE_TOO_SMALL, message, ", or ".join(fixes), need=_size(need), have=_size(kv_budget))
    )


def _larger_cache(demand: Demand, length: int) -> str | None:
    """The setting that makes room for a request of this length, or None where the memory does not allow it."""
    config, need = demand.config, demand.kv(length)
    room = demand.memory.budget_bytes(1.0) - demand.fixed
    if config.num_gpu_blocks_override is not None:
        return f"raise --num-gpu-blocks-override to {need // demand.block_bytes} at least" if need <= room else None
    mebibytes = -(-need // 2**20)
    by_size = f"to {mebibytes}M at least" if mebibytes * 2**20 <= room else None
    if config.kv_cache_memory_bytes is not None:
        return by_size and f"raise --kv-cache-memory-bytes {by_size}"
    if (share := demand.enough()) is not None:
        return f"raise --gpu-memory-utilization to {share:.2f} at least"
    # Only on a CPU, whose cache stays small where nothing is set.
    return by_size and f"set --kv-cache-memory-bytes {by_size}"


def asked_too_much(demand: Demand, room: int) -> ConfigError:
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


def _size_setting(demand: Demand, room: int) -> str:
    """The setting of the cache's size, as large as the memory allows."""
    if demand.config.num_gpu_blocks_override is not None:
        return f"--num-gpu-blocks-override <= {room // demand.block_bytes}"
    return f"--kv-cache-memory-bytes <= {room}"


def _with_others_stopped(demand: Demand, length: int) -> str | None:
    """What makes room for a request of this length once other processes hold nothing of this GPU; None: nothing."""
    if (alone := demand.alone) is None or (larger := _larger_cache(alone, length)) is None:
        return None
    share, stop = alone.enough(), "stop the other processes on this GPU"
    has_size = demand.asked is None or demand.asked >= demand.kv(length)
    return stop if has_size and share is not None and share <= demand.share else f"{stop} and {larger}"


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
