"""The command `octavo`: serve, chat, complete, plan, bench, download, compile-kernels, drain, collect-env.

Import-light: what a subcommand needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from octavo_engine import __version__
from octavo_engine.command_line import ABOUT_VLLM, add_vllm_flags, help_about, read
from octavo_engine.config import (
    ArgumentParser,
    ConfigError,
    EngineConfig,
    ServerConfig,
    UsageError,
    add_arguments,
    from_namespace,
    parse_count,
)
from octavo_engine.status import (
    API_PORT,
    DEFAULT_TERMINATION_LOG,
    MANAGEMENT_PORT,
    ExitStatus,
    Failure,
    FailureCode,
    FatalError,
)

if TYPE_CHECKING:
    from octavo_engine.client import Talk

COMPILE_SETTINGS = ("model", "revision", "download_dir", "block_size", "dtype")
DOWNLOAD_SETTINGS = (
    *("model", "revision", "download_dir", "model_store", "model_store_size"),
    *("host", "management_port", "log_level", "startup_stall_s", "termination_log"),
)

BROKEN_PIPE = 128 + 13
"""As of a program that SIGPIPE ended."""

Command = Callable[[argparse.Namespace, list[str]], int]
"""Runs a command with its flags, and with the warnings that reading them gave."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # What comes after a pipe (`| head`) has read enough. Python would complain once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (UsageError, ConfigError) as error:
        refuse(str(error), _termination_log(arguments))


def _run(arguments: list[str]) -> int:
    parser, commands = _parsers()
    if not arguments:
        parser.print_help()
        return ExitStatus.OK
    name = arguments[0]
    if name == "bench":
        return _bench(arguments[1:])
    if name not in commands:
        if not name.startswith("-"):
            near = difflib.get_close_matches(name, commands, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join([*commands, 'bench'])}"
            raise UsageError(f"octavo: unknown command {name!r}: {hint}")
        parser.parse_args(arguments)  # --help, --version
        return ExitStatus.OK
    # By the command's own parser, so that an unknown flag is compared with that command's flags.
    command, run = commands[name]
    if (about := next((a for a in arguments[1:] if a.startswith("--help=")), None)) is not None:
        print(help_about(command, about.partition("=")[2]))
        return ExitStatus.OK
    return run(*read(command, arguments[1:], os.environ))


def _parsers() -> tuple[ArgumentParser, dict[str, tuple[ArgumentParser, Command]]]:
    parser = ArgumentParser(prog="octavo", description="Serves large language models with the OpenAI API.")
    parser.add_argument("--version", action="version", version=f"octavo {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=ArgumentParser)
    serve = commands.add_parser(
        "serve", help="serve a model", description="Serve a model with the OpenAI API.", epilog=ABOUT_VLLM,
        usage="octavo serve MODEL [flags]",
    )  # fmt: skip
    _add_model(serve)
    serve.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS,
        help="YAML file of flags without their dashes; the command line wins over it.",
    )  # fmt: skip
    add_arguments(serve, [EngineConfig, ServerConfig])
    add_vllm_flags(serve)
    made = {"serve": (serve, _serve), **_client_parsers(commands)}
    drain = commands.add_parser(
        "drain",
        help="let the server on this machine finish its requests, and end it",
        description="Ask the server on this machine to take no new requests, and wait until the running ones are "
        "done. For a container's preStop hook.",
    )
    drain.add_argument("--host", default="127.0.0.1", help="Address of the server. Default: %(default)s.")
    drain.add_argument(
        "--management-port", type=int, default=MANAGEMENT_PORT, help="Its management port. Default: %(default)s."
    )
    plan = commands.add_parser(
        "plan",
        help="tell how much memory a model needs and what fits",
        description="Compute, without a GPU and without the weights, what the engine would allocate. Exit status 0 "
        "when it fits, the failure's own when it does not.",
        epilog=ABOUT_VLLM,
        usage="octavo plan MODEL [--memory BYTES] [flags]",
    )
    _add_model(plan)
    plan.add_argument(
        "--memory",
        type=parse_count,
        metavar="BYTES",
        help="Memory of the GPU to plan for (24G = 24 GiB). Default: plan for this machine's CPU.",
    )
    add_arguments(plan, [EngineConfig])
    add_vllm_flags(plan)
    commands.add_parser("bench", help="measure speed: bench serve, bench throughput, bench latency")
    fetch = commands.add_parser(
        "download",
        help="bring a model to this machine, whole and verified",
        description="Download a model and verify it, so that `octavo serve` with the same flags finds it whole. Goes "
        "on with what an earlier try left. A --model-store may be shared by pods: they wait for one another, and only "
        "one downloads.",
    )
    _add_model(fetch)
    add_arguments(fetch, [EngineConfig, ServerConfig], only=DOWNLOAD_SETTINGS)
    fetch.set_defaults(management_port=0)  # a server on this machine keeps its port
    kernels = commands.add_parser(
        "compile-kernels",
        help="compile a model's GPU kernels ahead of its first start",
        description="Compile, without a GPU, every kernel that a model needs, so that its first start does not. "
        "Name the folder in OCTAVO_PREBUILT_KERNELS when serving; the kernels fit this version of Octavo and Triton.",
    )
    _add_model(kernels)
    kernels.add_argument(
        "--architecture", default="sm_90", choices=("sm_80", "sm_89", "sm_90", "sm_100", "sm_120"),
        help="A100: sm_80, L4 and L40S: sm_89, H100 and H200: sm_90, B200: sm_100. Default: %(default)s.",
    )  # fmt: skip
    kernels.add_argument("--output", required=True, metavar="DIR", help="Folder to fill; what it has already stays.")
    kernels.add_argument(
        "--share", type=_share, default=(0, 1), metavar="I/N",
        help="Only every N-th kernel, from the I-th on, I from 0: N processes with one folder compile N times as fast.",
    )  # fmt: skip
    add_arguments(kernels, [EngineConfig], only=COMPILE_SETTINGS)
    collect = commands.add_parser(
        "collect-env",
        help="tell about this machine, for a report",
        description="Print what a report of an error should have: versions, devices, variables without their secrets.",
    )
    return parser, {
        **made,
        "download": (fetch, _download),
        "drain": (drain, _drain),
        "plan": (plan, _plan),
        "compile-kernels": (kernels, _compile_kernels),
        "collect-env": (collect, _collect_env),
    }


