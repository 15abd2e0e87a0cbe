"""Models by Hugging Face id, from a small Hub on this machine: found, downloaded with progress, refused by reason."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from octavo_engine.api.find_model import local_folder
from octavo_engine.status import FailureCode, FatalError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 257, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256, "torch_dtype": "float32",
}  # fmt: skip


@dataclass
class Hub:
    """The few routes of the Hub that a download uses. refusals: model → (status, the Hub's word for why)."""

    files: dict[str, bytes]
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def environment(self, home: Path) -> dict[str, str]:
        return {**os.environ, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(
        {
            "config.json": json.dumps(CONFIG).encode(),
            "tokenizer.json": b"{}",
            "model.safetensors": bytes(range(256)) * 8192,
            "pytorch_model.bin": b"never asked for",
            "README.md": b"never asked for",
        }
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.asked.append(self.path)
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[0] == "api":
                return self.answer_model("/".join(parts[2:4]), parts[4:])
            content = hub.files.get("/".join(parts[4:]))
            if parts[:3] != ["good", "model", "resolve"] or content is None:
                return self.refuse(404, "EntryNotFound")
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.do_GET()

        def answer_model(self, name: str, rest: list[str]) -> None:
            if name in hub.refusals:
                return self.refuse(*hub.refusals[name])
            if rest[:1] == ["revision"] and rest[1:] not in (["main"], [COMMIT]):
                return self.refuse(404, "RevisionNotFound")
            if rest[:1] == ["tree"]:
                document: object = [
                    {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                    for path, content in hub.files.items()
                ]
            else:
                siblings = [{"rfilename": path} for path in hub.files]
                document = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            body = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def refuse(self, status: int, reason: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", reason)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def plan(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "octavo_engine.cli", "plan", *arguments, "--memory=24G"]
    return subprocess.run(command, env=hub.environment(home), capture_output=True, text=True, timeout=60)


def test_a_plan_needs_the_config_and_no_weights(hub: Hub, tmp_path: Path) -> None:
    done = plan(hub, tmp_path, "hf://good/model")

    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM" in done.stdout
    assert any("config.json" in path for path in hub.asked)
    assert not any("safetensors" in path and "resolve" in path for path in hub.asked)


@pytest.mark.parametrize(
    ("arguments", "refusal", "code", "words"),
    [
        (["no/model"], (401, ""), FailureCode.MODEL_GATED, "set HF_TOKEN to a token"),
        (["no/model"], (401, "RepoNotFound"), FailureCode.MODEL_NOT_FOUND, "check the spelling"),
        (["no/model"], (404, "RepoNotFound"), FailureCode.MODEL_NOT_FOUND, "check the spelling"),
        (["no/model"], (403, "GatedRepo"), FailureCode.MODEL_GATED, "set HF_TOKEN"),
        (["good/model", "--revision=nowhere"], None, FailureCode.MODEL_NOT_FOUND, "at revision nowhere"),
        (["./no/such/folder"], None, FailureCode.MODEL_NOT_FOUND, "neither a folder nor a Hugging Face id"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused_by_reason(
    hub: Hub, tmp_path: Path, arguments: list[str], refusal: tuple[int, str] | None, code: FailureCode, words: str
) -> None:
    if refusal is not None:
        hub.refusals["no/model"] = refusal
    done = plan(hub, tmp_path, *arguments)

    assert done.returncode == code.exit_status, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr


def test_a_hub_out_of_reach_is_tried_again_and_then_named(tmp_path: Path) -> None:
    done = plan(Hub({}, url="http://127.0.0.1:1"), tmp_path, "good/model")

    assert done.returncode == FailureCode.DOWNLOAD_FAILED.exit_status, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "HF_ENDPOINT" in done.stderr


DOWNLOAD = """
import json
from octavo_engine.api.find_model import download
reports = []
found = download("good/model", None, None, lambda done, total: reports.append((done, total)))
print(json.dumps([str(found.path), found.resolved_revision, reports]))
"""


def test_a_download_reports_its_bytes_and_the_commit(hub: Hub, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DOWNLOAD], env=hub.environment(tmp_path), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    path, revision, reports = json.loads(done.stdout.splitlines()[-1])

    assert revision == COMMIT
    kept = {file.name for file in Path(path).iterdir()}
    assert kept == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (Path(path) / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert max(done_bytes for done_bytes, _ in reports) >= len(hub.files["model.safetensors"])
    assert reports == sorted(reports)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "hf://Qwen/Qwen3-8B", "a/b.c_d-1"])
def test_an_id_of_the_hub_is_no_folder(name: str) -> None:
    assert local_folder(name) is None


@pytest.mark.parametrize("name", ["", "gpt2", "/a/b", "./a/b", "~/a/b", "a/b/c", "a//b", "-a/b", "a/../b", "a/b\n"])
def test_what_is_neither_a_folder_nor_an_id_is_refused(name: str) -> None:
    with pytest.raises(FatalError) as refused:
        local_folder(name)

    assert refused.value.failure.code in (FailureCode.MODEL_NOT_FOUND, FailureCode.MODEL_INVALID)


def test_a_folder_is_found_under_its_real_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "org" / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    found = local_folder("org/model")  # a folder of that name wins over the Hub

    assert found is not None
    assert found.path == tmp_path / "org" / "model"
