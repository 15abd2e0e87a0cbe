"""Read a checkpoint's tensors into the engine's arena. Called by the runner at start-up."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo_engine.checkpoint import TensorInfo, read_headers
from octavo_engine.models.config import DecoderConfig
from octavo_engine.models.layout import ALIGNMENT, Placement, placements, slots
from octavo_engine.status import Failure, FailureCode, FatalError

OnProgress = Callable[[int, int], None]
"""(bytes done, bytes in all)"""

IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
"""Buffers that old exports contain and that follow from the config."""


def allocate(config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The engine's tensors by slot name: views of one flat arena, content undefined."""
    layout = slots(config)
    last = list(layout.values())[-1]
    size = last.offset + -(-last.num_elements // ALIGNMENT) * ALIGNMENT
    arena = torch.empty(size, dtype=dtype, device=device)
    return {s.name: arena[s.offset : s.offset + s.num_elements].view(s.shape) for s in layout.values()}


def load(folder: Path, config: DecoderConfig, tensors: dict[str, Tensor], on_progress: OnProgress) -> None:
    """Fill `tensors` from the checkpoint. Raises FatalError (MODEL_INVALID, WEIGHTS_CORRUPT)."""
    headers = read_headers(folder)
    targets = placements(config)
    _check(folder, headers, targets, config)
    total = sum(headers[name].num_bytes for name in targets)
    done = 0
    on_progress(0, total)
    # File by file and in the file's own order: reads stay sequential on any disk.
    for file in sorted({headers[name].file for name in targets}):
        try:
            with safe_open(str(file), framework="pt") as source:
                for name in source.keys():  # noqa: SIM118 - not a mapping
                    target = targets.get(name)
                    if target is None:
                        continue
                    rows = tensors[target.slot][target.row : target.row + target.shape[0]]
                    rows.copy_(source.get_tensor(name))
                    done += headers[name].num_bytes
                    on_progress(done, total)
        except (SafetensorError, OSError) as error:
            raise FatalError(
                Failure(
                    FailureCode.WEIGHTS_CORRUPT,
                    f"{file} cannot be read: {error}.",
                    "delete the file and download or copy it again",
                )
            ) from error


def fill_with_noise(config: DecoderConfig, tensors: dict[str, Tensor], seed: int, on_progress: OnProgress) -> None:
    """--load-format dummy: weights of a plausible size, so that speed can be measured without a checkpoint."""
    generator = torch.Generator(device=next(iter(tensors.values())).device).manual_seed(seed)
    total, done = sum(t.nbytes for t in tensors.values()), 0
    for name, tensor in tensors.items():
        if name.endswith("norm"):
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 1.0 / math.sqrt(config.hidden_size), generator=generator)
        done += tensor.nbytes
        on_progress(done, total)


def _check(folder: Path, headers: dict[str, TensorInfo], targets: dict[str, Placement], config: DecoderConfig) -> None:
    missing = [name for name in targets if name not in headers]
    if missing:
        raise FatalError(
            Failure(
                FailureCode.MODEL_INVALID,
                f"{folder} lacks {len(missing)} of the {len(targets)} tensors that its config.json asks for, "
                f"the first is {missing[0]}.",
                "check that config.json and the weight files belong to the same checkpoint",
            )
        )
    for name, target in targets.items():
        if headers[name].shape != target.shape:
            raise FatalError(
                Failure(
                    FailureCode.MODEL_INVALID,
                    f"{headers[name].file}: {name} has the shape {list(headers[name].shape)}, "
                    f"config.json asks for {list(target.shape)}.",
                    "check that config.json and the weight files belong to the same checkpoint",
                )
            )
    known = {"lm_head.weight"} if config.tied_embeddings else set()
    unknown = [n for n in headers if n not in targets and n not in known and not n.endswith(IGNORED_SUFFIXES)]
    if unknown:
        raise FatalError(
            Failure(
                FailureCode.UNSUPPORTED_MODEL,
                f"{folder} has {len(unknown)} tensors that a {config.architecture} does not have, "
                f"the first is {unknown[0]}.",
                "this is another model than its config.json says, or one that this version does not know",
            )
        )
