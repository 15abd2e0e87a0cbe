"""`octavo serve org/name` against a stand-in of the Hub that is slow, cut, hung, corrupt or gone, and a gated name."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import models
from hub import COMMIT, Hub, running_hub, set_faults
from octavo_engine.status import FailureCode
from ports import free_port

HERE = Path(__file__).parent
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def hub(tmp_path: Path, model_folder: Path) -> Iterator[Hub]:
    """Has a small model with a tokenizer, org/name, and the same, gated, as org/gated."""
    folder = tmp_path / "hub"
    for name in ("org/name", "org/gated"):
        shutil.copytree(model_folder, folder / name)
        (folder / name / "model-1.safetensors").write_bytes(WEIGHTS)
        (folder / name / "model-2.safetensors").write_bytes(WEIGHTS[::-1])
        (folder / name / "README.md").write_text("never asked for")
    (folder / "org/gated/gated").touch()
    with running_hub(folder) as server:
        yield server


class Server:
    def __init__(self, process: subprocess.Popen[str], management_port: int) -> None:
        self.process, self.port = process, management_port

    def statusz(self) -> dict[str, object]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/statusz", timeout=2) as answer:
            document: dict[str, object] = json.load(answer)
            return document

    def wait(self, stage: str, timeout_s: float = 120) -> dict[str, object]:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if (statusz := self.statusz())["stage"] == stage:
                    return statusz
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.05)
        raise TimeoutError(stage)

    def end(self) -> str:
        self.process.terminate()
        return self.process.communicate(timeout=60)[1]


@contextlib.contextmanager
def serving(hub: Hub, home: Path, *flags: str, model: str = "org/name", **more: str) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, str(HERE / "serve_scripted.py"), f"--model={model}", "--port=0", *flags]
    process = subprocess.Popen(
        [*command, f"--management-port={port}"],
        env={**environment(hub, home), **more}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield Server(process, port)
    finally:
        process.kill()
        process.wait()
        assert process.stderr
        process.stderr.close()


def environment(hub: Hub, home: Path) -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    root = str(HERE.parents[2] / "engine")
    return {**found, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": root}


def snapshot(home: Path, name: str = "org/name") -> Path:
    return home / "hub" / ("models--" + name.replace("/", "--")) / "snapshots" / COMMIT


def assert_whole(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "model-1.safetensors", "model-2.safetensors",
    }  # fmt: skip
    assert (folder / "model-1.safetensors").read_bytes() == WEIGHTS
    assert (folder / "model-2.safetensors").read_bytes() == WEIGHTS[::-1]


def test_a_name_is_served_from_the_cache_that_other_tools_know(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with serving(hub, home) as server:
        statusz = server.wait("ready")
    assert_whole(snapshot(home))
    import huggingface_hub

    found = huggingface_hub.snapshot_download("org/name", cache_dir=home / "hub", local_files_only=True)
    assert Path(found) == snapshot(home)
    assert "downloading" in statusz["stage_seconds"]  # type: ignore[operator]


def test_a_second_start_downloads_nothing(hub: Hub, tmp_path: Path) -> None:
    for _ in range(2):
        with serving(hub, tmp_path / "home") as server:
            server.wait("ready")

    assert len([line for line in hub.requests() if "GET" in line and "safetensors" in line]) == 2


def test_what_octavo_download_brings_is_served_without_another_download(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    command = [sys.executable, "-m", "octavo_engine", "download", "org/name"]
    done = subprocess.run(command, env=environment(hub, home), capture_output=True, text=True, timeout=60)
    with serving(hub, home) as server:
        server.wait("ready")

    assert Path(done.stdout.strip()) == snapshot(home), done.stderr
    assert len([line for line in hub.requests() if "GET" in line and "safetensors" in line]) == 2


def test_ctrl_c_ends_a_download_at_once_and_without_a_word(hub: Hub, tmp_path: Path) -> None:
    """Threads that download were waited for: fifty seconds of a slow model."""
    set_faults(hub, bytes_per_s=20000)
    command = [sys.executable, "-m", "octavo_engine", "download", "org/name", f"--model-store={tmp_path / 'store'}"]
    with subprocess.Popen(command, env=environment(hub, tmp_path), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        while "MB" not in (line := process.stderr.readline()):  # bytes come
            assert line
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(25) == -signal.SIGINT
        finally:
            process.kill()
        assert "Traceback" not in process.stderr.read()


def as_another_user(command: list[str]) -> list[str]:
    """Without the rights by which root writes everywhere."""
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command] if os.getuid() == 0 else command


def test_a_cache_that_cannot_be_written_serves_what_is_whole_in_it(hub: Hub, tmp_path: Path) -> None:
    """As mounted read-only into many pods."""
    home = tmp_path / "home"
    with serving(hub, home) as server:
        server.wait("ready")
    folders = [home, *(path for path in home.rglob("*") if path.is_dir() and not path.is_symlink())]
    for path in [*folders, *home.rglob("*.lock")]:
        path.chmod(0o555)
    plan = [sys.executable, "-m", "octavo_engine", "download", "org/name"]
    done = subprocess.run(as_another_user(plan), env=environment(hub, home), capture_output=True, text=True, timeout=60)
    for path in folders:
        path.chmod(0o755)

    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == snapshot(home)


def test_a_cache_that_cannot_be_written_is_named_at_once_where_something_is_missing(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o555)
    command = [sys.executable, "-m", "octavo_engine", "download", "org/name"]
    done = subprocess.run(
        as_another_user(command), env=environment(hub, tmp_path / "home"), capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 30
    assert "could not be stored in the cache: Permission denied. Fix: point --download-dir (or HF_HOME)" in done.stderr
    assert len([line for line in hub.requests() if "/api/models/" in line]) == 1  # no second try


def test_download_dir_is_where_it_is_kept(hub: Hub, tmp_path: Path) -> None:
    with serving(hub, tmp_path / "home", f"--download-dir={tmp_path / 'elsewhere'}") as server:
        server.wait("ready")

    assert_whole(tmp_path / "elsewhere" / "models--org--name" / "snapshots" / COMMIT)
    assert not (tmp_path / "home" / "hub").exists()


def test_a_slow_download_shows_its_progress(hub: Hub, tmp_path: Path) -> None:
    set_faults(hub, bytes_per_s=600_000)
    seen = set()
    with serving(hub, tmp_path / "home") as server:
        server.wait("downloading")
        while (statusz := server.statusz())["stage"] == "downloading":
            seen.add(statusz["progress"]["done_bytes"])  # type: ignore[index]
            time.sleep(0.1)
        server.wait("ready")
        log = server.end()

    assert len(seen) > 5
    assert re.search(r"downloading +\d+%  \d\.\d\d of 2\.\d\d MB", log), log


def test_answers_that_are_cut_are_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    set_faults(hub, cut_after=300_000)
    with serving(hub, tmp_path / "home") as server:
        server.wait("ready", 60)

    assert_whole(snapshot(tmp_path / "home"))
    assert any("bytes=300000-" in line for line in hub.requests())


def test_a_killed_download_is_gone_on_with_by_the_next_start(hub: Hub, tmp_path: Path) -> None:
    set_faults(hub, bytes_per_s=200_000)
    home = tmp_path / "home"
    with serving(hub, home) as server:
        server.wait("downloading")
        parts = home / "hub/models--org--name/blobs"
        while sum(path.stat().st_size for path in parts.glob("*.octavo-part")) < 200_000:
            time.sleep(0.05)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    assert not list(snapshot(home).glob("*.safetensors"))
    set_faults(hub)
    with serving(hub, home) as server:
        server.wait("ready")

    assert_whole(snapshot(home))
    assert any(re.search(r"bytes=[1-9]\d+-", line) for line in hub.requests())


def test_two_servers_that_start_at_once_download_once(hub: Hub, tmp_path: Path) -> None:
    """The one that waits for the other's files is not taken for stalled."""
    set_faults(hub, bytes_per_s=130_000)  # eight seconds; where much else runs, the imports alone may take three
    with (
        serving(hub, tmp_path / "home", "--startup-stall-s=5") as one,
        serving(hub, tmp_path / "home", "--startup-stall-s=5") as other,
    ):
        one.wait("ready")
        other.wait("ready")

    assert_whole(snapshot(tmp_path / "home"))
    assert len([line for line in hub.requests() if "GET" in line and "safetensors" in line]) == 2


