"""The flags of `octavo bench latency | throughput | serve`, and what each of them runs."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from octavo_engine.command_line import add_vllm_flags, help_about, read
from octavo_engine.config import (
    ArgumentParser,
    ConfigError,
    EngineConfig,
    UsageError,
    add_arguments,
    from_namespace,
)
from octavo_engine.status import API_PORT, ExitStatus, FatalError

SAMPLING: dict[str, type[float] | type[int]] = {
    "temperature": float, "top_p": float, "top_k": int, "min_p": float, "frequency_penalty": float,
    "presence_penalty": float, "repetition_penalty": float, "logprobs": int,
}  # fmt: skip
Command = Callable[[argparse.Namespace], int]


def add_commands(parser: argparse.ArgumentParser) -> dict[str, tuple[ArgumentParser, Command]]:
    """The sub-parsers of `octavo bench`, by name."""
    commands = parser.add_subparsers(metavar="KIND", parser_class=ArgumentParser)
    made: dict[str, tuple[ArgumentParser, Command]] = {}
    for name, run, text in (
        ("serve", _serve, "time a running server through HTTP"),
        ("throughput", _throughput, "time the engine with all requests at once"),
        ("latency", _latency, "time a batch of requests, over and over"),
    ):
        made[name] = (commands.add_parser(name, help=text, description=text.capitalize() + "."), run)
    serve, _ = made["serve"]
    serve.add_argument("--base-url", help="Address of the server. Default: http://HOST:PORT.")
    serve.add_argument("--host", default="localhost", help="Default: %(default)s.")
    serve.add_argument("--port", type=int, default=API_PORT, help="Default: %(default)s.")
    serve.add_argument("--model", help="Name of the model. Default: the one that the server names.")
    serve.add_argument("--tokenizer", help="Tokenizer of the sharegpt dataset, an id or a folder. Default: MODEL.")
    serve.add_argument(
        "--vocab-size", type=int, default=10_000, help="Random prompts take ids below it. Default: %(default)s."
    )
    serve.add_argument(
        "--request-rate", type=float, default=float("inf"), help="Requests per second. Default: inf, all at once."
    )
    serve.add_argument(
        "--burstiness", type=float, default=1.0,
        help="1 is a Poisson process, less comes in bursts, more is steadier. Default: %(default)s.",
    )  # fmt: skip
    serve.add_argument("--max-concurrency", type=int, help="Requests at once at most. Default: no limit.")
    serve.add_argument("--num-warmups", type=int, default=0, help="Requests sent before. Default: %(default)s.")
    serve.add_argument(
        "--backend", "--endpoint-type", default="openai", choices=("openai", "openai-completions", "vllm"),
        help="Which API is asked. Prompts are token ids, which chats do not take. Default: %(default)s.",
    )  # fmt: skip
    serve.add_argument("--endpoint", default="/v1/completions", metavar="PATH", help="Default: %(default)s.")
    serve.add_argument("--served-model-name", metavar="NAME", help="Name in requests, if it is not --model.")
    for name, kind in SAMPLING.items():
        serve.add_argument(f"--{name.replace('_', '-')}", type=kind, help="Default: the server's.")
    serve.add_argument(
        "--ignore-eos", action=argparse.BooleanOptionalAction, default=True,
        help="Let each answer have its full length. Default: on.",
    )  # fmt: skip
    serve.add_argument("--extra-body", type=json.loads, default={}, metavar="JSON", help="More fields of each request.")
    serve.add_argument("--header", nargs="+", default=[], metavar="NAME=VALUE", help="More headers of each request.")
    serve.add_argument("--request-id-prefix", default="", metavar="TEXT", help="Requests get X-Request-Id: TEXT0, …")
    serve.add_argument(
        "--ready-check-timeout-sec", type=float, default=0.0, metavar="SECONDS",
        help="Wait so long for the server to serve its model. Default: %(default)s.",
    )  # fmt: skip
    serve.add_argument(
        "--percentile-metrics", default="ttft,tpot,itl,e2el", help="Latencies to show. Default: %(default)s."
    )
    serve.add_argument("--save-result", action="store_true", help="Write the figures to a file of the run's name.")
    serve.add_argument("--save-detailed", action="store_true", help="With each request's own figures in it.")
    serve.add_argument("--result-dir", type=Path, default=Path(), metavar="DIR", help="Default: the current one.")
    serve.add_argument("--result-filename", metavar="NAME", help="Default: BACKEND-RATEqps-MODEL-TIME.json.")
    serve.add_argument("--label", help="What the file's name begins with. Default: BACKEND.")
    serve.add_argument("--metadata", nargs="+", default=[], metavar="KEY=VALUE", help="Kept in the file.")
    serve.add_argument(
        "--metric-percentiles", default="99", help="Percentiles to report, as 50,90,99. Default: %(default)s."
    )
    serve.add_argument(
        "--goodput", nargs="+", default=[], metavar="METRIC:MS",
        help="Count requests within these bounds: ttft:200 tpot:50 e2el:5000.",
    )  # fmt: skip
    _dataset_arguments(serve, num_prompts=1000, seed=True)
    for name in ("throughput", "latency"):
        command, _ = made[name]
        command.add_argument("model_positional", metavar="MODEL", nargs="?", help="Hugging Face id or folder.")
        command.add_argument(
            "--disable-detokenize", action="store_true", help="Without effect: no text is made of answers here."
        )
        if name == "throughput":
            command.add_argument("--backend", choices=("vllm",), default="vllm", help="Without effect: this engine.")
            _dataset_arguments(command, num_prompts=1000)
        else:
            command.add_argument("--batch-size", type=int, default=8, help="Requests at once. Default: %(default)s.")
            command.add_argument("--input-len", type=int, default=32, help="Default: %(default)s.")
            command.add_argument("--output-len", type=int, default=128, help="Default: %(default)s.")
            command.add_argument("--num-iters-warmup", type=int, default=3, help="Default: %(default)s.")
            command.add_argument("--num-iters", type=int, default=10, help="Default: %(default)s.")
        add_arguments(command, [EngineConfig])
        (slowdown,) = (action for action in command._actions if action.dest == "max_decode_slowdown")
        told = str(slowdown.help).rpartition(" Default: ")[0]
        slowdown.help = f"{told} Default: 0 here, where nobody reads answers as they grow."
        add_vllm_flags(command)
    for command, _ in made.values():
        command.add_argument("--output-json", type=Path, metavar="FILE", help="Write the figures there as JSON.")
        command.add_argument("--disable-tqdm", action="store_true", help="No progress bar.")
    return made


def _dataset_arguments(parser: argparse.ArgumentParser, num_prompts: int, *, seed: bool = False) -> None:
    """seed: whether --seed is free to be the dataset's."""
    from octavo_engine.bench.datasets import DATASETS, SHAPES

    usual, shared = SHAPES["random"], SHAPES["prefix_repetition"]
    parser.add_argument("--dataset-name", choices=DATASETS, default="random", help="Default: %(default)s.")
    parser.add_argument("--dataset-path", type=Path, metavar="FILE", help="File of the sharegpt dataset.")
    parser.add_argument("--num-prompts", type=int, default=num_prompts, help="Default: %(default)s.")
    parser.add_argument(
        "--no-oversample", action="store_true",
        help="Send fewer where a file has fewer conversations. Default: they come again.",
    )  # fmt: skip
    parser.add_argument(
        "--input-len", "--random-input-len", "--prefix-repetition-suffix-len", type=int, dest="input_len",
        help=f"Tokens of made-up prompts, behind what they share. Default: {usual.input_len}, "
        f"{shared.input_len} of prefix_repetition.",
    )  # fmt: skip
    parser.add_argument(
        "--output-len", "--random-output-len", "--prefix-repetition-output-len", "--sharegpt-output-len", type=int,
        dest="output_len", help=f"Tokens of answers. Default: {usual.output_len}, of sharegpt the file's.",
    )  # fmt: skip
    parser.add_argument(
        "--range-ratio", "--random-range-ratio", type=float, default=0.0, dest="range_ratio",
        help="Lengths vary by that share up and down. Default: %(default)s.",
    )  # fmt: skip
    parser.add_argument(
        "--prefix-len", "--random-prefix-len", "--prefix-repetition-prefix-len", type=int, dest="prefix_len",
        help=f"Tokens at the beginning that prompts share. Default: {usual.prefix_len}, "
        f"{shared.prefix_len} of prefix_repetition.",
    )  # fmt: skip
    parser.add_argument(
        "--num-prefixes", "--prefix-repetition-num-prefixes", type=int, default=shared.num_prefixes,
        dest="num_prefixes", help="Different beginnings of prefix_repetition. Default: %(default)s.",
    )  # fmt: skip
    if not any(action.dest == "seed" for action in parser._actions):
        names = ["--dataset-seed", "--seed"] if seed else ["--dataset-seed"]
        parser.add_argument(*names, type=int, default=0, help="Default: %(default)s.")


