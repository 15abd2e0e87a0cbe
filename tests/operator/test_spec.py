"""Parsing beyond what the API server can know. The table of good and bad specs is in test_crd.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo_operator.quantity import gib, parse_quantity
from octavo_operator.settings import Settings, SettingsError, from_environment
from octavo_operator.spec import PHRASES, Problem, Server, in_fields, parse

ROOT = Path(__file__).resolve().parents[2]


def problems(**spec: Any) -> str:
    body = {"model": {"source": "hf://org/name"}} | spec
    found = parse({"metadata": {"name": "x", "namespace": "d"}, "spec": body})
    assert isinstance(found, tuple)
    assert all(isinstance(problem, Problem) for problem in found)
    return " ".join(map(str, found))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"hardware": {"gpus": 2}}, ("spec.engine.tensorParallel", "hardware.gpus", "got 2", "one device")),
        ({"engine": {"noSuchField": 1}}, ("spec.engine.noSuchField",)),
        ({"engine": {"maxModelLen": "many"}}, ("spec.engine.maxModelLen", "'many'")),
    ],
)
def test_a_problem_names_the_field_the_value_and_what_would_be_right(spec, words):
    told = problems(**spec)

    assert [word for word in words if word not in told] == [], told


def test_an_engines_advice_is_told_to_whoever_wrote_an_llmserver():
    """The phrases are the engine's own: one that it no longer says would be translated for nobody."""
    said = " ".join(path.read_text() for path in (ROOT / "engine/octavo_engine").rglob("*.py"))

    for theirs in PHRASES:
        assert theirs in said
    assert "or use another source, such as hf://" in in_fields("check the path, or write an id like Qwen/Qwen3-8B")


def test_an_engines_variables_are_told_as_fields_too():
    fix = "accept its terms, make a token, and set HF_TOKEN; check AWS_ACCESS_KEY_ID and AWS_REGION"

    assert in_fields(fix) == (
        "accept its terms, make a token, and set spec.model.tokenSecretRef; check AWS_ACCESS_KEY_ID and "
        "spec.model.s3.region"
    )


def test_an_engines_words_are_told_in_the_fields_of_the_resource():
    assert in_fields("set --max-model-len <= 9216 or raise --kv-cache-memory-bytes; see --seed") == (
        "set spec.engine.maxModelLen <= 9216 or raise spec.engine.kvCacheMemory; see --seed"
    )


@pytest.mark.parametrize(
    ("text", "amount"), [("1", 1), ("1.5Gi", 1610612736), ("500m", 0.5), ("2k", 2000), (3, 3), ("1Ei", 2**60)]
)
def test_amounts_are_read_as_kubernetes_writes_them(text, amount):
    assert parse_quantity(text) == amount


@pytest.mark.parametrize("text", ["", "x", "-1", "1 Gi", "1GiB", "1e3", "Gi"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(ValueError, match="not a quantity"):
        parse_quantity(text)


@pytest.mark.parametrize(("count", "text"), [(0, "0.0 MiB"), (538 * 2**20, "538.0 MiB"), (15231233024, "14.2 GiB")])
def test_amounts_of_memory_are_told_as_people_compare_them(count, text):
    assert gib(count) == text


def test_settings_come_from_the_variables_that_the_chart_sets():
    environ = {
        "OCTAVO_ENGINE_IMAGE": "r/e:1",
        "OCTAVO_ENGINE_IMAGE_PULL_POLICY": "Never",
        "OCTAVO_ENGINE_IMAGE_PULL_SECRETS": "a, b",
        "OCTAVO_WATCH_NAMESPACES": "x,y",
        "OCTAVO_NAMESPACE": "system",
        "OCTAVO_IDENTITY": "pod-1",
        "OCTAVO_LISTEN_PORT": "1234",
        "OCTAVO_LOG_LEVEL": "debug",
        "OCTAVO_LEASE_SECONDS": "30",
    }
    found = from_environment(environ)

    assert (found.engine.image, found.engine.pull_policy, found.engine.pull_secrets) == ("r/e:1", "Never", ("a", "b"))
    assert found.watch_namespaces == ("x", "y")
    assert (found.namespace, found.identity, found.listen_port, found.lease_seconds) == ("system", "pod-1", 1234, 30)
    assert from_environment({"OCTAVO_WATCH_NAMESPACES": "", "OCTAVO_IDENTITY": "i"}).watch_namespaces == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OCTAVO_LISTEN_PORT", "70000"),
        ("OCTAVO_LISTEN_PORT", "http"),
        ("OCTAVO_LEASE_SECONDS", "1"),
        ("OCTAVO_LOG_LEVEL", "loud"),
        ("OCTAVO_ENGINE_IMAGE_PULL_POLICY", "Sometimes"),
    ],
)
def test_a_setting_outside_its_range_is_refused_by_name(name, value):
    with pytest.raises(SettingsError, match=rf"{name}: got '{value}', expected"):
        from_environment({name: value})


def test_the_statuses_time_behind_the_engine_is_below_two_seconds():
    settings = Settings()

    assert settings.loading_poll_s + settings.statusz_timeout_s <= 2


L4 = {
    "gpus": 2,
    "image": "r/engine:l4",
    "nodeSelector": {"gpu": "l4", "pool": "a"},
    "tolerations": [{"key": "l4", "operator": "Exists"}],
    "resources": {"requests": {"cpu": 4, "memory": "8Gi"}},
}


def test_a_profile_holds_where_the_server_says_nothing():
    spec = {
        "model": {"source": "hf://org/name"},
        "hardware": {"profile": "l4", "gpus": 0, "nodeSelector": {"pool": "b"}, "resources": {"requests": {"cpu": 1}}},
    }
    found = parse({"metadata": {"name": "x"}, "spec": spec}, {"l4": L4})

    assert isinstance(found, Server)
    assert found.spec.hardware.gpus == 0
    assert found.spec.hardware.node_selector == {"gpu": "l4", "pool": "b"}
    assert found.spec.hardware.resources.requests == {"cpu": 1, "memory": "8Gi"}
    assert [t.key for t in found.spec.hardware.tolerations] == ["l4"]
    assert found.spec.engine.image == "r/engine:l4"


def test_an_unknown_profile_is_a_problem_that_names_the_known_ones():
    spec = {"model": {"source": "hf://org/name"}, "hardware": {"profile": "h100"}}

    assert "the operator knows a10, l4" in str(parse({"metadata": {"name": "x"}, "spec": spec}, {"l4": {}, "a10": {}}))
    assert "has no profiles" in str(parse({"metadata": {"name": "x"}, "spec": spec}))


def test_profiles_are_read_from_the_settings_and_a_wrong_one_is_named():
    good = from_environment({"OCTAVO_ENGINE_PROFILES": json.dumps({"l4": L4})})

    assert good.engine.profiles == {"l4": L4}
    for text, words in (
        ("{", "no JSON"),
        ("[]", "object of objects"),
        ('{"l4": {"gpu": 1}}', "profile l4: gpu: there is no such field"),
        ('{"l4": {"gpus": -1}}', "profile l4: gpus"),
        ('{"l4": {"profile": "l4"}}', "names no other"),
    ):
        with pytest.raises(SettingsError, match=words):
            from_environment({"OCTAVO_ENGINE_PROFILES": text})
