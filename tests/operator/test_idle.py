"""An operator with nothing to do: it reads, renews its lease, and writes nothing else, however long that lasts.

Its periods are as short as they may be, so that each of them comes round several times here. Longer ones do the same
less often: benchmarks/operator_scale.py --turns idle counts ten minutes of them as installed.
"""

from __future__ import annotations

import time
from collections import Counter

import pytest
from stage import LEASE, Faults, certificate, says, wait_for

from octavo_engine.status import Failure, FailureCode, Stage

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

REST_S = 6.0


def test_at_rest_nothing_is_written_but_the_lease(stage, cluster, start):
    record = cluster.state / "at-rest"
    faults = Faults(cluster, 18230)
    often = {"OCTAVO_RESYNC_SECONDS": "1", "OCTAVO_SETTLED_POLL_SECONDS": "1", "OCTAVO_LOADING_POLL_SECONDS": "0.5"}
    often |= {"OCTAVO_LEASE_SECONDS": "10"}  # renewed every two seconds
    running = start("at-rest", 18150, server=faults.url, **often)
    running.wait_leading()
    stage.serve()
    (pod,) = stage.wait_pods(1)
    stage.up(pod)
    stage.serve("scaled", autoscaling={"maxReplicas": 3})
    (pod,) = stage.wait_pods(1, "scaled")
    stage.up(pod)
    stage.serve("loading")
    (pod,) = stage.wait_pods(1, "loading")
    stage.engines.say(stage.run_pod(pod), says(Stage.LOADING_WEIGHTS, 50, done=1, total=2, eta=60.0))
    stage.serve("sick")
    (pod,) = stage.wait_pods(1, "sick")
    stage.crash_pod(pod, certificate(Failure(FailureCode.KV_CACHE_TOO_SMALL, "Too small.", "")), 41, restarts=3)
    stage.serve("suspended", suspend=True)
    for name in ("qwen", "scaled", "suspended"):
        stage.wait_condition("Progressing", "False", "Settled", name)
    stage.wait_condition("Ready", "False", "LoadingWeights", "loading")
    stage.wait_condition("Ready", "False", "KvCacheTooSmall", "sick")
    time.sleep(2)  # the last events of that
    looks = running.metric("octavo_operator_look_seconds_count")
    faults.do(record=str(record))
    time.sleep(REST_S)

    def requests() -> Counter[str]:
        return Counter(line.partition("?")[0] for line in record.read_text().splitlines())

    def awake() -> bool:
        """Every server was looked at, every kind was listed, and the lease was renewed."""
        looked = running.metric("octavo_operator_look_seconds_count") - looks > 5
        return looked and requests()["GET /api/v1/pods"] >= 2 and requests()[f"PUT {LEASE}"] > 0

    wait_for(awake, "all that it does at rest, which a busy machine makes longer")
    faults.do()
    log = running.log()

    assert {request for request in requests() if not request.startswith("GET ")} == {f"PUT {LEASE}"}
    assert "ERROR" not in log
