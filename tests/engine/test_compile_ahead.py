"""Kernels compiled ahead are found by name wherever their folder lies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launched import launched_kernels

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip


def compile_kernels(model: Path, output: Path, **environment: str) -> str:
    return run("-m", "octavo_engine.cli", "compile-kernels", str(model), "--output", str(output), **environment)


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True, timeout=280,
        # The tests of kernels have them interpreted, in this process.
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )  # fmt: skip
    return done.stdout


@pytest.mark.slow
def test_a_folder_that_two_processes_fill_leaves_nothing_to_compile_then_or_elsewhere(tmp_path):
    model, built, moved = tmp_path / "model", tmp_path / "built", tmp_path / "moved"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))

    # A start without kernels: the first that is launched calls for the processes, and all that follow are found.
    script = str(Path(__file__).with_name("launch_steps.py"))
    left = run(script, str(model), "sm_90", str(built))
    built.rename(moved)
    second = compile_kernels(model, tmp_path / "unused", OCTAVO_PREBUILT_KERNELS=str(moved))
    lacking = run(script, str(model), "sm_90", OCTAVO_PREBUILT_KERNELS=str(moved))

    assert left == ""
    assert {file.stem for file in moved.rglob("*.cubin")} == launched_kernels()
    assert second.startswith("compiled 0 kernels")
    assert lacking == ""
    assert not [file for file in (tmp_path / "unused").rglob("*") if file.is_file()]
    launchers = list(moved.rglob("*.so"))
    assert all(b"libcuda.so.1" in file.read_bytes() for file in launchers), "not linked with the driver"
    assert {file.suffix for file in moved.rglob("*") if file.is_file()} >= {".cubin", ".json", ".so"}


WHEREVER = """
import sys, torch
from pathlib import Path
from octavo_engine.kernels.gpu.prefill_attention import CacheLoads, prefill_attention
from octavo_engine.runner.compile_ahead import ARCHITECTURES, _absent_gpu

described, queries = torch.zeros(64, dtype=torch.int32), torch.zeros(9, 4 * 64, dtype=torch.bfloat16)
loads = CacheLoads.of(torch.zeros(2, 10, 1, 64, 64, dtype=torch.bfloat16), wide=True)
with _absent_gpu(*ARCHITECTURES["sm_90"], Path(sys.argv[1])) as launched:
    for at in range(4):
        tiles, table = described[at : at + 16].view(2, 8), torch.zeros(1, 10, dtype=torch.int32)
        prefill_attention(queries, loads, table, tiles, torch.zeros(9, 128, dtype=torch.bfloat16), 1, 64, 0.1, 100)
    print(len(launched))
"""


@pytest.mark.slow
def test_prompts_of_a_sliding_window_have_one_kernel_wherever_in_a_steps_words_their_tiles_are(tmp_path):
    assert run("-c", WHEREVER, str(tmp_path)) == "1\n"
