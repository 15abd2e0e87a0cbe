"""How many replicas a server should have: loads and a clock in, a number with its reason out."""

from __future__ import annotations

from typing import Any

import pytest
from build import server

from octavo_engine.status import Load
from octavo_operator.autoscaling import Autoscaling
from octavo_operator.desired.autoscalers import autoscaler
from octavo_operator.scaling import History, Scaling, scale

IDLE = Load()


def spec(**fields: Any) -> Autoscaling:
    return Autoscaling.model_validate({"minReplicas": 1, "maxReplicas": 8} | fields)


def load(queue_s: float = 0.0, kv: float = 0.0, running: int = 1) -> Load:
    return Load(running=running, kv_usage=kv, predicted_queue_s=queue_s)


def decided(of: Autoscaling, current: int, loads: list[Load], history: History | None = None, at_s: float = 0) -> Any:
    return scale(of, current, loads, history or History(0.0), at_s)


@pytest.mark.parametrize(
    ("loads", "replicas"),
    [
        ([load(queue_s=2.0)], None),
        ([load(queue_s=2.1)], None),  # within the tolerance
        ([load(queue_s=3.0)], 2),
        ([load(queue_s=60.0)], 2),  # at most twice as many in a step
        ([load(queue_s=4.0), load(queue_s=4.0)], 4),
        ([load(queue_s=6.0), load(queue_s=0.0)], 3),  # the mean counts
        ([load(kv=0.99), load(kv=0.99)], 3),
        ([load(running=40), load(running=40)], None),  # it has no target
    ],
)
def test_what_the_engines_say_decides_how_many_more_there_are(loads, replicas):
    found = decided(spec(), len(loads), loads)

    assert (found.replicas if found else None) == replicas


def test_running_requests_count_where_they_have_a_target():
    found = decided(spec(target={"running": 20}), 2, [load(running=40), load(running=40)])

    assert found == Scaling(4, "40 requests run, and 20 should.")


def test_the_reason_names_the_measure_and_its_target():
    assert decided(spec(), 1, [load(queue_s=6.1)]).reason == "A new request would wait 6.1 s, and should 2 s."


def test_replicas_that_start_do_not_answer_a_burst_twice():
    """Two are wanted and one is ready: its queue asks for two, and two there are."""
    assert decided(spec(), 2, [load(queue_s=4.0)]) is None


def test_fewer_come_only_when_fewer_were_enough_for_the_whole_delay():
    of, history = spec(scaleDownDelaySeconds=300), History(0.0)
    quiet, lively = [load(0.5)] * 4, [load(1.5)] * 4

    at = [decided(of, 4, quiet, history, at_s) for at_s in (0, 100, 200)]
    burst = decided(of, 4, lively, history, 250)
    after = [decided(of, 4, quiet, history, at_s) for at_s in (301, 549)]
    then = decided(of, 4, quiet, history, 551)

    assert at == [None, None, None]
    assert burst is None
    assert [one.replicas for one in after] == [3, 3], "the burst asked for three"
    assert then.replicas == 1


def test_a_restarted_operator_scales_down_later_and_never_at_once():
    assert decided(spec(), 8, [IDLE] * 8, History(0.0), 10) is None


def test_the_last_replica_goes_when_nobody_asked_for_long_enough_and_only_where_it_may():
    of = spec(minReplicas=0, scaleDownDelaySeconds=0, idleSeconds=60)
    history = History(0.0)
    busy = decided(of, 1, [load(0.1)], history, 30)
    soon = decided(of, 1, [IDLE], history, 80)
    idle = decided(of, 1, [IDLE], history, 91)
    kept = decided(spec(scaleDownDelaySeconds=0), 1, [IDLE], History(0.0), 1000)

    assert (busy, soon, kept) == (None, None, None)
    assert idle == Scaling(0, "No request came for 60 s.")


