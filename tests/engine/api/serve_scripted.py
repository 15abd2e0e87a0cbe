"""`octavo serve` with the scripted engine behind it."""

from __future__ import annotations

import sys
from pathlib import Path

from octavo_engine.api.serve import serve
from octavo_engine.config import ArgumentParser, EngineConfig, ServerConfig, add_arguments, from_namespace

parser = ArgumentParser(prog="octavo serve")
add_arguments(parser, [EngineConfig, ServerConfig])
namespace = parser.parse_args()
serve(
    from_namespace(EngineConfig, namespace),
    from_namespace(ServerConfig, namespace),
    (sys.executable, str(Path(__file__).with_name("scripted_engine.py"))),
)
