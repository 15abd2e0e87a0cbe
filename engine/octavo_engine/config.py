"""Octavo's configuration: one frozen dataclass per concern, the flags made from it, and its checks.

A field's metadata is the single place for its flag, help text and bounds: the parser, `to_args` (with which the
operator writes container arguments) and the error messages all come from it, so they cannot drift apart.
Standard library only; called by cli.py, llm.py and the operator.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn, TypeVar

from octavo_engine.status import API_PORT, DEFAULT_TERMINATION_LOG, MANAGEMENT_PORT
from octavo_engine.structured.settings import StructuredOutputsSettings

DTYPES = ("auto", "float32", "float16", "bfloat16", "half", "float")
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")
BLOCK_SIZES = (16, 32, 64, 128)
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("console", "json")
TOOL_CALL_PARSERS = ("hermes", "llama3_json", "mistral", "qwen3_coder", "pythonic")
REASONING_PARSERS = ("deepseek_r1", "qwen3")
GENERATION_DEFAULTS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "max_new_tokens",
)  # fmt: skip
QUANTIZATIONS = ("awq", "gptq", "squeezellm", "fp8")


class ConfigError(Exception):
    """A setting outside its range. The text names the flag, the value and what would be right."""

    def __init__(self, flag: str, value: object, expected: str) -> None:
        super().__init__(f"{flag}: got {value!r}, expected {expected}")
        self.flag, self.value, self.expected = flag, value, expected


def parse_count(text: str) -> int:
    """'4096', '16k' (thousands), '16K' (1,024s), '1.5G' (2**30s): an amount as people write it. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", text.strip())
    if not match:
        raise ValueError(f"not a count: {text!r}")
    scale = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}[match[2]]
    amount = float(match[1]) * scale
    if amount != int(amount):
        raise ValueError(f"not a whole count: {text!r}")
    return int(amount)


def parse_model_len(text: str) -> int | None:
    """A context length in tokens, or None for 'auto' (the longest that the model and the memory allow)."""
    return None if text == "auto" or text == "-1" else parse_count(text)


def parse_log_level(text: str) -> str:
    """Levels as Python and uvicorn write them: INFO, trace, critical."""
    level = text.lower()
    return {"trace": "debug", "warn": "warning", "critical": "error", "fatal": "error"}.get(level, level)


def parse_json_object(text: str) -> str:
    """A JSON object, kept as text. Raises ValueError."""
    if not isinstance(json.loads(text), dict):
        raise ValueError("not an object")
    return text


def parse_structured_outputs_config(text: str) -> str:
    """Raises ValueError for an object with other settings than there are."""
    StructuredOutputsSettings.of(text)
    return text


def parse_words(text: str) -> list[str]:
    """One word, or a JSON list of them, as vLLM's CORS flags take it. Raises ValueError."""
    if not text.startswith("["):
        return [text]
    words = json.loads(text)
    if not all(isinstance(word, str) for word in words):
        raise ValueError("not a list of texts")
    return list(words)


def _setting(
    default: Any,
    help: str,
    *,
    group: str,
    parse: Callable[[str], Any] | None = None,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    aliases: Sequence[str] = (),
    metavar: str | None = None,
    secret: bool = False,
    managed: bool = False,
) -> Any:
    """managed: on Kubernetes the operator sets it itself or has a field for it, so free arguments may not."""
    return field(
        default=default,
        metadata={
            "help": help, "group": group, "parse": parse, "choices": choices, "low": low, "high": high,
            "aliases": tuple(aliases), "metavar": metavar, "secret": secret, "managed": managed,
        },
    )  # fmt: skip


