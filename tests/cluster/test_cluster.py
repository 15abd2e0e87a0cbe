"""The cluster itself: it comes up, runs a pod, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import machine
import programs
import pytest

import cluster as tool
from cluster import Cluster, ClusterError
from waiting import least_below

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def scratch() -> Iterator[Cluster]:
    """A cluster of this test's own, not started."""
    if problems := tool.problems():
        pytest.skip(" ".join(map(str, problems)))
    if not all(programs.is_built(name) for name in programs.NEEDED):
        pytest.skip("The programs are not built yet. Run: python tests/cluster/cluster.py build")
    own = Cluster(f"scratch-{os.getpid()}")
    yield own
    own.down()
    Path(f"{own.state}.lock").unlink()


def test_down_leaves_the_machine_as_it_was(scratch: Cluster) -> None:
    before = tool.footprint()
    scratch.up(gpus=2)
    scratch.run(["ip", "link", "show", "node0"])
    allocatable = scratch.kubectl("get", "node", "node1", "-o", r"jsonpath={.status.allocatable.nvidia\.com/gpu}")

    scratch.down()

    assert allocatable == "2"
    assert scratch.leftovers() == []
    # Others may start and stop clusters meanwhile: only what names this one or is nobody's counts.
    assert {trace for trace in tool.footprint() - before if "octavo-" not in trace or scratch.cgroup in trace} == set()


def test_up_clears_away_what_a_crash_left(scratch: Cluster) -> None:
    scratch.up()
    first = scratch.kubectl("get", "namespace", "default", "-o", "jsonpath={.metadata.uid}")
    os.kill(int((scratch.state / "unshare").read_text().split()[0]), signal.SIGKILL)
    while scratch.is_up():
        time.sleep(0.05)
    assert scratch.leftovers() != []

    scratch.up()

    assert scratch.kubectl("get", "namespace", "default", "-o", "jsonpath={.metadata.uid}") != first


def test_a_start_that_does_not_get_ready_is_tried_once_more_and_what_it_waited_for_is_kept(
    scratch: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(tool.NODE / "pause.c", tmp_path)
    (tmp_path / "start.sh").write_text("echo waiting for a node; sleep 1000\n")
    real = scratch._start

    def start(gpus: int) -> None:
        with monkeypatch.context() as first:
            if not starts:
                first.setattr(tool, "NODE", tmp_path)
                first.setattr(tool, "UP_TIMEOUT_S", 1.0)
            starts.append(gpus)
            real(gpus)

    starts: list[int] = []
    monkeypatch.setattr(scratch, "_start", start)

    scratch.up()

    assert starts == [0, 0]
    assert scratch.kubectl("get", "nodes", "-o", "name") == "node/node1\n"
    kept = machine.cache_dir() / "test-logs" / f"{scratch.name}-not-ready"
    assert (kept / "start.log").read_text() == "waiting for a node\n"
    told = capsys.readouterr().err
    assert "waiting for a node" in told
    assert f"Its logs are kept in {kept}" in told
    shutil.rmtree(kept)


def test_up_of_a_running_cluster_changes_nothing(scratch: Cluster) -> None:
    scratch.up()
    before = scratch.kubectl("get", "namespace", "default", "-o", "jsonpath={.metadata.uid}")

    assert least_below(1.0, scratch.up) < 1.0
    assert scratch.kubectl("get", "namespace", "default", "-o", "jsonpath={.metadata.uid}") == before


def test_the_api_server_is_reached_from_outside_with_the_kubeconfig(scratch: Cluster) -> None:
    scratch.up()
    kubectl = programs.folder("k8s") / "kubectl"

    with os.popen(f"{kubectl} --kubeconfig {scratch.kubeconfig} get nodes -o name") as output:
        assert output.read() == "node/node1\n"


def test_a_command_of_a_cluster_that_is_down_says_so(scratch: Cluster) -> None:
    with pytest.raises(ClusterError, match="is not up"):
        scratch.kubectl("get", "nodes")


@pytest.mark.parametrize("name", ["", "-a", "A", "a/b", "x" * 33])
def test_a_name_that_cannot_be_a_folder_and_a_cgroup_is_refused(name: str) -> None:
    with pytest.raises(ClusterError, match="name has 1 to 32"):
        Cluster(name)


def test_check_says_what_to_do_about_a_full_disk() -> None:
    problems = machine.check(go_needed=False, disk_needed_bytes=1 << 60)

    disk = next(problem for problem in problems if problem.code == "disk")
    assert "OCTAVO_CACHE" in disk.fix


def test_check_says_that_version_2_cgroups_are_not_supported_yet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)

    (problem,) = [p for p in machine.check(go_needed=False, disk_needed_bytes=0) if p.code == "cgroup"]

    assert "version 2 cgroups" in problem.message
    assert "CLUSTER=current make demo" in problem.fix


def test_check_says_that_an_ordinary_user_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "geteuid", lambda: 1000)

    problems = {problem.code: problem for problem in machine.check(go_needed=True, disk_needed_bytes=0)}

    assert "root" in problems["root"].message


def test_check_names_each_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.PACKAGES, "no-such-package", "no-such-command")

    assert machine.missing_packages()[-1] == "no-such-package"
    with contextlib.suppress(StopIteration):
        packages = next(p for p in machine.check(go_needed=False, disk_needed_bytes=0) if p.code == "packages")
        assert "no-such-package" in packages.message
