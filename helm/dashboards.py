#!/usr/bin/env python3
"""Write Grafana's boards into the chart: files/dashboards/{servers,operator}.json. Called by `make dashboards`.

A board is JSON of which a person reads nothing; what it shows is here, a line for each panel.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent / "octavo/files/dashboards"
WIDTH = 24
Panel = tuple[str, str, str, list[tuple[str, str]]]
"""title, unit, what it tells, [(expression, legend)]"""

ENGINE = 'namespace=~"$namespace", model_name=~"$model"'
SERVER = 'namespace=~"$namespace", server=~"$server"'


def quantile(share: float, name: str, by: str = "model_name") -> str:
    return f"histogram_quantile({share}, sum by (le, {by}) (rate({name}_bucket{{{ENGINE}}}[$__rate_interval])))"


def rate(name: str, by: str = "model_name") -> str:
    return f"sum by ({by}) (rate({name}{{{ENGINE}}}[$__rate_interval]))"


SERVERS: dict[str, list[Panel]] = {
    "Servers": [
        (
            "Ready and wanted pods",
            "short",
            "Where they part, kubectl describe llm tells why.",
            [
                (f'octavo_server_replicas{{{SERVER}, state="ready"}}', "{{server}} ready"),
                (f'octavo_server_replicas{{{SERVER}, state="desired"}}', "{{server}} wanted"),
            ],
        ),
        (
            "Conditions that do not hold",
            "short",
            "0 is False; the reason is in the legend.",
            [(f"octavo_server_condition{{{SERVER}}} == 0", "{{server}} {{type}}: {{reason}}")],
        ),
    ],
    "Requests": [
        (
            "Time to first token",
            "s",
            "From arrival to the first token: queue and prefill.",
            [
                (quantile(0.5, "vllm:time_to_first_token_seconds"), "{{model_name}} p50"),
                (quantile(0.99, "vllm:time_to_first_token_seconds"), "{{model_name}} p99"),
            ],
        ),
        (
            "Between two tokens",
            "s",
            "What a reader of a stream sees.",
            [
                (quantile(0.5, "vllm:inter_token_latency_seconds"), "{{model_name}} p50"),
                (quantile(0.99, "vllm:inter_token_latency_seconds"), "{{model_name}} p99"),
            ],
        ),
        (
            "Whole requests",
            "s",
            "From arrival to the last token.",
            [
                (quantile(0.5, "vllm:e2e_request_latency_seconds"), "{{model_name}} p50"),
                (quantile(0.99, "vllm:e2e_request_latency_seconds"), "{{model_name}} p99"),
            ],
        ),
        (
            "Ends of requests",
            "reqps",
            "abort: the client went away.",
            [(rate("vllm:request_success_total", "finished_reason"), "{{finished_reason}}")],
        ),
    ],
    "Load": [
        (
            "Running and waiting",
            "short",
            "Requests in the engines.",
            [
                (f"sum by (model_name) (vllm:num_requests_running{{{ENGINE}}})", "{{model_name}} running"),
                (f"sum by (model_name) (vllm:num_requests_waiting{{{ENGINE}}})", "{{model_name}} waiting"),
            ],
        ),
        (
            "Predicted wait",
            "s",
            "How long a new request would wait, as each engine predicts it; autoscaling goes by it.",
            [(f"octavo:predicted_queue_seconds{{{ENGINE}}}", "{{pod}}")],
        ),
        (
            "Tokens",
            "short",
            "Each second.",
            [
                (rate("vllm:prompt_tokens_total"), "{{model_name}} prompt"),
                (rate("vllm:generation_tokens_total"), "{{model_name}} generated"),
            ],
        ),
        (
            "Step time",
            "s",
            "One step computes a token for every running request, and a part of the prompts.",
            [
                (quantile(0.5, "octavo:step_seconds", "pod"), "{{pod}} p50"),
                (quantile(0.99, "octavo:step_seconds", "pod"), "{{pod}} p99"),
            ],
        ),
    ],
    "Memory": [
        (
            "KV cache in use",
            "percentunit",
            "Full is fine while nothing is put back.",
            [(f"vllm:kv_cache_usage_perc{{{ENGINE}}}", "{{pod}}")],
        ),
        (
            "Tokens that still fit",
            "short",
            "Headroom of the KV cache.",
            [(f"octavo:kv_headroom_tokens{{{ENGINE}}}", "{{pod}}")],
        ),
        (
            "Prefix cache hits",
            "percentunit",
            "Share of prompt tokens that need no computing.",
            [(f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}", "{{model_name}}")],
        ),
        (
            "Put back for lack of memory",
            "short",
            "Each second; these requests are computed twice.",
            [(rate("vllm:num_preemptions_total"), "{{model_name}}")],
        ),
    ],
    "Start": [
        (
            "Seconds in each stage",
            "s",
            "Of the present start of each engine.",
            [(f"octavo:stage_seconds{{{ENGINE}}}", "{{pod}} {{stage}}")],
        ),
        ("Stage", "short", "What each engine does.", [(f"octavo:stage{{{ENGINE}}} == 1", "{{pod}} {{stage}}")]),
    ],
}
OPERATOR: dict[str, list[Panel]] = {
    "Work": [
        ("Who leads", "short", "One of them, always.", [("octavo_operator_leader", "{{pod}}")]),
        ("Servers", "short", "That are looked after.", [("sum(octavo_operator_servers)", "servers")]),
        (
            "Waiting for a look",
            "short",
            "Servers that are due while as many as may be are looked at. A moment's number after a start is usual.",
            [("octavo_operator_queue_length", "{{pod}}")],
        ),
        (
            "Looks",
            "ops",
            "Each is one round of observe, decide, apply, report.",
            [("sum(rate(octavo_operator_look_seconds_count[$__rate_interval]))", "looks/s")],
        ),
        (
            "Time of a look",
            "s",
            "Mostly the API server's.",
            [
                (
                    f"histogram_quantile({share}, sum by (le) "
                    "(rate(octavo_operator_look_seconds_bucket[$__rate_interval])))",
                    name,
                )
                for share, name in ((0.5, "p50"), (0.99, "p99"))
            ],
        ),
        (
            "Looks that failed",
            "ops",
            "They are tried again; the log tells why.",
            [("sum(rate(octavo_operator_look_errors_total[$__rate_interval]))", "errors/s")],
        ),
    ],
    "API server": [
        (
            "Requests",
            "reqps",
            "By verb and kind.",
            [
                (
                    "sum by (verb, kind) (rate(octavo_operator_api_requests_total[$__rate_interval]))",
                    "{{verb}} {{kind}}",
                )
            ],
        ),
        (
            "Answers that are no success",
            "reqps",
            "404 and 409 are answers; 403 is a missing right, 0 is no answer.",
            [
                (
                    "sum by (verb, kind, code) "
                    '(rate(octavo_operator_api_requests_total{code!="200"}[$__rate_interval]))',
                    "{{verb}} {{kind}} {{code}}",
                )
            ],
        ),
        (
            "Lost by watches",
            "short",
            "Changes that only a list showed, in an hour. An operator that goes on losing starts anew.",
            [("sum by (kind) (increase(octavo_operator_watch_lost_total[1h]))", "{{kind}}")],
        ),
    ],
    "Activator": [
        (
            "Requests that wait",
            "short",
            "For servers that are asleep; the first of them wakes its server.",
            [("sum by (server) (octavo_activator_held_requests)", "{{server}}")],
        ),
        (
            "Wakes",
            "short",
            "In an hour. A server that is woken all the time is cheaper with one replica.",
            [("sum by (server) (increase(octavo_activator_wakes_total[1h]))", "{{server}}")],
        ),
        (
            "How long requests waited",
            "s",
            "Until an engine took them.",
            [
                (
                    "histogram_quantile(0.5, sum by (le) (rate(octavo_activator_hold_seconds_bucket[1h])))",
                    "p50",
                ),
                (
                    "histogram_quantile(0.99, sum by (le) (rate(octavo_activator_hold_seconds_bucket[1h])))",
                    "p99",
                ),
            ],
        ),
        (
            "What became of requests",
            "reqps",
            "refused: beyond a bound. late: not awake in time. closed: its key may not wake the server.",
            [("sum by (outcome) (rate(octavo_activator_requests_total[$__rate_interval]))", "{{outcome}}")],
        ),
        (
            "Bodies that wait",
            "bytes",
            "Of activator.bytesMiB for each replica.",
            [("octavo_activator_held_bytes", "{{pod}}")],
        ),
    ],
    "Process": [
        ("Memory", "bytes", "Resident.", [('process_resident_memory_bytes{job=~".*octavo.*"}', "{{pod}}")]),
        (
            "CPU",
            "percentunit",
            "Of one core.",
            [('rate(process_cpu_seconds_total{job=~".*octavo.*"}[$__rate_interval])', "{{pod}}")],
        ),
    ],
}


def board(title: str, uid: str, rows: dict[str, list[Panel]], variables: list[tuple[str, str]]) -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    y = 0
    for name, row in rows.items():
        panels.append(
            {"type": "row", "title": name, "collapsed": False, "panels": [], "id": len(panels) + 1,
             "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}}
        )  # fmt: skip
        y += 1
        per_line = 2 if len(row) % 2 == 0 or len(row) == 1 else 3
        width = WIDTH // per_line
        for number, (heading, unit, description, targets) in enumerate(row):
            panels.append(
                {
                    "type": "timeseries",
                    "title": heading,
                    "description": description,
                    "id": len(panels) + 1,
                    "datasource": {"type": "prometheus", "uid": "${datasource}"},
                    "gridPos": {"x": number % per_line * width, "y": y + number // per_line * 8, "w": width, "h": 8},
                    "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                    "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
                    "targets": [
                        {"expr": expression, "legendFormat": legend, "refId": chr(ord("A") + index)}
                        for index, (expression, legend) in enumerate(targets)
                    ],
                }
            )
        y += -(-len(row) // per_line) * 8
    templates: list[dict[str, Any]] = [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    ]
    templates += [
        {
            "name": name,
            "label": name,
            "type": "query",
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "query": {"query": query, "refId": name},
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        }
        for name, query in variables
    ]
    return {
        "title": title,
        "uid": uid,
        "tags": ["octavo"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": templates},
        "panels": panels,
    }


BOARDS = {
    "servers": board(
        "Octavo servers",
        "octavo-servers",
        SERVERS,
        [
            ("namespace", "label_values(octavo_server_condition, namespace)"),
            ("server", 'label_values(octavo_server_condition{namespace=~"$namespace"}, server)'),
            ("model", 'label_values(vllm:num_requests_running{namespace=~"$namespace"}, model_name)'),
        ],
    ),
    "operator": board("Octavo operator", "octavo-operator", OPERATOR, []),
}


def text(name: str) -> str:
    return json.dumps(BOARDS[name], indent=1) + "\n"


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    for name in BOARDS:
        (OUT / f"{name}.json").write_text(text(name))
