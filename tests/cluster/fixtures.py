"""Pytest fixtures over the cluster; tests/conftest.py and tests/e2e/conftest.py import them.

One pytest run holds up to two clusters: one of tests/e2e, which install the chart, and one of all others. Clusters have
numbered slots, so that two runs on one machine do not share one; a slot is held by a lock that ends with its process,
and what a killed run left in it is cleaned up by the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import images
import machine
import programs
import pytest

from cluster import Cluster, problems

SLOTS = 8
GPUS = 4


def built(component: str) -> Path:
    """The folder of a built component's programs. Skips, or fails as a cluster that cannot be does."""
    if not programs.is_built(component):
        _refuse(f"Not built yet: {component}. Run: python tests/cluster/cluster.py build {component}")
    return programs.folder(component)


@pytest.fixture(scope="session")
def helm() -> str:
    return f"{built('helm')}/helm"


@pytest.fixture(scope="session")
def promtool() -> str:
    return f"{built('promtool')}/promtool"


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A running cluster with four make-believe GPUs. Skips, with the reason, where there can be none."""
    reasons = [str(problem) for problem in problems()]
    if unbuilt := [name for name in programs.NEEDED if not programs.is_built(name)]:
        reasons.append(f"Not built yet: {' '.join(unbuilt)}. Run: python tests/cluster/cluster.py build")
    if reasons:
        _refuse(" ".join(reasons))
    with _slot() as name:
        running = Cluster(name)
        running.down()
        running.up(gpus=GPUS)
        yield running
        if request.session.testsfailed:
            kept = machine.cache_dir() / "test-logs" / name
            running.save_logs(kept)
            print(f"\nThe cluster's logs, events and objects are kept in {kept}")
        running.down()


@pytest.fixture(scope="session")
def loaded_images(cluster: Cluster) -> dict[str, str]:
    """The project's images of this checkout, on the node: Dockerfile target -> image name."""
    for target in images.TARGETS:
        images.build(target, print)
        cluster.load(images.name_of(target), print)
    return {target: images.name_of(target) for target in images.TARGETS}


def _refuse(reason: str) -> NoReturn:
    """OCTAVO_REQUIRE_CLUSTER=1 makes a failure of it, for machines that are known to carry a cluster."""
    (pytest.fail if os.environ.get("OCTAVO_REQUIRE_CLUSTER") else pytest.skip)(reason)


@contextlib.contextmanager
def _slot() -> Iterator[str]:
    """The name of a cluster that no other test run holds, until the block ends."""
    folder = machine.cache_dir() / "clusters"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(SLOTS):
        name = f"octavo-test-{number}"
        with (folder / f"{name}.held").open("w") as handle, contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield name
            return
    pytest.fail(f"{SLOTS} test runs hold a cluster on this machine already: wait for one of them to end")