def run(commands: dict[str, tuple[ArgumentParser, Command]], arguments: list[str], bench: ArgumentParser) -> int:
    """`octavo bench KIND …`"""
    if not arguments or arguments[0] not in commands:
        if not arguments or not arguments[0].startswith("-"):
            given = repr(arguments[0]) if arguments else "nothing"
            raise UsageError(f"octavo bench: got {given}, expected one of {', '.join(commands)}")
        bench.parse_args(arguments)  # --help
        return ExitStatus.OK
    command, run_it = commands[arguments[0]]
    if (about := next((a for a in arguments[1:] if a.startswith("--help=")), None)) is not None:
        print(help_about(command, about.partition("=")[2]))
        return ExitStatus.OK
    namespace, warnings = read(command, arguments[1:], os.environ)
    for warning in warnings:
        print(f"octavo bench: {warning}", file=sys.stderr)
    _check_places(namespace)
    try:
        return run_it(namespace)
    except FatalError as error:
        print(f"octavo bench: {error.failure}", file=sys.stderr)
        return error.failure.code.exit_status


def _serve(namespace: argparse.Namespace) -> int:
    from octavo_engine.bench import report, serve

    base_url = (namespace.base_url or f"http://{namespace.host}:{namespace.port}").rstrip("/").removesuffix("/v1")
    api_key = os.environ.get("OPENAI_API_KEY")
    if not namespace.request_rate > 0 or not namespace.burstiness > 0:
        name = "burstiness" if namespace.request_rate > 0 else "request-rate"
        raise ConfigError(f"--{name}", getattr(namespace, name.replace("-", "_")), "a number above 0")
    for name, least in (("max_concurrency", 1), ("num_warmups", 0)):
        if (value := getattr(namespace, name)) is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')}", value, f"{least} or more")
    if not isinstance(namespace.extra_body, dict):
        raise ConfigError("--extra-body", namespace.extra_body, "a JSON object")
    percentiles = _numbers("--metric-percentiles", namespace.metric_percentiles)
    goodput = _goodput(namespace.goodput)
    shown = [name.strip() for name in namespace.percentile_metrics.split(",")]
    if unknown := set(shown) - set(report.METRICS):
        raise ConfigError("--percentile-metrics", ", ".join(sorted(unknown)), "some of " + ", ".join(report.METRICS))
    headers, metadata = _pairs("--header", namespace.header), _pairs("--metadata", namespace.metadata)
    try:
        wait_s = namespace.ready_check_timeout_sec
        name = namespace.served_model_name or namespace.model
        found = None if name and not wait_s else asyncio.run(serve.served_model(base_url, api_key, wait_s))
        model = name or found or ""
    except OSError as error:
        print(f"octavo bench serve: {error}", file=sys.stderr)
        return 1
    samples = _samples(namespace, namespace.vocab_size, namespace.tokenizer or namespace.model or model)
    sampling = {name: getattr(namespace, name) for name in SAMPLING if getattr(namespace, name) is not None}
    target = serve.Target(
        base_url, model, api_key, namespace.ignore_eos, namespace.endpoint, {**sampling, **namespace.extra_body},
        headers, namespace.request_id_prefix,
    )  # fmt: skip
    load = serve.Load(namespace.request_rate, namespace.burstiness, namespace.max_concurrency, namespace.dataset_seed)
    progress = not namespace.disable_tqdm
    if namespace.num_warmups:
        asyncio.run(serve.run(target, samples[: namespace.num_warmups], serve.Load(), False))
    answers, duration = asyncio.run(serve.run(target, samples, load, progress))
    result = report.summary(answers, duration, percentiles, goodput)
    configured: dict[str, float] = {}
    if namespace.max_concurrency is not None:
        configured["Maximum request concurrency:"] = namespace.max_concurrency
    if namespace.request_rate != float("inf"):
        configured["Request rate configured (RPS):"] = namespace.request_rate
    details = {
        "input_lens": [a.prompt_len for a in answers], "output_lens": [a.output_len for a in answers],
        "ttfts": [a.ttft_s for a in answers], "itls": [a.itls_s for a in answers],
        "start_times": [a.started_s for a in answers], "errors": [a.error for a in answers],
        "date": time.strftime("%Y%m%d-%H%M%S"), "model_id": model, "num_prompts": len(samples),
        "request_rate": "inf" if namespace.request_rate == float("inf") else namespace.request_rate,
        "burstiness": namespace.burstiness, "max_concurrency": namespace.max_concurrency,
    }  # fmt: skip
    _write(namespace.output_json, {**result, **details})
    if namespace.save_result or namespace.save_detailed:
        about = {"backend": namespace.backend, "label": namespace.label, **metadata}
        if not namespace.save_detailed:
            details = {name: value for name, value in details.items() if not isinstance(value, list)}
        _write(namespace.result_dir / _file_name(namespace, model), {**about, **result, **details})
    # After the files: who reads the first lines alone, as `head` does, ends this command. Of nothing there is no table:
    # its zeros would look like figures, and like very good ones.
    if result["completed"]:
        print(report.table(result, percentiles, metrics=shown, load=configured), flush=True)
    if told := report.failures(answers):
        print(f"octavo bench serve: {told}", file=sys.stderr)
        return 1
    return ExitStatus.OK