@dataclass(frozen=True)
class EngineConfig:
    """What the engine process needs: the model, its memory and its scheduling."""

    model: str = _setting(
        "", "Hugging Face id (org/name) or a folder with config.json and safetensors files.",
        group="Model", metavar="MODEL", managed=True,
    )  # fmt: skip
    revision: str | None = _setting(
        None, "Branch, tag or commit of a Hugging Face model. Default: its main branch.", group="Model", managed=True
    )
    tokenizer: str | None = _setting(
        None, "Tokenizer's id or folder when it is not the model's own.", group="Model", metavar="MODEL"
    )
    tokenizer_revision: str | None = _setting(
        None, "Branch, tag or commit of the tokenizer. Default: --revision for the model's own, else main.",
        group="Model",
    )  # fmt: skip
    download_dir: str | None = _setting(
        None,
        "Where downloads are kept. Default: Hugging Face's cache (HF_HOME).",
        group="Model",
        metavar="DIR",
        managed=True,
    )
    model_store: str | None = _setting(
        None,
        "Folder that processes and pods share for downloaded models: each is verified, and served only when it is "
        "whole. Default: Hugging Face's cache.",
        group="Model",
        metavar="DIR",
        managed=True,
    )
    model_store_size: int | None = _setting(
        None, "Bytes that whole models in --model-store may take (100G = 100 GiB); beyond that, those unused for "
        "longest are removed. Default: what the disk holds.", group="Model", parse=parse_count, low=1, metavar="BYTES",
        managed=True,
    )  # fmt: skip
    load_format: str = _setting(
        "auto", "auto and safetensors read the checkpoint; dummy draws random weights (for measuring speed).",
        group="Model", choices=("auto", "safetensors", "dummy"),
    )  # fmt: skip
    trust_remote_code: bool = _setting(False, "Refused: this version runs no code from a checkpoint.", group="Model")
    dtype: str = _setting(
        "auto", "Type of weights and activations. auto: the checkpoint's own type where the device computes it "
        "natively, else float32.", group="Model", choices=DTYPES, managed=True,
    )  # fmt: skip
    quantization: str | None = _setting(
        None,
        "Refused: this version reads checkpoints in float32, float16 and bfloat16.",
        group="Model",
        choices=QUANTIZATIONS,
        aliases=("-q",),
    )
    max_model_len: int | None = _setting(
        None, "Longest prompt plus output, in tokens (8192, 8k, 8K). Default, and auto: the model's own limit, or "
        "what fits in memory where that is less.", group="Model", parse=parse_model_len,
        low=2, metavar="TOKENS", managed=True,
    )  # fmt: skip
    seed: int = _setting(0, "Seed of requests that bring none of their own.", group="Model", low=0, high=2**63 - 1)

    device: str = _setting(
        "auto", "Where to compute. auto: the GPU if there is one, else the CPU.", group="Memory and parallelism",
        choices=("auto", "cpu", "cuda"), managed=True,
    )  # fmt: skip
    gpu_memory_utilization: float = _setting(
        0.9, "Share of the device's memory that the engine may use in all (on a CPU: of the memory that is free at "
        "start, for the KV cache, at most 4 GiB).", group="Memory and parallelism", low=0.01, high=1.0, managed=True,
    )  # fmt: skip
    kv_cache_memory_bytes: int | None = _setting(
        None, "Size of the KV cache in bytes (4G = 4 GiB); overrides --gpu-memory-utilization.",
        group="Memory and parallelism", parse=parse_count, low=1, metavar="BYTES", managed=True,
    )  # fmt: skip
    num_gpu_blocks_override: int | None = _setting(
        None, "Blocks of the KV cache, whatever the memory; for trying preemption.", group="Memory and parallelism",
        low=1, metavar="BLOCKS",
    )  # fmt: skip
    kv_cache_dtype: str = _setting(
        "auto", "Type of keys and values in the cache. auto: as --dtype; fp8 (fp8_e4m3) and fp8_e5m2 take a byte each, "
        "so that twice as many tokens fit, at some cost in accuracy and in the time of prompts (attention of decodes "
        "is a fifth faster, of prompts two to three times slower: H200); their scales come from the checkpoint, else "
        "they are 1.", group="Memory and parallelism", choices=KV_CACHE_DTYPES,
    )  # fmt: skip
    block_size: int = _setting(
        64, "Tokens in one block of the KV cache.", group="Memory and parallelism", choices=BLOCK_SIZES, managed=True
    )
    tensor_parallel_size: int = _setting(
        1,
        "GPUs that share each layer; this version computes on one.",
        group="Memory and parallelism",
        low=1,
        high=64,
        aliases=("-tp",),
        managed=True,
    )
    pipeline_parallel_size: int = _setting(
        1, "Groups of GPUs that share the layers in sequence; this version computes on one GPU.",
        group="Memory and parallelism", low=1, high=64,
        aliases=("-pp",), managed=True,
    )  # fmt: skip
    enforce_eager: bool = _setting(
        False, "Launch every kernel by itself instead of capturing CUDA graphs: slower, for finding errors.",
        group="Memory and parallelism",
    )  # fmt: skip
    cpu_threads: int | None = _setting(
        None, "Threads for computing on a CPU. Default: the cores this process may use.",
        group="Memory and parallelism", low=1, high=1024,
    )  # fmt: skip

    max_num_seqs: int | None = _setting(
        None, "Requests computed together in one step. Default: 1024 on a GPU of 60 GiB or more, else 256.",
        group="Scheduling", low=1, high=4096, managed=True,
    )  # fmt: skip
    max_num_batched_tokens: int | None = _setting(
        None, "Tokens computed in one step: the bound on a prompt's chunk. Default: 8192 on a GPU of 60 GiB or more, "
        "else 2048.", group="Scheduling", parse=parse_count, low=1, high=2**20, metavar="TOKENS", managed=True,
    )  # fmt: skip
    enable_prefix_caching: bool = _setting(
        True,
        "Keep finished blocks and reuse them for prompts with the same beginning.",
        group="Scheduling",
        managed=True,
    )
    enable_chunked_prefill: bool = _setting(
        True, "Split long prompts over several steps, so that running requests go on beside them. Without it a "
        "prompt must fit in --max-num-batched-tokens.", group="Scheduling", managed=True,
    )  # fmt: skip
    max_decode_slowdown: float = _setting(
        2.3, "How many times longer a step may take for the prompts in it than for its running streams alone; longer "
        "prompts are split. Prompts may have more of it while many requests wait for their first token, up to eight "
        "times. 0 lets prompts fill --max-num-batched-tokens.", group="Scheduling", low=0, high=1000,
    )  # fmt: skip
    deterministic: bool = _setting(
        False, "Give a request the same tokens and log-probabilities, to the last bit, whatever is computed beside it, "
        "in which chunks, from the prefix cache or not, and after preemption. Slower; for the same device, version and "
        "settings. Also read from VLLM_BATCH_INVARIANT.", group="Scheduling",
    )  # fmt: skip
    max_num_queued_reqs: int = _setting(
        1024, "Requests that may wait; more get 429 with Retry-After.", group="Scheduling", low=1
    )
    max_num_queued_tokens: int = _setting(
        1_000_000, "Prompt tokens that may wait; more get 429 with Retry-After.", group="Scheduling",
        parse=parse_count, low=1, metavar="TOKENS",
    )  # fmt: skip

    def __post_init__(self) -> None:
        _check_bounds(self)

    def check(self) -> None:
        """Refuse what this version does not do and combinations that contradict each other. Raises ConfigError."""
        if not self.model:
            raise ConfigError("--model", self.model, "a Hugging Face id or a folder, e.g. `octavo serve Qwen/Qwen3-8B`")
        if self.tensor_parallel_size > 1:
            raise ConfigError(
                "--tensor-parallel-size", self.tensor_parallel_size, "1: this version computes on one device"
            )
        if self.pipeline_parallel_size > 1:
            raise ConfigError(
                "--pipeline-parallel-size",
                self.pipeline_parallel_size,
                "1: this version computes on one device",
            )
        if self.quantization is not None:
            raise ConfigError(
                "--quantization",
                self.quantization,
                "no quantization: this version reads float32, float16 and bfloat16",
            )
        if self.trust_remote_code:
            raise ConfigError(
                "--trust-remote-code", True, "it to be absent: this version runs no code from a checkpoint"
            )
        if 0 < self.max_decode_slowdown <= 1:
            raise ConfigError(
                "--max-decode-slowdown", self.max_decode_slowdown,
                "0 or more than 1: at 1 no prompt could ever run beside a stream",
            )  # fmt: skip
        tokens, requests = self.max_num_batched_tokens, self.max_num_seqs
        if tokens is not None and requests is not None and tokens < requests:
            raise ConfigError(
                "--max-num-batched-tokens", self.max_num_batched_tokens,
                f"at least --max-num-seqs ({self.max_num_seqs}), one token for each running request",
            )  # fmt: skip
        if (
            not self.enable_chunked_prefill
            and self.max_model_len is not None
            and tokens is not None
            and tokens < self.max_model_len
        ):
            raise ConfigError(
                "--max-num-batched-tokens", self.max_num_batched_tokens,
                f"at least --max-model-len ({self.max_model_len}) when chunked prefill is off",
            )  # fmt: skip


