"""Fixtures of the API process's tests: tokenizers and a server with a scripted engine behind it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Path:
    """The folder of a real checkpoint; only its tokenizer files are read here."""
    import models

    return models.smollm2()