def _throughput(namespace: argparse.Namespace) -> int:
    from octavo_engine.bench import offline

    llm, vocab_size = _llm(namespace)
    samples = _samples(namespace, vocab_size, getattr(namespace, "tokenizer", None) or namespace.model)
    _check_lengths(llm, samples)
    result = offline.throughput(llm, samples, not namespace.disable_tqdm)
    _write(namespace.output_json, result)
    rates = (result[f"{what}_per_second"] for what in ("requests", "tokens", "output_tokens"))
    print("Throughput: {:.2f} requests/s, {:.2f} total tokens/s, {:.2f} output tokens/s".format(*rates))
    return ExitStatus.OK


def _latency(namespace: argparse.Namespace) -> int:
    from octavo_engine.bench import datasets, offline

    for name, least in (("batch_size", 1), ("num_iters", 1), ("num_iters_warmup", 0)):
        if (value := getattr(namespace, name)) < least:
            raise ConfigError(f"--{name.replace('_', '-')}", value, f"{least} or more")
    # The same prompts come again and again: found in the cache, they would measure nothing.
    namespace.enable_prefix_caching = False
    llm, vocab_size = _llm(namespace)
    shape = datasets.Shape(namespace.input_len, namespace.output_len)
    samples = datasets.made_up("random", namespace.batch_size, shape, vocab_size, 0)
    _check_lengths(llm, samples)
    result = offline.latency(llm, samples, namespace.num_iters_warmup, namespace.num_iters, not namespace.disable_tqdm)
    _write(namespace.output_json, result)
    print(f"Avg latency: {result['avg_latency']:.4f} seconds")
    for percent, seconds in result["percentiles"].items():
        print(f"{percent}% percentile latency: {seconds:.4f} seconds")
    return ExitStatus.OK


