"""What a checkpoint's files hold, read from their headers alone. Import-light: used by plan and by the loader.

The safetensors format: 8 bytes little-endian length, a JSON header naming each tensor's dtype, shape and byte
range, then the bytes. (github.com/huggingface/safetensors, "Format")
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from octavo_engine.status import Failure, FailureCode, FatalError

MAX_HEADER_BYTES = 100 * 2**20
"""The format's own limit; more than that is no header but garbage."""


READ_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "model.safetensors.index.json", "*.safetensors",
)  # fmt: skip
"""What is read of a checkpoint's folder, where it is there."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. dtype is the format's name (F32, BF16, …), offset counts bytes from the file's start."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def check_may_enter(folder: Path) -> None:
    """A volume often belongs to another user than the one that serves. Raises FatalError (MODEL_INVALID)."""
    if not os.access(folder, os.R_OK | os.X_OK):
        raise _not_ours(folder, "entered", "a+rx")


def check_readable(folder: Path) -> None:
    """The same for the files that are read of a checkpoint. Raises FatalError (MODEL_INVALID)."""
    for file in (found for pattern in READ_FILES for found in sorted(folder.glob(pattern))):
        if not file.exists():
            what = f"{file} is a link to {os.readlink(file)}, which is not there."
            raise FatalError(Failure(FailureCode.MODEL_INVALID, what, "finish the download, or copy the file"))
        if not os.access(file, os.R_OK):
            raise _not_ours(file, "read", "a+r")


def _not_ours(path: Path, done: str, mode: str) -> FatalError:
    message = f"{path} may not be {done} by user {os.getuid()}, which this process runs as."
    return FatalError(Failure(FailureCode.MODEL_INVALID, message, f"let that user in, as with `chmod {mode} {path}`"))


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint in `folder`. Raises FatalError (MODEL_INVALID, WEIGHTS_CORRUPT)."""
    tensors: dict[str, TensorInfo] = {}
    for file in find_files(folder):
        try:
            infos = _read_header(file)
        except OSError as error:
            raise unreadable(file, str(error)) from error
        tensors |= {info.name: info for info in infos}
    return tensors


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order: those its index names, else all in the folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise _corrupt(index, "it is no index of a checkpoint") from error
        # A name with a path in it would read files outside the folder.
        files = [folder / Path(str(name)).name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FatalError(
                Failure(
                    FailureCode.WEIGHTS_CORRUPT,
                    f"{folder} lacks {len(missing)} of {len(files)} weight files: {', '.join(missing[:4])}.",
                    "finish the download or copy the missing files",
                )
            )
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        held = f"; it holds {', '.join(others[:4])}, which this version does not read" if others else ""
        raise FatalError(
            Failure(
                FailureCode.MODEL_INVALID,
                f"{folder} has no *.safetensors file{held}.",
                "use a checkpoint in safetensors format",
            )
        )
    return files


def _read_header(file: Path) -> list[TensorInfo]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise _corrupt(file, f"it is only {size} bytes long")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER_BYTES or 8 + length > size:
            raise _corrupt(file, f"its header claims {length} bytes, the file has {size}")
        try:
            header = json.loads(stream.read(length))
            infos = [
                TensorInfo(
                    name, file, str(entry["dtype"]), tuple(int(d) for d in entry["shape"]),
                    8 + length + int(entry["data_offsets"][0]),
                    int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]),
                )
                for name, entry in header.items()
                if name != "__metadata__"
            ]  # fmt: skip
            end = max((int(e["data_offsets"][1]) for n, e in header.items() if n != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise _corrupt(file, "its header cannot be read") from error
    if 8 + length + end != size:
        raise _corrupt(file, f"it should be {8 + length + end:,} bytes long and is {size:,}")
    return infos


def _corrupt(file: Path, what: str) -> FatalError:
    return FatalError(
        Failure(
            FailureCode.WEIGHTS_CORRUPT, f"{file} is damaged: {what}.", "delete the file and download or copy it again"
        )
    )


def unreadable(file: Path, why: str) -> FatalError:
    return FatalError(
        Failure(
            FailureCode.WEIGHTS_CORRUPT,
            f"{file} cannot be read: {why}.",
            "delete the file and download or copy it again",
        )
    )
