"""What the process computes on: device, memory, the type that it computes natively."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from octavo_engine.config import EngineConfig
from octavo_engine.plan import DeviceMemory
from octavo_engine.status import Failure, FailureCode, FatalError

DTYPE_ALIASES = {"half": "float16", "float": "float32"}
TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def choose_device(config: EngineConfig) -> torch.device:
    """Raises FatalError(DEVICE_UNAVAILABLE) when a GPU is asked for and there is none."""
    if config.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if config.device == "auto":
        return torch.device("cpu")
    raise FatalError(
        Failure(
            FailureCode.DEVICE_UNAVAILABLE,
            "No GPU can be used by this process (--device cuda).",
            "check nvidia-smi and the driver; in a container, ask for a GPU (nvidia.com/gpu); or use --device cpu",
        )
    )


def choose_dtype(config: EngineConfig, checkpoint_dtype: str, device: torch.device) -> str:
    """float32, float16 or bfloat16."""
    if config.dtype != "auto":
        return DTYPE_ALIASES.get(config.dtype, config.dtype)
    if device.type == "cpu" and not _cpu_computes(checkpoint_dtype):
        return "float32"  # emulated 16-bit products are several times slower
    return checkpoint_dtype


def memory_of(device: torch.device) -> DeviceMemory:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory("cuda", torch.cuda.get_device_name(device), total, free)
    free, total = host_memory()
    return DeviceMemory("cpu", f"CPU ({torch.get_num_threads()} threads)", total, free)


def host_memory() -> tuple[int, int]:
    """(free, total) bytes for this process: the machine's, or its cgroup's where that is less."""
    fields = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024
    free, total = fields["MemAvailable"], fields["MemTotal"]
    for limit_file, usage_file, stat_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
            "/sys/fs/cgroup/memory/memory.stat",
        ),
    ):
        limit, usage = _read_count(limit_file), _read_count(usage_file)
        if limit is not None and usage is not None and limit < total:
            # Page cache counts as used but is given up under pressure.
            free = min(free, max(limit - usage + _inactive_file(stat_file), 0))
            total = limit
    return free, total


def available_cpus() -> int:
    """Cores this process may use: its affinity, and its cgroup's quota where there is one."""
    cores = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        share, _, period = quota.read_text().partition(" ")
        if share != "max":
            return max(min(cores, round(int(share) / int(period))), 1)
    share_us, period_us = (
        _read_count("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
        _read_count("/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    )
    if share_us and period_us and share_us > 0:
        return max(min(cores, round(share_us / period_us)), 1)
    return cores


def _cpu_computes(dtype: str) -> bool:
    if dtype == "float32":
        return True
    # float16 products are emulated on nearly every CPU.
    return dtype == "bfloat16" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _read_count(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def _inactive_file(path: str) -> int:
    try:
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    except OSError:
        pass
    return 0
