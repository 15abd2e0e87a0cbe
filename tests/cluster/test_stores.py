"""Which stores of images are kept from one cluster to the next, and which images in them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import images
import machine
import pytest

import cluster as tool

DAY_S = 24 * 3600
NOW = 1_000_000_000.0


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    """Three stores, the last of which was used a day after the one before it."""
    for number, days in enumerate((3.0, 1.0, 0.0)):
        store = tmp_path / str(number)
        (store / "blobs").mkdir(parents=True)
        os.utime(store, (NOW - days * DAY_S,) * 2)
    return tmp_path


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_a_store_that_nobody_used_for_days_goes_and_one_that_a_cluster_has_stays(stores, monkeypatch):
    monkeypatch.setattr(machine, "disk_used", lambda folder: 0.1)
    with tool._lock_store(stores, 0):
        tool._forget_unused_stores(stores, NOW)
        held = left(stores)
    tool._forget_unused_stores(stores, NOW)

    assert held == ["0", "1", "2"]
    assert left(stores) == ["1", "2"]


def test_on_a_full_disk_stores_go_until_there_is_room_those_unused_for_longest_first(stores, monkeypatch):
    monkeypatch.setattr(machine, "disk_used", lambda folder: 0.75 + 0.03 * len(left(folder)))
    with tool._lock_store(stores, 2):
        tool._forget_unused_stores(stores, NOW - 2.5 * DAY_S)
        room = left(stores)
        monkeypatch.setattr(machine, "disk_used", lambda folder: 0.9)
        tool._forget_unused_stores(stores, NOW - 2.5 * DAY_S)

    assert room == ["2"], "two had to go before there was room"
    assert left(stores) == ["2"], "what a running cluster has is never taken from it"


def test_a_store_that_is_taken_is_no_longer_the_one_unused_for_longest(monkeypatch, tmp_path):
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "disk_used", lambda folder: 0.1)
    old = tmp_path / "stores" / "0"
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    first, lock = tool._take_store()
    with lock:
        second, other = tool._take_store()
        other.close()

    assert (first, second) == (old, tmp_path / "stores" / "1"), "two clusters side by side have two stores"
    assert left(tmp_path / "stores") == ["0", "1"]


CTR = """#!{python}
import json, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[3:]) + "\\n")
if sys.argv[3:] == ["images", "ls"]:
    print("REF TYPE DIGEST")
    for name, digest in {images!r}.items():
        print(name, "x", digest)
"""


@pytest.mark.parametrize(
    ("there", "removed"),
    [
        ({"localhost/octavo-engine:dev": "d2", "sha256:c1": "d1", "sha256:c2": "d2"}, ["sha256:c1"]),
        ({"localhost/octavo-engine:dev": "d2", "localhost/pause:1": "d1", "sha256:c1": "d1"}, []),
    ],
)
def test_builds_that_have_lost_their_name_are_forgotten(tmp_path, there, removed):
    log = tmp_path / "log"
    program = tmp_path / "ctr"
    program.write_text(CTR.format(python=sys.executable, log=str(log), images=there))
    program.chmod(0o755)
    images._forget_older_builds(lambda command: [str(program), *command[1:]])
    asked = log.read_text().splitlines()

    assert asked[1:] == ([f'["images", "rm", "--sync", "{removed[0]}"]'] if removed else [])