@dataclass(frozen=True)
class ServerConfig:
    """What the API process needs beside the engine's part: addresses, keys, limits, life cycle."""

    host: str = _setting(
        "localhost", "Address to listen on; 0.0.0.0 for all. Also read from OCTAVO_HOST, which the container image "
        "sets to 0.0.0.0.", group="Server", managed=True,
    )  # fmt: skip
    port: int = _setting(
        API_PORT, "Port of the OpenAI API; 0 takes a free one.", group="Server", low=0, high=65535, managed=True
    )
    uds: str | None = _setting(
        None, "Unix socket for the OpenAI API, instead of --host and --port.", group="Server", metavar="PATH",
        managed=True,
    )  # fmt: skip
    management_port: int = _setting(
        MANAGEMENT_PORT, "Port of /startupz, /livez, /readyz, /statusz, /drain and /metrics; 0 takes a free one.",
        group="Server", low=0, high=65535, managed=True,
    )  # fmt: skip
    served_model_name: tuple[str, ...] = _setting(
        (), "Names under which clients ask for the model; the first is the one reported. Default: MODEL.",
        group="Server", metavar="NAME", managed=True,
    )  # fmt: skip
    api_key: tuple[str, ...] = _setting(
        (), "Keys that clients must send one of, as Authorization: Bearer KEY or as X-Api-Key: KEY. Also read from "
        "OCTAVO_API_KEY and VLLM_API_KEY.", group="Server", metavar="KEY", secret=True, managed=True,
    )  # fmt: skip
    api_key_file: str | None = _setting(
        None, "File with one key a line, read again when it changes.", group="Server", metavar="FILE",
        managed=True,
    )  # fmt: skip
    chat_template: str | None = _setting(
        None,
        "File with a Jinja chat template, or the template itself, instead of the tokenizer's.",
        group="Server",
        metavar="FILE",
    )
    enable_auto_tool_choice: bool = _setting(
        False, "Let the model decide when to call tools; needs --tool-call-parser.", group="Server"
    )
    tool_call_parser: str | None = _setting(
        None, "How the model writes tool calls. hermes: also Qwen2.5 and Qwen3.", group="Server",
        choices=TOOL_CALL_PARSERS,
    )  # fmt: skip
    reasoning_parser: str | None = _setting(
        None, "How the model marks its thinking, which is then given apart from the answer, as `reasoning`.",
        group="Server", choices=REASONING_PARSERS,
    )  # fmt: skip
    default_chat_template_kwargs: str | None = _setting(
        None, "Variables for the chat template, as a JSON object; a request's own win.", group="Server",
        parse=parse_json_object, metavar="JSON",
    )  # fmt: skip
    generation_config: str = _setting(
        "auto", "Where default sampling parameters come from. auto: the model's generation_config.json; vllm: none, "
        "OpenAI's defaults; else a folder with that file.", group="Server", metavar="auto|vllm|DIR",
    )  # fmt: skip
    override_generation_config: str | None = _setting(
        None, "Default sampling parameters, as a JSON object; they win over generation_config.json.", group="Server",
        parse=parse_json_object, metavar="JSON",
    )  # fmt: skip
    structured_outputs_config: str | None = _setting(
        None, "Defaults of structured output, as a JSON object: disable_any_whitespace, disable_additional_properties, "
        "enable_in_reasoning.", group="Server", parse=parse_structured_outputs_config, metavar="JSON",
    )  # fmt: skip
    max_logprobs: int = _setting(
        20, "Most log-probabilities a token that a request may ask for.", group="Server", low=0, high=20
    )
    enable_prompt_tokens_details: bool = _setting(
        False, "Tell in usage how many tokens of the prompt came from the cache.", group="Server"
    )
    enable_force_include_usage: bool = _setting(
        False, "Send usage at the end of every stream, asked for or not.", group="Server"
    )
    root_path: str = _setting(
        "", "Prefix under which a proxy serves this API; requests are taken with it and without.", group="Server",
        metavar="/PREFIX",
    )  # fmt: skip
    disable_fastapi_docs: bool = _setting(
        False, "Leave out /docs and /openapi.json, which describe this API.", group="Server"
    )
    ui: bool = _setting(True, "Serve the page at /: a chat, and a view of the engine.", group="Server")
    max_request_bytes: int = _setting(
        32 * 2**20, "Largest request body.", group="Server", parse=parse_count, low=1024, metavar="BYTES"
    )
    ssl_keyfile: str | None = _setting(
        None,
        "Private key for HTTPS, as PEM; read again when it changes.",
        group="TLS and CORS",
        metavar="FILE",
        managed=True,
    )
    ssl_certfile: str | None = _setting(
        None,
        "Certificate for HTTPS, as PEM; read again when it changes.",
        group="TLS and CORS",
        metavar="FILE",
        managed=True,
    )
    ssl_ca_certs: str | None = _setting(
        None, "Certificates of authorities that clients' certificates are checked by.", group="TLS and CORS",
        metavar="FILE",
    )  # fmt: skip
    ssl_cert_reqs: int = _setting(
        0, "Clients' certificates: 0 not asked for, 1 checked when sent, 2 required.", group="TLS and CORS",
        choices=(0, 1, 2),
    )  # fmt: skip
    ssl_ciphers: str | None = _setting(
        None, "Ciphers of TLS 1.2, in OpenSSL's words, as ECDHE+AESGCM; TLS 1.3 has its own.", group="TLS and CORS",
        metavar="LIST",
    )  # fmt: skip
    allowed_origins: tuple[str, ...] = _setting(
        ("*",), "Origins whose pages may call the API from a browser; words, or a JSON list.", group="TLS and CORS",
        parse=parse_words, metavar="ORIGIN",
    )  # fmt: skip
    allowed_methods: tuple[str, ...] = _setting(
        ("*",), "Methods that they may use.", group="TLS and CORS", parse=parse_words, metavar="METHOD"
    )
    allowed_headers: tuple[str, ...] = _setting(
        ("*",), "Headers that they may send.", group="TLS and CORS", parse=parse_words, metavar="HEADER"
    )
    allow_credentials: bool = _setting(
        False, "Let browsers send cookies and the like to the API; the origins must be named for it.",
        group="TLS and CORS",
    )  # fmt: skip

    enable_metrics: bool = _setting(True, "Answer /metrics.", group="Logs, metrics and traces", managed=True)
    older_metric_names: bool = _setting(
        True, "Give metrics vLLM's earlier names too (gpu_cache_usage_perc and the like).",
        group="Logs, metrics and traces",
    )  # fmt: skip
    log_level: str = _setting(
        "info", "Least severe message that is logged. Also read from VLLM_LOGGING_LEVEL.",
        group="Logs, metrics and traces", choices=LOG_LEVELS, parse=parse_log_level, aliases=("--uvicorn-log-level",),
    )  # fmt: skip
    log_format: str = _setting(
        "console", "console: lines for people; json: one object a line.", group="Logs, metrics and traces",
        choices=LOG_FORMATS,
    )  # fmt: skip
    log_config_file: str | None = _setting(
        None, "File with a configuration of Python's logging, as JSON; it replaces --log-level and --log-format.",
        group="Logs, metrics and traces", metavar="FILE",
    )  # fmt: skip
    enable_log_requests: bool = _setting(
        False, "Log a line for each request: its id, lengths and times, never its text.",
        group="Logs, metrics and traces",
    )  # fmt: skip
    access_log: bool = _setting(False, "Log a line for each HTTP request.", group="Logs, metrics and traces")
    disable_access_log_for_endpoints: str | None = _setting(
        None, "Paths that --access-log leaves out, with commas between them: /health,/metrics.",
        group="Logs, metrics and traces", metavar="PATHS",
    )  # fmt: skip
    disable_log_stats: bool = _setting(
        False, "Leave out the line with throughput and queue that is logged under load.",
        group="Logs, metrics and traces",
    )  # fmt: skip
    log_stats_interval_s: float = _setting(
        10.0, "Seconds between those lines. Also read from VLLM_LOG_STATS_INTERVAL.",
        group="Logs, metrics and traces", low=0.1, high=86400, metavar="SECONDS",
    )  # fmt: skip
    otlp_traces_endpoint: str | None = _setting(
        None, "Where to send a trace of each request: the HTTP address of an OpenTelemetry collector (port 4318; gRPC "
        "is not spoken). Needs octavo[otel].", group="Logs, metrics and traces", metavar="URL",
    )  # fmt: skip

    drain_timeout_s: float = _setting(
        120.0, "Longest wait for running requests on SIGTERM or POST /drain before they are ended.",
        group="Life cycle", low=0, high=86400, metavar="SECONDS", aliases=("--shutdown-timeout",), managed=True,
    )  # fmt: skip
    startup_stall_s: float = _setting(
        300.0, "/startupz fails when start-up made no progress for this long.", group="Life cycle", low=1, high=86400,
        metavar="SECONDS", managed=True,
    )  # fmt: skip
    liveness_stall_s: float = _setting(
        60.0, "/livez fails when requests run and no step finished for this long.", group="Life cycle", low=1,
        high=86400, metavar="SECONDS",
    )  # fmt: skip
    verify_prompt: str | None = _setting(
        None, "Asked before the server is ready, as one message of a user where the model has a chat template; it ends "
        "with SELF_TEST_FAILED where the answer is not as the next three say.", group="Life cycle", metavar="TEXT",
        managed=True,
    )  # fmt: skip
    verify_max_tokens: int = _setting(
        16, "Longest answer to --verify-prompt.", group="Life cycle", low=1, high=1024, metavar="TOKENS", managed=True
    )
    verify_expect: str | None = _setting(
        None, "What the answer to --verify-prompt must contain, as it is written.", group="Life cycle", metavar="TEXT",
        managed=True,
    )  # fmt: skip
    verify_min_tokens_per_s: float | None = _setting(
        None, "How fast the answer to --verify-prompt must come, the wait for its first token included.",
        group="Life cycle", low=0.01, high=1e6, metavar="TOKENS", managed=True,
    )  # fmt: skip
    termination_log: str = _setting(
        DEFAULT_TERMINATION_LOG, "File for the death certificate; written only if its folder exists.",
        group="Life cycle", metavar="FILE", managed=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        _check_bounds(self)
        for name in self.served_model_name:
            if not name.strip():
                raise ConfigError("--served-model-name", name, "a name that is not empty")
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ConfigError(
                "--enable-auto-tool-choice", True,
                "--tool-call-parser beside it, one of " + ", ".join(TOOL_CALL_PARSERS),
            )  # fmt: skip
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            missing = "--ssl-certfile" if self.ssl_certfile is None else "--ssl-keyfile"
            raise ConfigError(missing, None, "a file: --ssl-keyfile and --ssl-certfile go together")
        if self.ssl_certfile is None and (self.ssl_ca_certs or self.ssl_cert_reqs or self.ssl_ciphers):
            raise ConfigError("--ssl-certfile", None, "a file, and --ssl-keyfile, for TLS")
        if self.ssl_cert_reqs and self.ssl_ca_certs is None:
            raise ConfigError("--ssl-ca-certs", None, "the authorities that clients' certificates are checked by")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError("--root-path", self.root_path, "a path with a slash before it and none after, as /llm")
        for name, value in json.loads(self.override_generation_config or "{}").items():
            if name not in GENERATION_DEFAULTS or isinstance(value, bool) or not isinstance(value, (int, float)):
                expected = "numbers for " + ", ".join(GENERATION_DEFAULTS)
                raise ConfigError("--override-generation-config", {name: value}, expected)
        if self.verify_prompt is not None and not self.verify_prompt.strip():
            raise ConfigError("--verify-prompt", self.verify_prompt, "a question that is not empty")
        if self.verify_prompt is None and (self.verify_expect, self.verify_min_tokens_per_s) != (None, None):
            raise ConfigError("--verify-prompt", None, "a question, for --verify-expect and --verify-min-tokens-per-s")
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ConfigError("--allow-credentials", True, "--allowed-origins with names, as browsers demand")
        if self.port == self.management_port and self.port != 0 and self.uds is None:
            raise ConfigError("--management-port", self.management_port, f"another port than --port ({self.port})")


Config = EngineConfig | ServerConfig


def flag_of(name: str) -> str:
    """'max_model_len' → '--max-model-len'."""
    return "--" + name.replace("_", "-")


def managed_flags() -> tuple[str, ...]:
    """Flags, in every spelling, that are the operator's to set: they may not come as free arguments."""
    spelled = set()
    for kind in (EngineConfig, ServerConfig):
        for f in fields(kind):
            if f.metadata["managed"]:
                long = [flag for flag in (flag_of(f.name), *f.metadata["aliases"]) if flag.startswith("--")]
                spelled |= {*long, *("--no-" + flag[2:] for flag in long)}
    return tuple(sorted(spelled | {"--config"}))


TYPED_FLAGS: frozenset[str] = frozenset(flag_of(f.name) for kind in (EngineConfig, ServerConfig) for f in fields(kind))
"""Every flag that a field stands behind; the operator refuses to pass these through as free arguments."""


def add_arguments(
    parser: argparse.ArgumentParser, kinds: Iterable[type[Config]], only: Sequence[str] | None = None
) -> None:
    """Add one flag per field, in groups. Booleans get --x and --no-x; underscores are accepted for dashes.

    only: names of the fields that are meant. Default: all.
    """
    groups: dict[str, argparse._ArgumentGroup] = {}
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        for f in fields(kind):
            if only is not None and f.name not in only:
                continue
            meta = f.metadata
            title = meta["group"]
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            names = [*meta["aliases"], flag_of(f.name)]
            options: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": _help(f)}
            hint = _plain_type(hints[f.name])
            if hint is bool:
                options["action"] = argparse.BooleanOptionalAction
            else:
                options["type"] = _converter(f, hint)
                if meta["metavar"]:
                    options["metavar"] = meta["metavar"]
                if meta["choices"] and hint is not tuple:
                    options["metavar"] = "{" + ",".join(map(str, meta["choices"])) + "}"
                if hint is tuple:
                    options["nargs"] = "+"
                    options["action"] = "extend"
            groups[title].add_argument(*names, **options)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with `_` for `-`, the nearest flag named for an unknown one, and ConfigError instead of an exit."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        # An abbreviation that is unique today is another flag's beginning tomorrow.
        super().__init__(prog, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([_dashed(a) for a in arguments], namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            # Without their dashes: two flags are not alike because both have them.
            known = [option[2:] for option in self._option_string_actions if option.startswith("--")]
            near = difflib.get_close_matches(unknown[0].partition("=")[0].lstrip("-"), known, n=1)
            expected = f"did you mean --{near[0]}?" if near else "see --help"
            self.error(f"unknown argument {unknown[0]!r}: {expected}")
        return parsed

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:  # names the function that converts
            expected = {int: "a whole number", float: "a number", parse_count: "a count, as 4096, 16k or 24G"}
            raise ConfigError(action.option_strings[-1], arg_string, expected.get(action.type, "JSON")) from None

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}")


class UsageError(ValueError):
    """The command line could not be read."""


C = TypeVar("C", EngineConfig, ServerConfig)


def from_namespace(kind: type[C], namespace: argparse.Namespace) -> C:
    """The config of this kind from parsed flags. Raises ConfigError for a value outside its range."""
    given = vars(namespace)
    values: dict[str, Any] = {f.name: given[f.name] for f in fields(kind) if f.name in given}
    frozen: dict[str, Any] = {name: _flat(v) if isinstance(v, list) else v for name, v in values.items()}
    return kind(**frozen)


def _flat(words: list[Any]) -> tuple[Any, ...]:
    """What `parse_words` makes of several words is a list of lists."""
    return tuple(part for word in words for part in (word if isinstance(word, list) else [word]))


def to_args(config: Config) -> list[str]:
    """The flags that make this config again, defaults left out, in field order: from_args(to_args(c)) == c."""
    args: list[str] = []
    for f in fields(config):
        value = getattr(config, f.name)
        if value == f.default:
            continue
        flag = flag_of(f.name)
        if isinstance(value, bool):
            args.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, tuple):
            args += [flag, *map(str, value)]
        elif value is None:
            args.append(f"{flag}=auto")
        else:
            # One word per setting: a value that begins with a dash cannot be taken for a flag.
            args.append(f"{flag}={value}")
    return args


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind)  # a millisecond, which an operator of many servers would spend at each look


