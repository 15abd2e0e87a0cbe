"""The command `octavo-operator`: run | activator | render | diff | doctor | crd. Each imports what it needs; kopf, only
`run`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from octavo_engine import __version__
from octavo_operator.crd import custom_resource_definition
from octavo_operator.logs import set_up
from octavo_operator.render import RenderError, render
from octavo_operator.settings import SettingsError, from_environment

if TYPE_CHECKING:
    from octavo_operator.cluster import Cluster


BROKEN_PIPE = 128 + 13
"""As of a program that SIGPIPE ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="octavo-operator", description="Octavo's Kubernetes operator.")
    parser.add_argument("--version", action="version", version=f"octavo-operator {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "run", help="watch LLMServers and make them run", description="Settings come from the environment: OCTAVO_…"
    )
    commands.add_parser(
        "activator",
        help="hold requests for LLMServers at zero replicas until they are awake",
        description="Takes requests on one port for each server, which the operator leads to it by the server's "
        "Service. Settings come from the environment: OCTAVO_…",
    )
    renders = commands.add_parser("render", help="print the objects that would be applied; needs no cluster")
    renders.add_argument("-f", "--filename", required=True, metavar="FILE", help="manifest with LLMServers; - is stdin")
    renders.add_argument("-n", "--namespace", default="default", help="for manifests that name none")
    renders.add_argument(
        "--pod-monitors", action="store_true", help="as for a cluster that has the Prometheus operator's PodMonitor"
    )
    diffs = commands.add_parser(
        "diff",
        help="print how the cluster's objects would change; exits with 1 when they would",
        description="By the API server's dry run. Settings come from the environment, as for run: inside the "
        "operator's pod they are right (kubectl exec -i -n octavo-system deploy/octavo-operator -- octavo-operator "
        "diff -f - < FILE).",
    )
    diffs.add_argument("-f", "--filename", required=True, metavar="FILE", help="manifest with LLMServers; - is stdin")
    diffs.add_argument("-n", "--namespace", default="default", help="for manifests that name none")
    doctors = commands.add_parser("doctor", help="look for what keeps Octavo from working here; exits with 1 if found")
    doctors.add_argument("-n", "--namespace", default="octavo-system", help="where the operator is installed")
    commands.add_parser("crd", help="print the CustomResourceDefinition")
    parsed = parser.parse_args(arguments)
    try:
        match parsed.command:
            case "run":
                return _run()
            case "activator":
                return _activate()
            case "render":
                engine, known = from_environment().engine, parsed.pod_monitors
                text = _text(parsed.filename)
                sys.stdout.write(render(text, engine, pod_monitors_known=known, namespace=parsed.namespace))
            case "diff":
                return _diff(_text(parsed.filename), parsed.namespace)
            case "doctor":
                return _doctor(parsed.namespace)
            case "crd":
                sys.stdout.write(yaml.safe_dump(custom_resource_definition(), sort_keys=False, width=120))
        sys.stdout.flush()
    except BrokenPipeError:
        # What comes after a pipe (`| head`) has read enough. Python would complain once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (SettingsError, RenderError, OSError) as error:
        print(f"octavo-operator {parsed.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _text(filename: str) -> str:
    try:
        return sys.stdin.read() if filename == "-" else Path(filename).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RenderError(f"{filename} is not text in UTF-8: {error.reason} at byte {error.start}") from error


def _diff(text: str, namespace: str) -> int:
    from octavo_operator.diff import diff

    settings = from_environment()

    async def work(cluster: Cluster) -> int:
        found = await diff(cluster, text, settings.engine, namespace, datetime.now(UTC))
        sys.stdout.write(found)
        return 1 if found else 0

    return _with_cluster("diff", work)


def _doctor(namespace: str) -> int:
    from octavo_operator.doctor import examine, report

    async def work(cluster: Cluster) -> int:
        found = await examine(cluster, namespace, datetime.now(UTC))
        sys.stdout.write(report(found))
        return 1 if any(verdict.level == "FAIL" for verdict in found) else 0

    return _with_cluster("doctor", work)


def _with_cluster(command: str, work: Callable[[Cluster], Awaitable[int]]) -> int:
    """2 when the cluster does not answer: 1 is for what was looked for and found."""
    import asyncio

    from octavo_operator.cluster import Cluster, UnavailableError

    async def connected() -> int:
        cluster = await Cluster.connect()
        try:
            return await work(cluster)
        finally:
            await cluster.close()

    try:
        return asyncio.run(connected())
    except UnavailableError as error:
        print(f"octavo-operator {command}: {error}", file=sys.stderr)
        return 2


def _run() -> int:
    import asyncio

    from octavo_operator.cluster import UnavailableError
    from octavo_operator.run import run

    settings = from_environment()
    set_up(settings.log_level, settings.log_format)
    try:
        return asyncio.run(run(settings))
    except UnavailableError as error:
        print(f"octavo-operator run: {error}", file=sys.stderr)
        return 1


def _activate() -> int:
    import asyncio

    from octavo_operator.activator import settings as activator
    from octavo_operator.activator.serve import serve
    from octavo_operator.cluster import UnavailableError

    settings = activator.from_environment()
    set_up(settings.log_level, settings.log_format)
    try:
        return asyncio.run(serve(settings))
    except UnavailableError as error:
        print(f"octavo-operator activator: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
