"""Which names clients may ask for are a namespace's own, where the cluster's operators say so. Pure.

A hostname is claimed by whoever writes it first into an Ingress or a route, and with it what clients send there. So an
operator's setting can keep each namespace to names of its own: example.com, *.example.com for whatever is below it, and
{namespace} in either. Without the setting every name may be claimed. Called by routes.py, reconcile.py and render.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from octavo_operator.expose import HOSTNAME, Expose

EXPECTED = "a name such as {namespace}.llm.example.com, or *.{namespace}.llm.example.com for all names below one"


def is_pattern(text: str) -> bool:
    # The * is a whole label: of *-{namespace}, a namespace `a` would own what is below another one called `b-a`.
    return re.fullmatch(HOSTNAME, text.replace("{namespace}", "x")) is not None


def refusal(exposed: Expose, patterns: Sequence[str], namespace: str) -> str | None:
    """Why the server's Ingress and HTTPRoute are not made, with the names that may be taken; None where they may be."""
    if not patterns:
        return None
    allowed = [pattern.replace("{namespace}", namespace) for pattern in patterns]
    asked = [("expose.ingress.hostname", exposed.ingress.hostname)] if exposed.ingress else []
    if exposed.gateway:
        if not exposed.gateway.hostnames:
            what = "expose.gateway has no hostnames, and with that asks for all names of its Gateway"
            return f"{what}: {_advice(allowed, namespace)}"
        asked += [("expose.gateway.hostnames", name) for name in exposed.gateway.hostnames]
    foreign = [(field, name) for field, name in asked if not any(_covers(pattern, name) for pattern in allowed)]
    if not foreign:
        return None
    told = " and ".join(f"{field} has {name!r}" for field, name in foreign[:3])
    return f"{told}, which this namespace may not claim: {_advice(allowed, namespace)}"


def _covers(pattern: str, name: str) -> bool:
    return name.endswith(pattern[1:]) if pattern.startswith("*.") else name == pattern


def _advice(allowed: Sequence[str], namespace: str) -> str:
    return (
        f"in the namespace {namespace}, names may be {' or '.join(allowed)} (Helm value tenancy.hostnames, where * "
        "stands for one label or more)"
    )
