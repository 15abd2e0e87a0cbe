"""The command line: what vLLM's flags are answered, --config, environment variables, --help=WORD."""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo_engine.command_line import add_vllm_flags, help_about, read
from octavo_engine.config import (
    TYPED_FLAGS,
    ArgumentParser,
    ConfigError,
    EngineConfig,
    ServerConfig,
    UsageError,
    add_arguments,
    from_namespace,
    managed_flags,
)
from octavo_engine.vllm_flags import BY_NAME, VLLM_FLAGS, Answer, Takes

REFERENCE = [
    "host",
    "port",
    "dtype",
    "load-format",
    "tokenizer-mode",
    "quantization",
    "gpu-memory-utilization",
    "block-size",
    "kv-cache-dtype",
    "enable-prefix-caching",
    "enable-chunked-prefill",
    "max-num-seqs",
    "max-num-batched-tokens",
    "enforce-eager",
    "seed",
    "tensor-parallel-size",
    "pipeline-parallel-size",
    "data-parallel-size",
    "max-logprobs",
    "logprobs-mode",
    "generation-config",
    "scheduling-policy",
    "prefix-caching-hash-algo",
    "shutdown-timeout",
    "allowed-origins",
    "enable-log-requests",
    "max-model-len",
    "speculative-config",
    "spec-method",
    "spec-model",
    "spec-tokens",
    "api-key",
    "served-model-name",
    "chat-template",
    "trust-request-chat-template",
    "default-chat-template-kwargs",
    "enable-auto-tool-choice",
    "tool-call-parser",
    "reasoning-parser",
    "lora-modules",
    "root-path",
    "ssl-keyfile",
    "ssl-certfile",
    "ssl-ca-certs",
    "allowed-methods",
    "allowed-headers",
    "middleware",
    "uds",
    "config",
    "log-config-file",
    "uvicorn-log-level",
    "disable-uvicorn-access-log",
    "disable-access-log-for-endpoints",
    "disable-log-stats",
    "enable-prompt-tokens-details",
    "enable-force-include-usage",
    "enable-server-load-tracking",
    "otlp-traces-endpoint",
    "collect-detailed-traces",
    "kv-cache-metrics",
    "show-hidden-metrics-for-version",
    "fingerprint-mode",
    "kv-cache-memory-bytes",
    "num-gpu-blocks-override",
    "swap-space",
    "speculative-model",
    "num-speculative-tokens",
    "enable-metrics",
    "log-level",
    "num-scheduler-steps",
    "max-seq-len-to-capture",
    "guided-decoding-backend",
    "device",
    "disable-log-requests",
    "task",
    "use-v2-block-manager",
    "disable-frontend-multiprocessing",
    "model",
    "kv-transfer-config",
    "enable-expert-parallel",
    "trust-remote-code",
    "revision",
    "tokenizer",
    "enable-lora",
    "max-loras",
    "runner",
    "convert",
    "enable-tokenizer-info-endpoint",
    "enable-request-id-headers",
    "api-server-count",
    "enable-mfu-metrics",
]
"""Every flag that the reference names: vLLM's tables and what its users pass."""


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="octavo serve")
    parser.add_argument("model_positional", metavar="MODEL", nargs="?")
    parser.add_argument("--config", default=argparse.SUPPRESS)
    add_arguments(parser, [EngineConfig, ServerConfig])
    add_vllm_flags(parser)
    return parser


def settings(*arguments: str, environ: dict[str, str] | None = None) -> tuple[EngineConfig, ServerConfig, list[str]]:
    namespace, warnings = read(make_parser(), list(arguments), environ or {})
    return from_namespace(EngineConfig, namespace), from_namespace(ServerConfig, namespace), warnings


@pytest.mark.parametrize("name", REFERENCE)
def test_every_flag_that_people_pass_is_known(name: str) -> None:
    assert f"--{name}" in make_parser()._option_string_actions


