"""Manifests in the documents are what the parser takes, and counts are counted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from octavo_operator.spec import Server, parse

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```ya?ml\n(.*?)^```", re.S | re.M)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_server_in_a_document_can_be_served(path):
    for text in BLOCK.findall(path.read_text()):
        for document in yaml.safe_load_all(text):
            if isinstance(document, dict) and document.get("kind") == "LLMServer":
                found = parse(document)
                assert isinstance(found, Server), found
                assert found.without_effect == ()


def test_lines_side_by_side_are_counted_as_they_stand():
    text = (ROOT / "docs/side-by-side.md").read_text()
    counted = [
        sum(bool(line.strip()) and not line.strip().startswith("#") for line in block.splitlines())
        for block in BLOCK.findall(text)
    ]
    (row,) = re.findall(r"^\| lines \| (\d+) \| (\d+) \| (\d+) \|", text, re.M)

    assert counted == [int(count) for count in row]
