"""The load in a response's head, for balancers that ask with each request (ORCA), in vLLM's words. Pure."""

from __future__ import annotations

import json

from octavo_engine.status import Load

ASKS = "endpoint-load-metrics-format"
TELLS = "endpoint-load-metrics"


def report(format: str, load: Load) -> dict[str, str]:
    """The header. format: what was asked for, TEXT or JSON; anything else is not answered, as in vLLM."""
    figures = {"kv_cache_usage_perc": float(load.kv_usage), "num_requests_waiting": float(load.waiting)}
    match format.strip().upper():
        case "TEXT":
            return {TELLS: "TEXT " + ", ".join(f"named_metrics.{name}={value}" for name, value in figures.items())}
        case "JSON":
            return {TELLS: "JSON " + json.dumps({"named_metrics": figures})}
        case _:
            return {}
