"""Find a model's files: a local folder, or a download from the Hugging Face Hub with visible progress.

Called by the API process, in a thread: the Hub's client is synchronous and may hang, so who waits also watches for
stalls. The engine is told the folder and never touches the network.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from octavo_engine.checkpoint import check_may_enter, check_readable
from octavo_engine.config import EngineConfig
from octavo_engine.status import Failure, FailureCode, FatalError
from octavo_engine.store import cache
from octavo_engine.store.hub import list_model
from octavo_engine.store.models import S3_SOURCE, Store, default_root, hub_client, whole_model
from octavo_engine.store.transfer import DamagedError, sleep

log = logging.getLogger(__name__)

DISK_ERRORS = frozenset({
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG,
})  # fmt: skip
"""Of the folder that it is to be kept in: the network has no part in them, and another try changes nothing."""
ATTEMPTS = 3
PAUSE_S = 2.0
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TEXT_FILES = ("*.json", "*.jinja", "*.txt")
WEIGHT_FILES = ("*.safetensors",)

Report = Callable[[int, int], None]
"""(done_bytes, total_bytes) so far; called from any thread."""


@dataclass(frozen=True)
class ModelFolder:
    """A checkpoint that is complete on disk."""

    path: Path
    resolved_revision: str | None = None


def local_folder(name: str, *, of: Literal["model", "tokenizer"] = "model") -> ModelFolder | None:
    """The folder when `name` is one, None when it names a model on the Hub. Raises FatalError: neither."""
    path = Path(name).expanduser()
    if os.path.isdir(path):  # not Path's: it raises where a folder on the way may not be entered
        check_may_enter(path)
        file = "config.json" if of == "model" else "tokenizer.json"
        if not (path / file).is_file():
            holds = "config.json, tokenizer.json and the safetensors files" if of == "model" else file
            raise FatalError(
                Failure(
                    FailureCode.MODEL_INVALID,
                    f"{path} has no {file}, so it is not a {of}'s folder.",
                    f"name the folder that holds {holds}",
                )
            )
        check_readable(path)
        return ModelFolder(path.resolve())
    if S3_SOURCE.fullmatch(name):
        return None
    if HUB_NAME.fullmatch(hub_id(name)) and not name.startswith((".", "/", "~")):
        return None
    is_file = os.path.isfile(path)
    what = "is a file, and a model is a folder" if is_file else "is neither a folder nor a Hugging Face id"
    fix = "name the folder that holds it" if is_file else "check the path, or write an id like Qwen/Qwen3-8B"
    raise FatalError(Failure(FailureCode.MODEL_NOT_FOUND, f"{name} {what}.", fix))


def hub_id(name: str) -> str:
    return name.removeprefix("hf://")


def store_of(config: EngineConfig, name: str) -> Store | None:
    """Where whole models are kept; None for Hugging Face's own cache, which knows no buckets."""
    if config.model_store is None and not name.startswith("s3://"):
        return None
    root = Path(config.model_store).expanduser() if config.model_store is not None else default_root()
    try:
        return Store(root, config.model_store_size)
    except OSError as error:
        raise FatalError(
            Failure(
                FailureCode.DOWNLOAD_FAILED,
                f"Models cannot be kept in {root}: {error.strerror}.",
                "name a folder that can be written with --model-store",
            )
        ) from error


def download(
    name: str,
    revision: str | None,
    download_dir: str | None,
    report: Report,
    *,
    weights: bool = True,
    store: Store | None = None,
) -> ModelFolder:
    """Blocks until the model is complete in the cache, or in the store where one is given.

    weights False: only config and tokenizer. Raises FatalError.
    """
    for library in ("httpx", "httpx2"):  # a line for each request; progress is told by the bytes
        logging.getLogger(library).setLevel(logging.WARNING)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if store is not None:
                source = name if name.startswith("s3://") else f"hf://{hub_id(name)}"
                return ModelFolder(*whole_model(source, revision, store, report, weights=weights))
            folder = _into_cache(name, revision, download_dir, report, weights=weights)
        except FatalError:
            raise
        except Exception as error:
            failure = explain(name, revision, error)
            of_this_disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
            if attempt == ATTEMPTS or failure.code is not FailureCode.DOWNLOAD_FAILED or of_this_disk:
                raise FatalError(failure) from error
            time.sleep(PAUSE_S * attempt)
        else:
            path = Path(folder)
            # The cache names a snapshot's folder after its commit.
            commit = path.name if re.fullmatch(r"[0-9a-f]{40}", path.name) else revision
            return ModelFolder(path, commit)
    raise AssertionError("unreachable")


