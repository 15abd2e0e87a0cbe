"""Stages, failures and the /statusz document: what the two halves of Octavo agree on."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from octavo_engine.status import (
    TERMINATION_LOG_MAX_BYTES,
    Effective,
    ExitStatus,
    Failure,
    FailureCode,
    FatalError,
    Load,
    Progress,
    Stage,
    Statusz,
)

README = Path(__file__).resolve().parents[2] / "README.md"


def test_every_failure_has_an_exit_status_of_its_own_and_none_is_0():
    statuses = [code.exit_status for code in FailureCode]

    assert len(set(statuses)) == len(statuses)
    assert {ExitStatus.OK, *statuses} == set(ExitStatus)
    for status in statuses:
        assert status not in (0, 1, 255)
        assert not 126 <= status <= 165, "shells and signals use these"


def test_the_readme_lists_the_exit_statuses_as_they_are():
    rows = re.findall(r"\| (\d+) \| ([A-Z_]+)(?= )", README.read_text())

    assert {(int(status), code) for status, code in rows} == {(int(c.exit_status), str(c)) for c in FailureCode}


FULL = Failure(FailureCode.KV_CACHE_TOO_SMALL, "It is too small.", "set it lower", "2 GiB", "1 GiB", "more")


@pytest.mark.parametrize("failure", [FULL, Failure(FailureCode.PORT_IN_USE, "Port 80 is in use.")])
def test_a_certificate_is_read_as_it_was_written(failure: Failure):
    assert Failure.from_json(failure.to_json()) == failure


def test_a_certificate_names_what_is_there_and_leaves_out_what_is_not():
    document = json.loads(Failure(FailureCode.PORT_IN_USE, "Port 80 is in use.", "take another").to_json())

    assert document == {"code": "PORT_IN_USE", "message": "Port 80 is in use.", "fix": "take another"}


@pytest.mark.parametrize("text", ["x", "ü", "漢", "\U0001f600", '"', "\n", "\udcff"])
@pytest.mark.parametrize("field", ["message", "fix", "need", "have", "detail", "all"])
def test_a_certificate_fits_the_termination_log_and_can_be_read_whatever_it_says(field: str, text: str):
    """Non-ASCII texts used to be cut in the middle of the JSON, and a path that is not UTF-8 could not be written."""
    names = ["message", "fix", "need", "have", "detail"] if field == "all" else [field]
    failure = dataclasses.replace(FULL, **dict.fromkeys(names, text * 10000))
    certificate = failure.to_json()
    read = Failure.from_json(certificate)

    assert len(certificate.encode()) <= TERMINATION_LOG_MAX_BYTES
    assert read is not None
    assert read.code is FULL.code
    for name in names:
        assert getattr(read, name)
    if field == "detail":
        assert (read.message, read.fix) == (FULL.message, FULL.fix)


@pytest.mark.parametrize(
    "text", ["", "Error: out of memory", "[]", "3", "null", '{"code": "NEW", "message": ""}', "{}"]
)
def test_what_is_no_certificate_is_not_mistaken_for_one(text: str):
    assert Failure.from_json(text) is None


def test_a_failure_reads_as_what_is_wrong_and_how_to_mend_it():
    assert str(FULL) == "It is too small. Fix: set it lower"
    assert str(Failure(FailureCode.ENGINE_DIED, "It died.")) == "It died."
    assert str(FatalError(FULL)) == str(FULL)


STATUSZ = Statusz(
    stage=Stage.READY,
    stage_seconds={"starting": 1.5, "ready": 2.0},
    progress=Progress(5, 10, 50.0, 2.5),
    effective=Effective(model="m", dtype="bfloat16", max_model_len=4096, num_blocks=7, kv_tokens=448),
    load=Load(1, 2, 3, 0.5, 1.0, 0.1),
    failure=FULL,
)


@pytest.mark.parametrize("status", [STATUSZ, Statusz(Stage.STARTING)])
def test_a_status_document_is_read_as_it_was_written(status: Statusz):
    assert Statusz.from_dict(json.loads(json.dumps(status.to_dict()))) == status


def test_another_versions_document_is_read_as_far_as_it_is_known():
    document = STATUSZ.to_dict()
    document["load"]["new"] = 1
    document["effective"]["new"] = {"a": 1}
    document["new"] = []
    del document["load"]["waiting"]
    read = Statusz.from_dict(document)

    assert read.load == dataclasses.replace(STATUSZ.load, waiting=0)
    assert read.effective == STATUSZ.effective


@pytest.mark.parametrize("document", [{}, {"stage": "sleeping"}, {"stage": None}])
def test_a_document_without_a_known_stage_is_refused(document: dict[str, object]):
    with pytest.raises(ValueError, match="not a valid Stage"):
        Statusz.from_dict(document)
