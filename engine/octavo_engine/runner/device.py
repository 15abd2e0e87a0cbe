"""What the process computes on: its kind and its memory."""

from __future__ import annotations

import torch

from octavo_engine.config import BLOCK_SIZES, ConfigError, EngineConfig
from octavo_engine.device_memory import DeviceMemory
from octavo_engine.host import host_memory
from octavo_engine.models.config import KV_DTYPE_BYTES
from octavo_engine.status import Failure, FailureCode, FatalError

TORCH_DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip
LEAST_CAPABILITY = (8, 0)
"""With bfloat16 and copies to shared memory that go on beside the computation, which all kernels are written for."""
E4M3_CAPABILITY = (8, 9)
"""From here on a GPU converts that type itself; before, Triton does not compile it."""


AMD_SHARED_BYTES = 64 * 1024
"""Shared memory of a gfx942's program, which AMD's torch does not tell."""
LARGE_BLOCK_BYTES = 113 * 1024
"""Shared memory of prefill attention with blocks of 128 keys of 256 numbers, as compiled for an A100."""
AMD_PADDING_BYTES = 32
"""Of a key and its value in decode attention on a gfx942, so that its threads find them in different banks."""


def choose_device(config: EngineConfig) -> torch.device:
    """Raises FatalError(DEVICE_UNAVAILABLE) when a GPU is asked for and there is none, or where it is too old."""
    if config.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
        _check_capability(device)
        return device
    if config.device == "auto":
        return torch.device("cpu")
    raise FatalError(
        Failure(
            FailureCode.DEVICE_UNAVAILABLE,
            "No GPU can be used by this process (--device cuda).",
            "check nvidia-smi and the driver; in a container, ask for a GPU (nvidia.com/gpu); or use --device cpu",
        )
    )


def _check_capability(device: torch.device) -> None:
    """Also with --device auto: who has a GPU would wait long for a processor's answers, and not know why."""
    if torch.version.hip or (capability := torch.cuda.get_device_capability(device)) >= LEAST_CAPABILITY:
        return
    raise FatalError(
        Failure(
            FailureCode.DEVICE_UNAVAILABLE,
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; the kernels "
            f"need {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}.",
            "use a GPU of NVIDIA's Ampere generation or later (A10, A100, L4, L40S, H100, ...); or use --device cpu",
        )
    )


def check_kv_dtype(kv_dtype: str, device: torch.device) -> None:
    """Raises ConfigError for a type of the KV cache that this device cannot read."""
    if kv_dtype != "fp8_e4m3" or device.type == "cpu" or torch.version.hip:
        return
    if (capability := torch.cuda.get_device_capability(device)) < E4M3_CAPABILITY:
        raise ConfigError(
            "--kv-cache-dtype", "fp8_e4m3",
            f"fp8_e5m2 on {torch.cuda.get_device_name(device)}: e4m3 needs compute capability 8.9, this one has "
            f"{capability[0]}.{capability[1]}",
        )  # fmt: skip


def check_block_size(block_size: int, head_dim: int, kv_dtype: str, device: torch.device) -> None:
    """Raises ConfigError where a block of keys and one of values do not fit beside a tile of queries."""
    if device.type == "cpu":
        return
    # Only NVIDIA's torch tells it.
    have = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    amd, have = have is None, have or AMD_SHARED_BYTES
    need = shared_bytes(block_size, head_dim, kv_dtype, amd)
    if need <= have:
        return
    fitting = [size for size in BLOCK_SIZES if shared_bytes(size, head_dim, kv_dtype, amd) <= have]
    raise ConfigError(
        "--block-size", block_size,
        f"at most {max(fitting, default=0)} for heads of {head_dim} on {torch.cuda.get_device_name(device)}: the "
        f"kernels need {-(-need // 1024)} KiB of shared memory, it has {have >> 10}",
    )  # fmt: skip


def shared_bytes(block_size: int, head_dim: int, kv_dtype: str, amd: bool) -> int:
    """Shared memory that attention asks for with blocks of this size, where that may be more than a device has.

    On a gfx942 decode attention is what asks for most: a block of keys and one of values, as wide as a power of two.
    That is what Triton compiles, to the byte, for blocks of 16 to 128, heads of 64 to 256 and caches of 16 and 8 bits;
    prefill attention takes 64 KiB at most. Elsewhere it is prefill attention, with the largest blocks.
    """
    if amd:
        width = 1 << (head_dim - 1).bit_length()
        return block_size * (2 * width * KV_DTYPE_BYTES[kv_dtype] + AMD_PADDING_BYTES)
    return LARGE_BLOCK_BYTES if block_size * head_dim > 128 * 128 else 0


def memory_of(device: torch.device) -> DeviceMemory:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory("cuda", torch.cuda.get_device_name(device), total, free)
    free, total = host_memory()
    return DeviceMemory("cpu", f"CPU ({torch.get_num_threads()} threads)", total, free)
