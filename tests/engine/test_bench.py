"""`octavo bench`: what is sent, how answers are timed, and which figures come of it."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from octavo_engine import cli
from octavo_engine.bench import cli as bench_cli
from octavo_engine.bench import datasets, report, serve
from octavo_engine.config import ArgumentParser, ConfigError, UsageError


def test_random_prompts_have_the_lengths_that_were_asked_for_and_nothing_in_common():
    samples = datasets.made_up("random", 20, datasets.Shape(100, 30), 5000, seed=1)

    assert [(len(s.prompt), s.output_len) for s in samples] == [(100, 30)] * 20
    assert len({tuple(s.prompt[:8]) for s in samples}) == 20
    assert all(datasets.FIRST_ID <= token < 5000 for s in samples for token in s.prompt)
    assert samples == datasets.made_up("random", 20, datasets.Shape(100, 30), 5000, seed=1)


def test_lengths_vary_within_the_range_ratio():
    lengths = [len(s.prompt) for s in datasets.made_up("random", 200, datasets.Shape(100, 30, 0.2), 5000, seed=1)]

    assert 80 <= min(lengths) < 90
    assert 110 < max(lengths) <= 120


def test_prefix_repetition_shares_as_many_beginnings_as_asked():
    shape = datasets.Shape(40, 30, prefix_len=60, num_prefixes=3)
    samples = datasets.made_up("prefix_repetition", 12, shape, 5000, seed=1)

    assert len({tuple(s.prompt[:60]) for s in samples}) == 3
    assert len({tuple(s.prompt) for s in samples}) == 12
    assert all(len(s.prompt) == 100 for s in samples)


@pytest.mark.parametrize(
    ("shape", "flag"),
    [
        (datasets.Shape(0, 1), "--input-len"), (datasets.Shape(1, 0), "--output-len"),
        (datasets.Shape(9, 9, 1.0), "--range-ratio"), (datasets.Shape(9, 9, prefix_len=-1), "--prefix-len"),
    ],
)  # fmt: skip
def test_impossible_lengths_are_refused_by_name(shape, flag):
    with pytest.raises(ConfigError, match=flag):
        datasets.made_up("random", 1, shape, 5000, 0)


def test_what_is_shared_comes_before_the_length_that_was_asked_for_as_with_vllms_flags():
    samples = datasets.made_up("random", 3, datasets.Shape(16, 1, prefix_len=32), 5000, seed=1)

    assert [len(s.prompt) for s in samples] == [48] * 3
    assert len({tuple(s.prompt[:32]) for s in samples}) == 1


def conversation(question: int, answer: int) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": "q " * question}, {"from": "gpt", "value": "a " * answer}]}


def words(text: str) -> list[int]:
    return list(range(len(text.split())))


def test_a_sharegpt_file_gives_questions_with_the_lengths_of_their_answers(tmp_path):
    file = tmp_path / "sharegpt.json"
    alone = {"conversations": [{"from": "human", "value": "nobody answers"}]}
    file.write_text(json.dumps([conversation(10, 20), conversation(2, 20), conversation(9, 3000), alone]))

    samples = datasets.sharegpt(file, 5, words, seed=0)
    of_seven = datasets.sharegpt(file, 5, words, seed=0, output_len=7)

    assert [(len(s.prompt), s.output_len) for s in samples] == [(10, 20)]
    assert sorted((len(s.prompt), s.output_len) for s in of_seven) == [(9, 7), (10, 7)]


@pytest.mark.parametrize("content", ['{"rows": []}', "[]", '[{"conversations": [{"value": 1}, {"value": 2}]}]'])
def test_a_file_that_is_no_sharegpt_file_is_refused_with_its_name(tmp_path, content):
    file = tmp_path / "other.json"
    file.write_text(content)

    with pytest.raises(ConfigError, match=r"other\.json"):
        datasets.sharegpt(file, 5, list, seed=0)


def test_poisson_arrivals_have_the_rate_that_was_asked_for():
    moments = serve.arrivals(4000, serve.Load(request_rate=20.0, seed=3))
    gaps = [b - a for a, b in itertools.pairwise(moments)]

    assert moments[0] == 0.0
    assert 4000 / moments[-1] == pytest.approx(20.0, rel=0.05)
    # The gaps of a Poisson process spread as much as their mean.
    deviation = (sum((gap - 0.05) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(0.05, rel=0.1)
    assert serve.arrivals(3, serve.Load()) == [0.0, 0.0, 0.0]


def test_percentiles_interpolate():
    assert report.percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert report.percentile([1.0, 2.0], 99) == pytest.approx(1.99)
    assert report.percentile([], 50) == 0.0


def test_the_summary_counts_what_was_answered_and_what_was_good():
    answers = [
        report.Answer(10, 0.0, 0.1, 0.5, [0.2, 0.2], 3),
        report.Answer(20, 0.2, 0.3, 0.7, [0.4], 2),
        report.Answer(30, 0.3, error="HTTP 503: no"),
    ]

    result = report.summary(answers, 2.0, [50.0, 99.0], {"ttft": 200.0})

    assert (result["completed"], result["failed"]) == (2, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (30, 5)
    assert result["output_throughput"] == 2.5
    assert result["request_goodput"] == 0.5
    assert result["max_concurrent_requests"] == 2
    assert result["mean_ttft_ms"] == pytest.approx(200.0)
    assert result["p50_itl_ms"] == pytest.approx(200.0)
    assert result["median_tpot_ms"] == pytest.approx(300.0)
    assert "P99 E2EL (ms):" in report.table(result, [50.0, 99.0])


def test_failures_are_told_by_their_number_and_the_first_reason_before_others():
    answers = [report.Answer(1, error=error) for error in ("", "late", "no", "no", "", "odd", "cut", "cut")]

    told = report.failures(answers).split("\n")

    assert told == ["6 of 8 requests failed, the first with: late", "2 of them with: no", "2 of them with: cut"]
    assert report.failures(answers[:1]) == ""


HEADERS: list[dict[str, str]] = []
"""Of every request to the server below."""


@pytest.fixture
async def server() -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """A server that streams three tokens 50 ms apart, and the bodies that it got. The prompt [7] is refused."""
    bodies: list[dict[str, Any]] = []
    HEADERS.clear()

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny"}]})

    async def completions(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        bodies.append(body)
        HEADERS.append({name.lower(): value for name, value in request.headers.items()})
        tells = body.get("stream_options") is not None
        if body["prompt"] == [7]:
            return web.json_response({"error": {"message": "busy"}}, status=503)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": a comment\n\n")
        for _ in range(3):
            await asyncio.sleep(0.05)
            await response.write(b'data: {"choices": [{"text": "x"}]}\n\n')
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 3}
        if tells:
            await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", completions)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}", bodies
    await runner.cleanup()


async def test_answers_are_timed_token_by_token(server):
    url, bodies = server
    target = serve.Target(url, await serve.served_model(url, None))

    answers, duration = await serve.run(target, [datasets.Sample([5, 6], 3)] * 4, serve.Load(), False)

    assert [a.error for a in answers] == [""] * 4
    assert [a.output_len for a in answers] == [3] * 4
    assert all(0.04 < a.ttft_s < 0.5 and len(a.itls_s) == 2 and min(a.itls_s) > 0.02 for a in answers)
    assert 0.14 < duration < 2
    assert bodies[0]["model"] == "tiny"
    assert bodies[0]["ignore_eos"] is True


async def test_of_a_server_that_does_not_count_its_tokens_each_event_is_one(server):
    url, _ = server
    target = serve.Target(url, "tiny", body={"stream_options": None})

    answers, _ = await serve.run(target, [datasets.Sample([5, 6], 3)], serve.Load(), False)

    assert answers[0].output_len == 3


async def test_a_refused_request_is_counted_and_tells_why(server):
    url, _ = server

    answers, _ = await serve.run(serve.Target(url, "tiny"), [datasets.Sample([7], 3)], serve.Load(), False)

    assert answers[0].error.startswith("HTTP 503")


async def test_no_more_requests_are_under_way_than_allowed(server):
    url, _ = server

    answers, _ = await serve.run(
        serve.Target(url, "tiny"), [datasets.Sample([5], 3)] * 6, serve.Load(max_concurrency=2), False
    )

    assert report.summary(answers, 1.0, [], {})["max_concurrent_requests"] <= 2
    assert max(a.started_s for a in answers) > 0.25


async def test_flags_of_vllms_benchmark_are_honoured_and_its_files_are_written(server, tmp_path, capsys):
    url, bodies = server
    arguments = [
        "bench", "serve", "--backend", "vllm", "--base-url", url, "--endpoint", "/v1/completions", "--num-prompts", "3",
        "--random-input-len", "4", "--random-output-len", "3", "--seed", "7", "--top-p", "0.9", "--no-ignore-eos",
        "--extra-body", '{"priority": 2}', "--header", "x-test=yes", "--request-id-prefix", "run-", "--disable-tqdm",
        "--percentile-metrics", "ttft,itl", "--metric-percentiles", "50", "--max-concurrency", "2", "--save-result",
        "--result-dir", str(tmp_path / "out"), "--label", "mine", "--metadata", "gpu=none",
        "--ready-check-timeout-sec", "5",
    ]  # fmt: skip
    assert await asyncio.to_thread(cli.main, arguments) == 0

    assert {(b["top_p"], b["ignore_eos"], b["priority"], b["model"]) for b in bodies} == {(0.9, False, 2, "tiny")}
    assert {h["x-request-id"] for h in HEADERS} == {"run-0", "run-1", "run-2"}
    assert {h["x-test"] for h in HEADERS} == {"yes"}
    shown = capsys.readouterr().out
    assert "Maximum request concurrency:" in shown
    assert "P50 TTFT (ms):" in shown
    assert "TPOT" not in shown
    (file,) = (tmp_path / "out").iterdir()
    assert file.name.startswith("mine-infqps-concurrency2-tiny-")
    result = json.loads(file.read_text())
    assert (result["completed"], result["gpu"], result["backend"]) == (3, "none", "vllm")
    assert "ttfts" not in result
    assert (result["request_rate"], result["num_prompts"]) == ("inf", 3)
    assert re.fullmatch(r"\d{8}-\d{6}", result["date"])


async def test_the_files_are_whole_where_nobody_reads_the_table(server, tmp_path, monkeypatch):
    """`octavo bench serve --save-result | head` left no file."""
    url, _ = server

    def broken(*_: Any, **__: Any) -> str:
        raise BrokenPipeError

    monkeypatch.setattr(report, "table", broken)
    arguments = ["--base-url", url, "--num-prompts", "2", "--disable-tqdm", "--save-result", "--result-dir"]
    with pytest.raises(BrokenPipeError):
        await asyncio.to_thread(bench, [*arguments, str(tmp_path), "--output-json", str(tmp_path / "all.json")])

    assert [json.loads(file.read_text())["completed"] for file in tmp_path.iterdir()] == [2, 2]


async def test_prompts_share_beginnings_without_being_told_how_and_by_vllms_flags(server, capsys):
    url, bodies = server
    arguments = ["bench", "serve", "--base-url", url, "--disable-tqdm", "--dataset-name", "prefix_repetition"]
    assert await asyncio.to_thread(cli.main, [*arguments, "--num-prompts", "12", "--request-rate", "200"]) == 0

    prompts = [body["prompt"] for body in bodies]
    assert {len(prompt) for prompt in prompts} == {512}
    assert len({tuple(prompt[:256]) for prompt in prompts}) == 10
    assert {body["max_tokens"] for body in bodies} == {128}

    bodies.clear()
    lengths = zip(("prefix-len", "suffix-len", "output-len", "num-prefixes"), "5432", strict=True)
    arguments += [word for name, length in lengths for word in (f"--prefix-repetition-{name}", length)]
    assert await asyncio.to_thread(cli.main, [*arguments, "--num-prompts", "6"]) == 0

    assert {(len(body["prompt"]), body["max_tokens"]) for body in bodies} == {(9, 3)}
    assert len({tuple(body["prompt"][:5]) for body in bodies}) == 2


async def test_where_every_request_fails_the_reason_comes_instead_of_a_table_of_zeros(server, tmp_path, capsys):
    url, _ = server
    file = tmp_path / "out.json"
    arguments = ["--base-url", url, "--num-prompts", "3", "--disable-tqdm", "--extra-body", '{"prompt": [7]}']

    assert await asyncio.to_thread(bench, [*arguments, "--output-json", str(file)]) == 1

    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("octavo bench serve: 3 of 3 requests failed, the first with: HTTP 503: ")
    assert "busy" in shown.err
    result = json.loads(file.read_text())
    assert (result["completed"], result["failed"]) == (0, 3)


async def test_where_some_requests_fail_the_table_stays_and_the_first_reason_is_told(server, monkeypatch, capsys):
    url, _ = server
    samples = [datasets.Sample([5, 6], 3), datasets.Sample([7], 3), datasets.Sample([5, 6], 3)]
    monkeypatch.setattr(datasets, "made_up", lambda *_: samples)

    assert await asyncio.to_thread(bench, ["--base-url", url, "--num-prompts", "3", "--disable-tqdm"]) == 1

    shown = capsys.readouterr()
    assert re.search(r"Successful requests: +2 ", shown.out)
    assert "1 of 3 requests failed, the first with: HTTP 503: " in shown.err


@pytest.mark.parametrize(("flags", "sent"), [([], 5), (["--no-oversample"], 2)])
async def test_a_file_with_fewer_conversations_comes_again_and_that_is_told(
    server, tmp_path, monkeypatch, capsys, flags, sent
):
    from octavo_engine.api import find_model, tokenizer

    url, bodies = server
    file = tmp_path / "sharegpt.json"
    file.write_text(json.dumps([conversation(5, 6), conversation(7, 8)]))
    monkeypatch.setattr(find_model, "local_folder", lambda name: SimpleNamespace(path=tmp_path))
    monkeypatch.setattr(tokenizer.Tokenizer, "load", lambda path: SimpleNamespace(encode=words))
    arguments = ["bench", "serve", "--base-url", url, "--disable-tqdm", "--dataset-name", "sharegpt"]
    arguments += ["--dataset-path", str(file), "--num-prompts", "5", *flags]
    assert await asyncio.to_thread(cli.main, arguments) == 0

    assert len(bodies) == sent
    assert {(len(body["prompt"]), body["max_tokens"]) for body in bodies} == {(5, 6), (7, 8)}
    assert ("has 2 conversations of ordinary length for 5 prompts" in capsys.readouterr().err) == (sent == 5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-concurrency", "0"], "--max-concurrency: got 0, expected 1 or more"),
        (["--num-warmups", "-1"], "--num-warmups: got -1, expected 0 or more"),
        (["--extra-body", "[1]"], "--extra-body: got [1], expected a JSON object"),
        (["--dataset-path", "conversations.json"], "--dataset-name: got 'random', expected sharegpt"),
        (["--dataset-name", "sharegpt", "--random-input-len", "9"], "--input-len: got 9, expected none"),
        (["--dataset-name", "sharegpt"], "--dataset-path: got None, expected the file"),
        (["--percentile-metrics", "ttft,other"], "got 'other', expected some of ttft, tpot, itl, e2el"),
        (["--metadata", "gpu"], "--metadata: got 'gpu', expected NAME=VALUE"),
        (["--backend", "openai-chat"], "--backend"),
    ],
)
def test_what_the_benchmark_cannot_do_is_refused(flags, words, capsys, monkeypatch):
    with pytest.raises((ConfigError, UsageError), match=re.escape(words)):
        bench(flags)


@pytest.mark.parametrize("kind", ["throughput", "latency"])
def test_flags_of_vllms_offline_benchmarks_that_are_so_anyway_are_taken(kind):
    command, _ = bench_cli.add_commands(ArgumentParser(prog="octavo bench"))[kind]
    backend = ["--backend", "vllm"] if kind == "throughput" else []

    given = command.parse_args([*backend, "--model", "m", "--disable-detokenize", "--output-len", "7"])

    assert given.output_len == 7
    if kind == "throughput":
        with pytest.raises(UsageError, match="'hf'"):
            command.parse_args(["--backend", "hf"])


@pytest.mark.parametrize("kind", ["throughput", "latency"])
def test_the_offline_benchmarks_hand_over_what_was_given_and_nothing_else(kind, monkeypatch):
    """A default that was handed over as if it were given would limit chunks; one that was given was ignored."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "octavo_engine.llm.LLM", lambda model, **settings: made.append(settings) or SimpleNamespace(vocab_size=9)
    )
    command, _ = bench_cli.add_commands(ArgumentParser(prog="octavo bench"))[kind]

    for flags in ([], ["--max-decode-slowdown", "1.5", "--max-num-seqs", "4"]):
        bench_cli._llm(command.parse_args(["m", *flags]))

    assert made[0].keys() == {"skip_tokenizer_init"}
    assert (made[1]["max_decode_slowdown"], made[1]["max_num_seqs"]) == (1.5, 4)
    told = " ".join(command.format_help().split())
    assert "--max-num-batched-tokens. Default: 0 here, where nobody reads answers as they grow." in told


