"""Models in a store are whole or not there: with a hub that is slow, cut, corrupt or gone, and with killed pods."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from hub import COMMIT, Hub, running_hub, set_faults
from octavo_engine.status import FailureCode
from octavo_engine.store import disk, transfer
from octavo_engine.store.disk import NoRoomError, Store
from octavo_engine.store.listing import MANIFEST, Listing, RemoteFile, wanted
from octavo_engine.store.s3 import Bucket, list_folder

WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "model-1.safetensors": WEIGHTS,
    "model-2.safetensors": WEIGHTS[::-1],
    "README.md": b"never asked for",
}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "hub"
    (folder / "org/name").mkdir(parents=True)
    for name, content in FILES.items():
        (folder / "org/name" / name).write_bytes(content)
    with running_hub(folder) as server:
        yield server


def start(hub: Hub, store: Path, *flags: str, model: str = "org/name", **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "octavo_engine.cli", "download", model, f"--model-store={store}", *flags]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(store.parent / "home"), **more}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def download(hub: Hub, store: Path, *flags: str, model: str = "org/name", **more: str) -> tuple[int, str, str]:
    process = start(hub, store, *flags, model=model, **more)
    out, errors = process.communicate(timeout=90)
    return process.returncode, out.strip(), errors


def assert_whole(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {*FILES, MANIFEST} - {"README.md"}
    for name in names - {MANIFEST}:
        assert (folder / name).read_bytes() == FILES[name], name


def whole_models(store: Path) -> list[Path]:
    return list((store / "models").iterdir()) if (store / "models").exists() else []


def gets(hub: Hub, suffix: str = ".safetensors") -> list[str]:
    return [line for line in hub.requests() if "GET" in line and suffix in line]


def test_a_model_is_kept_under_its_content_with_a_manifest(hub: Hub, tmp_path: Path) -> None:
    status, path, errors = download(hub, tmp_path / "store")

    assert status == 0, errors
    assert_whole(Path(path))
    manifest = json.loads((Path(path) / MANIFEST).read_text())
    assert manifest["revision"] == COMMIT
    assert {f["name"]: f["digest"] for f in manifest["files"]}["model-1.safetensors"] == (
        f"sha256:{hashlib.sha256(WEIGHTS).hexdigest()}"
    )


def test_a_second_time_nothing_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    first = download(hub, tmp_path / "store")[1]
    asked = len(gets(hub))

    assert download(hub, tmp_path / "store")[1] == first
    assert len(gets(hub)) == asked


def test_a_killed_download_is_gone_on_with_and_nothing_torn_is_there_between(hub: Hub, tmp_path: Path) -> None:
    store = tmp_path / "store"
    set_faults(hub, bytes_per_s=600_000)
    for kill in range(3):
        process = start(hub, store)
        _wait(lambda kill=kill: _partial(store) > (kill + 1) * 300_000, 60)  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert whole_models(store) == []
    before = _partial(store)
    set_faults(hub)
    status, path, errors = download(hub, store)

    assert status == 0, errors
    assert_whole(Path(path))
    resumed = [int(line.split("bytes=")[1].rstrip("-")) for line in gets(hub)[-2:] if "bytes=" in line]
    assert sum(resumed) >= before - 8 * transfer.CHUNK
    assert before > 800_000


def test_answers_that_are_all_cut_short_still_make_a_whole_model(hub: Hub, tmp_path: Path) -> None:
    set_faults(hub, cut_after=300_000)
    status, path, errors = download(hub, tmp_path / "store")

    assert status == 0, errors
    assert_whole(Path(path))
    assert len(gets(hub)) >= 8


def test_a_file_that_arrives_damaged_is_thrown_away_and_fetched_again(hub: Hub, tmp_path: Path) -> None:
    set_faults(hub, damage=2)
    status, path, errors = download(hub, tmp_path / "store")

    assert status == 0, errors
    assert_whole(Path(path))
    assert len(gets(hub)) == 4


def test_a_source_that_only_damages_is_named_and_nothing_of_it_is_kept(hub: Hub, tmp_path: Path) -> None:
    set_faults(hub, damage=1000)
    log = tmp_path / "termination"
    status, _, errors = download(hub, tmp_path / "store", f"--termination-log={log}")

    assert status == FailureCode.WEIGHTS_CORRUPT.exit_status
    assert "arrived damaged" in errors
    assert json.loads(log.read_text())["code"] == "WEIGHTS_CORRUPT"
    assert whole_models(tmp_path / "store") == []


def test_a_download_that_stands_still_ends_as_stalled_and_can_be_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    set_faults(hub, hang=True)
    status, _, errors = download(hub, tmp_path / "store", "--startup-stall-s=2")
    set_faults(hub)

    assert status == FailureCode.DOWNLOAD_STALLED.exit_status, errors
    assert download(hub, tmp_path / "store")[0] == 0


def test_several_at_once_download_once_and_all_get_it(hub: Hub, tmp_path: Path) -> None:
    set_faults(hub, bytes_per_s=1_500_000)
    processes = [start(hub, tmp_path / "store") for _ in range(3)]
    ends = [process.communicate(timeout=90) for process in processes]

    assert [process.returncode for process in processes] == [0, 0, 0], ends
    assert len({out for out, _ in ends}) == 1
    assert len(gets(hub)) == 2
    assert_whole(Path(ends[0][0].strip()))


def test_when_the_one_that_downloads_is_killed_another_goes_on(hub: Hub, tmp_path: Path) -> None:
    set_faults(hub, bytes_per_s=700_000)
    first = start(hub, tmp_path / "store")
    _wait(lambda: _partial(tmp_path / "store") > 300_000, 60)
    second = start(hub, tmp_path / "store")
    time.sleep(1.0)
    first.kill()
    first.communicate()
    out, errors = second.communicate(timeout=90)

    assert second.returncode == 0, errors
    assert_whole(Path(out.strip()))
    assert any("bytes=" in line for line in gets(hub))


def test_without_the_hub_what_a_branch_was_last_is_served(hub: Hub, tmp_path: Path) -> None:
    first = download(hub, tmp_path / "store")[1]
    set_faults(hub, refuse=503)

    assert download(hub, tmp_path / "store")[:2] == (0, first)
    assert download(hub, tmp_path / "store", "--revision=other")[0] == FailureCode.DOWNLOAD_FAILED.exit_status


def test_a_commit_that_is_there_needs_no_hub_at_all(hub: Hub, tmp_path: Path) -> None:
    download(hub, tmp_path / "store", f"--revision={COMMIT}")
    asked = len(hub.requests())

    assert download(hub, tmp_path / "store", f"--revision={COMMIT}")[0] == 0
    assert len(hub.requests()) == asked


def test_another_commit_is_another_folder_and_the_first_stays_whole(hub: Hub, tmp_path: Path) -> None:
    first = download(hub, tmp_path / "store")[1]
    (hub.folder / "org/name/commit").write_text("f" * 40)
    (hub.folder / "org/name/tokenizer.json").write_bytes(b'{"a": 1}')
    second = download(hub, tmp_path / "store")[1]

    assert first != second
    assert_whole(Path(first))
    assert (Path(second) / "tokenizer.json").read_bytes() == b'{"a": 1}'


def test_a_gated_model_without_a_token_says_where_to_ask(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "org/name/gated").touch()
    status, _, errors = download(hub, tmp_path / "store")

    assert status == FailureCode.MODEL_GATED.exit_status
    assert "accept its terms" in errors
    assert download(hub, tmp_path / "store", HF_TOKEN="right")[0] == 0


S3 = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}


def test_a_bucket_is_a_source_too(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "bucket/models").mkdir(parents=True)
    (hub.folder / "org/name").rename(hub.folder / "bucket/models/m")
    set_faults(hub, cut_after=400_000)
    status, path, errors = download(
        hub, tmp_path / "store", model="s3://bucket/models/m", AWS_ENDPOINT_URL=hub.url, **S3
    )

    assert status == 0, errors
    assert_whole(Path(path))
    assert any("X-Amz-Signature=" in line for line in gets(hub))


def test_a_refusing_bucket_is_named_with_its_variables(hub: Hub, tmp_path: Path) -> None:
    set_faults(hub, refuse=403)
    status, _, errors = download(hub, tmp_path / "store", model="s3://bucket/m", AWS_ENDPOINT_URL=hub.url, **S3)

    assert status == FailureCode.MODEL_GATED.exit_status
    assert "AWS_SECRET_ACCESS_KEY" in errors


def test_urls_are_signed_as_amazon_documents_it() -> None:
    # The example of "Authenticating Requests: Using Query Parameters (AWS Signature Version 4)", but for its lifetime.
    bucket = Bucket("examplebucket", None, "us-east-1", "AKIAIOSFODNN7EXAMPLE",
                    "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", None)  # fmt: skip
    signed = bucket.url("test.txt", {}, datetime(2013, 5, 24, tzinfo=UTC))
    query = {name: values[0] for name, values in parse_qs(urlsplit(signed).query).items()}

    assert urlsplit(signed).netloc == "examplebucket.s3.us-east-1.amazonaws.com"
    assert query["X-Amz-Credential"] == "AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request"
    assert query["X-Amz-Date"] == "20130524T000000Z"
    assert len(query["X-Amz-Signature"]) == 64
    assert "X-Amz-Signature" not in Bucket("b", None, "r", None, None, None).url("k", {}, datetime.now(UTC))


def test_a_bucket_of_many_pages_is_read_to_its_end() -> None:
    def get(url: str) -> bytes:
        page = parse_qs(urlsplit(url).query).get("continuation-token", ["0"])[0]
        more = f"<NextContinuationToken>{int(page) + 1}</NextContinuationToken>" if page != "2" else ""
        item = f"<Contents><Key>m/{page}.json</Key><Size>{page}</Size><ETag>x</ETag></Contents>"
        return f"<R>{item}{more}</R>".encode()

    found = list_folder("s3://b/m", get, {}, weights=True, now=lambda: datetime.now(UTC))

    assert [(file.name, file.size) for file in found.files] == [("0.json", 0), ("1.json", 1), ("2.json", 2)]


def test_of_a_repository_only_what_is_loaded_is_wanted() -> None:
    names = ["config.json", "a.safetensors", "consolidated.safetensors", "x.bin", "original/b.safetensors", MANIFEST]

    assert wanted(dict.fromkeys(names), weights=True) == ["a.safetensors", "config.json"]
    assert wanted(dict.fromkeys(names), weights=False) == ["config.json"]
    assert wanted({"consolidated.safetensors": 0}, weights=True) == ["consolidated.safetensors"]


# ---- the folder itself


def listing(name: str, size: int = 1000) -> Listing:
    digest = f"sha256:{hashlib.sha256(b'x' * size).hexdigest()}" if size < 2**20 else None
    file = RemoteFile("w.safetensors", size, digest, lambda: ("u", {}))
    return Listing(f"hf://o/{name}", "c", (file,))


class _Answer:
    def __init__(self, content: bytes) -> None:
        self.status, self.headers, self._content = 200, {}, content

    def chunks(self) -> Iterator[bytes]:
        yield self._content


def source(size: int = 1000) -> transfer.Get:
    @contextmanager
    def get(url: str, headers: Mapping[str, str]) -> Iterator[transfer.Answer]:
        yield _Answer(b"x" * size)

    return get


def fill(store: Store, name: str, size: int = 1000) -> Path:
    return store.fill(listing(name, size), source(size), lambda done, total: None, lambda seconds: None)


def test_the_models_unused_for_longest_make_room(tmp_path: Path) -> None:
    store = Store(tmp_path, limit_bytes=3000)
    first, second = fill(store, "a"), fill(store, "b")
    os.utime(tmp_path / "locks" / first.name, (200, 200))
    os.utime(tmp_path / "locks" / second.name, (100, 100))
    third = fill(store, "c")

    assert first.exists()
    assert not second.exists()
    assert third.exists()
    assert not list((tmp_path / "partial").iterdir())


def test_a_model_that_is_served_is_never_removed(tmp_path: Path) -> None:
    store = Store(tmp_path, limit_bytes=2500)
    first = fill(store, "a")
    with (tmp_path / "locks" / first.name).open() as handle:  # as an engine on another node
        fcntl.flock(handle, fcntl.LOCK_SH)
        with pytest.raises(NoRoomError, match="in use by others"):
            fill(store, "b", 2000)

    assert first.exists()
    assert fill(store, "b", 2000).exists()
    assert not first.exists()


def test_a_disk_that_is_too_small_is_told_before_anything_is_downloaded(tmp_path: Path) -> None:
    def never(url: str, headers: Mapping[str, str]) -> contextlib.AbstractContextManager[transfer.Answer]:
        raise AssertionError("downloaded")

    with pytest.raises(NoRoomError, match="GiB are free"):
        Store(tmp_path).fill(listing("big", 2**60), never, lambda done, total: None)


@pytest.mark.parametrize("harm", ["shorter", "missing", "no manifest", "a manifest that is no JSON"])
def test_a_folder_that_somebody_reached_into_is_no_whole_model_and_is_filled_again(tmp_path: Path, harm: str) -> None:
    store = Store(tmp_path)
    folder = fill(store, "a")
    match harm:
        case "shorter":
            (folder / "w.safetensors").write_bytes(b"x")
        case "missing":
            (folder / "w.safetensors").unlink()
        case "no manifest":
            (folder / MANIFEST).unlink()
        case _:
            (folder / MANIFEST).write_text("{")

    assert store.find(folder.name) is None
    assert fill(store, "a") == folder
    assert store.find(folder.name) == folder


def test_where_there_are_no_locks_everybody_downloads_apart_and_the_first_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: object, kind: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    store = Store(tmp_path)
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(fill(store, "a"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(folders) == 4
    assert len(set(folders)) == 1
    assert not list((tmp_path / "partial").iterdir())


def _partial(store: Path) -> int:
    return sum(path.stat().st_size for path in (store / "partial").glob("*/*.safetensors"))


def _wait(look: object, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not look():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)
