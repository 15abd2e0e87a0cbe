"""What the engine tells the world about itself: stages, the /statusz document, failures and exit statuses.

The contract between the two halves of Octavo: the engine fills these types, the operator reads them.
Standard library only, so that both import it for free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import IntEnum, StrEnum
from typing import Any, TypeVar

STATUSZ_VERSION = 1
"""Raised when a field of /statusz changes its meaning; added fields do not raise it."""

API_PORT = 8000
MANAGEMENT_PORT = 8001
DEFAULT_TERMINATION_LOG = "/dev/termination-log"
TERMINATION_LOG_MAX_BYTES = 4096
"""The kubelet keeps no more than this of a container's termination message."""


class Stage(StrEnum):
    """Where an engine is in its life, in this order; only FAILED can follow every other one."""

    STARTING = "starting"
    DOWNLOADING = "downloading"
    LOADING_WEIGHTS = "loading_weights"
    CAPTURING = "capturing"
    WARMING_UP = "warming_up"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class FailureCode(StrEnum):
    """Why an engine ended. The codes are stable: alerts and the operator's conditions are keyed by them."""

    INVALID_CONFIG = "INVALID_CONFIG"
    PORT_IN_USE = "PORT_IN_USE"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    MODEL_GATED = "MODEL_GATED"
    MODEL_INVALID = "MODEL_INVALID"
    WEIGHTS_CORRUPT = "WEIGHTS_CORRUPT"
    UNSUPPORTED_MODEL = "UNSUPPORTED_MODEL"
    UNSUPPORTED_FEATURE = "UNSUPPORTED_FEATURE"
    DOWNLOAD_FAILED = "DOWNLOAD_FAILED"
    DOWNLOAD_STALLED = "DOWNLOAD_STALLED"
    WEIGHTS_TOO_LARGE = "WEIGHTS_TOO_LARGE"
    KV_CACHE_TOO_SMALL = "KV_CACHE_TOO_SMALL"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    DEVICE_UNAVAILABLE = "DEVICE_UNAVAILABLE"
    DEVICE_ERROR = "DEVICE_ERROR"
    SELF_TEST_FAILED = "SELF_TEST_FAILED"
    ENGINE_DIED = "ENGINE_DIED"
    INTERNAL_ERROR = "INTERNAL_ERROR"

    @property
    def exit_status(self) -> ExitStatus:
        return ExitStatus[self.name]


class ExitStatus(IntEnum):
    """The process's exit status for each failure; 0 means a drained or asked-for end and nothing else.

    Kept clear of 1 (an unhandled Python error), 126-165 (shells, signals) and 255.
    """

    OK = 0
    INVALID_CONFIG = 2  # what argparse and every shell tool use for bad usage
    PORT_IN_USE = 10
    MODEL_NOT_FOUND = 20
    MODEL_GATED = 21
    MODEL_INVALID = 22
    WEIGHTS_CORRUPT = 23
    UNSUPPORTED_MODEL = 24
    UNSUPPORTED_FEATURE = 25
    DOWNLOAD_FAILED = 30
    DOWNLOAD_STALLED = 31
    WEIGHTS_TOO_LARGE = 40
    KV_CACHE_TOO_SMALL = 41
    OUT_OF_MEMORY = 42
    DEVICE_UNAVAILABLE = 50
    DEVICE_ERROR = 51
    SELF_TEST_FAILED = 60
    ENGINE_DIED = 70
    INTERNAL_ERROR = 71


