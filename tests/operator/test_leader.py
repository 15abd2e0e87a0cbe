"""Who may take the lease."""

from __future__ import annotations

import pytest

from octavo_operator.leader import Sighting, may_take

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
