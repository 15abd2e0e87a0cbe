"""Kernels that were compiled ahead, and a count of those that were not.

Triton keeps what it compiles in a folder, under a hash of the source, the options and its own version. `use` puts a
read-only folder of the same form in front of it (`octavo compile-kernels` writes one, images carry one), so that a pod
that starts finds its kernels compiled. Where none is there, several processes compile them (runner/compile_beside.py).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import triton
from triton.runtime.cache import FileCacheManager

log = logging.getLogger("octavo.engine")

ENVIRONMENT = "OCTAVO_PREBUILT_KERNELS"
"""Folders of prebuilt kernels, separated like a PATH."""
FEW = 4
"""Kernels that a start may lack and compiles itself: half a second each, and processes take seconds to start."""


class KernelCache(FileCacheManager):  # type: ignore[misc]  # triton has no types
    """Triton's own folder and, for what it lacks, the prebuilt ones.

    Its own comes first: where a prebuilt file does not fit this machine (a C library that is older), Triton builds it
    again, and must find that the next time.
    """

    on_miss: ClassVar[Callable[[], None] | None] = None
    missed: ClassVar[int] = 0
    """See `filling`."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        self._prebuilt = [] if override or dump else [folder / key for folder in folders() if (folder / key).is_dir()]
        super().__init__(key, override, dump)

    def get_file(self, filename: str) -> str | None:
        found: str | None = super().get_file(filename)
        prebuilt = (folder / filename for folder in self._prebuilt)
        return found or next((str(file) for file in prebuilt if file.exists()), None)

    def get_group(self, filename: str) -> dict[str, str] | None:
        # Triton writes the members' absolute paths: in a folder that moved they are known by name.
        listing = self.get_file(f"__grp__{filename}")
        if listing is None and (fill := KernelCache.on_miss) is not None:
            KernelCache.missed += 1
            if KernelCache.missed > FEW:
                KernelCache.on_miss = None
                fill()
                listing = self.get_file(f"__grp__{filename}")
        if listing is None:
            return None
        members = json.loads(Path(listing).read_text()).get("child_paths") or {}
        here = Path(listing).parent
        return {name: str(here / name) for name in members if (here / name).exists()}


def folders() -> list[Path]:
    return [Path(folder) for folder in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if folder]


class Compilations:
    """Counts what Triton compiles in this process, as opposed to what it finds compiled."""

    def __init__(self) -> None:
        self.count = 0
        self.ready = False
        """While set, a request waits for each compilation."""
        self.late = 0
        """Compilations that a request waited for; each is logged."""

    def __call__(self, *, src: Any, cache_hit: bool, times: Any, **_: Any) -> None:
        if cache_hit:
            return
        self.count += 1
        if self.ready:
            self.late += 1
            log.warning("compiled the kernel %s while requests waited; please report the model and flags", src.name)


@contextmanager
def filling(fill: Callable[[], None]) -> Iterator[None]:
    """Within, once FEW kernels are in no folder, the next one has `fill` called and is looked for again; not later."""
    KernelCache.on_miss, KernelCache.missed = fill, 0
    try:
        yield
    finally:
        KernelCache.on_miss = None


def use() -> Compilations:
    """From here on Triton looks into the prebuilt folders first, and what it compiles is counted."""
    triton.knobs.cache.manager_class = KernelCache
    compilations = Compilations()
    triton.knobs.compilation.listener = compilations
    return compilations
