"""What is said of a device that cannot do what is asked of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from octavo_engine.config import ConfigError, EngineConfig
from octavo_engine.runner.device import check_block_size, check_kv_dtype, choose_device
from octavo_engine.status import FailureCode, FatalError


def test_a_gpu_without_e4m3_is_told_what_to_take(monkeypatch: pytest.MonkeyPatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))

    with pytest.raises(ConfigError, match=r"expected fp8_e5m2 on NVIDIA A100: e4m3 needs compute capability 8\.9"):
        check_kv_dtype("fp8_e4m3", device)
    check_kv_dtype("fp8_e5m2", device)
    check_kv_dtype("bfloat16", device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_kv_dtype("fp8_e4m3", device)


def test_a_block_that_a_gpu_has_no_room_for_is_refused(monkeypatch: pytest.MonkeyPatch):
    device, memory = torch.device("cuda", 0), SimpleNamespace(shared_memory_per_block_optin=99 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)

    with pytest.raises(ConfigError, match=r"--block-size: got 128, expected at most 64 for heads of 256 on NVIDIA L4"):
        check_block_size(128, 256, device)
    check_block_size(128, 128, device)
    check_block_size(64, 256, device)
    memory.shared_memory_per_block_optin = 163 * 1024
    check_block_size(128, 256, device)
    del memory.shared_memory_per_block_optin  # as AMD's torch does
    with pytest.raises(ConfigError, match="it has 64"):
        check_block_size(128, 256, device)


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_a_gpu_that_is_too_old_is_named_before_anything_is_compiled_for_it(asked: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))

    with pytest.raises(FatalError) as refused:
        choose_device(EngineConfig(model="m", device=asked))

    failure = refused.value.failure
    assert failure.code is FailureCode.DEVICE_UNAVAILABLE
    assert failure.message == "Tesla T4 has compute capability 7.5; the kernels need 8.0."
    assert "--device cpu" in failure.fix
    assert choose_device(EngineConfig(model="m", device="cpu")).type == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose_device(EngineConfig(model="m", device=asked)).type == "cuda"
