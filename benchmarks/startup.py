"""Seconds from the start of `octavo serve` to ready, with a checkpoint of real size in the page cache.

    PYTHONPATH=engine python benchmarks/startup.py [--model DIR] [--folder DIR] [--output FILE] [-- further flags]

Writes random weights of the model's shape to --folder unless they are there, reads them once, then starts the server
three times. For prebuilt kernels set OCTAVO_PREBUILT_KERNELS, see `octavo compile-kernels --help`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from octavo_engine.models.config import load_config
from octavo_engine.models.layout import placements

sys.path.insert(0, str(Path(__file__).parent))
from served import MODEL, READY_S, end, write_tokenizer

PORT, MANAGEMENT_PORT = 18100, 18101


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "octavo-startup")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("flags", nargs="*")
    arguments = parser.parse_args()
    write_checkpoint(arguments.model, arguments.folder)
    write_tokenizer(arguments.folder)
    size = sum(len(block) for file in arguments.folder.glob("*.safetensors") for block in blocks(file))
    runs = [start(arguments.folder, arguments.flags) for _ in range(arguments.runs)]
    result = {
        "gpu": torch.cuda.get_device_name(), "weights_bytes": size, "runs": runs, "torch": torch.__version__,
        "prebuilt_kernels": bool(os.environ.get("OCTAVO_PREBUILT_KERNELS")), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def write_checkpoint(model: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(model / "config.json", folder)
    if any(folder.glob("*.safetensors")):
        return
    shard: dict[str, torch.Tensor] = {}
    shards = 0
    for name, target in placements(load_config(folder)).items():
        shard[name] = torch.randn(target.shape, device="cuda", dtype=torch.bfloat16).mul_(0.02).cpu()
        if sum(tensor.nbytes for tensor in shard.values()) > 4e9:
            save_file(shard, folder / f"model-{shards}.safetensors")
            shard, shards = {}, shards + 1
    save_file(shard, folder / f"model-{shards}.safetensors")
    torch.cuda.empty_cache()


def blocks(file: Path) -> Any:
    with file.open("rb") as stream:
        while block := stream.read(1 << 26):
            yield block


def start(folder: Path, flags: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "octavo_engine.cli", "serve", str(folder), "--port", str(PORT)]
    command += ["--management-port", str(MANAGEMENT_PORT), *flags]
    began = time.monotonic()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    first_answer = None
    try:
        while True:
            if server.poll() is not None:
                raise SystemExit(f"the server ended with {server.returncode}")
            try:
                status = json.load(urllib.request.urlopen(f"http://127.0.0.1:{MANAGEMENT_PORT}/statusz", timeout=5))
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                status = None
            if time.monotonic() - began > READY_S:
                raise SystemExit(f"the server is not ready after {READY_S} s: {status}")
            if status is None:
                time.sleep(0.01)
                continue
            first_answer = first_answer or time.monotonic() - began
            if status["stage"] == "ready":
                break
            time.sleep(0.02)
        ready = time.monotonic() - began
        asked = time.monotonic()
        body = {"model": str(folder), "prompt": [5] * 100, "max_tokens": 4, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=60).read()
        run = {
            "ready_s": round(ready, 2), "first_answer_s": round(first_answer, 2),
            "first_request_s": round(time.monotonic() - asked, 3), "stage_seconds": status.get("stage_seconds"),
        }  # fmt: skip
        print(run, flush=True)
        return run
    finally:
        end(server)


if __name__ == "__main__":
    main()
