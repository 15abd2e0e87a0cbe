"""`octavo collect-env`: what a report of an error should have. Reads; changes nothing; tells no secret."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping

from octavo_engine import __version__
from octavo_engine.host import available_cpus, host_memory

PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface_hub", "aiohttp", "uvloop", "pydantic",
    "msgspec", "jinja2", "prometheus_client", "numpy",
)  # fmt: skip
PREFIXES = (
    "OCTAVO_",
    "VLLM_",
    "HF_",
    "HUGGING_FACE_",
    "CUDA_",
    "NVIDIA_",
    "NCCL_",
    "TORCH_",
    "TRITON_",
    "OMP_",
    "LD_LIBRARY_PATH",
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_LOGIN = re.compile(r"//[^/@\s]*@")
TIMEOUT_S = 10


def describe(environ: Mapping[str, str]) -> str:
    """Lines of `name: value`, in groups."""
    free, total = host_memory()
    groups: dict[str, dict[str, str]] = {
        "Octavo": {"version": __version__, "python": f"{platform.python_version()} ({sys.executable})"},
        "Machine": {
            "system": platform.platform(),
            "cores this process may use": f"{available_cpus()} of {os.cpu_count()}",
            "memory": f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f} GiB",
            "container": "yes" if os.path.exists("/.dockerenv") or "KUBERNETES_SERVICE_HOST" in environ else "no sign",
        },
        "GPU": _gpus(),
        "Packages": {name: _version(name) for name in PACKAGES},
        "Variables": _variables(environ),
    }
    return "\n\n".join(
        title + "\n" + "\n".join(f"  {name}: {value}" for name, value in lines.items())
        for title, lines in groups.items()
    )


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    found = {
        name: "(set)" if _SECRET.search(name) else _LOGIN.sub("//…@", value)
        for name, value in sorted(environ.items())
        if name.startswith(PREFIXES)
    }
    return found or {"none": "of " + ", ".join(PREFIXES)}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> dict[str, str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"nvidia-smi": "not found"}
    query = "--query-gpu=name,memory.total,memory.used,driver_version,compute_cap"
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"failed: {error}"}
    return {str(index): line for index, line in enumerate(done.stdout.strip().splitlines())}
