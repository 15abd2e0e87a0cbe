"""A short name for a document: equal documents have equal digests, whatever the order of their keys."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:10]
