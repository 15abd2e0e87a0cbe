"""Weights stream from files into the engine's arena."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from octavo_engine.checkpoint import read_headers
from octavo_engine.config import EngineConfig
from octavo_engine.loader import weights
from octavo_engine.models.config import load_config
from octavo_engine.models.layout import placements
from octavo_engine.runner.model_runner import ModelRunner
from octavo_engine.status import FailureCode, FatalError, Stage

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "hidden_size": 64,
    "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path):
    """(folder, its tensors): two files, matrices in float32, norms in bfloat16."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(target.shape, generator=generator).to(
            torch.bfloat16 if len(target.shape) == 1 else torch.float32
        )
        for name, target in placements(load_config(tmp_path)).items()
    }
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, tmp_path / "model-1.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, tmp_path / "model-2.safetensors")
    return tmp_path, tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece_bytes", [1000 * 8, weights.PIECE_BYTES])
def test_every_tensor_comes_to_its_rows_in_the_engines_type(checkpoint, dtype, piece_bytes, monkeypatch):
    folder, tensors = checkpoint
    monkeypatch.setattr(weights, "PIECE_BYTES", piece_bytes)
    config = load_config(folder)
    arena = weights.allocate(config, dtype, torch.device("cpu"))
    for tensor in arena.values():
        tensor.fill_(float("nan"))
    seen: list[tuple[int, int]] = []

    weights.load(folder, config, arena, lambda done, total: seen.append((done, total)))

    for name, target in placements(config).items():
        rows = arena[target.slot][target.row : target.row + target.shape[0]]
        assert torch.equal(rows, tensors[name].to(dtype)), name
    total = sum(t.nbytes for t in tensors.values())
    assert seen[0][0] <= seen[-1][0] == total
    assert {t for _, t in seen} == {total}


def test_pieces_cover_each_tensor_once_and_follow_the_files(checkpoint):
    folder, tensors = checkpoint
    headers, targets = read_headers(folder), placements(load_config(folder))

    pieces = weights.plan_pieces(headers, targets, 4096)

    assert [(p.file, p.offset) for p in pieces] == sorted((p.file, p.offset) for p in pieces)
    covered = sorted((p.slot, p.element, p.num_elements) for p in pieces)
    for (slot, element, count), (next_slot, next_element, _) in itertools.pairwise(covered):
        assert slot != next_slot or element + count == next_element
    assert sum(p.num_bytes for p in pieces) == sum(t.nbytes for t in tensors.values())


def test_a_file_that_shrinks_while_it_is_read_is_named(checkpoint, monkeypatch):
    folder, _ = checkpoint
    config = load_config(folder)
    arena = weights.allocate(config, torch.float32, torch.device("cpu"))
    file = folder / "model-1.safetensors"
    headers = read_headers(folder)
    monkeypatch.setattr(weights, "read_headers", lambda _: headers)
    file.write_bytes(file.read_bytes()[:5000])

    with pytest.raises(FatalError) as caught:
        weights.load(folder, config, arena, lambda done, total: None)

    assert caught.value.failure.code is FailureCode.WEIGHTS_CORRUPT
    assert "model-1.safetensors" in str(caught.value.failure)


def test_readers_get_the_interpreter_quickly_until_the_model_is_loaded(checkpoint):
    folder, _ = checkpoint
    usual, seen = sys.getswitchinterval(), set()
    config = EngineConfig(model=str(folder), device="cpu", kv_cache_memory_bytes=2**24, max_model_len=64)

    ModelRunner(config).load(
        folder, lambda stage, done, total: seen.add((stage, done > 0, round(sys.getswitchinterval(), 6)))
    )

    assert (Stage.LOADING_WEIGHTS, True, weights.SWITCH_S) in seen
    assert (Stage.WARMING_UP, False, usual) in seen
    assert sys.getswitchinterval() == usual
