"""Build the cluster's programs from the Go modules in go/, once per version, into the cache. Called by cluster.py.

go/*/go.mod and go.sum pin every version and its content. A build is kept under a key made of those files and of the
flags, so a change of either builds anew and leaves the old one for whoever still runs it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from machine import cache_dir, make_once

MODULES = Path(__file__).resolve().parent / "go"
STATIC_FLAGS = ("-trimpath", "-buildvcs=false")


@dataclass(frozen=True)
class Component:
    """One Go module. The programs named in `packages` land beside each other in the component's folder."""

    name: str
    packages: tuple[str, ...]
    tags: str = ""

    def programs(self) -> list[str]:
        return [_program(package, self.name) for package in self.packages]


COMPONENTS = {
    c.name: c
    for c in (
        Component(
            "k8s",
            (
                "k8s.io/kubernetes/cmd/kube-apiserver",
                "k8s.io/kubernetes/cmd/kube-controller-manager",
                "k8s.io/kubernetes/cmd/kube-scheduler",
                "k8s.io/kubernetes/cmd/kubelet",
                "k8s.io/kubernetes/cmd/kube-proxy",
                "k8s.io/kubernetes/cmd/kubectl",
                "./fake-gpu",
            ),
        ),
        Component("etcd", ("go.etcd.io/etcd/server/v3",)),
        Component("coredns", (".",)),
        Component("helm", ("helm.sh/helm/v3/cmd/helm",)),
        # Without the tags every cloud's service discovery would be built in.
        Component(
            "prometheus", ("github.com/prometheus/prometheus/cmd/prometheus",), "remove_all_sd,enable_kubernetes_sd"
        ),
        # Of the same version; apart, so that who wants one of them builds one.
        Component("promtool", ("github.com/prometheus/prometheus/cmd/promtool",), "remove_all_sd,enable_kubernetes_sd"),
        Component("kwok", ("sigs.k8s.io/kwok/cmd/kwok",)),
    )
}
NEEDED = ("k8s", "etcd", "coredns")
FOR_DEMO = (*NEEDED, "helm")


def folder(name: str) -> Path:
    """Where this version of the component's programs is, or will be."""
    component = COMPONENTS[name]
    digest = hashlib.sha256(repr((component, STATIC_FLAGS)).encode())
    for path in sorted(p for p in (MODULES / name).rglob("*") if p.is_file()):
        digest.update(path.relative_to(MODULES).as_posix().encode() + b"\0" + path.read_bytes())
    return cache_dir() / "programs" / f"{name}-{digest.hexdigest()[:12]}"


def is_built(name: str) -> bool:
    return folder(name).is_dir()


def search_path() -> str:
    """The built programs' folders, as a PATH that goes before the machine's."""
    return os.pathsep.join(str(folder(name)) for name in COMPONENTS if is_built(name))


def build(names: tuple[str, ...], say: Callable[[str], None]) -> None:
    """Build what is not there yet. Go's own caches stay where Go keeps them."""
    for name in names:
        make_once(folder(name), functools.partial(_build, COMPONENTS[name], say))


def _build(component: Component, say: Callable[[str], None], target: Path) -> None:
    say(f"building {component.name}: {', '.join(component.programs())}")
    started = time.monotonic()
    tags = ["-tags", component.tags] if component.tags else []
    linker_flags = " ".join(["-s", "-w", *_version_flags(component)])
    for packages, out in _outputs(component, target):
        subprocess.run(
            ["go", "build", *STATIC_FLAGS, *tags, "-ldflags", linker_flags, "-o", out, *packages],
            cwd=MODULES / component.name,
            # GOWORK and GOFLAGS of the person who runs this must not change what is built.
            env=os.environ | {"CGO_ENABLED": "0", "GOWORK": "off", "GOFLAGS": "-mod=readonly"},
            check=True,
        )
    say(f"built {component.name} in {time.monotonic() - started:.0f} s")


def _outputs(component: Component, target: Path) -> list[tuple[list[str], str]]:
    # Go names a program after its package's last element, which says nothing for a module's root ("v3", ".").
    odd = [p for p in component.packages if _program(p, component.name) != p.rpartition("/")[2]]
    rest = [p for p in component.packages if p not in odd]
    outputs = [([package], str(target / component.name)) for package in odd]
    return outputs + ([(rest, f"{target}/")] if rest else [])


def _program(package: str, component: str) -> str:
    last = package.rsplit("/", 1)[-1]
    return component if last == "." or re.fullmatch(r"v\d+", last) else last


def _version_flags(component: Component) -> list[str]:
    """Kubernetes learns its version from the linker; without it, version checks fail on v0.0.0."""
    if component.name != "k8s":
        return []
    found = re.search(r"k8s\.io/kubernetes v((\d+)\.(\d+)\.\d+)", (MODULES / "k8s/go.mod").read_text())
    assert found, "go/k8s/go.mod requires k8s.io/kubernetes"
    version, major, minor = found.groups()
    prefix = "-X k8s.io/component-base/version"
    return [f"{prefix}.gitVersion=v{version}", f"{prefix}.gitMajor={major}", f"{prefix}.gitMinor={minor}"]
