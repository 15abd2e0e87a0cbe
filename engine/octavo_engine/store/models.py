"""A model of a source, whole on this disk: list, fill, hold. Called by find_model, in a thread, as it blocks."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from octavo_engine.status import Failure, FailureCode, FatalError
from octavo_engine.store.disk import NoRoomError, Report, Store, revision_of
from octavo_engine.store.hub import list_model
from octavo_engine.store.listing import Listing
from octavo_engine.store.s3 import list_folder, utc_now
from octavo_engine.store.transfer import DamagedError, Get, client, sleep

log = logging.getLogger(__name__)

S3_SOURCE = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_][A-Za-z0-9._-]*)*/?")
COMMIT = re.compile(r"[0-9a-f]{40}")


def default_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "octavo" / "models"


def whole_model(
    source: str, revision: str | None, store: Store, report: Report, *, weights: bool = True
) -> tuple[Path, str | None]:
    """(folder, commit). source: hf://org/name or s3://bucket/folder.

    Raises FatalError for what the store can tell, and the Hub client's errors for what find_model explains.
    """
    kept = source if weights else f"{source}#text"
    known = store.recall(kept, revision)
    if known and revision and COMMIT.fullmatch(revision) and store.find(known):
        return _held(store, known)  # a commit never becomes another: no need to ask
    get = hub_client()
    try:
        listing = _list(source, revision, get, weights=weights)
    except Exception as error:
        if known and store.find(known) and not _is_refusal(error):
            log.warning("%s cannot be asked, so what it was last is served: %s", source, error)
            return _held(store, known)
        if source.startswith("s3://"):
            raise FatalError(explain_s3(source, error)) from error
        raise
    if not any(file.name == "config.json" for file in listing.files):
        raise FatalError(
            Failure(
                FailureCode.MODEL_INVALID,
                f"{source} has no config.json, so it is not a model's folder.",
                "name the folder that holds config.json, tokenizer.json and the safetensors files",
            )
        )
    try:
        store.fill(listing, get, report, sleep)
    except NoRoomError as error:
        raise FatalError(
            Failure(
                FailureCode.DOWNLOAD_FAILED,
                f"{source} does not fit into {store.root}: {error}.",
                "give it more space (cache.size of an LLMServer), or remove models that are not used",
            )
        ) from error
    except DamagedError as error:
        raise FatalError(
            Failure(
                FailureCode.WEIGHTS_CORRUPT,
                f"{source}: {error}, again and again.",
                "nothing of it is served; look at what stands between here and the source (proxy, mirror, disk)",
            )
        ) from error
    store.remember(kept, revision, listing.key)
    return _held(store, listing.key)


def explain_s3(source: str, error: Exception) -> Failure:
    status = getattr(getattr(error, "response", None), "status_code", None)
    detail = f"{type(error).__name__}: {str(error)[:800]}"
    if status in (401, 403):
        return Failure(
            FailureCode.MODEL_GATED,
            f"Access to {source} was refused (HTTP {status}).",
            "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION: the key is missing, wrong, or may not list "
            "the bucket",
            detail=detail,
        )
    if status == 404:
        return Failure(
            FailureCode.MODEL_NOT_FOUND, f"{source} was not found.", "check the bucket's name and AWS_ENDPOINT_URL"
        )
    return Failure(
        FailureCode.DOWNLOAD_FAILED,
        f"{source} could not be listed.",
        "check AWS_ENDPOINT_URL, and the network and proxy settings",
        detail=detail,
    )


def _held(store: Store, key: str) -> tuple[Path, str | None]:
    store.hold(key)
    folder = store.root / "models" / key
    return folder, revision_of(folder)


def _list(source: str, revision: str | None, get: Get, *, weights: bool) -> Listing:
    if source.startswith("hf://"):
        return list_model(source.removeprefix("hf://"), revision, weights=weights)

    def body(url: str) -> bytes:
        with get(url, {}) as answer:
            return b"".join(answer.chunks())

    return list_folder(source, body, os.environ, weights=weights, now=utc_now)


def _is_refusal(error: Exception) -> bool:
    """The source answered, and the answer was no."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status in (401, 403, 404, 410)


def hub_client() -> Get:
    """Through the Hub client's own session, which knows proxies and certificates."""
    import huggingface_hub
    from huggingface_hub.utils import HfHubHTTPError, hf_raise_for_status

    # The HTTP library is the Hub client's own affair; its errors are found by the names that they have in it.
    transport: Any = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    # Not OSError: a refusal is one too, and so is a full disk.
    broken = tuple(kind for kind in transport.__subclasses__() if kind.__name__ == "RequestError")
    return client(huggingface_hub.get_session(), broken, hf_raise_for_status)


__all__ = ["S3_SOURCE", "Store", "default_root", "hub_client", "whole_model"]