def _check_bounds(config: Config) -> None:
    hints = _hints(type(config))  # type: ignore[arg-type]  # a class is hashable, whatever its instances are
    for f in fields(config):
        value, meta = getattr(config, f.name), f.metadata
        if value is None and f.default is None:
            continue
        flag, hint = flag_of(f.name), _plain_type(hints[f.name])
        # The parser gives the right types; LLM(max_num_seqs="8") and a manifest's text do not.
        right = isinstance(value, (float, int) if hint is float else hint)
        if not right or (isinstance(value, bool) and hint is not bool):  # True is an int to Python, to nobody else
            raise ConfigError(flag, value, _type_text(f, hint))
        if meta["choices"] and value not in meta["choices"]:
            raise ConfigError(flag, value, "one of " + ", ".join(map(str, meta["choices"])))
        low, high = meta["low"], meta["high"]
        if isinstance(value, (int, float)) and (
            (low is not None and not value >= low) or (high is not None and not value <= high)
        ):
            raise ConfigError(flag, value, _range_text(low, high))


def _type_text(f: dataclasses.Field[Any], hint: type) -> str:
    if f.metadata["choices"]:
        return "one of " + ", ".join(map(str, f.metadata["choices"]))
    if f.metadata["metavar"] == "JSON":
        return "a JSON object"
    words = {bool: "True or False", str: "text", tuple: "a tuple of texts", int: "a whole number", float: "a number"}
    low, high = f.metadata["low"], f.metadata["high"]
    return words[hint] + (f", {_range_text(low, high)}" if low is not None or high is not None else "")


