"""Each alert, by promtool: a story in which it fires and one in which it stays quiet. And names that exist."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "octavo"
RULES = CHART / "files" / "rules.yaml"

SERVER = 'namespace="ml", server="qwen"'
ENGINE = 'namespace="ml", model_name="qwen", pod="qwen-1", instance="i", engine="0"'
OTHER = 'namespace="ml", model_name="qwen", pod="qwen-2", instance="j", engine="0"'
FOR_LONG = 180
"""Minutes of each story; samples come once a minute."""


def ready(value: int, reason: str) -> dict[str, str]:
    return {f'octavo_server_condition{{{SERVER}, type="Ready", reason="{reason}"}}': f"{value}x{FOR_LONG}"}


def condition(kind: str, value: int, reason: str = "x") -> dict[str, str]:
    return {f'octavo_server_condition{{{SERVER}, type="{kind}", reason="{reason}"}}': f"{value}x{FOR_LONG}"}


def replicas(desired: int, ready: int, updated: int) -> dict[str, str]:
    counts = {"desired": desired, "ready": ready, "updated": updated}
    return {f'octavo_server_replicas{{{SERVER}, state="{s}"}}': f"{n}x{FOR_LONG}" for s, n in counts.items()}


def gauge(name: str, value: float, labels: str = ENGINE) -> dict[str, str]:
    return {f"{name}{{{labels}}}": f"{value}x{FOR_LONG}"}


def grows(name: str, a_minute: float, labels: str = ENGINE) -> dict[str, str]:
    return {f"{name}{{{labels}}}": f"0+{a_minute}x{FOR_LONG}"}


def slow(name: str, labels: str, below: dict[str, float]) -> dict[str, str]:
    """A histogram: observations a minute up to each bound."""
    joined = f"{labels}, " if labels else ""
    return {f'{name}_bucket{{{joined}le="{bound}"}}': f"0+{n}x{FOR_LONG}" for bound, n in below.items()}


@dataclass(frozen=True)
class Story:
    fires: dict[str, str]
    quiet: dict[str, str]
    labels: dict[str, str]


OF_SERVER = {"namespace": "ml", "server": "qwen"}
OF_MODEL = {"namespace": "ml", "model_name": "qwen"}
STORIES = {
    # The reason changes in the middle, which must not begin the time anew.
    "OctavoServerNotReady": Story(
        {
            f'octavo_server_condition{{{SERVER}, type="Ready", reason="InsufficientGPU"}}': f"0x10 _x{FOR_LONG}",
            f'octavo_server_condition{{{SERVER}, type="Ready", reason="ImagePull"}}': f"_x10 0x{FOR_LONG}",
        },
        ready(0, "Suspended"),
        OF_SERVER,
    ),
    "OctavoServerDegraded": Story(replicas(3, 2, 3), replicas(3, 3, 3), OF_SERVER),
    "OctavoServerDoesNotFit": Story(condition("Fits", 0), condition("Fits", 1), OF_SERVER),
    "OctavoModelNotCached": Story(condition("ModelCached", 0), condition("ModelCached", 1), OF_SERVER),
    "OctavoRolloutStuck": Story(
        replicas(3, 3, 1) | condition("Progressing", 1, "RollingOut"),
        replicas(3, 1, 1) | condition("Progressing", 1, "Starting"),
        OF_SERVER,
    ),
    "OctavoQueueLong": Story(
        gauge("octavo:predicted_queue_seconds", 30) | gauge("octavo:predicted_queue_seconds", 20, OTHER),
        # One replica has room: the router's business, not one of more replicas.
        gauge("octavo:predicted_queue_seconds", 30) | gauge("octavo:predicted_queue_seconds", 1, OTHER),
        OF_MODEL,
    ),
    "OctavoKvCacheFull": Story(
        gauge("vllm:kv_cache_usage_perc", 0.99), gauge("vllm:kv_cache_usage_perc", 0.9), OF_MODEL
    ),
    "OctavoPreemptions": Story(
        grows("vllm:num_preemptions_total", 60), grows("vllm:num_preemptions_total", 1), OF_MODEL
    ),
    "OctavoFirstTokenSlow": Story(
        slow("vllm:time_to_first_token_seconds", ENGINE, {"10": 60, "20": 100, "+Inf": 100}),
        slow("vllm:time_to_first_token_seconds", ENGINE, {"10": 100, "20": 100, "+Inf": 100}),
        OF_MODEL,
    ),
    "OctavoRequestsAborted": Story(
        grows("vllm:request_success_total", 50, f'{ENGINE}, finished_reason="abort"')
        | grows("vllm:request_success_total", 50, f'{ENGINE}, finished_reason="stop"'),
        grows("vllm:request_success_total", 5, f'{ENGINE}, finished_reason="abort"')
        | grows("vllm:request_success_total", 95, f'{ENGINE}, finished_reason="stop"'),
        OF_MODEL,
    ),
    "OctavoEngineStuck": Story(
        gauge("vllm:num_requests_running", 3) | gauge("octavo:steps_total", 7),
        gauge("vllm:num_requests_running", 0) | gauge("octavo:steps_total", 7)
        | gauge("vllm:num_requests_running", 3, OTHER) | grows("octavo:steps_total", 60, OTHER),
        {**OF_MODEL, "pod": "qwen-1", "instance": "i", "engine": "0"},
    ),
    "OctavoServerDoesNotWake": Story(
        gauge("octavo_activator_held_requests", 2, 'server="ml/qwen", pod="a"'),
        {'octavo_activator_held_requests{server="ml/qwen", pod="a"}': f"2x10 _x{FOR_LONG}"},
        {"server": "ml/qwen"},
    ),
    "OctavoActivatorFull": Story(
        grows("octavo_activator_requests_total", 6, 'pod="a", outcome="refused"'),
        grows("octavo_activator_requests_total", 600, 'pod="a", outcome="forwarded"'),
        {},
    ),
    "OctavoOperatorAbsent": Story({}, gauge("octavo_operator_leader", 1, 'pod="a"'), {}),
    "OctavoOperatorTwoLeaders": Story(
        gauge("octavo_operator_leader", 1, 'pod="a"') | gauge("octavo_operator_leader", 1, 'pod="b"'),
        gauge("octavo_operator_leader", 1, 'pod="a"') | gauge("octavo_operator_leader", 0, 'pod="b"'),
        {},
    ),
    "OctavoOperatorErrors": Story(
        grows("octavo_operator_look_errors_total", 60, 'pod="a"'),
        grows("octavo_operator_look_errors_total", 1, 'pod="a"'),
        {},
    ),
    "OctavoOperatorRefused": Story(
        grows("octavo_operator_api_requests_total", 6, 'verb="apply", kind="Service", code="403"'),
        grows("octavo_operator_api_requests_total", 6, 'verb="apply", kind="Service", code="409"'),
        {"verb": "apply", "kind": "Service"},
    ),
    "OctavoOperatorBehind": Story(
        gauge("octavo_operator_queue_length", 3, 'pod="a"') | gauge("octavo_operator_queue_length", 0, 'pod="b"'),
        # As many are due in a burst, and are looked at before the next minute.
        {'octavo_operator_queue_length{pod="a"}': "500 0 0 500 0 0" + " 0 0 500" * (FOR_LONG // 3)},
        {},
    ),
    "OctavoOperatorSlow": Story(
        slow("octavo_operator_look_seconds", "", {"5": 60, "15": 100, "+Inf": 100}),
        slow("octavo_operator_look_seconds", "", {"5": 100, "15": 100, "+Inf": 100}),
        {},
    ),
}  # fmt: skip


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_every_alert_has_its_stories_and_says_what_to_do():
    assert {rule["alert"] for rule in rules()} == set(STORIES)
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert len(rule["annotations"]["description"]) > 40
        assert rule["annotations"]["summary"].endswith(".")


def test_the_rules_are_rules(promtool):
    done = subprocess.run([promtool, "check", "rules", str(RULES)], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", STORIES)
@pytest.mark.parametrize("fires", [True, False], ids=["fires", "quiet"])
def test_an_alert_fires_in_its_story_and_in_no_other(promtool, tmp_path, alert, fires):
    story = STORIES[alert]
    rule = next(rule for rule in rules() if rule["alert"] == alert)
    series = [{"series": name, "values": values} for name, values in (story.fires if fires else story.quiet).items()]
    expected = [{"exp_labels": {**rule["labels"], **story.labels}}] if fires else []
    only = {"groups": [{"name": "one", "rules": [{k: v for k, v in rule.items() if k != "annotations"}]}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(only))
    case = {"alertname": alert, "eval_time": "90m", "exp_alerts": expected}
    (tmp_path / "test.yaml").write_text(
        yaml.safe_dump(
            {
                "rule_files": ["rules.yaml"],
                "evaluation_interval": "1m",
                "tests": [{"interval": "1m", "input_series": series, "alert_rule_test": [case]}],
            }
        )
    )
    done = subprocess.run([promtool, "test", "rules", str(tmp_path / "test.yaml")], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr


def boards() -> Any:
    spec = importlib.util.spec_from_file_location("dashboards", ROOT / "helm/dashboards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["servers", "operator"])
def test_the_charts_boards_are_the_written_ones(name):
    assert (CHART / f"files/dashboards/{name}.json").read_text() == boards().text(name), "run `make dashboards`"


def test_panels_lie_beside_each_other_and_every_one_says_what_it_shows():
    for board in boards().BOARDS.values():
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            place = panel["gridPos"]
            cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                     for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
            assert not cells & taken
            assert place["x"] + place["w"] <= 24
            taken |= cells
            assert panel["type"] == "row" or panel["description"]


NAME = re.compile(r"\b(?:vllm:|octavo:|octavo_)[a-z0-9_]+")


def test_alerts_and_boards_name_metrics_that_there_are():
    """Those of the engine and the operator, as their code writes them down; a histogram has three names."""
    operator = ROOT / "operator/octavo_operator"
    sources = [
        *(ROOT / "engine/octavo_engine/api/metrics.py", operator / "metrics.py", operator / "activator/metrics.py")
    ]
    known: set[str] = set()
    for name in {n for source in sources for n in re.findall(r'"((?:vllm:|octavo)[a-z0-9_:]+)"', source.read_text())}:
        known |= {name, f"{name}_total", f"{name}_bucket", f"{name}_count", f"{name}_sum"}
    known |= {f"vllm:prefix_cache_{what}_total" for what in ("queries", "hits")}
    used = set(NAME.findall(RULES.read_text())) | set(NAME.findall(json.dumps(boards().BOARDS)))

    assert used - known == set()


def test_the_operators_board_shows_everything_that_it_measures():
    operator = ROOT / "operator/octavo_operator"
    source = (operator / "metrics.py").read_text() + (operator / "activator/metrics.py").read_text()
    measured = set(re.findall(r'"(octavo_(?:operator|activator)_[a-z_]+)"', source))
    shown = json.dumps(boards().BOARDS["operator"])

    assert len(measured) == 12
    assert [name for name in measured if name not in shown] == []


@pytest.mark.parametrize("name", ["servers", "operator"])
def test_a_boards_expressions_can_be_parsed(promtool, tmp_path, name):
    rules = [
        # A board's variables are Grafana's; any duration and any text do for the parser.
        {"record": f"x{number}", "expr": target["expr"].replace("$__rate_interval", "5m")}
        for number, target in enumerate(t for p in boards().BOARDS[name]["panels"] for t in p.get("targets", []))
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", str(tmp_path / "rules.yaml")], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
