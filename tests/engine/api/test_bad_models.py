"""Models that cannot be served, through the real command: one clear line, the certificate, the exit status."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo_engine.models.config import parse_config
from octavo_engine.models.layout import placements
from octavo_engine.status import ExitStatus, Failure, FailureCode

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 257, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "torch_dtype": "float32", "eos_token_id": 256,
}  # fmt: skip


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A small whole model, for a test to break."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(target.shape, generator=generator) * 0.1
        for name, target in placements(parse_config(CONFIG)).items()
    }
    save_file(weights, folder / "model.safetensors")
    return folder


def serve(folder: Path, *flags: str) -> tuple[int, list[str], Failure | None]:
    """Exit status, lines on stderr that are no ordinary log, certificate."""
    log = folder.parent / "termination.log"
    command = [sys.executable, "-m", "octavo_engine.cli", "serve", str(folder), f"--termination-log={log}"]
    ports = [] if any("port" in flag for flag in flags) else ["--port=0", "--management-port=0"]
    done = subprocess.run(
        [*command, *ports, "--log-level=warning", "--kv-cache-memory-bytes=8M", *flags],
        capture_output=True, text=True, timeout=60, env=os.environ,
    )  # fmt: skip
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines(), Failure.from_json(log.read_text()) if log.exists() else None


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1000)


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] = float("nan")


Q = "model.layers.1.self_attn.q_proj.weight"
HUGE = {"hidden_size": 65536, "intermediate_size": 65536, "num_hidden_layers": 500}


@pytest.mark.parametrize(
    ("spoil", "flags", "code", "words"),
    [
        (remove("config.json"), [], FailureCode.MODEL_INVALID, "has no config.json"),
        (write("config.json", "{"), [], FailureCode.MODEL_INVALID, "config.json"),
        (config(hidden_size=None), [], FailureCode.MODEL_INVALID, "hidden_size is None"),
        (config(architectures=["MambaForCausalLM"]), [], FailureCode.UNSUPPORTED_MODEL, "MambaForCausalLM"),
        (
            config(quantization_config={"quant_method": "awq"}), [], FailureCode.UNSUPPORTED_FEATURE,
            "quantized (awq)",
        ),
        (remove("tokenizer.json"), [], FailureCode.MODEL_INVALID, "has no tokenizer.json"),
        (write("tokenizer.json", "{}"), [], FailureCode.MODEL_INVALID, "tokenizer.json cannot be read"),
        (remove("model.safetensors"), [], FailureCode.MODEL_INVALID, "has no *.safetensors file"),
        (cut, [], FailureCode.WEIGHTS_CORRUPT, "model.safetensors is damaged: it should be"),
        (config(hidden_size=64), [], FailureCode.MODEL_INVALID, "config.json asks for"),
        (weights(lambda t: t.pop(Q) is None), [], FailureCode.MODEL_INVALID, f"the first is {Q}"),
        (
            weights(lambda t: t.update({"model.layers.0.extra": torch.zeros(1)})), [],
            FailureCode.UNSUPPORTED_MODEL, "the first is model.layers.0.extra",
        ),
        (weights(poison), [], FailureCode.SELF_TEST_FAILED, "not finite"),
        (config(), ["--kv-cache-memory-bytes=20k"], FailureCode.KV_CACHE_TOO_SMALL, "one request of 256 tokens"),
        (config(), ["--kv-cache-memory-bytes=100000G"], FailureCode.INVALID_CONFIG, "GiB free and the weights take"),
        (config(), ["--max-model-len=300"], FailureCode.INVALID_CONFIG, "--max-model-len: got 300"),
        (config(), ["--chat-template=/nowhere"], FailureCode.INVALID_CONFIG, "--chat-template"),
        (config(), ["--api-key-file=/nowhere"], FailureCode.INVALID_CONFIG, "--api-key-file"),
        (config(), ["--host=203.0.113.1"], FailureCode.INVALID_CONFIG, "not an address of this machine"),
        (config(), ["--tensor-parallel-size=2"], FailureCode.INVALID_CONFIG, "one device"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_ends_in_one_line_a_certificate_and_its_status(folder, spoil, flags, code, words):
    spoil(folder)
    if code is FailureCode.KV_CACHE_TOO_SMALL:
        flags = ["--max-model-len=256", *flags]
    status, lines, failure = serve(folder, *flags)

    assert status == code.exit_status
    assert len(lines) - (failure is not None and failure.detail is not None) == 1, lines
    assert words in lines[0]
    assert failure is not None
    assert failure.code is code
    assert failure.fix


def test_a_model_larger_than_the_memory_is_refused_before_anything_is_loaded(folder: Path):
    config(**HUGE)(folder)
    command = [sys.executable, "-m", "octavo_engine.cli", "serve", str(folder), "--port=0", "--management-port=0"]
    log = folder.parent / "termination.log"
    done = subprocess.run(
        [*command, f"--termination-log={log}", "--log-level=warning"], capture_output=True, text=True, timeout=60
    )
    failure = Failure.from_json(log.read_text())

    assert done.returncode == ExitStatus.WEIGHTS_TOO_LARGE
    assert failure is not None
    assert failure.need is not None
    assert float(failure.need.split()[0]) > 10_000
    assert failure.fix.startswith("give the process at least ")
    assert failure.fix.endswith(", or choose a smaller model")


def denied(name: str, mode: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).chmod(mode)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (denied("model.safetensors", 0), "model.safetensors may not be read by user"),
        (denied("config.json", 0), "config.json may not be read by user"),
        (denied(".", 0), "may not be entered by user"),
        (
            lambda folder: (folder / "more.safetensors").symlink_to("../blobs/0123"),
            "more.safetensors is a link to ../blobs/0123, which is not there",
        ),
    ],
)
@pytest.mark.parametrize("command", ["serve", "plan"])
def test_files_of_another_user_and_links_to_nothing_are_named(folder, spoil, words, command):
    """As on a volume that was filled by root, and in a cache of which a part was removed."""
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    spoil(folder)
    arguments = [sys.executable, "-m", "octavo_engine", command, str(folder)]
    if os.getuid() == 0:  # to whom everything is open
        arguments = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *arguments]
        for path in (folder, *folder.iterdir()):
            os.chown(path, 12345, 12345, follow_symlinks=False)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)

    assert done.returncode == ExitStatus.MODEL_INVALID
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert words in done.stderr


def test_a_file_of_a_model_is_not_its_folder(folder: Path):
    status, lines, _ = serve(folder / "model.safetensors")

    assert status == ExitStatus.MODEL_NOT_FOUND
    assert "model.safetensors is a file, and a model is a folder. Fix: name the folder that holds it" in lines[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(folder: Path):
    status, lines, failure = serve(folder, "--device=cuda")

    assert status == ExitStatus.DEVICE_UNAVAILABLE
    assert "No GPU can be used" in lines[0]
    assert failure is not None
    assert "--device cpu" in failure.fix


@pytest.mark.parametrize("flag", ["--port", "--management-port"])
def test_a_port_in_use_is_named_with_its_flag(folder: Path, flag: str):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        other = "--management-port=0" if flag == "--port" else "--port=0"
        status, lines, failure = serve(folder, f"{flag}={port}", other)

    assert status == ExitStatus.PORT_IN_USE
    assert len(lines) == 1
    assert f"Port {port} of localhost is in use" in lines[0]
    assert failure is not None
    assert failure.fix.endswith(f"with {flag}")


def test_the_whole_model_would_have_been_served(folder: Path):
    """Otherwise the refusals above could come from anything."""
    log = folder.parent / "ready.log"
    command = [sys.executable, "-m", "octavo_engine.cli", "serve", str(folder), "--port=0", "--management-port=0"]
    with log.open("w") as stream:
        process = subprocess.Popen([*command, "--kv-cache-memory-bytes=8M"], stderr=stream)
    try:
        for _ in range(600):
            if "ready in" in log.read_text():
                break
            assert process.poll() is None, log.read_text()
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        process.terminate()
        assert process.wait(60) == ExitStatus.OK
    finally:
        process.kill()
        process.wait()
    assert "float32" in log.read_text()


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        ([], 0, "longest request"),
        (["--memory=1G"], 40, "does not fit on a GPU of 1.0 GiB"),
        (["--memory=100M"], 40, "the engine may use 0.00 GiB"),
        (["--kv-cache-memory-bytes=20k", "--max-model-len=256"], 41, "set --max-model-len <= "),
        (
            ["--kv-cache-memory-bytes=1k"],
            41,
            "gives it 0.00 MiB (0 tokens). Fix: raise --kv-cache-memory-bytes to 1M",
        ),
        (["--memory=24G", "--max-model-len=256"], 0, "on a GPU of 24.0 GiB"),
        (["--memory=lots"], 2, "--memory"),
    ],
)
def test_octavo_plan_tells_what_fits_with_the_same_statuses(folder: Path, flags: list[str], status: int, words: str):
    command = [sys.executable, "-m", "octavo_engine.cli", "plan", str(folder), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert done.returncode == status, done.stderr
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
