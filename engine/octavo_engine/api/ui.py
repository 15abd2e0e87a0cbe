"""The page at /: one answer with its style and script inside, and the status that it shows. No outside assets.

The page itself is open, as it holds nothing; what it asks for needs the key like any other request.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from octavo_engine.api.board import Board
from octavo_engine.api.metrics import Metrics

FOLDER = Path(__file__).with_name("page")


@cache
def page() -> tuple[str, dict[str, str]]:
    """Its text, and the headers that let a browser run nothing but that text."""
    html, css, script = ((FOLDER / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    html = html.replace("/*CSS*/", css).replace("/*JS*/", script)
    policy = "; ".join(
        [
            "default-src 'none'", f"script-src {_hash(script)}", f"style-src {_hash(css)} 'unsafe-hashes'",
            "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
        ]
    )  # fmt: skip
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return html, headers


def status(board: Board, metrics: Metrics, model: str) -> dict[str, Any]:
    """What the page shows of the engine. Cheap: asked for every second by each page that is open."""
    statusz = board.statusz()
    effective = statusz.effective
    return {
        "model": model,
        "stage": str(statusz.stage),
        "stage_seconds": statusz.stage_seconds,
        "progress": {
            "done_bytes": statusz.progress.done_bytes,
            "total_bytes": statusz.progress.total_bytes,
            "percent": statusz.progress.percent,
            "eta_s": statusz.progress.eta_s,
        },
        "load": {
            "running": statusz.load.running,
            "waiting": statusz.load.waiting,
            "kv_usage": statusz.load.kv_usage,
        },
        "generation_tokens": metrics.generation_tokens,
        "effective": None
        if effective is None
        else {"max_model_len": effective.max_model_len, "dtype": effective.dtype, "gpu": effective.gpu},
        "failure": None if statusz.failure is None else statusz.failure.message,
    }


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
