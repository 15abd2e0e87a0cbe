"""Processes that compile kernels beside an engine's start: how many, and what becomes of it where they fail."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
import triton

from octavo_engine.kernels.gpu import prebuilt
from octavo_engine.runner import compile_beside as beside

GIB = 2**30


@pytest.mark.parametrize(
    ("cpus", "free", "processes"),
    [(16, 200 * GIB, 16), (96, 200 * GIB, 16), (4, 7 * GIB, 3), (8, GIB, 0), (2, 200 * GIB, 0)],
)
def test_there_are_as_many_as_cores_and_half_of_the_memory_allow(cpus, free, processes):
    assert beside.num_processes(cpus, free) == processes


@pytest.mark.parametrize(("architecture", "processes"), [(None, 8), ("sm_90", 0)])
def test_nothing_is_started_where_it_would_be_no_help(monkeypatch, tmp_path, architecture, processes):
    monkeypatch.setattr(beside.sys, "executable", "/nowhere")

    beside.compile_beside(tmp_path, architecture, 64, "bfloat16", processes)


@pytest.mark.parametrize(
    ("script", "told"),
    [("exit 3", "2 of 2 processes that compile kernels failed, with [3, 3]"), ("exec sleep 60", "one by one")],
)
def test_a_start_goes_on_where_they_fail_or_hang(monkeypatch, tmp_path, caplog, script, told):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(beside.sys, "executable", str(program))
    monkeypatch.setattr(beside, "LIMIT_S", 0.5)

    began = time.monotonic()
    with caplog.at_level(logging.INFO, "octavo.engine"):
        beside.compile_beside(tmp_path, "sm_90", 64, "bfloat16", 2)

    assert told in caplog.text
    assert time.monotonic() - began < 30


def test_a_python_that_is_not_there_is_told_of(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(beside.sys, "executable", str(tmp_path / "none"))

    beside.compile_beside(tmp_path, "sm_90", 64, "bfloat16", 2)

    assert "one by one" in caplog.text


def test_they_get_nothing_of_the_servers_settings_and_no_device(monkeypatch, tmp_path):
    program, seen = tmp_path / "python", tmp_path / "seen"
    program.write_text(f'#!/bin/sh\nshift 2\nfor last; do :; done\n(echo "$@"; env) > {seen}.${{last%%/*}}\n')
    program.chmod(0o755)
    monkeypatch.setattr(beside.sys, "executable", str(program))
    monkeypatch.setenv("OCTAVO_PORT", "1")
    monkeypatch.setenv("VLLM_PORT", "2")
    monkeypatch.setenv(prebuilt.ENVIRONMENT, "/kernels")
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "cache")
        beside.compile_beside(tmp_path / "model", "sm_90", 32, "float16", 2)

    for number in (0, 1):
        told = (tmp_path / f"seen.{number}").read_text()
        assert told.startswith(
            f"compile-kernels {tmp_path}/model --architecture sm_90 --output {tmp_path}/cache "
            f"--block-size 32 --dtype float16 --share {number}/2\n"
        )
        assert "CUDA_VISIBLE_DEVICES=\n" in told
        assert f"{prebuilt.ENVIRONMENT}=/kernels\n" in told
        assert "OCTAVO_PORT" not in told
        assert "VLLM_PORT" not in told


def test_they_are_called_for_once_and_when_more_than_a_few_kernels_are_in_no_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(triton.knobs.cache, "manager_class", None)
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    calls = []

    def fill() -> None:
        calls.append(None)
        there = prebuilt.KernelCache("there")
        there.put_group("k.json", {"k.json": there.put("{}", "k.json")})

    def found(name: str) -> bool:
        return prebuilt.KernelCache(name).get_group("k.json") is not None

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        prebuilt.use()
        with prebuilt.filling(fill):
            assert not any(found(f"few {number}") for number in range(prebuilt.FEW))
            assert not calls
            assert found("there")
            assert not found("missing")
        with prebuilt.filling(fill):
            pass
        assert not any(found(f"late {number}") for number in range(2 * prebuilt.FEW))

    assert len(calls) == 1


@pytest.mark.parametrize(("capability", "architecture"), [((9, 0), "sm_90"), ((8, 9), "sm_89"), ((7, 5), None)])
def test_the_device_says_what_they_compile_for(monkeypatch, capability, architecture):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    assert beside.architecture_of(torch.device("cuda")) == architecture


ENGINE = """
import os, signal, subprocess, sys
from octavo_engine.runner import compile_beside

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
helper = compile_beside.HELPER.replace("from octavo_engine.cli import main", "import time; time.sleep(100)")
process = subprocess.Popen([sys.executable, "-c", helper], **compile_beside.PIPES)
print(process.pid, flush=True)
sys.stdin.readline()
os._exit(0)
"""


def test_they_end_with_the_engine_that_ignores_signals():
    engine = subprocess.Popen([sys.executable, "-c", ENGINE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    helper = int(engine.stdout.readline())
    os.kill(helper, 0)

    engine.communicate("end\n", timeout=60)

    until = time.monotonic() + 60
    while time.monotonic() < until and is_running(helper):
        time.sleep(0.05)
    assert not is_running(helper)


def is_running(pid: int) -> bool:
    """A process that has ended and that nobody waited for is no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