def _into_cache(name: str, revision: str | None, folder: str | None, report: Report, *, weights: bool) -> str:
    import huggingface_hub  # here and not above: half a second that local folders need not wait for
    from huggingface_hub.constants import HF_HUB_CACHE

    repo, root = hub_id(name), Path(folder or HF_HUB_CACHE).expanduser()
    patterns = [*TEXT_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        listing = list_model(repo, revision, weights=weights)
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", None) is not None:
            raise  # the Hub has answered, and the answer was no
        path = _cached(repo, revision, root, patterns, weights=weights)
        if path is None:
            raise
        log.warning("the Hub cannot be asked, so what %s was last is served: %s", repo, type(error).__name__)
        return path
    if any(file.digest is None for file in listing.files):  # a mirror that tells less than the Hub
        path = huggingface_hub.snapshot_download(
            repo, revision=revision, cache_dir=root, allow_patterns=patterns, tqdm_class=_bar_class(report)
        )
        return str(path)
    try:
        return str(cache.fill(listing, root, repo, revision, hub_client(), report, sleep))
    except DamagedError as error:
        raise FatalError(
            Failure(
                FailureCode.WEIGHTS_CORRUPT,
                f"{repo}: {error}, again and again.",
                "nothing of it is served; look at what stands between here and the Hub (proxy, mirror, disk)",
            )
        ) from error


def _cached(repo: str, revision: str | None, root: Path, patterns: list[str], *, weights: bool) -> str | None:
    """What is in the cache of it, when that is whole."""
    import huggingface_hub

    try:
        path: str = huggingface_hub.snapshot_download(
            repo, revision=revision, cache_dir=root, allow_patterns=patterns, local_files_only=True
        )
    except (OSError, ValueError):  # the client's ways of saying that it is not there
        return None
    return path if cache.is_whole(Path(path), weights=weights) else None


def explain(name: str, revision: str | None, error: Exception) -> Failure:
    """What a failed download means to the person who asked for it."""
    kind, detail = {base.__name__ for base in type(error).__mro__}, str(error)[:800]
    where = hub_id(name) + (f" at revision {revision}" if revision else "")
    if "GatedRepoError" in kind:
        page = f"https://huggingface.co/{hub_id(name)}"
        if _has_token():
            fix = f"accept its terms at {page} with the account that HF_TOKEN is of, or set the token of one that has"
        else:
            fix = (
                f"accept its terms at {page}, make a token at https://huggingface.co/settings/tokens, and set HF_TOKEN "
                "to it"
            )
        return Failure(
            FailureCode.MODEL_GATED,
            f"{where} is gated: its owner grants access on request, and {_who()}.",
            fix,
            detail=detail,
        )
    if "OfflineModeIsEnabled" in kind:
        return Failure(
            FailureCode.MODEL_NOT_FOUND,
            f"{where} is not whole in the cache, and HF_HUB_OFFLINE forbids to download it.",
            "unset HF_HUB_OFFLINE, or bring the model into the cache (HF_HOME, --download-dir) first",
            detail=detail,
        )
    if kind & {"RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"}:
        return Failure(
            FailureCode.MODEL_NOT_FOUND,
            f"{where} was not found on the Hugging Face Hub.",
            "check the spelling and --revision; a private model needs HF_TOKEN",
            detail=detail,
        )
    if (status := getattr(getattr(error, "response", None), "status_code", None)) in (401, 403):
        return Failure(
            FailureCode.MODEL_GATED,
            f"The Hugging Face Hub refused access to {where} (HTTP {status}).",
            "set HF_TOKEN to a token of an account with access"
            if not _has_token()
            else "check HF_TOKEN: it is wrong, or of an account without access",
            detail=detail,
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failure(
            FailureCode.DOWNLOAD_FAILED,
            f"The disk is full: {where} could not be stored.",
            "give the cache more space, or point --download-dir (or HF_HOME) to a larger disk",
            detail=detail,
        )
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return Failure(
            FailureCode.DOWNLOAD_FAILED,
            f"{where} could not be stored in the cache: {error.strerror}.",
            "point --download-dir (or HF_HOME) to a folder that this user may write to",
            detail=detail,
        )
    return Failure(
        FailureCode.DOWNLOAD_FAILED,
        f"{where} could not be downloaded from the Hugging Face Hub.",
        "check the network and proxy settings (HTTPS_PROXY, HF_ENDPOINT), or name a local folder",
        detail=f"{type(error).__name__}: {detail}",
    )


def _has_token() -> bool:
    """HF_TOKEN, HUGGING_FACE_HUB_TOKEN, or a login on this machine."""
    import huggingface_hub

    return huggingface_hub.get_token() is not None


def _who() -> str:
    return "the token's account has none" if _has_token() else "no token is set"


def stalled(name: str, seconds: float) -> Failure:
    return Failure(
        FailureCode.DOWNLOAD_STALLED,
        f"The download of {hub_id(name)} received nothing for {seconds:.0f} s.",
        "check the network; what was downloaded is kept, a restart goes on from there",
    )


def _bar_class(report: Report) -> type[Any]:
    """A progress bar that draws nothing and reports: the Hub client's only way to tell how far it is."""
    from tqdm.std import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]  # generic in the type stubs alone
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            self._bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            moved: bool | None = super().update(n)
            if self._bytes:
                report(int(self.n), int(self.total or 0))
            return moved

        def display(self, *args: Any, **options: Any) -> None:
            """Nothing is drawn; the screen has a bar of its own."""

    return Bar
