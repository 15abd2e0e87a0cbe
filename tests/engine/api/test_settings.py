"""Each setting of the server does what its help says, on a running server with a scripted engine."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import select
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from octavo_engine.api.board import Board, Limits
from octavo_engine.api.screen import Screen
from octavo_engine.config import ConfigError, ServerConfig
from octavo_engine.status import Stage

ROOT = Path(__file__).resolve().parents[3]
ASK = {"model": "tiny", "prompt": "abcdefgh", "max_tokens": 4, "temperature": 0}


def post(server: Any, path: str = "/v1/completions", **body: Any) -> tuple[int, str]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.url + path, json.dumps({**ASK, **body}).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def chat(server: Any, **body: Any) -> str:
    messages = [{"role": "user", "content": "hi"}]
    status, text = post(server, "/v1/chat/completions", messages=messages, max_tokens=60, **body)
    assert status == 200, text
    return str(json.loads(text)["choices"][0]["message"]["content"])


def test_usage_ends_every_stream_when_it_is_forced(start) -> None:
    _, text = post(start("--enable-force-include-usage"), stream=True)
    events = [line for line in text.split("\n\n") if line]

    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 4


def test_cached_tokens_are_told_when_asked_for_and_else_not(start) -> None:
    told = json.loads(post(start("--enable-prompt-tokens-details"), n=1)[1])["usage"]
    silent = json.loads(post(start())[1])["usage"]

    assert told["prompt_tokens_details"] == {"cached_tokens": 0}
    assert "prompt_tokens_details" not in silent


def test_the_description_of_the_api_can_be_left_out(start, server) -> None:
    def status(running: Any, path: str) -> int:
        try:
            with urllib.request.urlopen(running.url + path, timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    bare = start("--disable-fastapi-docs")
    assert [status(server, path) for path in ("/docs", "/openapi.json")] == [200, 200]
    assert [status(bare, path) for path in ("/docs", "/openapi.json", "/v1/models")] == [404, 404, 200]


def test_more_log_probabilities_than_allowed_are_refused_and_the_next_request_is_served(start) -> None:
    server = start("--max-logprobs=2")
    status, text = post(server, logprobs=3)

    assert status == 400
    assert "Requested sample logprobs of 3, which is greater than max allowed: 2" in text
    assert post(server)[0] == 200


def test_template_variables_have_defaults_that_a_request_overrides(start, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("mood {{ mood }} tone {{ tone }}")
    server = start(f"--chat-template={template}", '--default-chat-template-kwargs={"mood": "calm", "tone": "low"}')

    assert chat(server) == "mood calm tone low"
    assert chat(server, chat_template_kwargs={"tone": "high"}) == "mood calm tone high"


def test_an_effort_decides_whether_a_model_thinks_unless_the_request_says_so_itself(start) -> None:
    template = "{{ enable_thinking }} {{ reasoning_effort }}"
    server = start("--chat-template", template, '--default-chat-template-kwargs={"enable_thinking": "unsaid"}')

    assert chat(server) == "unsaid "
    assert chat(server, reasoning_effort="none") == "False none"
    assert chat(server, reasoning_effort="low") == "True low"
    assert chat(server, reasoning_effort="low", chat_template_kwargs={"enable_thinking": False}) == "False low"


def test_a_template_may_be_given_itself(start) -> None:
    assert chat(start("--chat-template", "say {{ messages[0].content }}")) == "say hi"


def test_a_template_that_is_no_jinja_is_named(start) -> None:
    server = start("--chat-template", "{% if %}", ready=False)

    assert server.wait_exit() == 2
    assert "--chat-template" in server.certificate.read_text()


@pytest.mark.parametrize(
    ("flags", "most"),
    [
        ([], 3),  # the model's generation_config.json
        (["--generation-config=vllm"], 19),  # none: the echo of the prompt, and its end
        (["--generation-config={other}"], 5),
        (['--override-generation-config={"max_new_tokens": 2}'], 2),
        (["--generation-config=vllm", '--override-generation-config={"max_tokens": 6}'], 6),
    ],
)
def test_default_sampling_comes_from_where_it_is_told_to(
    start, model_folder: Path, tmp_path: Path, flags: list[str], most: int
) -> None:
    folder, other = tmp_path / "model", tmp_path / "other"
    for target, count in ((folder, 3), (other, 5)):
        subprocess.run(["cp", "-r", str(model_folder), str(target)], check=True)
        (target / "generation_config.json").write_text(json.dumps({"max_new_tokens": count}))
    server = start(f"--model={folder}", *(flag.replace("{other}", str(other)) for flag in flags))
    # Chats have no limit of their own; a completion's is 16.
    status, text = post(server, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], max_tokens=None)

    assert status == 200
    assert json.loads(text)["usage"]["completion_tokens"] == most


def test_a_folder_for_default_sampling_that_is_none_is_named(start) -> None:
    server = start("--generation-config=/nowhere", ready=False)

    assert server.wait_exit() == 2
    assert "a folder with generation_config.json" in server.certificate.read_text()


@pytest.mark.parametrize("value", ['{"temprature": 1}', '{"temperature": true}', '{"top_k": "5"}'])
def test_default_sampling_that_cannot_be_read_is_named(value: str) -> None:
    with pytest.raises(ConfigError, match="numbers for temperature"):
        ServerConfig(override_generation_config=value)


# ---- the first screen


def on_a_terminal(*flags: str, folder: Path, **environ: str) -> tuple[str, str]:
    """(what the terminal showed, what the line to paste printed): of a server that is asked once and ended."""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(Path(__file__).parent / "serve_scripted.py"), f"--model={folder}", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "engine"), **environ}
    process = subprocess.Popen(
        [*command, "--port=0", "--management-port=0"], env=environment, stderr=theirs, stdout=theirs
    )
    os.close(theirs)
    shown, said, deadline = "", "", time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 65536).decode()
            found = re.search(r"(curl .*?\\\r?\n.*?}'\r?\n)", shown, re.DOTALL)
            if found:
                said = subprocess.run(
                    ["bash", "-c", found[1].replace("\r", "").replace("KEY'", "k'")], capture_output=True, text=True
                ).stdout
                break
    finally:
        process.terminate()
        process.wait(60)
        os.close(ours)
    return shown, said


def test_a_terminal_shows_what_is_loaded_a_bar_the_address_and_a_line_to_paste_that_works(model_folder: Path) -> None:
    shown, said = on_a_terminal(folder=model_folder, OCTAVO_SCRIPT='{"load_s": 1.5}')

    assert str(model_folder) in shown
    assert re.search(r"loading weights\s+━+─+\s+\d+%", shown)
    assert re.search(r"ready in \d\.\d s", shown)
    assert re.search(r"listening on (http://localhost:\d+)   chat at \1/", shown)
    assert json.loads(said)["choices"][0]["message"]["content"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen_of(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, columns: int = 80, term: str = "xterm") -> Screen:
    """Of a server that loads, with a gigabyte and 25 s to go."""
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(terminal, "fileno", lambda: 7)
    monkeypatch.setattr("os.get_terminal_size", lambda fd: os.terminal_size((columns, 24)))
    board = Board(Limits(300.0, 60.0, max_num_queued_reqs=0, max_num_queued_tokens=0))
    board.enter(Stage.LOADING_WEIGHTS, 16_000_000, 1_000_000_000)
    return Screen(board, terminal, started=0.0)


def test_the_bar_fits_a_narrow_terminal_where_a_line_that_wraps_could_not_be_drawn_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    screen_of(terminal, monkeypatch, columns=30).tick(1.0)
    text = terminal.getvalue().removeprefix("\r\x1b[K")

    assert text.startswith("  loading weights   ─")
    assert len(text) < 30


def test_a_line_of_the_log_does_not_begin_behind_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    screen = screen_of(terminal, monkeypatch)
    logger = logging.Logger("apart")
    logger.addHandler(logging.StreamHandler(terminal))
    screen.keep_apart(logger)
    screen.tick(1.0)
    logger.warning("a word")

    assert terminal.getvalue().endswith("\r\x1b[Ka word\n")


def test_a_terminal_that_draws_nothing_gets_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = Terminal()
    with caplog.at_level(logging.INFO, "octavo"):
        screen_of(terminal, monkeypatch, term="dumb").tick(1.0)

    assert terminal.getvalue() == ""
    assert "loading weights" in caplog.text


def test_the_line_to_paste_works_behind_a_key_and_a_prefix(model_folder: Path) -> None:
    shown, said = on_a_terminal("--api-key=k", "--root-path=/llm", folder=model_folder)

    assert "Authorization: Bearer KEY" in shown
    assert "/llm/v1/chat/completions" in shown
    assert json.loads(said)["choices"]


def test_the_line_to_paste_works_on_a_unix_socket(model_folder: Path, tmp_path: Path) -> None:
    shown, said = on_a_terminal(f"--uds={tmp_path / 'api.sock'}", folder=model_folder)

    assert "--unix-socket" in shown
    assert json.loads(said)["choices"]


# ---- octavo chat and octavo complete


def octavo(*arguments: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "engine"), **environ}
    command = [sys.executable, "-m", "octavo_engine.cli", *arguments]
    return subprocess.run(command, input=stdin, env=environment, capture_output=True, text=True, timeout=60)


def test_complete_answers_each_line_of_its_input(server) -> None:
    done = octavo("complete", f"--url={server.url}/v1", "--max-tokens=5", stdin="hello\n\nworld\n")

    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\nworld\n", "")


def test_chat_remembers_what_was_said(server) -> None:
    done = octavo("chat", f"--url={server.url}/v1", "--system-prompt=S", "--max-tokens=200", stdin="one\ntwo\n")
    first, second = done.stdout.splitlines()

    assert first == "<system>S<user>one<assistant>"
    assert second == f"<system>S<user>one<assistant>{first}<user>two<assistant>"


def test_the_key_comes_from_the_flag_or_the_environment_and_a_refusal_is_told(start) -> None:
    server = start("--api-key=sesame")
    url = f"--url={server.url}/v1"

    assert octavo("complete", url, "-q", "hi", "--api-key=sesame").returncode == 0
    assert octavo("complete", url, "-q", "hi", OPENAI_API_KEY="sesame").returncode == 0
    refused = octavo("complete", url, "-q", "hi")
    assert refused.returncode == 1
    assert "HTTP 401: " in refused.stderr


def test_no_server_is_told_with_how_to_start_one() -> None:
    done = octavo("chat", "--url=http://127.0.0.1:1/v1", "-q", "hi")

    assert done.returncode == 1
    assert "Start one with `octavo serve MODEL`" in done.stderr