def _range_text(low: float | None, high: float | None) -> str:
    if high is None:
        return f"{low} or more"
    if low is None:
        return f"{high} or less"
    return f"{low} to {high}"


def _help(f: dataclasses.Field[Any]) -> str:
    default = f.default
    if isinstance(default, bool):  # first, as 0 and 1 equal False and True, and are worth telling
        shown = " Default: on." if default else " Default: off."
    elif default in (None, (), "") or f.metadata["secret"]:
        shown = ""
    else:
        shown = f" Default: {' '.join(default) if isinstance(default, tuple) else default}."
    return str(f.metadata["help"] + shown).replace("%", "%%")


def _converter(f: dataclasses.Field[Any], hint: type) -> Callable[[str], Any]:
    flag = flag_of(f.name)
    parse = f.metadata["parse"] or (str if hint is tuple else hint)

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError:
            raise ConfigError(flag, text, _type_text(f, hint)) from None

    return convert


def _plain_type(hint: Any) -> type:
    """`int | None` → int, `tuple[str, ...]` → tuple."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    plain: type = typing.get_origin(hint) or hint
    return plain


def _dashed(argument: str) -> str:
    """'--max_model_len=4k' → '--max-model-len=4k': both spellings are in use."""
    if not argument.startswith("--"):
        return argument
    name, separator, value = argument.partition("=")
    return name.replace("_", "-") + separator + value
