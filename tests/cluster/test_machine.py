"""What is made once for all checkouts of a machine: built programs and fetched definitions."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from machine import make_once


def test_of_several_at_once_one_makes_it_and_the_others_find_it(tmp_path: Path) -> None:
    together = threading.Barrier(4)
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "program").write_text("whole")

    def want(_: int) -> str:
        together.wait()
        make_once(tmp_path / "programs" / "k8s", make)
        return (tmp_path / "programs" / "k8s" / "program").read_text()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(want, range(4)))

    assert found == ["whole"] * 4
    assert len(made) == 1


def test_what_fails_half_way_is_not_taken_for_the_whole_and_is_made_anew(tmp_path: Path) -> None:
    target = tmp_path / "k8s"

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        make_once(target, fail)
    assert not target.exists()

    make_once(target, lambda folder: (folder / "program").touch())

    assert [path.name for path in target.iterdir()] == ["program"]
