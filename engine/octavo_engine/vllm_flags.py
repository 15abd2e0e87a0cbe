"""Flags of vLLM, of today and of earlier, that no setting of Octavo stands behind: what each of them is answered.

One table as data. The command line, its help and docs/flags.md come from it. A flag is never ignored in silence:
what it asks for is so anyway (ALWAYS), means nothing here and is said to (MOOT), or is refused (MISSING).
Standard library only; called by command_line.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from octavo_engine.config import ConfigError


class Answer(StrEnum):
    ALWAYS = "always"
    """What the flag asks for is so without it. Its opposite (`--no-…`, a false value) is warned of."""
    MOOT = "moot"
    """It changes nothing here. A warning says why, once."""
    MISSING = "missing"
    """It would change what is served, and this version cannot. Refused, unless the value asks for nothing."""


class Takes(StrEnum):
    NOTHING = "nothing"
    VALUE = "value"
    VALUES = "values"


@dataclass(frozen=True)
class VllmFlag:
    """neutral: values that ask for nothing beyond what this version does; they pass in silence."""

    name: str
    takes: Takes
    answer: Answer
    why: str
    neutral: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def dest(self) -> str:
        """Where the parser leaves what was given. A colon keeps it apart from every setting."""
        return "vllm:" + self.name


def answers(values: Mapping[str, object]) -> list[str]:
    """The warnings that these parsed flags (dest → value) call for. Raises ConfigError for one that is refused."""
    warnings = []
    for flag in VLLM_FLAGS:
        if flag.dest not in values:
            continue
        value = values[flag.dest]
        if _asks_for_nothing(flag, value):
            continue
        shown = value if value is not True else "it"
        if flag.answer is Answer.MISSING:
            raise ConfigError(flag.name, _shown(value) or True, _expected(flag))
        if flag.answer is Answer.ALWAYS:
            warnings.append(f"--no-{flag.name[2:]} has no effect: {flag.why}")
        else:
            spelled = flag.name if shown == "it" else f"{flag.name} {_shown(value)}".rstrip()
            warnings.append(f"{spelled} has no effect: {flag.why}")
    return warnings


def _asks_for_nothing(flag: VllmFlag, value: object) -> bool:
    if flag.takes is Takes.NOTHING:
        return (value is True) if flag.answer is Answer.ALWAYS else (value is False)
    words = [str(word) for word in value] if isinstance(value, list) else [str(value)]
    return bool(flag.neutral) and all(word in flag.neutral for word in words)


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "" if value is True else str(value)


def _expected(flag: VllmFlag) -> str:
    what = " or ".join(flag.neutral) if flag.neutral else "it to be absent"
    return f"{what}: {flag.why}"


def _table(
    takes: Takes, answer: Answer, rows: Iterable[tuple[str, str] | tuple[str, str, Sequence[str]]]
) -> list[VllmFlag]:
    """Rows of (names separated by spaces, why, neutral values)."""
    flags = []
    for names, why, *rest in rows:
        first, *others = names.split()
        flags.append(VllmFlag(first, takes, answer, why, tuple(rest[0]) if rest else (), tuple(others)))
    return flags


ONE_DEVICE = "this version computes on one device"
REPLICAS = "run one server for each replica (spec.replicas of an LLMServer does)"
NO_LORA = "this version serves no LoRA adapters"
NO_SPECULATION = "this version does no speculative decoding"
TEXT_ONLY = "models of text alone are served"
NO_COMPILATION = "nothing is compiled by torch.compile; kernels are Octavo's own"
SCHEDULER = "the scheduler sizes chunks and steps by itself"
ONE_API_PROCESS = "one API process carries the load of its engine"
NO_FOREIGN_CODE = "no code is loaded on a flag's word"
NO_TRANSFER = "keys and values stay in the engine"
NO_POOLING = "this version generates text and does no pooling"
NEVER_LOGGED = "prompts and answers are never logged"
NO_EXPERTS = "no mixture of experts is served by this version"
NO_MAMBA = "no model with Mamba layers is served by this version"
STAY = "weights stay on the device"
PLACES = "where threads run is left to the system; pin the process to bind it"

VLLM_FLAGS: tuple[VllmFlag, ...] = tuple(
    _table(
        Takes.NOTHING,
        Answer.ALWAYS,
        [
            ("--async-scheduling", "steps are planned while the one before computes"),
            ("--disable-log-requests", "requests are logged only with --enable-log-requests"),
            ("--disable-uvicorn-access-log", "HTTP requests are logged only with --access-log"),
            ("--enable-request-id-headers", "every response carries X-Request-Id"),
            ("--enable-server-load-tracking", "/load always counts"),
            ("--enable-ssl-refresh", "certificates are read again when their files change"),
            ("--enable-offline-docs", "no page loads anything from outside"),
            ("--language-model-only", TEXT_ONLY),
            ("--use-tqdm-on-load", "loading shows its progress"),
            ("--use-v2-block-manager", "there is one block manager"),
            ("--log-error-stack", "an unexpected error is logged with its stack"),
        ],
    )
    + _table(
        Takes.NOTHING,
        Answer.MOOT,
        [
            ("--aggregate-engine-logging", "there is one engine, and its log is whole"),
            ("--allow-deprecated-quantization", "no quantization is deprecated here"),
            ("--calculate-kv-scales", "the KV cache has the type of the weights"),
            ("--cudagraph-metrics", "octavo: metrics tell of steps"),
            ("--disable-cascade-attn", "there is no cascade attention"),
            ("--disable-chunked-mm-input", TEXT_ONLY),
            ("--disable-custom-all-reduce", ONE_DEVICE),
            ("--disable-frontend-multiprocessing", "API and engine are always two processes"),
            ("--disable-hybrid-kv-cache-manager", "there is one manager of the KV cache"),
            ("--disable-nccl-for-dp-synchronization", ONE_DEVICE),
            ("--disable-sliding-window", "models with sliding windows are refused"),
            ("--enable-cumem-allocator", "memory is one arena, allocated at the start"),
            ("--enable-dbo", ONE_DEVICE),
            ("--enable-ep-weight-filter", NO_EXPERTS),
            ("--enable-eplb", NO_EXPERTS),
            ("--enable-expert-parallel -ep", NO_EXPERTS),
            ("--enable-flash-late-interaction", NO_POOLING),
            ("--enable-flashinfer-autotune", "kernels are Octavo's own, and are tuned ahead"),
            ("--enable-layerwise-nvtx-tracing", "profile with the tools of the device"),
            ("--enable-log-deltas", NEVER_LOGGED),
            ("--enable-logging-iteration-details", "octavo:step_seconds tells of steps"),
            ("--enable-mamba-cache-stochastic-rounding", NO_MAMBA),
            ("--enable-mixed-moe-lora-format", NO_LORA),
            ("--enable-mm-embeds", TEXT_ONLY),
            ("--enable-mm-processor-stats", TEXT_ONLY),
            ("--enable-tower-connector-lora", NO_LORA),
            ("--exclude-tools-when-tool-choice-none", "the chat template gets the tools that the request has"),
            ("--fail-on-environ-validation", "variables of vLLM that mean nothing here are warned of"),
            ("--fully-sharded-loras", NO_LORA),
            ("--interleave-mm-strings", TEXT_ONLY),
            ("--jit-monitor-verbose", "each kernel that is compiled after the start is logged anyway"),
            ("--kv-sharing-fast-prefill", "no model that shares keys and values between layers is served"),
            ("--multi-step-stream-outputs", "every step's tokens are streamed"),
            ("--numa-bind", PLACES),
            ("--ray-workers-use-nsight", "Ray is not used"),
            ("--scheduler-reserve-full-isl", SCHEDULER),
            ("--skip-mm-profiling", TEXT_ONLY),
            ("--specialize-active-lora", NO_LORA),
            ("--worker-use-ray", "Ray is not used"),
        ],
    )
    + _table(
        Takes.NOTHING,
        Answer.MISSING,
        [
            ("--data-parallel-external-lb -dpe", REPLICAS),
            ("--data-parallel-hybrid-lb -dph", REPLICAS),
            ("--data-parallel-multi-port-external-lb -dpm", REPLICAS),
            ("--enable-elastic-ep", ONE_DEVICE),
            ("--enable-log-outputs", NEVER_LOGGED),
            ("--enable-lora", NO_LORA),
            ("--enable-mfu-metrics", "this version does not estimate operations"),
            ("--enable-per-request-metrics", "times of a request are told in /metrics and in traces"),
            ("--enable-prompt-embeds", "prompts are text or token ids"),
            ("--enable-return-routed-experts", NO_EXPERTS),
            ("--enable-sleep-mode", "the engine does not sleep"),
            ("--enable-tokenizer-info-endpoint", "/tokenizer_info is not there"),
            ("--grpc", "the server speaks HTTP"),
            ("--headless", ONE_DEVICE),
            ("--kv-cache-metrics", "how long blocks stay in the cache is not measured"),
            ("--mm-encoder-only", TEXT_ONLY),
            ("--return-tokens-as-token-ids", "ask for it in a request (return_tokens_as_token_ids)"),
            ("--skip-tokenizer-init", "the server reads and writes text"),
            ("--tokens-only", "the server reads and writes text"),
            ("--trust-request-chat-template", "a request brings no template of its own"),
            ("--use-fp64-gumbel", "answers are drawn with 32-bit noise"),
        ],
    )
    + _table(
        Takes.VALUE,
        Answer.MOOT,
        [
            ("--additional-config", "it is for other platforms", ["{}"]),
            ("--all2all-backend", NO_EXPERTS),
            ("--allowed-local-media-path", TEXT_ONLY, [""]),
            ("--api-server-count -asc", ONE_API_PROCESS, ["1"]),
            ("--attention-backend", "each device has one attention", ["auto"]),
            ("--attention-config -ac", "each device has one attention", ["{}"]),
            ("--code-revision", "no code is loaded from a checkpoint"),
            ("--compilation-config -cc", NO_COMPILATION, ["{}"]),
            ("--cp-kv-cache-interleave-size", ONE_DEVICE, ["1"]),
            ("--cpu-distributed-timeout-seconds", ONE_DEVICE),
            ("--data-parallel-supervisor-port", REPLICAS),
            ("--dbo-decode-token-threshold", ONE_DEVICE),
            ("--dbo-prefill-token-threshold", ONE_DEVICE),
            ("--dcp-comm-backend", ONE_DEVICE),
            ("--dcp-kv-cache-interleave-size", ONE_DEVICE, ["1"]),
            ("--distributed-executor-backend", ONE_DEVICE, ["mp", "uni"]),
            ("--distributed-timeout-seconds", ONE_DEVICE),
            ("--dp-supervisor-probe-failure-threshold", REPLICAS),
            ("--dp-supervisor-probe-interval-s", REPLICAS),
            ("--dp-supervisor-probe-timeout-s", REPLICAS),
            ("--eplb-config", NO_EXPERTS, ["{}"]),
            ("--expert-placement-strategy", NO_EXPERTS, ["linear"]),
            ("--fingerprint-mode", "system_fingerprint names the version"),
            ("--fingerprint-value", "system_fingerprint names the version"),
            ("--gdn-prefill-backend", "each device has one attention"),
            ("--guided-decoding-backend", "one backend does all of structured output", ["auto", "guidance"]),
            ("--h11-max-header-count", "headers are bounded at 8 KiB a field"),
            ("--h11-max-incomplete-event-size", "headers are bounded at 8 KiB a field"),
            ("--ir-op-priority", NO_COMPILATION, ["{}"]),
            ("--jit-monitor-mode", "kernels compiled after the start are logged and counted", ["warn"]),
            ("--kernel-config", "kernels are chosen by device and shape", ["{}"]),
            ("--kv-cache-metrics-sample", "how long blocks stay in the cache is not measured"),
            ("--kv-offloading-backend", NO_TRANSFER, ["native"]),
            ("--limit-mm-per-prompt", TEXT_ONLY, ["{}"]),
            ("--linear-backend", "kernels are chosen by device and shape", ["auto"]),
            ("--long-prefill-token-threshold", SCHEDULER, ["0"]),
            ("--lora-dtype", NO_LORA, ["auto"]),
            ("--mamba-backend", NO_MAMBA),
            ("--mamba-block-size", NO_MAMBA),
            ("--mamba-cache-dtype", NO_MAMBA, ["auto"]),
            ("--mamba-cache-mode", NO_MAMBA, ["none"]),
            ("--mamba-cache-philox-rounds", NO_MAMBA),
            ("--mamba-ssm-cache-dtype", NO_MAMBA, ["auto"]),
            ("--max-cpu-loras", NO_LORA),
            ("--max-log-len", NEVER_LOGGED),
            ("--max-long-partial-prefills", SCHEDULER, ["1"]),
            ("--max-lora-rank", NO_LORA),
            ("--max-loras", NO_LORA),
            ("--max-cudagraph-capture-size", "graphs are captured up to --max-num-seqs"),
            ("--max-num-partial-prefills", SCHEDULER, ["1"]),
            ("--max-parallel-loading-workers", "weights are read by as many threads as help"),
            ("--max-seq-len-to-capture", "graphs do not depend on the length"),
            ("--media-io-kwargs", TEXT_ONLY, ["{}"]),
            ("--mm-encoder-attn-backend", TEXT_ONLY),
            ("--mm-encoder-attn-dtype", TEXT_ONLY),
            ("--mm-encoder-fp8-scale-path", TEXT_ONLY),
            ("--mm-encoder-fp8-scale-save-margin", TEXT_ONLY),
            ("--mm-encoder-fp8-scale-save-path", TEXT_ONLY),
            ("--mm-encoder-tp-mode", TEXT_ONLY),
            ("--mm-ipc-gpu-memory-gb", TEXT_ONLY),
            ("--mm-processor-cache-gb", TEXT_ONLY),
            ("--mm-processor-cache-type", TEXT_ONLY),
            ("--mm-processor-kwargs", TEXT_ONLY, ["{}"]),
            ("--mm-shm-cache-max-object-size-mb", TEXT_ONLY),
            ("--mm-tensor-ipc", TEXT_ONLY),
            ("--model-loader-extra-config", "the loader needs no settings", ["{}"]),
            ("--moe-backend", NO_EXPERTS, ["auto"]),
            ("--num-lookahead-slots", NO_SPECULATION, ["0"]),
            ("--num-scheduler-steps", "each step is scheduled; steps overlap", ["1"]),
            ("--offload-backend", STAY, ["auto"]),
            ("--offload-num-in-group", STAY, ["1"]),
            ("--offload-prefetch-step", STAY, ["1"]),
            ("--optimization-level -O", NO_COMPILATION),
            ("--performance-mode", "there is one mode"),
            ("--preemption-mode", "what is preempted is computed again", ["recompute"]),
            ("--prefill-schedule-interval", REPLICAS, ["1"]),
            (
                "--prefix-caching-hash-algo",
                "blocks are found by BLAKE2b, which nobody can collide",
                ["sha256", "sha256_cbor"],
            ),
            ("--pt-load-map-location", "weights are read into place", ["cpu"]),
            ("--renderer-num-workers", "templates and tokenizers have threads of their own", ["1"]),
            ("--safetensors-load-strategy", "weights are read into place", ["lazy", "eager"]),
            ("--safetensors-prefetch-block-size", "weights are read into place"),
            ("--safetensors-prefetch-num-threads", "weights are read by as many threads as help"),
            ("--scheduler-delay-factor", SCHEDULER, ["0", "0.0"]),
            (
                "--scheduling-policy",
                "a request's priority counts, equal ones go first come first served",
                ["fcfs", "priority"],
            ),
            ("--show-hidden-metrics-for-version", "older names of metrics are always there"),
            ("--stream-interval", "every step's tokens are streamed", ["1"]),
            ("--swap-space", "what is preempted is computed again, not swapped", ["0"]),
            ("--tool-server", "tools are called by the client", ["demo"]),
            ("--ubatch-size", ONE_DEVICE, ["0"]),
            ("--video-pruning-rate", TEXT_ONLY),
            ("--watermark", SCHEDULER, ["0", "0.0"]),
        ],
    )
    + _table(
        Takes.VALUES,
        Answer.MOOT,
        [
            ("--allowed-media-domains", TEXT_ONLY),
            ("--cpu-offload-params", STAY),
            ("--cuda-graph-sizes", "graphs are captured up to --max-num-seqs"),
            ("--cudagraph-capture-sizes", "graphs are captured up to --max-num-seqs"),
            ("--kv-cache-dtype-skip-layers", "the KV cache has the type of the weights"),
            ("--lora-target-modules", NO_LORA),
            ("--numa-bind-cpus", PLACES),
            ("--numa-bind-nodes", PLACES),
            ("--offload-params", STAY),
            ("--ignore-patterns", "only text files and safetensors are downloaded"),
        ],
    )
    + _table(
        Takes.VALUE,
        Answer.MISSING,
        [
            ("--chat-template-content-format", "content is given to the template as text", ["auto", "string"]),
            ("--collect-detailed-traces", "a trace has one span for each request", ["None"]),
            ("--config-format", "config.json is read as Hugging Face writes it", ["auto", "hf"]),
            ("--convert", NO_POOLING, ["auto", "none"]),
            ("--cpu-offload-gb", STAY, ["0", "0.0"]),
            ("--data-parallel-address -dpa", REPLICAS),
            ("--data-parallel-backend -dpb", REPLICAS, ["mp"]),
            ("--data-parallel-rank -dpn", REPLICAS, ["0"]),
            ("--data-parallel-rpc-port -dpp", REPLICAS),
            ("--data-parallel-size -dp", REPLICAS, ["1"]),
            ("--data-parallel-size-local -dpl", REPLICAS, ["1"]),
            ("--data-parallel-start-rank -dpr", REPLICAS, ["0"]),
            ("--decode-context-parallel-size -dcp", ONE_DEVICE, ["1"]),
            ("--diffusion-config -dc", "no diffusion model is served by this version"),
            ("--ec-transfer-config", NO_TRANSFER),
            ("--hf-config-path", "config.json is read from the model's folder"),
            ("--hf-overrides", "config.json is taken as it is", ["{}"]),
            ("--hf-token", "set HF_TOKEN: every process sees a command line"),
            ("--io-processor-plugin", NO_FOREIGN_CODE),
            ("--kv-events-config", "events of the KV cache are not published"),
            ("--kv-offloading-size", NO_TRANSFER, ["0"]),
            ("--kv-transfer-config", NO_TRANSFER),
            ("--logits-processor-pattern", NO_FOREIGN_CODE),
            ("--logprobs-mode", "log-probabilities are of the model's own distribution", ["raw_logprobs"]),
            ("--master-addr", ONE_DEVICE),
            ("--master-port", ONE_DEVICE),
            ("--model-class-overrides", NO_FOREIGN_CODE, ["{}"]),
            ("--model-impl", "models are Octavo's own", ["auto", "vllm"]),
            ("--nnodes -n", ONE_DEVICE, ["1"]),
            ("--node-rank -r", ONE_DEVICE, ["0"]),
            ("--num-speculative-tokens --spec-tokens", NO_SPECULATION, ["0"]),
            ("--offload-group-size", STAY, ["0"]),
            ("--override-attention-dtype", "attention is computed in the type of the weights"),
            ("--override-pooler-config --pooler-config", NO_POOLING),
            ("--prefill-context-parallel-size -pcp", ONE_DEVICE, ["1"]),
            ("--profiler-config", "profile with the tools of the device"),
            ("--quantization-config", "this version reads float32, float16 and bfloat16", ["{}"]),
            ("--reasoning-config", "thinking has no budget in this version", ["{}"]),
            ("--reasoning-parser-plugin", NO_FOREIGN_CODE),
            ("--response-role", "answers are the assistant's", ["assistant"]),
            ("--rope-scaling", "config.json is taken as it is"),
            ("--rope-theta", "config.json is taken as it is"),
            ("--runner", NO_POOLING, ["auto", "generate"]),
            ("--scheduler-cls", NO_FOREIGN_CODE),
            ("--spec-method", NO_SPECULATION),
            ("--speculative-config -sc", NO_SPECULATION, ["{}"]),
            ("--speculative-model --spec-model", NO_SPECULATION),
            ("--task", NO_POOLING, ["auto", "generate"]),
            ("--tokenizer-mode", "tokenizer.json is read, and no other form", ["auto", "hf"]),
            ("--tool-parser-plugin", NO_FOREIGN_CODE),
            ("--weight-transfer-config", "weights are those of the checkpoint"),
            ("--worker-cls", NO_FOREIGN_CODE),
            ("--worker-extension-cls", NO_FOREIGN_CODE),
        ],
    )
    + _table(
        Takes.VALUES,
        Answer.MISSING,
        [
            ("--default-mm-loras", NO_LORA),
            ("--device-ids", "choose the device with CUDA_VISIBLE_DEVICES"),
            ("--logits-processors", NO_FOREIGN_CODE),
            ("--lora-modules", NO_LORA),
            ("--middleware", NO_FOREIGN_CODE),
        ],
    )
)

BY_NAME = {name: flag for flag in VLLM_FLAGS for name in (flag.name, *flag.aliases)}