def _client_parsers(commands: Any) -> dict[str, tuple[ArgumentParser, Command]]:
    made: dict[str, tuple[ArgumentParser, Command]] = {}
    for name, run, what in (
        ("chat", _chat, "talk with a model that is served"),
        ("complete", _complete, "let a model that is served continue a text"),
    ):
        command = commands.add_parser(
            name,
            help=what,
            description=what.capitalize() + ". Without --quick it reads line after line; Ctrl-D ends it.",
        )
        command.add_argument(
            "--url", default=f"http://localhost:{API_PORT}/v1", help="Address of the API. Default: %(default)s."
        )
        command.add_argument("--model-name", metavar="NAME", help="Default: the one that the server names first.")
        command.add_argument("--api-key", metavar="KEY", help="Default: OPENAI_API_KEY, OCTAVO_API_KEY, VLLM_API_KEY.")
        command.add_argument("-q", "--quick", metavar="TEXT", help="Send this, print the answer, end.")
        command.add_argument("--max-tokens", type=int, metavar="TOKENS", help="Default: the server's.")
        command.add_argument("--temperature", type=float, help="Default: the server's.")
        if name == "chat":
            command.add_argument("--system-prompt", metavar="TEXT", help="What the conversation begins with.")
        made[name] = (command, run)
    return made


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model_positional", metavar="MODEL", nargs="?", help="Hugging Face id (org/name) or a folder; also --model."
    )


def _serve(namespace: argparse.Namespace, warnings: list[str]) -> int:
    engine_config, server_config = _engine_config(namespace), from_namespace(ServerConfig, namespace)
    engine_config.check()
    from octavo_engine.api.serve import serve

    serve(engine_config, server_config, warnings=warnings)


def _download(namespace: argparse.Namespace, warnings: list[str]) -> int:
    from octavo_engine.api.download import run

    return run(_engine_config(namespace), from_namespace(ServerConfig, namespace))


def _chat(namespace: argparse.Namespace, warnings: list[str]) -> int:
    from octavo_engine import client

    return client.chat(_talk(namespace), namespace.system_prompt, namespace.quick)


def _complete(namespace: argparse.Namespace, warnings: list[str]) -> int:
    from octavo_engine import client

    return client.complete(_talk(namespace), namespace.quick)


def _talk(namespace: argparse.Namespace) -> Talk:
    from octavo_engine.client import Talk

    if not re.match(r"https?://[^/]", namespace.url):
        raise ConfigError("--url", namespace.url, f"an address such as http://localhost:{API_PORT}/v1")
    variables = ("OPENAI_API_KEY", "OCTAVO_API_KEY", "VLLM_API_KEY")
    key = namespace.api_key or next((os.environ[name] for name in variables if os.environ.get(name)), None)
    sampling = {name: getattr(namespace, name) for name in ("max_tokens", "temperature")}
    given = {name: value for name, value in sampling.items() if value is not None}
    return Talk(namespace.url, namespace.model_name, key, given)


def _collect_env(namespace: argparse.Namespace, warnings: list[str]) -> int:
    from octavo_engine.collect_env import describe

    print(describe(os.environ))
    return ExitStatus.OK