def _llm(namespace: argparse.Namespace) -> tuple[Any, int]:
    """The engine in this process, and its vocabulary's size."""
    if namespace.model_positional is not None:
        namespace.model = namespace.model_positional
    config = from_namespace(EngineConfig, namespace)
    config.check()
    from dataclasses import fields

    from octavo_engine.llm import LLM

    # Only what was given: what LLM does without a setting is not always what its default says (max_decode_slowdown).
    given = {f.name for f in fields(EngineConfig)} & vars(namespace).keys() - {"model"}
    settings = {name: getattr(config, name) for name in given}
    llm = LLM(config.model, **settings, skip_tokenizer_init=getattr(namespace, "dataset_name", "random") != "sharegpt")
    return llm, llm.vocab_size


def _check_lengths(llm: Any, samples: list[Any]) -> None:
    """Raises ConfigError where a request would be refused or cut short, which is not what was to be measured."""
    longest, limit = max(len(s.prompt) + s.output_len for s in samples), llm.effective.max_model_len
    if longest > limit:
        raise ConfigError("--max-model-len", limit, f"{longest} or more, as prompt and answer have so many tokens")


def _samples(namespace: argparse.Namespace, vocab_size: int, tokenizer: str) -> list[Any]:
    from octavo_engine.bench import datasets

    kind, count = namespace.dataset_name, namespace.num_prompts
    if count < 1:
        raise ConfigError("--num-prompts", count, "1 or more")
    seed: int = getattr(namespace, "dataset_seed", 0) or getattr(namespace, "seed", 0)
    if kind != "sharegpt":
        if namespace.dataset_path is not None:
            raise ConfigError("--dataset-name", kind, "sharegpt, as --dataset-path names a file")
        names = ("input_len", "output_len", "range_ratio", "prefix_len", "num_prefixes")
        given = {name: value for name in names if (value := getattr(namespace, name)) is not None}
        return list(datasets.made_up(kind, count, replace(datasets.SHAPES[kind], **given), vocab_size, seed))
    for name in ("input_len", "prefix_len"):
        if (value := getattr(namespace, name)) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}", value, "none, as the prompts of sharegpt are the file's")
    if namespace.dataset_path is None:
        raise ConfigError("--dataset-path", None, "the file of the sharegpt dataset")
    from octavo_engine.api.find_model import local_folder
    from octavo_engine.api.tokenizer import Tokenizer

    folder = local_folder(tokenizer)
    if folder is None:
        raise ConfigError("--tokenizer", tokenizer, "a folder with tokenizer.json")
    encode = Tokenizer.load(folder.path).encode
    samples = list(datasets.sharegpt(namespace.dataset_path, count, encode, seed, namespace.output_len))
    if len(samples) < count and not namespace.no_oversample:
        has = f"{namespace.dataset_path} has {len(samples)} conversations of ordinary length for {count} prompts"
        print(f"octavo bench: {has}: they come again, and may be found in the prefix cache", file=sys.stderr)
        samples = [samples[index % len(samples)] for index in range(count)]
    return samples