def test_the_last_replica_goes_after_idle_seconds_whatever_the_delay_is():
    """It went after both, one after the other: 900 s with the defaults, where idleSeconds said 600."""
    of, history = spec(minReplicas=0, scaleDownDelaySeconds=300, idleSeconds=60), History(0.0)
    one = [decided(of, 1, [IDLE], history, at_s) for at_s in (0, 30, 59, 60)]
    of_two = [decided(of, 2, [IDLE] * 2, History(0.0), at_s) for at_s in (0, 60, 299)]
    later = decided(of, 2, [IDLE] * 2, History(0.0), 300)

    assert one == [None, None, None, Scaling(0, "No request came for 60 s.")]
    assert of_two == [None, None, None], "the second one goes by the delay"
    assert later.replicas == 1


def test_the_last_replica_stays_where_nothing_would_wake_it_again():
    of = spec(minReplicas=0, scaleDownDelaySeconds=0, idleSeconds=60)
    kept = scale(of, 1, [IDLE], History(0.0), 1000, keeps_last=True)
    of_three = scale(of, 3, [IDLE] * 3, History(0.0), 1000, keeps_last=True)

    assert kept is None
    assert of_three is not None
    assert of_three.replicas == 1
    assert scale(of, 0, [], History(0.0), 1000, keeps_last=True) is None, "a person has put it to sleep"


def test_a_held_request_wakes_a_server_and_nothing_else_does():
    of = spec(minReplicas=0)

    assert decided(of, 0, []) is None
    assert scale(of, 0, [], History(0.0), 0.0, asked=True) == Scaling(1, "The activator holds a request for it.")
    assert scale(spec(minReplicas=2), 0, [], History(0.0), 0.0, asked=True) == Scaling(
        2, "autoscaling.minReplicas is 2."
    )


def test_a_woken_server_is_not_sent_to_sleep_before_anybody_could_ask_it():
    """Slept for an hour, loaded for two minutes: nobody asked for longer than idleSeconds in all that time."""
    of, history = spec(minReplicas=0, scaleDownDelaySeconds=0, idleSeconds=60), History(0.0)
    decided(of, 0, [], history, 3600)
    loading = decided(of, 1, [], history, 3720)
    ready = decided(of, 1, [IDLE], history, 3722)
    held = scale(of, 1, [IDLE], history, 3785.0, asked=True)
    idle = decided(of, 1, [IDLE], history, 3846)

    assert (loading, ready, held) == (None, None, None)
    assert idle == Scaling(0, "No request came for 60 s.")


def test_bounds_are_kept_whoever_set_the_replicas():
    assert decided(spec(minReplicas=2), 1, [IDLE]).replicas == 2
    assert decided(spec(maxReplicas=4), 9, [IDLE] * 9).replicas == 4
    assert decided(spec(maxReplicas=4), 4, [load(50.0)] * 4) is None


def test_without_an_answer_nothing_is_known_and_nothing_is_taken_away():
    assert decided(spec(scaleDownDelaySeconds=0), 3, [], History(0.0), 1000) is None


def test_an_hpa_scales_the_server_by_its_engines_metrics():
    found = autoscaler(server(autoscaling={"mode": "HPA", "maxReplicas": 4, "target": {"queueSeconds": 3}}))
    assert found is not None
    metrics = {m["pods"]["metric"]["name"]: m["pods"]["target"]["averageValue"] for m in found["spec"]["metrics"]}

    assert found["spec"]["scaleTargetRef"]["kind"] == "LLMServer"
    assert metrics == {"octavo:predicted_queue_seconds": "3000m", "vllm:kv_cache_usage_perc": "850m"}


def test_keda_asks_prometheus_for_the_servers_own_pods():
    asked = {"mode": "KEDA", "minReplicas": 0, "maxReplicas": 4, "prometheusAddress": "http://prometheus:9090"}
    found = autoscaler(server(autoscaling=asked))
    assert found is not None
    trigger = found["spec"]["triggers"][0]["metadata"]

    assert found["spec"]["minReplicaCount"] == 0
    assert trigger["query"] == 'sum(octavo:predicted_queue_seconds{namespace="default",octavo_dev_server="qwen"})'
    assert trigger["threshold"] == "2"
    behavior = found["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior == {"scaleDown": {"stabilizationWindowSeconds": 300}}


def test_the_built_in_mode_and_a_suspended_server_have_no_autoscaler():
    assert autoscaler(server(autoscaling={"maxReplicas": 4})) is None
    assert autoscaler(server(autoscaling={"mode": "HPA", "maxReplicas": 4}, suspend=True)) is None
