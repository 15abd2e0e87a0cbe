"""What a built image is made of: the size of each layer, and of each thing in it. Called by cluster.py and the tests.

All sizes are those of the files when unpacked, which is what a node's disk and a pull have to carry. The layers lie in
the OCI layout as plain archives, so reading their tables of contents takes a second however large they are.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from dataclasses import dataclass

import images

PACKAGES = "usr/local/lib/python3.12/site-packages/"
# The beginning of a path -> what is there; the first that fits counts.
NAMED = [
    (PACKAGES, ""),
    *((path, "CPython") for path in ("usr/local/lib/python3.12", "usr/local/lib/libpython", "usr/local/bin")),
    *((path, "C compiler") for path in ("usr/lib/gcc", "usr/bin")),
    *((path, "C headers") for path in ("usr/include", "usr/local/include")),
    ("usr/lib", "shared libraries"),
]


@dataclass(frozen=True)
class Layer:
    made_by: str
    size_bytes: int
    parts: dict[str, int]
    """Bytes by package or by kind of file, the largest first."""

    def is_torch(self) -> bool:
        """Whether this is the layer of torch, triton, and what those two require."""
        return "torch" in self.parts

    def is_compiler(self) -> bool:
        """Whether this is the C compiler, which is in the image for triton alone."""
        return "C compiler" in self.parts


def layers(image: str) -> list[Layer]:
    """The image's layers from the bottom up. It must have been built with buildah."""
    with images.locked():
        layout, digest = images.push_to_layout(image)
    manifest = json.loads(images.blob(layout, digest).read_text())
    config = json.loads(images.blob(layout, manifest["config"]["digest"]).read_text())
    made_by = [step["created_by"] for step in config["history"] if not step.get("empty_layer")]
    found = []
    for step, layer in zip(made_by, manifest["layers"], strict=True):
        parts: Counter[str] = Counter()
        with tarfile.open(images.blob(layout, layer["digest"])) as archive:
            for entry in archive:
                if entry.size:
                    parts[_part(entry.name)] += entry.size
        found.append(Layer(_shortened(step), parts.total(), dict(parts.most_common())))
    return found


def table(image: str) -> str:
    """A few lines for people: layers, their largest parts, and the sums that the project has bounds for."""
    found = layers(image)
    lines = [f"{image}  {_mb(sum(layer.size_bytes for layer in found))} unpacked"]
    for layer in found:
        largest = [f"{name} {_mb(size)}" for name, size in layer.parts.items() if size >= 500_000][:6]
        lines.append(f"  {_mb(layer.size_bytes):>9}  {', '.join(largest) or layer.made_by}")
    if any(layer.is_torch() for layer in found):
        lines.append(f"  {_mb(without_torch(found)):>9}  without torch and triton: their layer, and the C compiler")
    return "\n".join(lines)


def without_torch(found: list[Layer]) -> int:
    return sum(layer.size_bytes for layer in found if not layer.is_torch() and not layer.is_compiler())


def _part(path: str) -> str:
    path = path.removeprefix("./").lstrip("/")
    for folder, name in NAMED:
        if path.startswith(folder):
            return name or path.removeprefix(PACKAGES).partition("/")[0]
    return "other files"


def _shortened(step: str) -> str:
    return step.removeprefix("/bin/sh -c ").removeprefix("#(nop) ").strip()[:80]


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"
