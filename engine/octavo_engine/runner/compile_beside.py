"""The kernels of a model that starts without them, compiled by several processes at once.

One process takes half a minute for a model's 84 kernels, most of it in LLVM and ptxas on one core. Eight are counted to
take three seconds to start and four to compile. What they do is `octavo compile-kernels` into Triton's own folder, so
the engine finds each kernel as if it had compiled it the last time; what its flags want beyond those, it compiles
itself. Where they fail, it is as slow as without them.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import triton

from octavo_engine.host import available_cpus, host_memory
from octavo_engine.kernels.gpu import prebuilt

log = logging.getLogger("octavo.engine")

LIMIT_S = 120.0
"""Compiling alone took 30 to 90 s."""
MOST_PROCESSES = 16
LEAST_PROCESSES = 3
"""A start needs some 65 of the 84 kernels, the others being those of other modes: two are no quicker than it alone."""
PROCESS_BYTES = 2**30
"""Each takes 780 MB, most of it torch and LLVM."""
HELPER = """
import os, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
from octavo_engine.cli import main
sys.exit(main())
"""
"""It ends when its standard input does, which is when the engine ends, however that comes: signals that the engine
ignores are ignored by what it starts."""
PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def num_processes(cpus: int, free_bytes: int) -> int:
    """0 where they would be no help. Half of the free memory is for them: the weights pass through it as well."""
    found = min(cpus, MOST_PROCESSES, free_bytes // 2 // PROCESS_BYTES)
    return found if found >= LEAST_PROCESSES else 0


def architecture_of(device: torch.device) -> str | None:
    """As `compile-kernels` names it; None for what it does not compile for."""
    from octavo_engine.runner.compile_ahead import ARCHITECTURES

    if torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    name = f"sm_{major}{minor}"
    return name if name in ARCHITECTURES else None


def fill_at_start(model: Path, device: torch.device, block_size: int, dtype: str) -> None:
    """`compile_beside`, with what this machine allows."""
    processes = num_processes(available_cpus(), host_memory()[0])
    compile_beside(model, architecture_of(device), block_size, dtype, processes)


def compile_beside(model: Path, architecture: str | None, block_size: int, dtype: str, processes: int) -> None:
    """Fill Triton's folder for this model, a folder with its config.json. Failures are logged."""
    if architecture is None or not processes:
        return
    began = time.monotonic()
    command = [sys.executable, "-c", HELPER, "compile-kernels", str(model)]
    command += ["--architecture", architecture, "--output", triton.knobs.cache.dir]
    command += ["--block-size", str(block_size), "--dtype", dtype]
    # Settings of the server that are in its environment are none of theirs, nor is the device.
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == prebuilt.ENVIRONMENT or not name.startswith(("OCTAVO_", "VLLM_"))
    }
    environment = {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(processes):
            share = ["--share", f"{number}/{processes}"]
            started.append(subprocess.Popen([*command, *share], env=environment, **PIPES))
        for process in started:
            process.wait(max(LIMIT_S - (time.monotonic() - began), 0.0))
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("kernels are compiled one by one: %s", error)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()
    failed = [process.returncode for process in started if process.returncode]
    if failed:
        log.warning("%d of %d processes that compile kernels failed, with %s", len(failed), len(started), failed)
    else:
        log.info("compiled the model's kernels in %.1f s, %d processes", time.monotonic() - began, processes)
