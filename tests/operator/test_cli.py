"""The command: what it prints, what it refuses, and what it does not load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from octavo_operator.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_of_the_operator_loads_torch_and_only_run_loads_kopf():
    code = """
import sys, pkgutil, importlib, octavo_operator.cli
assert "kopf" not in sys.modules and "kubernetes" not in sys.modules, "the command loads the client"
for module in pkgutil.walk_packages(octavo_operator.__path__, "octavo_operator."):
    importlib.import_module(module.name)
print([name for name in ("torch", "transformers", "tokenizers", "numpy", "safetensors") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)

    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_crd_prints_what_is_checked_in(capsys):
    assert main(["crd"]) == 0
    assert capsys.readouterr().out == (ROOT / "crds/llmserver.yaml").read_text()


EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.yaml")) if "kind: LLMServer" in path.read_text()]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_render_prints_the_children_of_an_example(path, capsys):
    assert main(["render", "-f", str(path), "--pod-monitors", "-n", "team"]) == 0
    found = list(yaml.safe_load_all(capsys.readouterr().out))

    assert [body["kind"] for body in found] == ["Deployment", "Service", "PodDisruptionBudget", "PodMonitor"]
    assert {body["metadata"]["namespace"] for body in found} == {"team"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not YAML"),
        ("kind: Pod", "no LLMServer"),
        ("{kind: LLMServer, apiVersion: octavo.dev/v2}", "expected octavo.dev/v1alpha1"),
        ("{kind: LLMServer, apiVersion: octavo.dev/v1alpha1}", "no metadata.name"),
        (
            "{kind: LLMServer, apiVersion: octavo.dev/v1alpha1, metadata: {name: x}, spec: {model: {source: y}}}",
            "x: spec.model: model.source is 'y', expected hf://org/name",
        ),
    ],
)
def test_render_refuses_what_it_cannot_read_in_one_line(text, words, tmp_path, capsys):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(text)
    status = main(["render", "-f", str(manifest)])
    error = capsys.readouterr().err

    assert status == 2
    assert words in error
    assert error.startswith("octavo-operator render: ")


def test_a_pipe_that_is_closed_ends_a_command_without_a_word():
    run = f"set -o pipefail; {sys.executable} -m octavo_operator.cli crd | true"  # more than a pipe holds
    done = subprocess.run(["bash", "-c", run], capture_output=True, text=True, timeout=60)

    assert done.stderr == ""
    assert done.returncode == 141


def test_a_file_that_is_not_text_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "m.yaml").write_bytes(b"a: \xff\xfe")
    status = main(["render", "-f", str(tmp_path / "m.yaml")])

    assert status == 2
    assert "m.yaml is not text in UTF-8: invalid start byte at byte 3" in capsys.readouterr().err


def test_without_a_kubeconfig_doctor_says_where_to_name_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    status = main(["doctor"])

    assert status == 2
    assert "Fix: name a kubeconfig that works in KUBECONFIG" in capsys.readouterr().err


def test_a_file_that_is_not_there_and_a_bad_setting_end_in_one_line(monkeypatch, capsys):
    assert main(["render", "-f", "/no/such/file"]) == 2
    assert "/no/such/file" in capsys.readouterr().err
    monkeypatch.setenv("OCTAVO_LISTEN_PORT", "high")
    assert main(["run"]) == 2
    assert "OCTAVO_LISTEN_PORT: got 'high'" in capsys.readouterr().err
