"""What is said of an image's build, and what is kept of it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import images
import pytest
import sizes

from cluster import Cluster

BUILDAH = """\
[1/2] STEP 1/3: FROM python AS tools
[1/2] STEP 2/3: RUN apt-get update
--> Using cache 21c48ceb9681
[1/2] STEP 3/3: RUN pip install torch
Collecting torch
[2/2] STEP 1/1: COPY a b
"""
DOCKER = """\
#7 [tools 2/3] RUN apt-get update
#7 CACHED
#8 [tools 3/3] RUN pip install torch
#8 0.512 Collecting torch
"""


@pytest.mark.parametrize("output", [BUILDAH, DOCKER])
def test_only_the_steps_that_take_time_are_told(tmp_path, output):
    told: list[str] = []
    images._run_logged(["printf", "%s", output], tmp_path / "log", told.append, "image engine")

    assert told == ["  image engine: RUN pip install torch"]
    assert (tmp_path / "log").read_text() == output


def test_a_build_that_fails_shows_its_last_words_and_its_log(tmp_path):
    command = ["sh", "-c", "echo no space left; exit 3"]
    with pytest.raises(images.ImageError) as caught:
        images._run_logged(command, tmp_path / "log", print, "image engine")

    assert "no space left" in str(caught.value)
    assert str(tmp_path / "log") in str(caught.value)


def layout_with(folder: Path, *layers: dict[str, bytes]) -> str:
    """An OCI layout with one image of these layers. Returns the manifest's digest."""

    def put(content: bytes) -> str:
        digest = images._sha256(content)
        file = images.blob(folder, digest)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return digest

    def packed(files: dict[str, bytes]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, data in files.items():
                images._add(archive, name, data)
        return buffer.getvalue()

    history = [
        {"created_by": "ENV A=1", "empty_layer": True},
        *({"created_by": f"COPY {n}"} for n in range(len(layers))),
    ]
    config = put(json.dumps({"history": history}).encode())
    digests = [{"digest": put(packed(layer))} for layer in layers]
    manifest = put(json.dumps({"config": {"digest": config}, "layers": digests}).encode())
    entry = {"digest": manifest, "annotations": {images.REF_NAME: "localhost/engine:1"}}
    (folder / "index.json").write_text(json.dumps({"manifests": [entry]}))
    return manifest


def test_a_layer_is_counted_by_what_is_in_it(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    site = sizes.PACKAGES
    root = {"usr/local/lib/python3.12/os.py": b"x" * 10, "usr/lib/libc.so.6": b"x" * 5, "etc/passwd": b"x"}
    torch = {f"{site}torch/__init__.py": b"x" * 1000, f"{site}sympy/core.py": b"x" * 100}
    compiler = {"usr/lib/gcc/cc1": b"x" * 50, "usr/include/stdio.h": b"x" * 7}
    manifest = layout_with(tmp_path / "layout", root, compiler, torch, {f"{site}octavo_engine/cli.py": b"x" * 3})
    monkeypatch.setattr(images, "push_to_layout", lambda image: (tmp_path / "layout", manifest))

    found = sizes.layers("localhost/engine:1")

    assert [layer.made_by for layer in found] == ["COPY 0", "COPY 1", "COPY 2", "COPY 3"]
    assert found[0].parts == {"CPython": 10, "shared libraries": 5, "other files": 1}
    assert found[2].parts == {"torch": 1000, "sympy": 100}
    assert sizes.without_torch(found) == 16 + 3


def test_blobs_that_no_image_names_are_removed(tmp_path):
    manifest = layout_with(tmp_path, {"a": b"1"})
    used = {digest.partition(":")[2] for digest in images._blobs(tmp_path, manifest)}
    (tmp_path / "blobs/sha256" / "0123").write_bytes(b"of an older build")

    images._forget_unused(tmp_path)

    assert {file.name for file in (tmp_path / "blobs/sha256").iterdir()} == used


@pytest.fixture
def image(cluster: Cluster, tmp_path: Path) -> Iterator[str]:
    """An image of one small layer and one that is linked into containerd's store, built anew for each test."""
    (tmp_path / "small").write_bytes(os.urandom(1000))
    (tmp_path / "large").write_bytes(os.urandom(images.CARRIED_BYTES + 1))
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY small large /\n")
    name = "localhost/arrives:1"
    images.build_folder(tmp_path, name, print)
    yield name
    cluster.run(["ctr", "-n", "k8s.io", "images", "rm", "--sync", name])


def collect_garbage(cluster: Cluster) -> None:
    lease = cluster.run(["ctr", "-n", "k8s.io", "leases", "create"]).stdout.strip()
    cluster.run(["ctr", "-n", "k8s.io", "leases", "rm", "--sync", lease])


@pytest.mark.cluster
@pytest.mark.slow
def test_an_image_arrives_although_containerd_collects_a_blob_of_it_before_it_has_a_name(
    cluster: Cluster, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = []

    def import_late(*arguments: Any) -> subprocess.CompletedProcess[bytes]:
        if not codes:
            collect_garbage(cluster)
        done = real(*arguments)
        codes.append(done.returncode)
        return done

    real = images._import
    monkeypatch.setattr(images, "_import", import_late)

    cluster.load(image, print)

    assert [bool(code) for code in codes] == [True, False]
    assert images.is_loaded(image, cluster.inside)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_build_of_which_only_small_layers_are_new_arrives_while_containerd_collects_garbage_all_the_time(
    cluster: Cluster, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "CARRIED_BYTES", 2 * images.CARRIED_BYTES)
    monkeypatch.setattr(images, "IMPORT_PAUSES_S", ())
    loaded = threading.Event()

    def collect() -> None:
        while not loaded.is_set():
            collect_garbage(cluster)

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        cluster.load(image, print)
    finally:
        loaded.set()
        collector.join()

    assert images.is_loaded(image, cluster.inside)
