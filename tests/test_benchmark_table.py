"""benchmarks/table.py: every promise has its line, one without a figure is not kept, and no result is lost."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RECORDED = BENCHMARKS / "results" / "h200-2026-11-28.json"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("table", monkeypatch)


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    monkeypatch.setattr(sys, "path", list(sys.path))  # served.py adds its folder
    spec.loader.exec_module(module)
    return module


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORDED.read_text())
    return found


def test_every_promise_has_a_line_whatever_was_measured(table):
    names = [promise.name for promise in table.promises(recorded())]
    nothing = list(table.promises({"gpu": {}, "served": {}, "startup": {}}))

    assert len(names) == len(set(names)) == 22
    assert [promise.name for promise in nothing] == names
    assert not any(promise.holds for promise in nothing)
    assert all("MISSED" in str(promise) and "no figure" in str(promise) for promise in nothing)


def test_figures_come_from_their_places(table):
    found = recorded()
    found["gpu"]["decode"]["8"]["of_floor"] = 0.5
    found["served"]["poisson"]["gap_ms"][1] = 12.3
    found["startup"]["runs"] = [{"ready_s": 9.0}, {"ready_s": 7.5}]
    del found["gpu"]["prefill_attention"]["16384"]
    lines = {promise.name: promise for promise in table.promises(found)}

    assert lines["time per output token at batch 8, of the floor"].value == 0.5
    assert not lines["time per output token at batch 8, of the floor"].holds
    assert lines["15 requests/s, gap p99, ms"].holds
    assert lines["start to ready, s"].value == 7.5
    assert lines["prefill attention, 16384 tokens, of cuDNN's"].value is None
    assert (
        lines["prefill attention, 8192 tokens, of cuDNN's"].value
        == found["gpu"]["prefill_attention"]["8192"]["of_cudnn"]
    )


def test_kernels_compiled_after_ready_have_a_line_in_results_of_both_forms(table, monkeypatch, capsys):
    """The promise is 0 in every benchmark, and the table did not look."""
    old = BENCHMARKS / "results" / "h200-2026-11-30.json"
    monkeypatch.setattr(sys, "argv", ["table.py", "--read", str(old)])

    table.main()

    shown = capsys.readouterr().out
    assert re.search(r"^holds  kernels compiled after ready +0\.000   must <= 0$", shown, re.MULTILINE)
    assert "22 of 22 hold" in shown

    metric = 'octavo:kernel_compilations_total{engine="0",model_name="m 1"} 3.0'
    number = script("served", monkeypatch).compilations(f"# HELP octavo:kernel_compilations\n{metric}\nother 7.0\n")
    for form in (metric, number):
        *_, line = table.promises({"served": {"kernel_compilations": form}})
        assert (line.name, line.value, line.holds) == ("kernels compiled after ready", 3.0, False)


def test_a_part_that_was_not_asked_for_has_no_lines(table):
    assert [promise.name for promise in table.promises({"startup": {}})] == ["start to ready, s"]


PART = """
import json, pathlib, sys
pathlib.Path(sys.argv[2]).write_text(json.dumps({"of": __file__}))
sys.exit(STATUS)
"""


def test_what_a_part_wrote_before_it_failed_is_kept_and_the_others_run(table, tmp_path, monkeypatch, capfd):
    for name, text in (("gpu.py", PART.replace("STATUS", "3")), ("served.py", "1 / 0"), ("startup.py", PART)):
        (tmp_path / name).write_text(text.replace("STATUS", "0"))
    monkeypatch.setattr(table, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(sys, "argv", ["table.py"])
    monkeypatch.setattr(table, "device_name", lambda: "NVIDIA H200")

    table.main()

    (file,) = (tmp_path / "results").iterdir()
    assert re.fullmatch(r"h200-\d{4}-\d\d-\d\d\.json", file.name)
    found = json.loads(file.read_text())
    assert Path(found["gpu"]["of"]).name == "gpu.py"
    assert found["served"] == {}
    assert Path(found["startup"]["of"]).name == "startup.py"
    assert found["date"] in file.name
    shown = capfd.readouterr().out
    assert "gpu ended with 3" in shown
    assert "0 of 22 hold" in shown


def test_a_result_is_written_beside_those_of_the_same_day(table, tmp_path):
    (tmp_path / "h100-2026-11-28.json").touch()

    assert table.result_file(tmp_path, "NVIDIA H100 80GB HBM3", "2026-11-28").name == "h100-2026-11-28-2.json"
    assert table.result_file(tmp_path, "NVIDIA H200", "2026-11-28").name == "h200-2026-11-28.json"
    assert table.result_file(tmp_path, "", "2026-11-28").name == "gpu-2026-11-28.json"
