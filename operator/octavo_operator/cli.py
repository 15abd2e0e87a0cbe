"""The command `octavo-operator`: run | render | crd. Each imports what it needs, so that only `run` loads kopf."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from octavo_engine import __version__
from octavo_operator.crd import custom_resource_definition
from octavo_operator.render import RenderError, render
from octavo_operator.settings import SettingsError, from_environment


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="octavo-operator", description="Octavo's Kubernetes operator.")
    parser.add_argument("--version", action="version", version=f"octavo-operator {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "run", help="watch LLMServers and make them run", description="Settings come from the environment: OCTAVO_…"
    )
    renders = commands.add_parser("render", help="print the objects that would be applied; needs no cluster")
    renders.add_argument("-f", "--filename", required=True, metavar="FILE", help="manifest with LLMServers; - is stdin")
    renders.add_argument("-n", "--namespace", default="default", help="for manifests that name none")
    renders.add_argument(
        "--pod-monitors", action="store_true", help="as for a cluster that has the Prometheus operator's PodMonitor"
    )
    commands.add_parser("crd", help="print the CustomResourceDefinition")
    parsed = parser.parse_args(arguments)
    try:
        match parsed.command:
            case "run":
                return _run()
            case "render":
                text = sys.stdin.read() if parsed.filename == "-" else Path(parsed.filename).read_text()
                engine = from_environment().engine
                known = parsed.pod_monitors
                sys.stdout.write(render(text, engine, pod_monitors_known=known, namespace=parsed.namespace))
            case "crd":
                sys.stdout.write(yaml.safe_dump(custom_resource_definition(), sort_keys=False, width=120))
    except (SettingsError, RenderError, OSError) as error:
        print(f"octavo-operator {parsed.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _run() -> int:
    import asyncio

    from octavo_operator.cluster import UnavailableError
    from octavo_operator.run import run

    settings = from_environment()
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    # One line for every request and every watch is not a story that a person acts on.
    logging.getLogger("aiohttp").setLevel(logging.WARNING)
    try:
        return asyncio.run(run(settings))
    except UnavailableError as error:
        print(f"octavo-operator run: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