def test_every_flag_of_vllm_serve_is_known() -> None:
    """The names that the parser of vLLM 0.25.1's `serve` has, its short ones among them."""
    names = (Path(__file__).parent / "vllm-0.25.1-flags.txt").read_text().split()

    known = make_parser()._option_string_actions

    assert len(names) > 280
    assert [name for name in names if name not in known] == []


def example(flag: Any) -> list[str]:
    match flag.takes:
        case Takes.NOTHING:
            return [flag.name]
        case Takes.VALUE:
            return [f"{flag.name}=something"]
        case Takes.VALUES:
            return [flag.name, "something", "else"]


@pytest.mark.parametrize("flag", [f for f in VLLM_FLAGS if f.answer is Answer.MISSING], ids=lambda f: f.name)
def test_a_flag_that_would_change_what_is_served_is_refused_with_its_reason(flag: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        settings(*example(flag))

    assert str(refused.value).startswith(flag.name + ": got ")
    assert flag.why in str(refused.value)


@pytest.mark.parametrize("flag", [f for f in VLLM_FLAGS if f.answer is Answer.MOOT], ids=lambda f: f.name)
def test_a_flag_without_effect_is_warned_of_once(flag: Any) -> None:
    _, _, warnings = settings(*example(flag), *example(flag))

    assert len(warnings) == 1
    assert warnings[0].startswith(flag.name)
    assert flag.why in warnings[0]


@pytest.mark.parametrize("flag", [f for f in VLLM_FLAGS if f.answer is Answer.ALWAYS], ids=lambda f: f.name)
def test_a_flag_for_what_is_so_anyway_passes_and_its_opposite_is_warned_of(flag: Any) -> None:
    assert settings(flag.name)[2] == []
    assert settings("--no-" + flag.name[2:])[2] == [f"--no-{flag.name[2:]} has no effect: {flag.why}"]


@pytest.mark.parametrize("flag", [f for f in VLLM_FLAGS if f.neutral], ids=lambda f: f.name)
def test_a_value_that_asks_for_nothing_passes_in_silence(flag: Any) -> None:
    for value in flag.neutral:
        assert settings(f"{flag.name}={value}")[2] == []


@pytest.mark.parametrize("flag", [f for f in VLLM_FLAGS if f.takes is Takes.NOTHING and f.answer is not Answer.ALWAYS],
                         ids=lambda f: f.name)  # fmt: skip
def test_what_is_switched_off_that_is_not_there_passes_in_silence(flag: Any) -> None:
    assert settings("--no-" + flag.name[2:])[2] == []


def test_no_flag_is_both_a_setting_and_answered_by_the_table() -> None:
    assert not TYPED_FLAGS & set(BY_NAME)
    assert all(flag.why and not flag.why.endswith(".") for flag in VLLM_FLAGS)


def test_the_flags_of_a_chart_for_vllm_are_taken() -> None:
    engine, server, warnings = settings(
        "Qwen/Qwen2.5-0.5B-Instruct", "--host", "0.0.0.0", "--port", "8000", "--no-enable-chunked-prefill",
        "--no-enable-prefix-caching", "--max-model-len", "2048", "--dtype", "bfloat16", "--tensor-parallel-size", "1",
        "--max-num-seqs", "32", "--gpu_memory_utilization", "0.8", "--runner", "generate", "--convert", "auto",
        "--disable-uvicorn-access-log", "--uvicorn-log-level", "INFO", "--disable-log-requests", "-dp", "1", "-O3",
        "--max_loras", "4", "--shutdown-timeout", "30", "--allowed-origins", '["https://a", "https://b"]',
    )  # fmt: skip

    assert (engine.max_model_len, engine.gpu_memory_utilization, engine.enable_prefix_caching) == (2048, 0.8, False)
    assert (server.log_level, server.drain_timeout_s, server.allowed_origins) == (
        "info", 30.0, ("https://a", "https://b"),
    )  # fmt: skip
    assert warnings == [
        "--max-loras 4 has no effect: this version serves no LoRA adapters",
        "--optimization-level 3 has no effect: nothing is compiled by torch.compile; kernels are Octavo's own",
    ]


@pytest.mark.parametrize(
    ("arguments", "kwargs"),
    [
        (["--default-chat-template-kwargs.enable_thinking", "false"], '{"enable_thinking": false}'),
        (
            ["--default_chat_template_kwargs.a.b=1", "--default-chat-template-kwargs.c", "x"],
            '{"a": {"b": 1}, "c": "x"}',
        ),
    ],
)
def test_an_object_may_be_written_in_parts(arguments: list[str], kwargs: str) -> None:
    assert settings(*arguments)[1].default_chat_template_kwargs == kwargs


def test_parts_of_an_object_that_is_refused_are_refused() -> None:
    with pytest.raises(ConfigError, match="no speculative decoding"):
        settings("--speculative-config.method", "ngram")
    with pytest.raises(UsageError, match="has no value"):
        settings("--default-chat-template-kwargs.a")
    with pytest.raises(UsageError, match="value of its own"):
        settings("--default-chat-template-kwargs.a=1", "--default-chat-template-kwargs.a.b=1")


# ---- --config


def write(tmp_path: Path, text: str) -> str:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    return str(file)


def test_a_file_holds_flags_and_the_command_line_wins_over_it(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
model: Qwen/Qwen3-8B
max_model_len: 8k
enable-prefix-caching: false
enforce-eager: true
served-model-name: [a, b]
default-chat-template-kwargs: {enable_thinking: false}
speculative-config: {}
swap-space: 4
port: 9000
""",
    )
    engine, server, warnings = settings(
        "--config", file, "--port=9001", "--served-model-name=c", environ={"VLLM_LOGGING_LEVEL": "DEBUG"}
    )

    assert (engine.model, engine.max_model_len, engine.enforce_eager) == ("Qwen/Qwen3-8B", 8000, True)
    assert not engine.enable_prefix_caching
    assert (server.port, server.served_model_name, server.log_level) == (9001, ("c",), "debug")
    assert server.default_chat_template_kwargs == '{"enable_thinking": false}'
    assert len(warnings) == 1
    assert "--swap-space 4" in warnings[0]


def test_a_model_on_the_command_line_wins_over_the_one_in_the_file(tmp_path: Path) -> None:
    namespace, _ = read(make_parser(), ["Qwen/A", "--config", write(tmp_path, "model: Qwen/B")], {})

    assert namespace.model_positional == "Qwen/A"
    assert not hasattr(namespace, "model")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max-modle-len: 5", "did you mean --max-model-len?"),
        ("max-model-len: five", "--max-model-len: got 'five'"),
        ("max-model-len:", "max-model-len has no value"),
        ("- a list", "must hold flags and their values"),
        ("port: [8000", "cannot be read"),
        ("config: other.yaml", "cannot stand in a file"),
        ("enable-lora: true", "--enable-lora"),
        ("port: true", "--port"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_place(tmp_path: Path, text: str, words: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises((UsageError, ConfigError)) as refused:
        settings("--config", file)

    assert words in str(refused.value)
    assert file in str(refused.value) or "--enable-lora" in str(refused.value)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match=r"/no/such\.yaml cannot be read"):
        settings("--config=/no/such.yaml")


# ---- environment


def test_variables_of_vllm_stand_for_settings_and_flags_win_over_them() -> None:
    environ = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOG_STATS_INTERVAL": "2.5", "OCTAVO_HOST": "0.0.0.0"}

    _, server, warnings = settings(environ=environ)
    assert (server.log_level, server.log_stats_interval_s, server.host) == ("warning", 2.5, "0.0.0.0")
    assert warnings == []
    assert settings("--host=::1", environ=environ)[1].host == "::1"


@pytest.mark.parametrize(("value", "on"), [("1", True), ("true", True), ("0", False)])
def test_a_variable_of_vllm_may_switch_a_setting(value: str, on: bool) -> None:
    engine, _, warnings = settings(environ={"VLLM_BATCH_INVARIANT": value})

    assert (engine.deterministic, warnings) == (on, [])
    assert settings("--no-deterministic", environ={"VLLM_BATCH_INVARIANT": value})[0].deterministic is False


def test_a_variable_with_a_value_that_does_not_do_is_named() -> None:
    with pytest.raises(UsageError, match="VLLM_BATCH_INVARIANT: got 'often', expected 0 or 1"):
        settings(environ={"VLLM_BATCH_INVARIANT": "often"})
    with pytest.raises(UsageError, match="VLLM_LOG_STATS_INTERVAL: --log-stats-interval-s: got 'often'"):
        settings(environ={"VLLM_LOG_STATS_INTERVAL": "often"})


def test_a_variable_of_vllm_without_meaning_is_warned_of_and_those_of_kubernetes_are_not() -> None:
    _, _, warnings = settings(
        environ={
            "VLLM_ATTENTION_BACKEND": "FLASHINFER", "VLLM_USE_V1": "1", "VLLM_API_KEY": "k",
            "VLLM_SERVICE_HOST": "10.0.0.1", "VLLM_PORT_80_TCP": "tcp://10.0.0.1:80", "VLLM_SERVICE_PORT_HTTP": "80",
        }
    )  # fmt: skip

    assert warnings == ["VLLM_ATTENTION_BACKEND has no effect: it is a variable of vLLM that means nothing here"]


# ---- help


def test_help_tells_about_one_flag_one_group_or_a_word() -> None:
    parser = make_parser()

    assert "Port of the OpenAI API" in help_about(parser, "port")
    assert "--max-num-seqs" not in help_about(parser, "port")
    scheduling = help_about(parser, "scheduling")
    assert scheduling.startswith("Scheduling:")
    assert "--max-num-seqs" in scheduling
    assert "--tensor-parallel-size" not in scheduling
    by_word = help_about(parser, "logprobs")
    assert "--max-logprobs" in by_word
    assert "--logprobs-mode [raw_logprobs]" in by_word
    assert "what is preempted is computed again" in help_about(parser, "--swap_space")
    assert help_about(parser, "tls and cors") == help_about(parser, "tls-and-cors")


def test_help_about_something_unknown_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean --help=max-num-seqs"):
        help_about(make_parser(), "max-nun-seqs")
    with pytest.raises(UsageError, match="groups are"):
        help_about(make_parser(), "zzzzzz")


def test_help_shows_every_flag_in_its_group_and_leaves_vllms_others_to_help_vllm() -> None:
    text, foreign = make_parser().format_help(), help_about(make_parser(), "vllm")
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)

    assert titles[2:] == [
        "Model", "Memory and parallelism", "Scheduling", "Server", "TLS and CORS", "Logs, metrics and traces",
        "Life cycle",
    ]  # fmt: skip
    assert "swap-space" not in text
    assert all(flag.name in foreign for flag in VLLM_FLAGS)


def octavo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "octavo_engine.cli", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "m", "--max-nun-seqs=3"], "did you mean --max-num-seqs?"),
        (["serve", "m", "--swap-spase=3"], "did you mean --swap-space?"),
        (["serve", "m", "--kv-cache-dtype", "int8"], "--kv-cache-dtype: got 'int8', expected one of auto, fp8,"),
        (["serve", "m", "-sc", '{"method": "ngram"}'], "no speculative decoding"),
        (["serve", "m", "-tp", "2"], "--tensor-parallel-size: got 2"),
        (["serve", "m", "--ssl-keyfile=k.pem"], "--ssl-certfile"),
        (["serve"], "--model: got '', expected a Hugging Face id"),
        (["sevre", "m"], "did you mean serve?"),
        (["serve", "m", "--gguf"], "unknown argument '--gguf': see --help"),
        (["plan", "m", "--memory", "lots"], "--memory: got 'lots', expected a count, as 4096, 16k or 24G"),
        (["chat", "--max-tokens", "many"], "--max-tokens: got 'many', expected a whole number"),
        (["chat", "--url", "localhost:8000"], "--url: got 'localhost:8000', expected an address such as http://"),
        (
            ["compile-kernels", "m", "--output", "/proc/kernels"],
            "--output: got '/proc/kernels', expected a folder that",
        ),
        (["bench", "serve", "--extra-body", "{"], "--extra-body: got '{', expected JSON"),
        (["bench", "serve", "--output-json", "/nowhere/x"], "--output-json: got '/nowhere', expected a folder that"),
    ],
)
def test_a_command_line_that_is_refused_ends_with_status_2_and_one_line(arguments: list[str], words: str) -> None:
    done = octavo(*arguments)

    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert words in done.stderr


def test_help_of_a_flag_is_printed_by_the_command() -> None:
    done = octavo("serve", "--help=max-model-len")

    assert done.returncode == 0
    assert "Longest prompt plus output" in done.stdout


@pytest.mark.parametrize(("flag", "default"), [("seed", "0"), ("tensor-parallel-size", "1"), ("ssl-cert-reqs", "0")])
def test_a_default_of_0_or_1_is_told_like_any_other(flag: str, default: str) -> None:
    assert help_about(make_parser(), flag).rstrip().endswith(f"Default: {default}.")


def test_the_page_of_flags_is_made_from_the_tables() -> None:
    """Written with: octavo serve --help=markdown > docs/flags.md"""
    page = (Path(__file__).parents[2] / "docs" / "flags.md").read_text()

    assert octavo("serve", "--help=markdown").stdout == page
    assert all(f"`{flag}`" in page for flag in (*TYPED_FLAGS, *BY_NAME))


def test_a_pipe_that_is_closed_ends_a_command_without_a_word() -> None:
    run = f"{sys.executable} -m octavo_engine.cli serve --help=markdown | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {run}"], capture_output=True, text=True, timeout=60)

    assert done.stderr == ""
    assert done.stdout.startswith("#")
    assert done.returncode in (0, 141)


@pytest.mark.parametrize("module", ["config", "llm"], ids=["while its own modules are imported", "while it measures"])
def test_ctrl_c_ends_a_command_by_the_signal_and_without_a_word(module: str, tmp_path: Path) -> None:
    """The signal comes as the module is asked for: early in every command, late in a benchmark's."""
    if module == "llm":
        pytest.importorskip("tqdm")  # the older and newer Pythons are tried without what benchmarks need
    command = ["bench", "latency", str(tmp_path)] if module == "llm" else ["serve", "m"]
    program = f"""
import importlib.abc, os, runpy, signal, sys

class Interrupter(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "octavo_engine.{module}":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background command begins with it ignored
sys.meta_path.insert(0, Interrupter())
sys.argv = ["octavo", *{command!r}]
runpy.run_module("octavo_engine", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)

    assert done.stderr == ""
    assert done.returncode == -signal.SIGINT


def test_collect_env_tells_versions_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("OCTAVO_API_KEY", "sk-verysecret")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:verysecret@hub.example")
    monkeypatch.setenv("HF_HOME", "/models")
    text = octavo("collect-env").stdout

    assert "verysecret" not in text
    assert "HF_TOKEN: (set)" in text
    assert "HF_ENDPOINT: https://…@hub.example" in text
    assert "HF_HOME: /models" in text
    assert re.search(r"python: 3\.\d+", text)


def test_what_the_operator_sets_may_not_come_as_free_arguments_in_any_spelling() -> None:
    taken = managed_flags()

    assert {"--host", "--port", "--uds", "--config", "--api-key", "--shutdown-timeout", "--max-model-len"} <= set(taken)
    assert "--no-enable-prefix-caching" in taken
    assert "--seed" not in taken
