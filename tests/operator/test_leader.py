"""Who may take the lease."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta

import pytest

from octavo_operator.doctor import _leader
from octavo_operator.leader import Leader, Sighting, may_take

SPEC = {"holderIdentity": "other", "renewTime": "t1", "leaseDurationSeconds": 15}


@pytest.mark.parametrize(
    ("spec", "sighting", "now", "may"),
    [
        ({}, None, 0.0, True),
        (SPEC | {"holderIdentity": ""}, None, 0.0, True),
        (SPEC | {"holderIdentity": "me"}, None, 0.0, True),
        # A renewal that is seen first now may be of this very moment, whatever its time says.
        (SPEC, None, 1e9, False),
        (SPEC, Sighting("other", "t0", 0.0), 100.0, False),
        (SPEC, Sighting("another", "t1", 0.0), 100.0, False),
        (SPEC, Sighting("other", "t1", 0.0), 14.9, False),
        (SPEC, Sighting("other", "t1", 0.0), 15.1, True),
        ({"holderIdentity": "other"}, Sighting("other", "", 0.0), 1.0, False),
    ],
)
def test_a_lease_is_taken_when_free_ours_or_not_renewed_on_our_own_clock(spec, sighting, now, may):
    assert may_take(spec, "me", sighting, now) is may


class Leases:
    """A cluster that has one Lease, and answers until it is told not to."""

    def __init__(self):
        self.lease, self.hangs, self.written = None, False, []

    async def get(self, kind, namespace, name):
        if self.hangs:
            await asyncio.Event().wait()
        return self.lease

    async def create(self, body):
        return await self.replace(body)

    async def replace(self, body):
        self.lease = body
        self.written.append(body["spec"]["renewTime"])
        return body


def leader(cluster, identity="me", lease_s=1, clock=lambda: datetime.now(UTC), monotonic=time.monotonic):
    return Leader(cluster, "ns", identity, lease_s, clock=clock, monotonic=monotonic)


async def test_a_holder_whose_renewal_hangs_gives_up_before_another_may_take_the_lease():
    cluster = Leases()
    holder = leader(cluster)
    await holder.acquire()
    cluster.hangs = True

    # What hangs never ends by itself.
    await asyncio.wait_for(holder.hold(), 60)


async def test_a_clock_that_jumps_neither_loses_the_lease_nor_gives_it_to_another():
    cluster, jumps = Leases(), iter([0, 5, -7, 30, -30, 0] * 1000)
    now, tick = datetime(2026, 1, 1, tzinfo=UTC), [0.0]
    holder = leader(cluster, clock=lambda: now + timedelta(hours=next(jumps), seconds=tick[0]), lease_s=15)
    other = leader(cluster, "other", lease_s=15, monotonic=lambda: tick[0])
    await holder.acquire()
    taken = []
    for _ in range(6):  # renewals each three seconds, which the other one sees
        await holder.acquire()
        taken.append(await other._try())
        tick[0] += 3
    for _ in range(4):
        tick[0] += 4
        taken.append(await other._try())

    assert taken == [False] * 9 + [True]
    assert cluster.written[1] > cluster.written[0] > cluster.written[2]


@pytest.mark.parametrize("skew_h", [-1, 1])
async def test_the_doctor_tells_a_leader_that_lives_from_a_dead_one_whatever_clock_it_went_by(skew_h):
    """By an hour of difference between two machines, a dead leader was alive for an hour, or a living one dead."""
    cluster = Leases()
    holder = leader(cluster, clock=lambda: datetime.now(UTC) + timedelta(hours=skew_h))
    await holder.acquire()
    holding = asyncio.create_task(holder.hold())
    (alive,) = await _leader(cluster, "ns", datetime.now(UTC))
    holding.cancel()
    (dead,) = await _leader(cluster, "ns", datetime.now(UTC) + timedelta(seconds=3))

    assert (alive.level, dead.level) == ("ok", "FAIL"), (alive, dead)
    assert "has not renewed its lease for 1 s" in dead.sentence