def test_a_file_that_arrives_damaged_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    set_faults(hub, damage=2)
    with serving(hub, tmp_path / "home") as server:
        server.wait("ready")

    assert_whole(snapshot(tmp_path / "home"))


def ended(hub: Hub, home: Path, *flags: str, model: str = "org/name", **more: str) -> tuple[int, str]:
    with serving(hub, home, *flags, model=model, **more) as server:
        _, log = server.process.communicate(timeout=90)
        return server.process.returncode, log


def test_a_hub_that_only_damages_is_named_and_nothing_of_it_is_served(hub: Hub, tmp_path: Path) -> None:
    set_faults(hub, damage=100)
    status, log = ended(hub, tmp_path / "home")

    assert status == FailureCode.WEIGHTS_CORRUPT.exit_status
    assert "model-" in log
    assert "arrived damaged" in log
    assert not list(snapshot(tmp_path / "home").glob("*.safetensors"))


def test_a_hub_that_hangs_ends_the_start_as_stalled(hub: Hub, tmp_path: Path) -> None:
    set_faults(hub, hang=True)
    status, log = ended(hub, tmp_path / "home", "--startup-stall-s=2")

    assert status == FailureCode.DOWNLOAD_STALLED.exit_status
    assert "received nothing for" in log
    assert "a restart goes on from there" in log


