"""What the process computes on: its kind and its memory."""

from __future__ import annotations

import torch

from octavo_engine.config import EngineConfig
from octavo_engine.host import host_memory
from octavo_engine.plan import DeviceMemory
from octavo_engine.status import Failure, FailureCode, FatalError

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


def memory_of(device: torch.device) -> DeviceMemory:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory("cuda", torch.cuda.get_device_name(device), total, free)
    free, total = host_memory()
    return DeviceMemory("cpu", f"CPU ({torch.get_num_threads()} threads)", total, free)
