"""What the machine, or the container's share of it, offers: memory, cores, number types. Import-light."""

from __future__ import annotations

import os
from pathlib import Path


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


def computes_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products; without them they are emulated, several times slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
