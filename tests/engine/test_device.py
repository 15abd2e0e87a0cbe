"""What is said of a device that cannot do what is asked of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from octavo_engine.config import ConfigError, EngineConfig
from octavo_engine.runner.device import AMD_SHARED_BYTES, check_block_size, check_kv_dtype, choose_device, shared_bytes
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
        check_block_size(128, 256, "bfloat16", device)
    check_block_size(128, 128, "bfloat16", device)
    check_block_size(64, 256, "bfloat16", device)
    memory.shared_memory_per_block_optin = 163 * 1024
    check_block_size(128, 256, "bfloat16", device)


@pytest.mark.parametrize(
    ("block_size", "head_dim", "kv_dtype", "most"),
    [
        (128, 64, "bfloat16", None),
        (128, 80, "bfloat16", 64),
        (128, 96, "float16", 64),
        (128, 128, "bfloat16", 64),
        (128, 128, "fp8_e4m3", None),
        (64, 128, "bfloat16", None),
        (128, 256, "bfloat16", 32),
        (64, 256, "bfloat16", 32),  # the default
        (32, 256, "bfloat16", None),
        (128, 256, "fp8_e5m2", 64),
        (64, 256, "fp8_e5m2", None),
    ],
)
def test_a_gfx942_takes_the_blocks_that_decode_attention_has_room_for(
    monkeypatch: pytest.MonkeyPatch, block_size: int, head_dim: int, kv_dtype: str, most: int | None
):
    """Blocks of 128 keys were let through with heads of 80 to 128, and the default with heads of 256."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI300X")
    # AMD's torch tells nothing of shared memory.
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    if most is None:
        check_block_size(block_size, head_dim, kv_dtype, device)
        return
    with pytest.raises(ConfigError) as refused:
        check_block_size(block_size, head_dim, kv_dtype, device)

    assert f"--block-size: got {block_size}, expected at most {most} for heads of {head_dim}" in str(refused.value)
    assert "KiB of shared memory, it has 64" in str(refused.value)
    check_block_size(most, head_dim, kv_dtype, device)


@pytest.mark.parametrize(
    ("block_size", "head_dim", "kv_dtype", "compiled"),
    [
        (32, 64, "fp8_e4m3", 5120), (32, 64, "bfloat16", 9216), (64, 64, "fp8_e4m3", 10240),
        (64, 64, "bfloat16", 18432), (128, 64, "bfloat16", 36864), (64, 80, "bfloat16", 34816),
        (128, 80, "bfloat16", 69632), (128, 96, "fp8_e4m3", 36864), (32, 128, "bfloat16", 17408),
        (128, 128, "bfloat16", 69632), (32, 256, "bfloat16", 33792), (64, 256, "bfloat16", 67584),
        (64, 256, "fp8_e4m3", 34816), (128, 256, "fp8_e4m3", 69632), (128, 256, "bfloat16", 135168),
    ],
)  # fmt: skip
def test_what_decode_attention_needs_on_a_gfx942_is_what_triton_compiled(block_size, head_dim, kv_dtype, compiled):
    """Bytes of shared memory that `_decode` was given for gfx942, where compiling them again would take minutes."""
    assert shared_bytes(block_size, head_dim, kv_dtype, amd=True) == compiled
    assert AMD_SHARED_BYTES == 65536


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