def _plan(namespace: argparse.Namespace, warnings: list[str]) -> int:
    for warning in warnings:
        print(f"octavo plan: {warning}", file=sys.stderr)
    config = _engine_config(namespace)
    config.check()
    from octavo_engine.api.find_model import download, local_folder, store_of
    from octavo_engine.device_memory import DeviceMemory
    from octavo_engine.host import host_memory
    from octavo_engine.models.config import load_config
    from octavo_engine.plan import choose_dtype, describe, make_plan

    if namespace.memory is not None:
        memory = DeviceMemory(
            "cuda", f"a GPU of {namespace.memory / 2**30:.1f} GiB", namespace.memory, namespace.memory
        )
    else:
        free, total = host_memory()
        memory = DeviceMemory("cpu", "this machine's CPU", total, free)
    try:
        folder = local_folder(config.model) or download(
            config.model,
            config.revision,
            config.download_dir,
            lambda done, total: None,
            weights=False,
            store=store_of(config, config.model),
        )
        model = load_config(folder.path)
        plan = make_plan(config, model, choose_dtype(config, model.dtype, memory.kind), memory)
    except FatalError as error:
        print(f"octavo plan: {error.failure}", file=sys.stderr)
        return error.failure.code.exit_status
    print(describe(plan, model, memory))
    return ExitStatus.OK


def _share(text: str) -> tuple[int, int]:
    first, _, step = text.partition("/")
    if not (first.isascii() and first.isdigit() and step.isascii() and step.isdigit() and int(first) < int(step)):
        raise argparse.ArgumentTypeError(f"{text!r}, expected I/N with I below N, as 0/8 to 7/8")
    return int(first), int(step)


def _compile_kernels(namespace: argparse.Namespace, warnings: list[str]) -> int:
    config = _engine_config(namespace)
    config.check()
    output = Path(namespace.output).expanduser()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("--output", namespace.output, f"a folder that can be written ({error.strerror})") from None
    from octavo_engine.api.find_model import download, local_folder, store_of
    from octavo_engine.models.config import load_config
    from octavo_engine.plan import choose_dtype

    try:
        folder = local_folder(config.model) or download(
            config.model, config.revision, config.download_dir, lambda done, total: None, weights=False,
            store=store_of(config, config.model),
        )  # fmt: skip
        model = load_config(folder.path)
        dtype = choose_dtype(config, model.dtype, "cuda")
    except FatalError as error:
        print(f"octavo compile-kernels: {error.failure}", file=sys.stderr)
        return error.failure.code.exit_status
    from octavo_engine.runner.compile_ahead import compile_kernels
    from octavo_engine.runner.device import TORCH_DTYPES

    began = time.monotonic()
    count = compile_kernels(
        model, namespace.architecture, output, config.block_size, TORCH_DTYPES[dtype], namespace.share
    )
    print(f"compiled {count} kernels for {namespace.architecture} into {output} in {time.monotonic() - began:.0f} s")
    return ExitStatus.OK


def _bench(arguments: list[str]) -> int:
    # Its flags are made only when it is called: `octavo serve --help` should not wait for them.
    from octavo_engine.bench.cli import add_commands, run

    parser = ArgumentParser(prog="octavo bench", description="Measure how fast a server or an engine is.")
    return run(add_commands(parser), arguments, parser)


def _drain(namespace: argparse.Namespace, warnings: list[str]) -> int:
    import http.client

    connection = http.client.HTTPConnection(namespace.host, namespace.management_port)
    try:
        connection.request("POST", "/drain?wait=true")
        response = connection.getresponse()
        print(response.read().decode().strip())
    except OSError as error:
        print(f"octavo drain: no server on {namespace.host}:{namespace.management_port}: {error}", file=sys.stderr)
        return 1
    return ExitStatus.OK if response.status == 200 else 1


def _engine_config(namespace: argparse.Namespace) -> EngineConfig:
    positional = namespace.model_positional
    if positional is not None:
        if getattr(namespace, "model", positional) != positional:
            raise UsageError(f"octavo: the model is given twice: {positional!r} and --model {namespace.model!r}")
        namespace.model = positional
    return from_namespace(EngineConfig, namespace)


def refuse(message: str, termination_log: str) -> NoReturn:
    """Bad usage: one line, the certificate, exit status 2."""
    from octavo_engine.api.certificate import write_certificate

    print(message if message.startswith("octavo") else f"octavo: {message}", file=sys.stderr)
    write_certificate(Failure(FailureCode.INVALID_CONFIG, message, "see `octavo serve --help`"), termination_log)
    sys.stderr.flush()
    os._exit(ExitStatus.INVALID_CONFIG)


def _termination_log(arguments: Sequence[str]) -> str:
    """--termination-log from a command line that could not be parsed."""
    for index, argument in enumerate(arguments):
        name, separator, value = argument.partition("=")
        if name.replace("_", "-") == "--termination-log":
            if separator:
                return value
            if index + 1 < len(arguments):
                return arguments[index + 1]
    return DEFAULT_TERMINATION_LOG


if __name__ == "__main__":
    sys.exit(main())
