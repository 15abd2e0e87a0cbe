"""What a source holds, before anything of it is here: files with their sizes and digests. No I/O."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

TEXT = (".json", ".jinja", ".txt")
WEIGHTS = (".safetensors",)
MANIFEST = "octavo-manifest.json"


@dataclass(frozen=True)
class RemoteFile:
    name: str
    size: int
    digest: str | None
    """sha256:…, git:… (the Hub's name for a small file) or etag:…; None where the source tells none."""
    request: Callable[[], tuple[str, dict[str, str]]] = field(compare=False)
    """URL and headers of a download. Asked for anew at each try, as signed URLs expire."""


@dataclass(frozen=True)
class Listing:
    source: str
    revision: str | None
    """The commit, where the source has commits."""
    files: tuple[RemoteFile, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def key(self) -> str:
        """Names this content and no other: the source, readable, and a digest of its commit or of all its files."""
        content = [[f.name, f.size, f.digest] for f in sorted(self.files, key=lambda f: f.name)]
        text = json.dumps([self.source, self.revision, content])
        return f"{slug(self.source)}@{hashlib.sha256(text.encode()).hexdigest()[:24]}"

    def manifest(self) -> dict[str, Any]:
        return {
            "version": 1,
            "source": self.source,
            "revision": self.revision,
            "files": [{"name": f.name, "size": f.size, "digest": f.digest} for f in self.files],
        }


def slug(source: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "--", source)[:120].strip("-.")


def wanted(names: Mapping[str, Any], *, weights: bool) -> list[str]:
    """Of a source's files, those that a model is loaded from: nothing in folders, no second copy of the weights."""
    suffixes = (*TEXT, *(WEIGHTS if weights else ()))
    found = [name for name in names if "/" not in name and name.endswith(suffixes) and name != MANIFEST]
    others = [n for n in found if n.endswith(WEIGHTS) and not n.startswith("consolidated")]
    return sorted(name for name in found if not (others and name.startswith("consolidated")))
