"""Two versions of the operator, one after the other, over the same servers: which pods are made anew by that?

    python tests/operator/two_versions.py COMMIT                  # COMMIT, then this checkout, then COMMIT again
    python tests/operator/two_versions.py COMMIT --write FILE     # and keep what COMMIT wrote, for test_upgrade.py

Run by hand, as a clone in CI may not reach that far back. Each version runs as a process with its own chart's rights
against a real API server with staged nodes, and its CRD is applied before, as `helm upgrade` does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("engine", "operator", "tests", "tests/operator", "tests/cluster")]

from stage import Api, Engines, Operator, Stage, chart, define, wait_for  # noqa: E402 -- the path above leads to it

from cluster import Cluster  # noqa: E402

SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "replicated": {"replicas": 2, "engine": {"maxModelLen": 2048, "dtype": "bfloat16", "args": ["--seed=1"]}},
    "idle": {"rollout": {"waitForIdle": True, "idleTimeoutSeconds": 600}, "lifecycle": {"drainTimeoutSeconds": 60}},
    "sidecar": {"podTemplate": {"spec": {"containers": [{"name": "sidecar", "image": "x"}]}}},
}
NODE = {"octavo.dev/versions": "yes"}
# What a version makes of them, by its own code: applied under our field manager, with a digest of it as annotation.
APPLIED = """
import json, sys
from octavo_operator.changes import with_digest
from octavo_operator.desired import objects
from octavo_operator.settings import EngineDefaults
from octavo_operator.spec import parse
servers = json.load(sys.stdin)
made = {one["metadata"]["name"]: objects(parse(one), EngineDefaults(), pod_monitors_known=False) for one in servers}
print(json.dumps({name: [with_digest(body) for body in bodies] for name, bodies in made.items()}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commit", help="the older version")
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep what it wrote")
    asked = parser.parse_args()
    cluster = Cluster("octavo-versions")
    with tempfile.TemporaryDirectory() as folder:
        older = Path(folder, "older")
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", older, asked.commit], check=True)
        cluster.down()
        cluster.up()
        try:
            return compare(cluster, older, asked.commit, asked.write)
        finally:
            cluster.down()
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", older], check=True)


def compare(cluster: Cluster, older: Path, commit: str, write: Path | None) -> int:
    api = Api(cluster)
    restarted = 0
    with contextlib.ExitStack() as kubelets:
        stage = None
        before: dict[str, Any] = {}
        for number, (name, root) in enumerate((("older", older), ("newer", ROOT), ("older again", older))):
            documents = chart("octavo", "crd", "rbac", "serviceaccount", root=root)
            define(cluster, documents)
            if stage is None:
                stage = Stage(api, Engines(cluster))
                api.merge(f"/api/v1/nodes/{stage.node}", {"metadata": {"labels": NODE}})
                for server, spec in SPECS.items():
                    stage.serve(server, **spec, hardware={"nodeSelector": NODE})
                    kubelets.enter_context(stage.kubelet(server))
            path = f"{root}/engine:{root}/operator"
            operator = Operator(
                cluster, f"version-{number}", 18500 + number, PYTHONPATH=path, OCTAVO_SETTLED_POLL_SECONDS="1"
            )
            try:
                operator.wait_leading(60)
                settle(stage)
                time.sleep(5)  # several looks at each
                after = world(stage)
                if before:
                    restarted += tell(name, before, after)
                elif write is not None:
                    write.write_text(json.dumps(written(stage, older, commit), indent=1, sort_keys=True) + "\n")
                before = after
            finally:
                operator.stop()
    print(f"{restarted} pods were made anew or restarted")
    return 1 if restarted else 0


def settle(stage: Stage) -> None:
    for server in SPECS:
        stage.wait_condition("Progressing", "False", "Settled", server, timeout_s=120)


def world(stage: Stage) -> dict[str, Any]:
    return {
        server: {
            "pods": {
                pod["metadata"]["uid"]: sum(c.get("restartCount", 0) for c in pod["status"]["containerStatuses"])
                for pod in stage.pods(server)
            },
            "template": (wait_for(lambda name=server: stage.get("deployments", name), "it"))["spec"]["template"],
            "update": stage.condition("UpdateAvailable", server),
        }
        for server in SPECS
    }


def tell(name: str, before: dict[str, Any], after: dict[str, Any]) -> int:
    restarted = 0
    for server, found in after.items():
        lost = {uid for uid, count in before[server]["pods"].items() if found["pods"].get(uid) != count}
        restarted += len(lost)
        kept = "the same pods" if not lost else f"{len(lost)} pods lost"
        template = "the same template" if found["template"] == before[server]["template"] else "ANOTHER template"
        print(f"{name}: {server}: {kept}, {template}; UpdateAvailable {found['update']['status']}", end=" ")
        print(f"{found['update']['reason']}: {found['update']['message']}")
    return restarted


def written(stage: Stage, older: Path, commit: str) -> dict[str, Any]:
    """What the older version left behind: the servers with their status, and the children as it applied them."""
    servers = [stage.get("llmservers", name) or {} for name in SPECS]
    kept = [
        {**one, "metadata": {k: one["metadata"][k] for k in ("name", "namespace", "uid", "generation")}}
        for one in servers
    ]
    environment = {**os.environ, "PYTHONPATH": f"{older}/engine:{older}/operator"}
    command = [sys.executable, "-c", APPLIED]
    done = subprocess.run(command, input=json.dumps(kept), env=environment, capture_output=True, text=True, check=True)
    return {"commit": commit, "servers": kept, "applied": json.loads(done.stdout)}


if __name__ == "__main__":
    sys.exit(main())
