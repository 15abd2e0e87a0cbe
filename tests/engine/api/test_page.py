"""The page at /, as a person with a browser uses it: real Chromium, a real server, a scripted engine that says the
prompt again. Where no Chromium is installed these tests are skipped, and say so."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

import models
from octavo_engine.api import ui
from ports import free_port

CAPITALS = {"enum": ["Paris", "Rome"]}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TOOLS = '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]'
ECHO = (
    "{% for m in messages if m.tool_calls %}{{ m.tool_calls[0].function.name }} gave {% endfor %}"
    "{{ messages[-1].content }}{% if tools %}{{ '\n' }}{% endif %}"
)


# ---- without a browser


def get(url: str) -> tuple[int, Any, str]:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def wait_until(condition: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if condition():
                return
        time.sleep(0.1)
    raise TimeoutError(f"not within {timeout_s} s")


def test_the_page_is_one_answer_that_names_no_other_host(server) -> None:
    status, headers, text = get(server.url + "/")

    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert set(re.findall(r"https?://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)


def test_without_the_page_its_routes_are_not_there(start) -> None:
    server = start("--no-ui")

    assert get(server.url + "/")[0] == 404
    assert get(server.url + "/ui/status")[0] == 404
    assert get(server.url + "/v1/models")[0] == 200


def test_the_page_is_open_and_what_it_shows_needs_the_key(start) -> None:
    server = start("--api-key=k")

    assert get(server.url + "/")[0] == 200
    assert get(server.url + "/ui/status")[0] == 401


def test_under_a_root_path_the_page_has_its_slash(start) -> None:
    server = start("--root-path=/llm")

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args: Any) -> None:
            return None

    with pytest.raises(urllib.error.HTTPError) as answer:
        urllib.request.build_opener(Stay).open(server.url + "/llm")
    answer.value.close()
    assert (answer.value.code, answer.value.headers["Location"]) == (308, "/llm/")
    assert get(server.url + "/llm/")[0] == 200


def test_the_status_tells_what_the_engine_does(server) -> None:
    document = json.loads(get(server.url + "/ui/status")[2])

    assert (document["stage"], document["model"]) == ("ready", "tiny")
    assert document["load"] == {"running": 0, "waiting": 0, "kv_usage": 0.0}
    assert document["effective"]["max_model_len"] == 512


def test_script_and_style_are_those_that_the_policy_names() -> None:
    html, headers = ui.page()

    assert "/*JS*/" not in html
    assert "/*CSS*/" not in html
    assert headers["Content-Security-Policy"].count("sha256-") == 2


# ---- with one


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium): the page is not tried")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium) -> Iterator[Any]:
    """An empty tab. Whatever its script or its policy complains of, and whomever else it asks, fails the test."""
    context = chromium.new_context(viewport={"width": 1200, "height": 800})
    tab = context.new_page()
    tab.set_default_timeout(30_000)
    tab.complaints, tab.asked = [], []
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.on("console", lambda message: message.type == "error" and tab.complaints.append(message.text))
    tab.on("request", lambda request: tab.asked.append(request))
    yield tab
    own = {request.url.split("/")[2] for request in tab.asked if not request.url.startswith("data:")}
    expected = [text for text in tab.complaints if "Failed to load resource" not in text]  # refusals that are shown
    context.close()
    assert expected == []
    assert len(own) <= 1


def opened(page: Any, url: str) -> Any:
    page.goto(url)
    page.wait_for_selector('#state[data-state="ready"]')
    return page


def say(page: Any, text: str, *, wait: bool = True) -> None:
    page.fill("#prompt", text)
    page.keyboard.press("Enter")
    if wait:
        page.wait_for_selector("#stop", state="hidden")


def until(page: Any, expression: str) -> None:
    """Not wait_for_function: it evaluates inside the page, whose policy forbids that."""
    for _ in range(2400):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise TimeoutError(expression)


def bodies(page: Any) -> list[dict[str, Any]]:
    return [json.loads(r.post_data) for r in page.asked if r.url.endswith("/v1/chat/completions")]


@pytest.fixture(scope="module")
def echo(start_shared, tmp_path_factory) -> Any:
    """Its answer is the last message."""
    template = tmp_path_factory.mktemp("page") / "echo.jinja"
    template.write_text(ECHO)
    flags = ("--enable-auto-tool-choice", "--tool-call-parser=hermes", "--reasoning-parser=qwen3")
    return start_shared(f"--chat-template={template}", *flags, script={"step_s": 0.004})


@pytest.mark.browser
def test_a_chat_streams_and_tells_its_speed(page, echo) -> None:
    opened(page, echo.url)
    say(page, "Good morning.")

    assert page.inner_text(".turn.assistant .text") == "Good morning."
    facts = page.inner_text(".turn.assistant .facts")
    assert re.fullmatch(r"first token [\d.]+ s · [\d.]+ tokens/s · 14 tokens in [\d.]+ s · prompt 13", facts), facts
    say(page, "And again.")
    assert [m["role"] for m in bodies(page)[1]["messages"]] == ["user", "assistant", "user"]


@pytest.mark.browser
def test_settings_are_what_is_asked_with_and_outlive_a_reload(page, echo) -> None:
    opened(page, echo.url)
    for name, value in (("max_tokens", "7"), ("seed", "3"), ("top_k", "5"), ("min_p", "0.1"), ("system", "Be brief.")):
        page.fill(f"#{name}", value)
    page.fill("#stop-at", "END|###")
    page.locator("#temperature").focus()
    page.keyboard.press("Home")
    page.locator("#top_p").press("End")
    page.reload()
    say(opened(page, echo.url), "Hello there")
    (body,) = bodies(page)

    expected = {
        "model": "tiny", "temperature": 0, "top_p": 1, "max_tokens": 7, "seed": 3, "top_k": 5, "min_p": 0.1,
        "stop": ["END", "###"], "stream": True, "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}],
    }  # fmt: skip
    assert body == expected
    assert "cut by max tokens" in page.inner_text(".turn.assistant .facts")


@pytest.mark.browser
def test_escape_stops_an_answer_and_the_engine(page, echo) -> None:
    opened(page, echo.url)
    say(page, "x" * 400, wait=False)
    until(page, "document.querySelector('.turn.assistant .text')?.textContent.length > 20")
    page.keyboard.press("Escape")
    page.wait_for_selector("#stop", state="hidden")

    assert "stopped" in page.inner_text(".turn.assistant .facts")
    assert len(page.inner_text(".turn.assistant .text")) < 400
    echo.wait_idle()


@pytest.mark.browser
def test_everything_can_be_done_from_the_keyboard(page, echo) -> None:
    opened(page, echo.url)
    page.locator("#log").focus()
    page.keyboard.press("/")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop", state="hidden")
    assert bodies(page)[0]["messages"][0]["content"] == "one\ntwo"

    page.keyboard.press("Control+Shift+O")
    assert page.locator(".turn").count() == 0
    assert page.evaluate("document.activeElement.id") == "prompt"


@pytest.mark.browser
def test_text_is_never_read_as_html(page, echo) -> None:
    opened(page, echo.url)
    text = "<img src=x onerror=document.title='owned'> <script>1</script>"
    say(page, text)

    assert page.inner_text(".turn.assistant .text") == text
    assert page.locator("#log img, #log script").count() == 0
    assert page.title() == "tiny · Octavo"


@pytest.mark.browser
def test_code_stands_in_blocks_and_thinking_apart(page, echo) -> None:
    opened(page, echo.url)
    say(page, "<think>\nHm.\n</think>\nSee:\n```python\nprint(1)\n```\nDone.")

    assert page.inner_text(".turn.assistant pre") == "print(1)"
    assert page.inner_text(".turn.assistant .text p >> nth=0") == "See:"
    page.click(".turn.assistant summary")
    assert "Hm." in page.inner_text(".turn.assistant details p")


@pytest.mark.browser
def test_a_call_is_shown_and_its_result_goes_back(page, echo) -> None:
    opened(page, echo.url)
    page.click("#format-part summary")
    page.fill("#tools", TOOLS)
    say(page, CALL)
    assert "calls weather" in page.inner_text(".call")
    assert '"city": "Paris"' in page.inner_text(".call pre")

    page.fill(".call input", "18 degrees")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.turn.assistant').length === 2")
    page.wait_for_selector("#stop", state="hidden")
    sent = bodies(page)[1]["messages"]
    assert [m["role"] for m in sent] == ["user", "assistant", "tool"]
    assert sent[2] == {"role": "tool", "tool_call_id": sent[1]["tool_calls"][0]["id"], "content": "18 degrees"}
    assert "weather gave 18 degrees" in page.inner_text(".turn.assistant >> nth=1")


@pytest.mark.browser
def test_json_is_asked_for_and_what_cannot_be_read_is_told_at_its_place(page, echo) -> None:
    opened(page, echo.url)
    page.click("#format-part summary")
    page.select_option("#format", "json_schema")
    page.fill("#schema", "{no")
    say(page, "hi", wait=False)
    page.wait_for_selector("#format-problem:not([hidden])")
    assert "The schema cannot be read" in page.inner_text("#format-problem")
    assert bodies(page) == []

    page.fill("#schema", '{"type": "object"}')
    say(page, "hi", wait=False)
    page.wait_for_selector("#stop", state="hidden")
    schema = {"name": "answer", "schema": {"type": "object"}}
    assert bodies(page)[0]["response_format"] == {"type": "json_schema", "json_schema": schema}


@pytest.mark.browser
@pytest.mark.slow
def test_a_real_model_answers_in_json_when_asked_to(page, tmp_path) -> None:
    port, management = free_port(), free_port()
    command = [
        sys.executable,
        "-m",
        "octavo_engine.cli",
        "serve",
        str(models.smollm2()),
        "--kv-cache-memory-bytes=256M",
    ]
    process = subprocess.Popen([*command, f"--port={port}", f"--management-port={management}"])
    try:
        wait_until(lambda: get(f"http://127.0.0.1:{management}/readyz")[0] == 200, 60)
        opened(page, f"http://127.0.0.1:{port}")
        page.fill("#max_tokens", "60")
        page.fill("#seed", "1")
        page.click("#format-part summary")
        page.select_option("#format", "json_schema")
        page.fill(
            "#schema", json.dumps({"type": "object", "properties": {"capital": CAPITALS}, "required": ["capital"]})
        )
        say(page, "What is the capital of France? Answer in JSON.")
        text = page.inner_text(".turn.assistant .text")
    finally:
        process.terminate()
        process.wait(60)

    assert json.loads(text)["capital"] in ("Paris", "Rome")


@pytest.mark.browser
def test_a_refusal_is_shown_in_the_servers_words_and_the_next_question_is_answered(page, echo) -> None:
    opened(page, echo.url)
    page.fill("#max_tokens", "100000")
    say(page, "hi", wait=False)
    page.wait_for_selector(".turn .problem")
    assert "cannot be greater than max_model_len" in page.inner_text(".turn .problem")

    page.fill("#max_tokens", "5")
    say(page, "hello")
    assert [m["content"] for m in bodies(page)[1]["messages"]] == ["hello"]


@pytest.mark.browser
def test_the_engine_is_watched_while_it_works(page, start) -> None:
    opened(page, start(script={"step_s": 0.02}).url)
    assert "running\n0" in page.inner_text("#facts")
    say(page, "y" * 240, wait=False)
    until(page, "/running\\n1/.test(document.getElementById('facts').innerText)")
    until(page, "parseFloat(document.getElementById('peak').textContent.slice(5)) > 20")
    page.keyboard.press("Escape")

    points = page.get_attribute("#chart polyline", "points").split()
    assert len(points) == 60
    assert min(float(point.split(",")[1]) for point in points) < 5  # the line has risen


@pytest.mark.browser
def test_loading_shows_its_progress_and_becomes_ready_by_itself(page, start) -> None:
    server = start(script={"load_s": 8}, ready=False).wait_bound()
    for _ in range(300):
        try:
            page.goto(server.url)
            break
        except Exception:  # noqa: BLE001 - the port is bound before it answers
            page.wait_for_timeout(100)
    until(page, "/loading weights \\d+ %/.test(document.getElementById('state').textContent)")
    assert page.is_visible("#progress")
    assert "received" in page.inner_text("#facts")
    page.wait_for_selector('#state[data-state="ready"]')

    assert page.is_hidden("#progress")
    assert page.is_visible("#chart")


@pytest.mark.browser
def test_behind_a_key_the_page_asks_for_it_and_then_works(page, start) -> None:
    server = start("--api-key=sesame")
    page.goto(server.url)
    page.wait_for_selector("#key-part:not([hidden])")
    assert page.inner_text("#state") == "needs a key"
    assert page.is_hidden("#engine-part")  # of which nothing is known
    page.keyboard.type("wrong")  # the field has the focus already
    page.keyboard.press("Enter")
    until(page, 'document.querySelector("#state").textContent === "another key is needed"')

    page.fill("#key", "sesame")
    page.keyboard.press("Enter")
    page.wait_for_selector('#state[data-state="ready"]')
    say(page, "hi")
    assert "hi" in page.inner_text(".turn.assistant .text")


@pytest.mark.browser
def test_under_a_root_path_the_page_works(page, start) -> None:
    server = start("--root-path=/llm")
    opened(page, server.url + "/llm")
    say(page, "hi")

    assert all(
        "/llm/" in request.url or request.url.endswith("/llm") for request in page.asked if "data:" not in request.url
    )


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 375])
def test_it_fits_and_can_be_read_in_light_and_dark_wide_and_narrow(page, echo, scheme: str, width: int) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 700})
    opened(page, echo.url)
    say(page, "A question that is long enough to take more than one line on a narrow screen, and then some more.")
    say(page, "```\n" + "wide " * 60 + "\n```")

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert contrast(page, ".turn.assistant", ".turn.assistant .text p") > 7
    for part in (".facts", ".who"):
        assert contrast(page, ".turn.assistant", f".turn.assistant {part}") > 4.5
    dark = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.2
    assert dark == (scheme == "dark")


def contrast(page: Any, background: str, text: str) -> float:
    under = luminance(page.evaluate(f"getComputedStyle(document.querySelector('{background}')).backgroundColor"))
    over = luminance(page.evaluate(f"getComputedStyle(document.querySelector('{text}')).color"))
    return (max(under, over) + 0.05) / (min(under, over) + 0.05)


def luminance(color: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
