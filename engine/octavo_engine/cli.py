"""The command `octavo`: serve, plan, bench, drain. Import-light: what a subcommand needs is imported when it runs."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from octavo_engine import __version__
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
from octavo_engine.status import DEFAULT_TERMINATION_LOG, MANAGEMENT_PORT, ExitStatus, Failure, FailureCode, FatalError

DOWNLOAD_SETTINGS = (
    *("model", "revision", "model_store", "model_store_size"),
    *("host", "management_port", "log_level", "startup_stall_s", "termination_log"),
)
EPILOG = "Flags of vLLM are understood in both spellings (--max-model-len, --max_model_len)."


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
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
    return run(command.parse_args(arguments[1:]))


def _parsers() -> tuple[ArgumentParser, dict[str, tuple[ArgumentParser, Callable[[argparse.Namespace], int]]]]:
    parser = ArgumentParser(prog="octavo", description="Serves large language models with the OpenAI API.")
    parser.add_argument("--version", action="version", version=f"octavo {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=ArgumentParser)
    serve = commands.add_parser(
        "serve", help="serve a model", description="Serve a model with the OpenAI API.", epilog=EPILOG
    )
    _add_model(serve)
    add_arguments(serve, [EngineConfig, ServerConfig])
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
    )
    _add_model(plan)
    plan.add_argument(
        "--memory",
        type=parse_count,
        metavar="BYTES",
        help="Memory of the GPU to plan for (24G = 24 GiB). Default: plan for this machine's CPU.",
    )
    add_arguments(plan, [EngineConfig])
    commands.add_parser("bench", help="measure speed: bench serve, bench throughput, bench latency")
    fetch = commands.add_parser(
        "download",
        help="bring a model into a store, whole and verified",
        description="Download a model into --model-store and verify it, so that servers find it whole. Goes on with "
        "what an earlier try left. For the cache of several pods: they wait for one another, and only one downloads.",
    )
    _add_model(fetch)
    add_arguments(fetch, [EngineConfig, ServerConfig], only=DOWNLOAD_SETTINGS)
    fetch.set_defaults(management_port=0)  # a server on this machine keeps its port
    return parser, {
        "serve": (serve, _serve),
        "download": (fetch, _download),
        "drain": (drain, _drain),
        "plan": (plan, _plan),
    }


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model_positional", metavar="MODEL", nargs="?", help="Hugging Face id (org/name) or a folder; also --model."
    )


def _serve(namespace: argparse.Namespace) -> int:
    engine_config, server_config = _engine_config(namespace), from_namespace(ServerConfig, namespace)
    engine_config.check()
    from octavo_engine.api.serve import serve

    serve(engine_config, server_config)


def _download(namespace: argparse.Namespace) -> int:
    from octavo_engine.api.download import run

    return run(_engine_config(namespace), from_namespace(ServerConfig, namespace))


def _plan(namespace: argparse.Namespace) -> int:
    config = _engine_config(namespace)
    config.check()
    from octavo_engine.api.find_model import download, local_folder, store_of
    from octavo_engine.host import host_memory
    from octavo_engine.models.config import load_config
    from octavo_engine.plan import DeviceMemory, choose_dtype, describe, make_plan

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


def _bench(arguments: list[str]) -> int:
    # Its flags are made only when it is called: `octavo serve --help` should not wait for them.
    from octavo_engine.bench.cli import add_commands, run

    parser = ArgumentParser(prog="octavo bench", description="Measure how fast a server or an engine is.")
    return run(add_commands(parser), arguments, parser)


def _drain(namespace: argparse.Namespace) -> int:
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