def test_a_gated_name_without_a_token_says_where_to_accept_and_how_to_set_it(hub: Hub, tmp_path: Path) -> None:
    status, log = ended(hub, tmp_path / "home", model="org/gated")

    assert status == FailureCode.MODEL_GATED.exit_status
    assert "no token is set" in log
    assert "accept its terms at https://huggingface.co/org/gated" in log
    assert "set HF_TOKEN" in log


def test_a_gated_name_with_the_token_of_another_account_says_so(hub: Hub, tmp_path: Path) -> None:
    status, log = ended(hub, tmp_path / "home", model="org/gated", HF_TOKEN="wrong")

    assert status == FailureCode.MODEL_GATED.exit_status
    assert "the token's account has none" in log
    assert "wrong" not in log.replace("token is wrong", "")


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_a_gated_name_is_served_with_the_right_token(hub: Hub, tmp_path: Path, variable: str) -> None:
    with serving(hub, tmp_path / "home", model="org/gated", **{variable: "right"}) as server:
        server.wait("ready")


def test_a_revision_that_is_not_there_is_named(hub: Hub, tmp_path: Path) -> None:
    status, log = ended(hub, tmp_path / "home", "--revision=nowhere")

    assert status == FailureCode.MODEL_NOT_FOUND.exit_status
    assert "at revision nowhere" in log


def test_offline_what_is_whole_in_the_cache_is_served(hub: Hub, tmp_path: Path) -> None:
    with serving(hub, tmp_path / "home") as server:
        server.wait("ready")
    asked = len(hub.requests())
    with serving(hub, tmp_path / "home", HF_HUB_OFFLINE="1") as server:
        server.wait("ready")

    assert len(hub.requests()) == asked


def test_offline_what_is_not_whole_is_refused_with_the_variable_named(hub: Hub, tmp_path: Path) -> None:
    """`octavo plan` brings the text files alone; a snapshot's folder is there, and a client would take it for whole."""
    code = "from octavo_engine.api.find_model import download; download('org/name', None, None, print, weights=False)"
    subprocess.run([sys.executable, "-c", code], env=environment(hub, tmp_path / "home"), check=True)
    assert (snapshot(tmp_path / "home") / "config.json").exists()

    status, log = ended(hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert status == FailureCode.MODEL_NOT_FOUND.exit_status
    assert "HF_HUB_OFFLINE forbids" in log


def test_a_hub_that_is_gone_leaves_what_is_whole_to_be_served(hub: Hub, tmp_path: Path) -> None:
    with serving(hub, tmp_path / "home") as server:
        server.wait("ready")
    with serving(hub, tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:1") as server:
        server.wait("ready", 60)
        log = server.end()

    assert "the Hub cannot be asked, so what org/name was last is served" in log


@pytest.mark.slow
def test_smollm2_is_served_by_its_name_and_answers(hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(models.smollm2(), hub.folder / NAME)
    port, management = free_port(), free_port()
    command = [sys.executable, "-m", "octavo_engine.cli", "serve", NAME, f"--port={port}"]
    process = subprocess.Popen(
        [*command, f"--management-port={management}", "--kv-cache-memory-bytes=256M"],
        env=environment(hub, tmp_path / "home"), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    server = Server(process, management)
    try:
        statusz = server.wait("ready", 120)
        body = {"prompt": "The capital of France is", "max_tokens": 3, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            document = json.load(answer)
    finally:
        process.kill()
        process.communicate()

    assert statusz["effective"]["resolved_revision"] == COMMIT  # type: ignore[index]
    assert document["model"] == NAME
    assert "Paris" in document["choices"][0]["text"]