def _file_name(namespace: argparse.Namespace, model: str) -> str:
    """As `vllm bench` names it."""
    if namespace.result_filename:
        return str(namespace.result_filename)
    limit = "" if namespace.max_concurrency is None else f"-concurrency{namespace.max_concurrency}"
    when = time.strftime("%Y%m%d-%H%M%S")
    begin = namespace.label or namespace.backend
    return f"{begin}-{namespace.request_rate}qps{limit}-{model.split('/')[-1]}-{when}.json"


def _pairs(flag: str, words: list[str]) -> dict[str, str]:
    for word in words:
        if "=" not in word:
            raise ConfigError(flag, word, "NAME=VALUE")
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def _numbers(flag: str, text: str) -> list[float]:
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = [-1.0]
    if not all(0 <= number <= 100 for number in numbers):
        raise ConfigError(flag, text, "numbers from 0 to 100 with commas between them")
    return numbers


def _goodput(words: list[str]) -> dict[str, float]:
    bounds = {}
    for word in words:
        name, _, bound = word.partition(":")
        try:
            bounds[name] = float(bound)
        except ValueError:
            raise ConfigError("--goodput", word, "METRIC:MILLISECONDS, as in ttft:200") from None
        if name not in ("ttft", "tpot", "e2el"):
            raise ConfigError("--goodput", word, "one of ttft, tpot and e2el before the colon")
    return bounds


def _check_places(namespace: argparse.Namespace) -> None:
    """Where figures are to be written must be writable before minutes of measuring, not after. Raises ConfigError."""
    places: list[tuple[str, Path]] = []
    if namespace.output_json is not None:
        places.append(("--output-json", namespace.output_json.parent))
    if getattr(namespace, "save_result", False) or getattr(namespace, "save_detailed", False):
        with contextlib.suppress(OSError):
            namespace.result_dir.mkdir(parents=True, exist_ok=True)
        places.append(("--result-dir", namespace.result_dir))
    for flag, folder in places:
        if not os.access(folder, os.W_OK):
            raise ConfigError(flag, str(folder), "a folder that is there and can be written")


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(result) + "\n")