def bench(flags: list[str], *kind: str) -> int:
    parser = ArgumentParser(prog="octavo bench")
    return bench_cli.run(bench_cli.add_commands(parser), [*(kind or ("serve", "--model", "m")), *flags], parser)


def test_a_server_that_is_not_there_is_named(capsys):
    assert cli.main(["bench", "serve", "--port", "1", "--num-prompts", "1"]) == 1

    assert "octavo serve" in capsys.readouterr().err


@pytest.mark.slow
def test_the_offline_benchmarks_run_on_a_real_model(tmp_path, capsys):
    import models

    model, file = str(models.smollm2()), tmp_path / "out.json"
    common = [model, "--device=cpu", "--max-model-len=128", "--output-len=4", "--disable-tqdm", f"--output-json={file}"]

    assert cli.main(["bench", "latency", *common, "--batch-size=2", "--num-iters=2", "--num-iters-warmup=0"]) == 0
    latency = json.loads(file.read_text())
    assert cli.main(["bench", "throughput", *common, "--num-prompts=3", "--input-len=10"]) == 0
    throughput = json.loads(file.read_text())

    assert len(latency["latencies"]) == 2
    assert throughput["num_requests"] == 3
    assert throughput["total_num_tokens"] == 3 * 14
    assert "requests/s" in capsys.readouterr().out

    # A request that would be cut short is found before the measurement and not by it.
    with pytest.raises(ConfigError, match="--max-model-len: got 128, expected 129 or more"):
        bench(["--num-prompts=3", "--input-len=125", *common], "throughput")
