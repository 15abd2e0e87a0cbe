"""Every Python example, run as a user runs it. The manifests are applied by tests/operator and tests/e2e."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import models

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_offline_generates_without_a_server():
    assert "The capital of France is →  Paris" in run("examples/offline.py", str(models.smollm2()))


def test_the_client_streams_an_answer_from_octavo_serve():
    serve = [sys.executable, "-m", "octavo_engine.cli", "serve", str(models.smollm2()), "--port=18400"]
    server = subprocess.Popen([*serve, "--management-port=18401", "--served-model-name=smollm2"], cwd=ROOT)
    try:
        wait_ready("http://localhost:18401/readyz", server)
        answer = run("examples/client.py", "http://localhost:18400/v1")
    finally:
        server.terminate()
        status = server.wait(60)

    assert answer.strip()
    assert status == 0


def wait_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, f"the server ended with {server.returncode}"
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise TimeoutError(url)
