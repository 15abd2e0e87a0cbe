"""The CustomResourceDefinitions of projects whose objects the operator makes, as their own Go modules ship them.

Called by cluster.py (`build definitions`), for the tests that hold our objects against the real schemas. They are kept
in the cache and not in the checkout: they are other people's. Version and content are pinned.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from machine import cache_dir, make_once

NAME = "definitions"


@dataclass(frozen=True)
class Module:
    path: str
    version: str
    sum: str
    """As in a go.sum."""
    files: tuple[str, ...]


_MONITORING = "example/prometheus-operator-crd/monitoring.coreos.com_"
MODULES = (
    Module(
        "sigs.k8s.io/gateway-api",
        "v1.5.0",
        "h1:duoo14Ky/fJXpjpmyMISE2RTBGnfCg8zICfTYLTnBJA=",
        ("config/crd/standard/gateway.networking.k8s.io_httproutes.yaml",),
    ),
    Module(
        "sigs.k8s.io/gateway-api-inference-extension",
        "v1.2.0",
        "h1:7H+ijrUImnW2ubcTakNgV723xDIdQx1Umv4vDVB+tTk=",
        ("config/crd/bases/inference.networking.k8s.io_inferencepools.yaml",),
    ),
    Module(
        "github.com/kedacore/keda/v2",
        "v2.21.0",
        "h1:R6z2HZvstK4RLUMxroNACzBj74xGxt3kG59b5Xc+Xps=",
        ("config/crd/bases/keda.sh_scaledobjects.yaml",),
    ),
    Module(
        "github.com/prometheus-operator/prometheus-operator",
        "v0.85.0",
        "h1:M5xLCLEoaW2IJfnuCwFzzpL+jSVQu3KGT84Pye+fW8s=",
        tuple(f"{_MONITORING}{kind}.yaml" for kind in ("podmonitors", "prometheuses", "prometheusrules")),
    ),
)


def folder() -> Path:
    """Where these versions are, or will be: one file for each definition."""
    return cache_dir() / "programs" / f"{NAME}-{hashlib.sha256(repr(MODULES).encode()).hexdigest()[:12]}"


def are_there() -> bool:
    return folder().is_dir()


def fetch(say: Callable[[str], None]) -> None:
    """Downloads what is not there yet, about 22 MB, of which Go keeps a copy."""

    def make(target: Path) -> None:
        for module in MODULES:
            say(f"fetching {module.path} {module.version}")
            source = _download(module)
            for file in module.files:
                shutil.copyfile(source / file, target / Path(file).name)

    make_once(folder(), make)


def _download(module: Module) -> Path:
    with tempfile.TemporaryDirectory() as nowhere:  # in a module of its own, Go would add it to that
        done = subprocess.run(
            ["go", "mod", "download", "-json", f"{module.path}@{module.version}"],
            cwd=nowhere,
            env=os.environ | {"GOWORK": "off", "GOFLAGS": "-mod=mod"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    told = json.loads(done.stdout)
    if told["Sum"] != module.sum:
        raise ValueError(f"{module.path} {module.version} is {told['Sum']}, expected {module.sum}")
    return Path(told["Dir"])
