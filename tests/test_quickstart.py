"""The README's quick start, run as it stands: each block in order, in a network of its own, with a stand-in for the
Hugging Face Hub, from the built wheel in a fresh environment."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import models

ROOT = Path(__file__).resolve().parents[1]
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
GATED = "meta-llama/Llama-3.2-1B-Instruct"
HUB_PORT = 8099
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Block:
    language: str
    text: str


def blocks() -> list[Block]:
    return blocks_of((ROOT / "README.md").read_text().partition("\n## Quick start\n")[2].partition("\n## ")[0])


def blocks_of(text: str) -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


def test_the_blocks_are_those_that_are_tried() -> None:
    """A new one must be tried below."""
    first_words = [" ".join(block.text.split()[:2]) for block in blocks()]

    assert first_words == [
        "pip install", "octavo serve", "curl localhost:8000/v1/chat/completions", "import asyncio", "octavo chat",
        "from octavo_engine", "octavo serve", "HF_TOKEN=$(cat ~/.hf-token)", "docker compose", "$ octavo",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that the blocks printed, from one pass over them."""
    apart = ["unshare", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("no network namespace can be made here (needs root), and the ports of the README may be in use")
    folder = tmp_path_factory.mktemp("quickstart")
    wheel(folder / "wheels")
    python = fresh_environment(folder / "env")
    for name in (NAME, GATED):
        shutil.copytree(models.smollm2(), folder / "hub" / name)
    (folder / "hub" / GATED / "gated").touch()
    (folder / "home").mkdir()
    (folder / "home/.hf-token").write_text("right\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "XDG_"))}
    environment |= {
        "PATH": f"{python.parent}:{environment['PATH']}", "HOME": str(folder / "home"),
        "HF_ENDPOINT": f"http://127.0.0.1:{HUB_PORT}",
        # The wheel is the one that was built here, and its dependencies are there.
        "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder / "wheels"), "PIP_NO_DEPS": "1",
    }  # fmt: skip
    command = [*apart, sys.executable, str(Path(__file__).resolve()), str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def wheel(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)


def fresh_environment(folder: Path) -> Path:
    """Its Python. What Octavo depends on is borrowed from this one: torch's gigabytes are not copied."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    site = next((folder / "lib").glob("python3*/site-packages"))
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "borrowed.pth").write_text(ours + "\n")
    return folder / "bin" / "python"


def test_the_wheel_installs_with_its_page_and_commands(results: dict[str, Any]) -> None:
    assert results["pip install"]["status"] == 0
    assert "Successfully installed octavo" in results["pip install"]["out"]
    assert "data-state" in results["page"]


def test_a_model_is_served_by_its_name_and_says_how_to_ask_it(results: dict[str, Any]) -> None:
    assert "ready in" in results["serve"]
    assert f"url=http://localhost:8000 model={NAME}" in results["serve"]


def test_curl_gets_an_answer(results: dict[str, Any]) -> None:
    answer = json.loads(results["curl"]["out"])

    assert answer["model"] == NAME
    assert answer["choices"][0]["message"]["content"]


def test_the_python_client_and_ten_requests_at_once_are_answered(results: dict[str, Any]) -> None:
    assert results["client"]["status"] == 0, results["client"]["err"]
    assert results["client"]["out"].strip()
    # The ten overlapped: the log of the load would not show it, the metric of steps does.
    assert results["most_in_a_step"] >= 8


def test_the_command_line_chats(results: dict[str, Any]) -> None:
    assert results["octavo chat"]["status"] == 0, results["octavo chat"]["err"]
    assert results["octavo chat"]["out"].strip()


def test_llm_generates_in_python(results: dict[str, Any]) -> None:
    assert results["llm"]["status"] == 0, results["llm"]["err"]
    assert "Paris" in results["llm"]["out"]


def test_the_python_of_the_page_on_moving_from_vllm_runs(results: dict[str, Any]) -> None:
    assert results["moving"]["status"] == 0, results["moving"]["err"]
    assert "length" in results["moving"]["out"]


def test_a_snapshots_folder_is_served(results: dict[str, Any]) -> None:
    assert results["folder"]["stage"] == "ready"
    assert "/snapshots/" in results["folder"]["effective"]["model"]


def test_a_gated_model_is_served_with_a_token_and_refused_without(results: dict[str, Any]) -> None:
    assert results["gated"]["stage"] == "ready"
    assert results["gated without"]["status"] == 21
    assert "set HF_TOKEN" in results["gated without"]["err"]


def test_what_is_not_there_yet_is_answered_as_the_readme_says(results: dict[str, Any]) -> None:
    assert results["console"] == blocks()[-1].text


def test_the_compose_files_command_serves_and_its_health_check_tells_when(results: dict[str, Any]) -> None:
    assert results["compose"] == {"before": 1, "after": 0, "readyz": 200}


# ---- the pass itself, in a network of its own


def main(folder: Path) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    text = [block.text for block in blocks()]
    results: dict[str, Any] = {}
    hub = subprocess.Popen([sys.executable, str(ROOT / "tests/hub.py"), str(HUB_PORT), str(folder / "hub")])
    try:
        results["pip install"] = run(text[0])
        with Served(text[1]) as server:
            server.wait()
            results["page"] = fetch("http://localhost:8000/")
            results["curl"] = run(text[2])
            results["client"] = run(f"python - <<'END'\n{text[3]}\nEND")
            results["most_in_a_step"] = most_in_a_step(fetch("http://localhost:8000/metrics"))
            results["octavo chat"] = run(text[4])
        results["serve"] = server.log
        results["llm"] = run(f"python - <<'END'\n{text[5]}\nEND")
        (moving,) = blocks_of((ROOT / "docs/moving-from-vllm.md").read_text())
        results["moving"] = run(f"python - <<'END'\n{moving.text}\nEND")
        with Served(text[6]) as server:
            results["folder"] = server.wait()
        results["gated without"] = run(text[7].partition(" ")[2].replace("~/.hf-token) ", ""))
        with Served(text[7]) as server:
            results["gated"] = server.wait()
        results["console"] = console(text[9])
        results["compose"] = compose()
    finally:
        hub.terminate()
        hub.wait()
    (folder / "results.json").write_text(json.dumps(results))


def run(command: str) -> dict[str, Any]:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=240)
    return {"status": done.returncode, "out": done.stdout, "err": done.stderr}


class Served:
    """A block that serves until it is ended."""

    def __init__(self, command: str, environment: dict[str, str] | None = None) -> None:
        # exec, so that the process is octavo and not the shell.
        self.process = subprocess.Popen(
            ["bash", "-c", command.replace("octavo serve", "exec octavo serve", 1)],
            env={**os.environ, **(environment or {})}, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.log = ""

    def __enter__(self) -> Served:
        return self

    def wait(self) -> dict[str, Any]:
        """/statusz when it is ready."""
        for _ in range(1200):
            assert self.process.poll() is None, self.process.communicate()[1]
            try:
                statusz: dict[str, Any] = json.loads(fetch("http://localhost:8001/statusz"))
            except OSError:
                statusz = {}
            if statusz.get("stage") == "ready":
                return statusz
            time.sleep(0.1)
        raise TimeoutError(statusz)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.log = self.process.communicate(timeout=30)[1]


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())


def most_in_a_step(metrics: str) -> int:
    """The largest bucket of tokens in a step that holds a step: tokens of a decode step are its requests."""
    counts: dict[float, float] = {}
    for line in metrics.splitlines():
        if line.startswith("vllm:iteration_tokens_total_bucket"):
            bound = re.search(r'le="([^"]+)"', line)
            assert bound
            counts[float(bound[1])] = float(line.rsplit(" ", 1)[1])
    total = counts[float("inf")]
    return int(max(bound for bound in counts if bound != float("inf") and counts[bound] < total))


def console(text: str) -> str:
    """The block as it comes out when its commands are run."""
    lines = []
    for line in text.splitlines():
        if line.startswith("$ "):
            done = run(line[2:])
            assert done["status"] == 2, done
            lines += [line, *(done["out"] + done["err"]).splitlines()]
    return "\n".join(lines) + "\n"


def compose() -> dict[str, int]:
    """The command of the service, and what its health check says before and when it is ready."""
    service = yaml.safe_load((ROOT / "examples/docker-compose.yaml").read_text())["services"]["octavo"]
    kind, *check = service["healthcheck"]["test"]
    assert kind == "CMD"
    command = shlex.join(["octavo", *service["command"]])
    # As the image sets it; the address does not matter in a network of our own.
    with Served(command, {"OCTAVO_HOST": "0.0.0.0", "HF_HOME": os.path.expanduser("~/.cache/huggingface")}) as server:
        before = subprocess.run(check, capture_output=True).returncode
        server.wait()
        after = subprocess.run(check, capture_output=True).returncode
        with urllib.request.urlopen("http://127.0.0.1:8001/readyz", timeout=5) as answer:
            return {"before": before, "after": after, "readyz": answer.status}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
