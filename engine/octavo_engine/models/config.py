"""What a checkpoint's config.json says, as one decoder family described by data. Pure; used by plan and models.

Llama, Mistral, Qwen2 and Qwen3 differ in a handful of switches: biases, QK-norm, sliding windows, tied embeddings,
the scaling of RoPE. A model outside the family is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo_engine.status import Failure, FailureCode, FatalError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPE_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""The numbers that each scaling of RoPE cannot do without."""
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
"""By transformers' names; those of kernels/act_mul.py."""
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
KV_DTYPE_BYTES = {**DTYPE_BYTES, "fp8_e4m3": 1, "fp8_e5m2": 1}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. `parameters` holds what `type` needs, under transformers' names."""

    theta: float
    type: str
    parameters: Mapping[str, float]


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer with grouped-query attention, RMSNorm and a gated MLP."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    max_position: int
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    activation: str
    """Of the MLP's gate: silu, gelu or gelu_tanh."""
    windows: tuple[int | None, ...]
    """Per layer: how many of the last tokens attention sees, None for all."""
    dtype: str

    @property
    def qkv_size(self) -> int:
        """Rows of the merged projection: queries, keys, values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def kv_bytes_per_token(self, kv_dtype: str) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * KV_DTYPE_BYTES[kv_dtype]

    @property
    def num_parameters(self) -> int:
        layer = self.hidden_size * (self.qkv_size + self.num_heads * self.head_dim)
        layer += 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        layer += self.qkv_size * self.qkv_bias + self.hidden_size * self.output_bias
        layer += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias + 2 * self.head_dim * self.qk_norm
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size


def load_config(folder: Path) -> DecoderConfig:
    """Read folder/config.json. Raises FatalError (MODEL_NOT_FOUND, MODEL_INVALID, UNSUPPORTED_MODEL)."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise _fatal(
            FailureCode.MODEL_NOT_FOUND, f"There is no folder {folder}.",
            "give a folder that holds config.json and *.safetensors, or a Hugging Face id (org/name)",
        )  # fmt: skip
    if not path.is_file():
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise _fatal(
            FailureCode.MODEL_INVALID, f"{folder} has no config.json (it holds: {inside}).",
            "give the folder of a Hugging Face checkpoint: config.json, tokenizer.json and *.safetensors side by side",
        )  # fmt: skip
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else f"is not JSON: {error}"
        raise _fatal(FailureCode.MODEL_INVALID, f"{path} {why}.", "download or copy the checkpoint again") from error
    if not isinstance(raw, dict):
        raise _fatal(
            FailureCode.MODEL_INVALID, f"{path} holds no JSON object.", "download or copy the checkpoint again"
        )
    return parse_config(raw, str(path))


def parse_config(raw: Mapping[str, Any], origin: str = "config.json") -> DecoderConfig:
    """Raises FatalError: MODEL_INVALID for a missing or impossible value, UNSUPPORTED_MODEL for another family."""
    architectures = raw.get("architectures") or ["none"]
    architecture = str(architectures[0])
    if architecture not in ARCHITECTURES:
        raise _fatal(
            FailureCode.UNSUPPORTED_MODEL, f"The architecture {architecture} is not supported.",
            "choose a model of one of " + ", ".join(ARCHITECTURES),
        )  # fmt: skip
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise _fatal(
            FailureCode.UNSUPPORTED_FEATURE, f"The checkpoint is quantized ({method}), which this version cannot read.",
            "choose the checkpoint's float16 or bfloat16 original",
        )  # fmt: skip

    def whole(name: str, default: int | None = None) -> int:
        value = raw.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _fatal(
                FailureCode.MODEL_INVALID, f"{origin}: {name} is {value!r}, expected a whole number above 0.",
                "download or copy the checkpoint again",
            )  # fmt: skip
        return value

    hidden, heads = whole("hidden_size"), whole("num_attention_heads")
    layers = whole("num_hidden_layers")
    kv_heads = whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise _fatal(
            FailureCode.MODEL_INVALID, f"{origin}: {heads} attention heads cannot share {kv_heads} key-value heads.",
            "download or copy the checkpoint again",
        )  # fmt: skip
    if (activation := raw.get("hidden_act") or "silu") not in ACTIVATIONS:
        raise _fatal(
            FailureCode.UNSUPPORTED_MODEL, f"The activation {activation!r} is not supported.",
            "choose a model with one of " + ", ".join(ACTIVATIONS),
        )  # fmt: skip
    qwen2 = architecture == "Qwen2ForCausalLM"
    attention_bias = bool(raw.get("attention_bias", qwen2))
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16")
    return DecoderConfig(
        architecture=architecture,
        vocab_size=whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=whole("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=whole("head_dim", hidden // heads),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_rope(raw, origin),
        max_position=whole("max_position_embeddings", 2048),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias,
        output_bias=attention_bias and not qwen2,  # Qwen2 has a bias on queries, keys and values alone
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        activation=ACTIVATIONS[activation],
        windows=_windows(raw, architecture, layers),
        dtype=dtype if dtype in DTYPE_BYTES else "bfloat16",
    )


def _rope(raw: Mapping[str, Any], origin: str) -> RopeConfig:
    # transformers 5 writes rope_parameters; before it there were rope_theta and rope_scaling.
    parameters = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(parameters.pop("rope_theta", None) or raw.get("rope_theta") or 10_000.0)
    kind = str(parameters.pop("rope_type", None) or parameters.pop("type", None) or "default")
    parameters.pop("type", None)
    if kind not in ROPE_PARAMETERS:
        raise _fatal(
            FailureCode.UNSUPPORTED_MODEL, f"The RoPE scaling {kind!r} is not supported.",
            "choose a model with one of " + ", ".join(ROPE_PARAMETERS),
        )  # fmt: skip
    if kind == "yarn":
        parameters.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings", 2048))
    numbers = {k: float(v) for k, v in parameters.items() if isinstance(v, (int, float))}
    missing = [name for name in ROPE_PARAMETERS[kind] if name not in numbers]
    if missing:
        raise _fatal(
            FailureCode.MODEL_INVALID, f"{origin}: RoPE scaling {kind!r} lacks the number {missing[0]}.",
            "download or copy the checkpoint again",
        )  # fmt: skip
    return RopeConfig(theta, kind, numbers)


def _windows(raw: Mapping[str, Any], architecture: str, layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    if not window or architecture == "LlamaForCausalLM":
        return (None,) * layers
    if architecture == "MistralForCausalLM":
        return (int(window),) * layers
    if not raw.get("use_sliding_window", False):
        return (None,) * layers
    if types := raw.get("layer_types"):
        return tuple(int(window) if kind == "sliding_attention" else None for kind in types)
    first = int(raw.get("max_window_layers", layers))
    return tuple(int(window) if layer >= first else None for layer in range(layers))


def _fatal(code: FailureCode, message: str, fix: str) -> FatalError:
    return FatalError(Failure(code=code, message=message, fix=fix))
