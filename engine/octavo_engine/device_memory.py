"""The memory of the device that a model is to run on."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
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
