"""Configuration: every flag outside its range is refused with its name, the value and what would be right."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from octavo_engine.config import (
    TYPED_FLAGS,
    ArgumentParser,
    Config,
    ConfigError,
    EngineConfig,
    ServerConfig,
    UsageError,
    add_arguments,
    flag_of,
    from_namespace,
    parse_count,
    to_args,
)

KINDS: tuple[type[Config], ...] = (EngineConfig, ServerConfig)
FIELDS = [(kind, field) for kind in KINDS for field in dataclasses.fields(kind)]


def parse(*arguments: str) -> tuple[EngineConfig, ServerConfig]:
    parser = ArgumentParser(prog="octavo serve")
    add_arguments(parser, KINDS)
    namespace = parser.parse_args(list(arguments))
    return from_namespace(EngineConfig, namespace), from_namespace(ServerConfig, namespace)


def outside() -> list[tuple[str, str, str]]:
    """(flag, value, what would be right) for both ends of every bounded field, and a word where a number belongs."""
    cases = []
    for kind, field in FIELDS:
        meta, flag = field.metadata, flag_of(field.name)
        low, high = meta["low"], meta["high"]
        if low is not None:
            # No flag takes a negative amount, so a parser of amounts says so before the bound does.
            cases.append((flag, str(low - 1), str(low)))
            cases.append((flag, "many", "number"))
        if high is not None:
            cases.append((flag, str(high + 1), str(high)))
        if isinstance(field.default, float):
            cases += [(flag, "nan", str(low)), (flag, "inf", str(low))]
        if meta["choices"]:
            cases.append((flag, "17", str(meta["choices"][-1])))
        if kind is EngineConfig and meta["choices"]:
            cases.append((flag, "other", str(meta["choices"][0])))
    return cases


@pytest.mark.parametrize(("flag", "value", "right"), outside())
def test_a_value_outside_its_range_is_refused_with_flag_value_and_what_would_be_right(flag, value, right):
    with pytest.raises(ConfigError) as refused:
        parse(f"{flag}={value}")

    text = str(refused.value)
    assert text.startswith(f"{flag}: got ")
    assert value.removesuffix(".0") in text
    assert right in text


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--max-num-batched-tokens", "1048577", "1 to 1048576"),  # exact, not 1.04858e+06
        ("--seed", "-1", f"0 to {2**63 - 1}"),
        ("--served-model-name", " ", "not empty"),
        ("--max-model-len", "4kk", "a whole number, 2 or more"),
        ("--gpu-memory-utilization", "1,0", "a number, 0.01 to 1.0"),
    ],
)
def test_the_refusal_says(flag, value, words):
    with pytest.raises(ConfigError, match=flag) as refused:
        parse(f"{flag}={value}")

    assert words in str(refused.value)


def test_two_ports_of_one_number_are_refused_unless_both_are_chosen_for_us():
    with pytest.raises(ConfigError, match=r"--management-port: got 8000, expected another port than --port \(8000\)"):
        parse("--management-port=8000")

    assert parse("--port=0", "--management-port=0")[1].port == 0


@pytest.mark.parametrize(
    ("settings", "flag", "words"),
    [
        ({"model": ""}, "--model", "a Hugging Face id or a folder"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size", "1: this version computes on one device"),
        ({"pipeline_parallel_size": 3}, "--pipeline-parallel-size", "1: this version computes on one device"),
        ({"quantization": "awq"}, "--quantization", "no quantization"),
        ({"quantization": "fp8"}, "--quantization", "no quantization"),
        ({"trust_remote_code": True}, "--trust-remote-code", "runs no code from a checkpoint"),
        (
            {"max_num_batched_tokens": 100, "max_num_seqs": 256},
            "--max-num-batched-tokens",
            "at least --max-num-seqs (256)",
        ),
        (
            {"max_model_len": 4096, "enable_chunked_prefill": False, "max_num_batched_tokens": 2048},
            "--max-num-batched-tokens",
            "at least --max-model-len (4096) when chunked prefill is off",
        ),
    ],
)
def test_what_this_version_does_not_do_is_refused_with_a_sentence(settings: dict[str, Any], flag: str, words: str):
    config = EngineConfig(**{"model": "x", **settings})
    with pytest.raises(ConfigError) as refused:
        config.check()

    assert refused.value.flag == flag
    assert words in str(refused.value)


def test_the_defaults_are_those_of_vllm_and_pass():
    engine, server = parse("--model=x")
    engine.check()

    assert (server.host, server.port) == ("localhost", 8000)
    assert (engine.gpu_memory_utilization, engine.dtype) == (0.9, "auto")
    assert (engine.tensor_parallel_size, engine.pipeline_parallel_size) == (1, 1)
    assert engine.enable_prefix_caching
    assert engine.enable_chunked_prefill


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (EngineConfig, "max_model_len", "4k"),
        (EngineConfig, "max_num_seqs", True),
        (EngineConfig, "max_num_queued_reqs", None),
        (EngineConfig, "block_size", "64"),
        (EngineConfig, "enable_prefix_caching", "no"),
        (EngineConfig, "gpu_memory_utilization", "0.9"),
        (EngineConfig, "dtype", None),
        (ServerConfig, "served_model_name", "one"),
        (ServerConfig, "port", 80.5),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(kind: type[Config], name: str, value: object):
    """LLM(max_model_len="4k") used to end in a TypeError from a comparison deep inside."""
    settings: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=flag_of(name)):
        kind(**settings)


def test_a_whole_number_is_a_number():
    assert EngineConfig(gpu_memory_utilization=1).gpu_memory_utilization == 1


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("4096", 4096), ("8k", 8000), ("8K", 8192), ("2m", 2_000_000), ("2M", 2**21), ("1.5G", 3 * 2**29)],
)
def test_amounts_are_read_as_people_write_them(text: str, count: int):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "k", "-1", "1e3", "1.5", "1.0001k", "1 000", "4kB", "0x10", "one"])
def test_what_is_no_amount_is_refused(text: str):
    with pytest.raises(ValueError, match="count"):
        parse_count(text)


@pytest.mark.parametrize(
    ("arguments", "length"),
    [
        (["--max-model-len=auto"], None),
        (["--max-model-len", "-1"], None),
        (["--max-model-len", "8K"], 8192),
        (["--max_model_len", "8k"], 8000),
        (["--max_model_len=16"], 16),
    ],
)
def test_a_length_may_be_given_in_every_spelling(arguments: list[str], length: int | None):
    assert parse(*arguments)[0].max_model_len == length


def test_short_and_negated_flags_are_those_of_vllm():
    engine, server = parse("-tp", "2", "-pp=4", "-q", "awq", "--no-enable-prefix-caching", "--no-enable-metrics")

    assert (engine.tensor_parallel_size, engine.pipeline_parallel_size, engine.quantization) == (2, 4, "awq")
    assert not engine.enable_prefix_caching
    assert not server.enable_metrics


def test_names_and_keys_may_be_several_at_once_or_one_after_the_other():
    _, server = parse("--served-model-name", "a", "b", "--served-model-name", "c", "--api-key", "x", "y")

    assert server.served_model_name == ("a", "b", "c")
    assert server.api_key == ("x", "y")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-modle-len=5"], "did you mean --max-model-len?"),
        (["--tensor-paralel-size", "2"], "did you mean --tensor-parallel-size?"),
        (["--zzz"], "see --help"),
        (["--max-model"], "did you mean --max-model-len?"),  # no abbreviations
        (["--port"], "--port: expected one argument"),
        (["--enable-prefix-caching=true"], "--enable-prefix-caching"),
        (["stray"], "unknown argument 'stray'"),
    ],
)
def test_a_command_line_that_cannot_be_read_names_the_place(arguments: list[str], words: str):
    with pytest.raises(UsageError) as refused:
        parse(*arguments)

    assert words in str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(),
        EngineConfig(
            model="-starts-with-a-dash", revision="a=b", max_model_len=4096, kv_cache_memory_bytes=2**30,
            enable_prefix_caching=False, block_size=16, gpu_memory_utilization=0.35, seed=2**62, quantization="fp8",
        ),
        ServerConfig(),
        ServerConfig(
            host="::", port=1, served_model_name=("a", "b c"), api_key=("k",), drain_timeout_s=0.5,
            enable_metrics=False, termination_log="",
        ),
    ],
)  # fmt: skip
def test_the_flags_made_from_a_configuration_make_it_again(config: Config):
    engine, server = parse(*to_args(config))

    assert (engine if isinstance(config, EngineConfig) else server) == config


def test_every_field_has_its_flag_with_help():
    parser = ArgumentParser(prog="octavo serve")
    add_arguments(parser, KINDS)
    text = parser.format_help()

    assert len(TYPED_FLAGS) == len(FIELDS)
    for _, field in FIELDS:
        assert flag_of(field.name) in text
        assert len(field.metadata["help"]) > 10


def test_a_configuration_cannot_be_changed_after_it_was_made():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "module", ["octavo_engine", "octavo_engine.config", "octavo_engine.plan", "octavo_engine.status"]
)
def test_importing_the_spine_loads_nothing_heavy(module: str):
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'numpy', 'transformers', 'aiohttp') if m in sys.modules])"
    )
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True)

    assert loaded.strip() == "[]"


def test_the_parser_of_the_command_line_loads_nothing_heavy():
    code = """
import sys, octavo_engine.cli
try:
    octavo_engine.cli.main(["serve", "--help"])
except SystemExit:
    pass
print([m for m in ('torch', 'numpy', 'transformers', 'aiohttp', 'pydantic') if m in sys.modules])
"""
    lines = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()

    assert lines[-1] == "[]"
