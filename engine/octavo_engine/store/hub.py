"""The Hugging Face Hub as a source: which files a revision has. Its client knows the endpoint, tokens and proxies."""

from __future__ import annotations

from typing import Any

from octavo_engine.store.listing import Listing, RemoteFile, wanted


def list_model(repo: str, revision: str | None, *, weights: bool) -> Listing:
    """Raises the Hub client's errors."""
    import huggingface_hub
    from huggingface_hub.utils import build_hf_headers

    info = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    siblings: dict[str, Any] = {sibling.rfilename: sibling for sibling in info.siblings or []}

    def file(name: str) -> RemoteFile:
        sibling = siblings[name]
        url = huggingface_hub.hf_hub_url(repo, name, revision=info.sha)
        digest = (
            f"sha256:{sibling.lfs.sha256}" if sibling.lfs else f"git:{sibling.blob_id}" if sibling.blob_id else None
        )
        # Compressed on the way, a file could not be gone on with in its middle.
        return RemoteFile(
            name, int(sibling.size or 0), digest, lambda: (url, {**build_hf_headers(), "Accept-Encoding": "identity"})
        )

    return Listing(f"hf://{repo}", info.sha, tuple(file(name) for name in wanted(siblings, weights=weights)))
