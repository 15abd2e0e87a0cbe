"""Who may wake a server that asks for API keys. Pure: answers of engines and a clock in, a verdict out.

The activator cannot check a key: the keys are in a Secret of the server's namespace, and it has no right on Secrets.
What it can do is to bound what a stranger costs. A request without any key never wakes a server. One with a key that
the server's engine has accepted before always does. One with an unknown key does, until a woken engine refused such a
key: then unknown keys do not wake that server for a quarter of an hour, and twice as long each time, up to six hours.
Digests of accepted keys are kept in memory alone, under a secret of this process.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field

from octavo_operator.names import Key

FIRST_CLOSED_S = 900.0
LAST_CLOSED_S = 6 * 3600.0
KEYS = 1024
"""Accepted keys that are remembered of one server; the one unused for longest goes."""
SERVERS = 4096
REFUSED = (401, 403)


@dataclass
class _Door:
    accepted: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    refusals: int = 0
    closed_until: float = 0.0


class Keys:
    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._doors: OrderedDict[Key, _Door] = OrderedDict()

    def knows(self, server: Key, credential: str) -> bool:
        """Whether an engine of the server has accepted the credential."""
        door = self._doors.get(server)
        return door is not None and self._digest(credential) in door.accepted

    def closed_s(self, server: Key, credential: str, now: float) -> float:
        """For how many seconds yet a request with this credential does not wake the server; 0 where it does."""
        door = self._doors.get(server)
        if door is None or self._digest(credential) in door.accepted:
            return 0.0
        return max(door.closed_until - now, 0.0)

    def answered(self, server: Key, credential: str, status: int, now: float, *, woke: bool = True) -> None:
        """An engine of the server answered a request with this credential.

        woke: whether the server was woken for it. What a stranger asks of a server that is awake costs nothing, and
        must not keep others from waking it later.
        """
        door = self._doors.setdefault(server, _Door())
        self._doors.move_to_end(server)
        digest = self._digest(credential)
        if status in REFUSED:
            door.accepted.pop(digest, None)
            if woke and now >= door.closed_until:  # those that were held together are one
                door.closed_until = now + min(FIRST_CLOSED_S * 2 ** min(door.refusals, 10), LAST_CLOSED_S)
                door.refusals += 1
        else:
            door.accepted[digest] = None
            door.accepted.move_to_end(digest)
            door.refusals, door.closed_until = 0, 0.0
        if len(door.accepted) > KEYS:
            door.accepted.popitem(last=False)
        if len(self._doors) > SERVERS:
            self._doors.popitem(last=False)

    def _digest(self, credential: str) -> bytes:
        return hashlib.blake2b(credential.encode("utf-8", "surrogateescape"), key=self._secret, digest_size=16).digest()