@dataclass(frozen=True)
class Failure:
    """One fatal failure, written for the person who has to mend it.

    message: what is wrong and where, one sentence.
    fix: what would be right, as something to do ("set maxModelLen <= 9216"); "" when nobody can know.
    need, have: the two figures that did not match, with their unit, or None.
    detail: what a developer wants to see (an exception's text); never a prompt or a secret.
    """

    code: FailureCode
    message: str
    fix: str = ""
    need: str | None = None
    have: str | None = None
    detail: str | None = None

    def to_json(self) -> str:
        """The death certificate: one JSON object of at most TERMINATION_LOG_MAX_BYTES bytes."""
        document = {key: value for key, value in asdict(self).items() if value is not None}
        # The longest text is halved until all of it fits: cutting the JSON itself would leave nothing to parse.
        while len(text := json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")) > (
            TERMINATION_LOG_MAX_BYTES
        ):
            longest = max(document, key=lambda key: len(document[key]))
            document[longest] = document[longest][: len(document[longest]) // 2]
        return text.decode()

    @classmethod
    def from_json(cls, text: str) -> Failure | None:
        """The failure in a termination message, or None when the text is not a death certificate."""
        try:
            document = json.loads(text)
            return cls.from_dict(document)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Failure:
        return cls(
            code=FailureCode(document["code"]),
            message=str(document["message"]),
            fix=str(document.get("fix") or ""),
            need=_optional_str(document.get("need")),
            have=_optional_str(document.get("have")),
            detail=_optional_str(document.get("detail")),
        )

    def __str__(self) -> str:
        return f"{self.message} Fix: {self.fix}" if self.fix else self.message


class FatalError(Exception):
    """Ends the engine: carries the death certificate from the place that knows to the place that exits."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


@dataclass(frozen=True)
class Progress:
    """How far the current stage is. total_bytes 0 means that the total is not known."""

    done_bytes: int = 0
    total_bytes: int = 0
    percent: float = 0.0
    eta_s: float | None = None


@dataclass(frozen=True)
class Effective:
    """What the engine resolved its configuration to; sent once, when sizes are known."""

    model: str = ""
    resolved_revision: str | None = None
    dtype: str = ""
    kv_dtype: str = ""
    max_model_len: int = 0
    block_size: int = 0
    num_blocks: int = 0
    kv_tokens: int = 0
    max_concurrency_at_max_len: float = 0.0
    attention_backend: str = ""
    cuda_graphs: bool = False
    gpu: str = ""
    driver: str | None = None
    tensor_parallel: int = 1
    engine_version: str = ""
    quantization: str | None = None
    weights_bytes: int = 0
    kv_bytes: int = 0


@dataclass(frozen=True)
class Load:
    """How busy the engine is. kv_usage is 0..1; last_step_age_s is None before the first step."""

    running: int = 0
    waiting: int = 0
    waiting_prefill_tokens: int = 0
    kv_usage: float = 0.0
    predicted_queue_s: float = 0.0
    last_step_age_s: float | None = None


@dataclass(frozen=True)
class Statusz:
    """The document behind GET /statusz."""

    stage: Stage
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds spent in each stage so far, the current one included."""
    progress: Progress = field(default_factory=Progress)
    effective: Effective | None = None
    load: Load = field(default_factory=Load)
    failure: Failure | None = None
    version: int = STATUSZ_VERSION

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Statusz:
        """Read what another version of the engine may have written: unknown keys are skipped, missing ones default.

        Raises ValueError when there is no stage or when it is not one of ours.
        """
        failure = document.get("failure")
        effective = document.get("effective")
        return cls(
            stage=Stage(document.get("stage", "")),
            stage_seconds={str(k): float(v) for k, v in (document.get("stage_seconds") or {}).items()},
            progress=_read(Progress, document.get("progress") or {}),
            effective=_read(Effective, effective) if effective else None,
            load=_read(Load, document.get("load") or {}),
            failure=Failure.from_dict(failure) if failure else None,
            version=int(document.get("version", STATUSZ_VERSION)),
        )


T = TypeVar("T", Progress, Effective, Load)


def _read(kind: type[T], document: Mapping[str, Any]) -> T:
    known = {f.name for f in fields(kind)}
    return kind(**{key: value for key, value in document.items() if key in known})


def _optional_str(value: object) -> str | None:
    return None if value is None else str(value)
