"""Weights stream from files into the engine's arena."""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from octavo_engine.checkpoint import read_headers
from octavo_engine.config import EngineConfig
from octavo_engine.loader import weights
from octavo_engine.models.config import load_config
from octavo_engine.models.layout import placements
from octavo_engine.runner import model_runner
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


class Graphs:
    """Captures in the place of a GPU's steps: `during` is what happens inside of it."""

    def __init__(self, during: Callable[[Callable[[], None]], None]) -> None:
        self._during = during

    def capture(self, between: Callable[[], None], eager: bool) -> None:
        self._during(between)


class Stages:
    """What is told, in order, each stage once."""

    def __init__(self) -> None:
        self.seen: list[Stage] = []
        self.changed = threading.Condition()

    def __call__(self, stage: Stage, done: int, total: int) -> None:
        with self.changed:
            if self.seen[-1:] != [stage]:
                self.seen.append(stage)
            self.changed.notify_all()


def loading_of(folder: Path) -> weights.Loading:
    config = load_config(folder)
    return weights.Loading(folder, config, weights.allocate(config, torch.float32, torch.device("cpu")))


def test_the_stage_is_capturing_once_the_weights_are_there_though_one_kernel_takes_long(checkpoint):
    """Half a minute of compiling was told as loading_weights at 60 %: nothing asked for the progress meanwhile."""
    folder, _ = checkpoint
    loading, stages = loading_of(folder), Stages()

    def one_long_kernel(between: Callable[[], None]) -> None:
        with stages.changed:
            assert stages.changed.wait_for(lambda: Stage.CAPTURING in stages.seen, 10)

    model_runner._capture(Graphs(one_long_kernel), loading, False, stages)

    assert stages.seen == [Stage.LOADING_WEIGHTS, Stage.CAPTURING]


def test_the_stage_is_that_of_the_weights_to_the_end_where_they_come_last(checkpoint, monkeypatch):
    folder, _ = checkpoint
    captured, read, stages = threading.Event(), weights._read_exactly, Stages()

    def slowly(*args) -> None:
        assert captured.wait(10)
        time.sleep(2 * model_runner.POLL_S)
        read(*args)

    monkeypatch.setattr(weights, "_read_exactly", slowly)
    loading = loading_of(folder)
    model_runner._capture(Graphs(lambda between: captured.set()), loading, False, stages)

    assert stages.seen == [Stage.LOADING_WEIGHTS]
    assert loading.done_bytes == loading.total_bytes > 0


def test_weights_that_cannot_be_read_end_the_capture_and_nothing_is_told_afterwards(checkpoint, monkeypatch):
    folder, _ = checkpoint
    stages = Stages()

    def broken(*_) -> None:
        raise OSError("the disk is gone")

    def many_graphs(between: Callable[[], None]) -> None:
        until = time.monotonic() + 10
        while time.monotonic() < until:
            between()
            time.sleep(0.01)

    monkeypatch.setattr(weights, "_read_exactly", broken)
    with pytest.raises(FatalError, match="the disk is gone"):
        model_runner._capture(Graphs(many_graphs), loading_of(folder), False, stages)

    assert not [thread for thread in threading.enumerate() if thread.name == "stages"]


def test_without_a_checkpoint_capturing_is_told_before_the_first_kernel():
    stages = Stages()

    model_runner._capture(Graphs(lambda between: stages.seen.append("compiled")), None, False, stages)

    assert stages.seen == [Stage.CAPTURING, "compiled"]
