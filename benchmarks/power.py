"""What a GPU draws while it works: joules, watts and the clock of its multiprocessors, from NVIDIA's own library.

A card at its power limit lowers its clock until it keeps to it, and the time of whatever needs the clock is then its
joules over its watts. Cards that copy alike differ in that.
"""

from __future__ import annotations

import ctypes
import threading
import time
from dataclasses import dataclass

import torch

_SM_CLOCK, _AT_POWER_LIMIT = 1, 0x4  # NVML_CLOCK_SM, nvmlClocksEventReasonSwPowerCap
SAMPLED_EVERY_S = 0.1


@dataclass
class Drawn:
    """Over some time. mhz: mean clock of the multiprocessors. limited: share of the time at the power limit."""

    seconds: float
    joules: float
    mhz: float
    limited: float

    @property
    def watts(self) -> float:
        return self.joules / self.seconds


class Meter:
    """with Meter() as meter: work; meter.drawn is known behind it.

    The counter of joules moves some ten times a second: over less than a few seconds they are 10 % off.
    """

    drawn: Drawn

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._call("nvmlInit_v2")
        self._device = ctypes.c_void_p()
        bus = torch.cuda.get_device_properties(torch.cuda.current_device())
        name = f"{bus.pci_domain_id:08x}:{bus.pci_bus_id:02x}:{bus.pci_device_id:02x}.0"
        self._call("nvmlDeviceGetHandleByPciBusId_v2", name.encode(), ctypes.byref(self._device))

    def __enter__(self) -> Meter:
        self._clocks: list[int] = []
        self._limits: list[bool] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._began, self._first = time.monotonic(), self._millijoules()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        seconds, joules = time.monotonic() - self._began, (self._millijoules() - self._first) / 1e3
        self._over.set()
        self._thread.join()
        many = max(len(self._clocks), 1)
        self.drawn = Drawn(seconds, joules, sum(self._clocks) / many, sum(self._limits) / many)

    def _sample(self) -> None:
        clock, reasons = ctypes.c_uint(), ctypes.c_ulonglong()
        while not self._over.wait(SAMPLED_EVERY_S):
            self._call("nvmlDeviceGetClockInfo", self._device, _SM_CLOCK, ctypes.byref(clock))
            self._call("nvmlDeviceGetCurrentClocksThrottleReasons", self._device, ctypes.byref(reasons))
            self._clocks.append(clock.value)
            self._limits.append(bool(reasons.value & _AT_POWER_LIMIT))

    def _millijoules(self) -> int:
        total = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._device, ctypes.byref(total))
        return total.value

    def _call(self, function: str, *arguments: object) -> None:
        if status := getattr(self._library, function)(*arguments):
            raise RuntimeError(f"{function} ended with status {status}")
