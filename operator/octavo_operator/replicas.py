"""One engine pod as the status tells of it: the pod, what its engine says, and what is wrong with it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo_engine.status import Stage, Statusz
from octavo_operator import names
from octavo_operator.causes import Cause, Wanted, cause_of
from octavo_operator.observed import Pod, World
from octavo_operator.quantity import gib
from octavo_operator.report import PodStatus

STARTING_GRACE_S = 10.0
"""An engine binds its ports in a third of a second; on a node that is busy with starting it, a little later."""
SILENT_AFTER_S = 10.0
"""An answer may be late once or twice; an engine that is silent for longer than this is not there for us."""


@dataclass(frozen=True)
class Replica:
    pod: Pod
    stage: str
    engine: Statusz | None = None
    cause: Cause | None = None

    @property
    def ready(self) -> bool:
        """In the Service, and its engine answers: a pod whose probes pass without it is some other program."""
        return self.pod.ready and not self.pod.terminating and self.stage != names.POD_UNREACHABLE

    @property
    def has_model(self) -> bool:
        """Its engine has found the whole checkpoint: it reads it, or has done so."""
        return self.stage in (Stage.LOADING_WEIGHTS, Stage.CAPTURING, Stage.WARMING_UP, Stage.READY, Stage.DRAINING)

    def words(self) -> str:
        """'pod qwen-7f: loading weights 61 % (9.3 GiB of 15.2 GiB), about 40 s left'."""
        text = f"pod {self.pod.name}: {_STAGE_WORDS.get(self.stage, self.stage.replace('_', ' '))}"
        if self.engine is not None and self.stage == Stage.DRAINING:
            return f"{text}, {self.engine.load.running} requests running"
        if self.engine is None or self.stage != self.engine.stage:
            return text
        if self.stage == Stage.READY:
            return text if self.pod.ready else f"{text}, not yet in the Service"
        progress = self.engine.progress
        if percent := _percent(self.engine):
            text += f" {percent} %"
        if progress.total_bytes:
            text += f" ({gib(progress.done_bytes)} of {gib(progress.total_bytes)})"
        if eta := _eta(self.engine):
            text += f", about {eta} s left"
        return text

    def report(self) -> PodStatus:
        engine = self.engine
        loading = engine is not None and self.stage == engine.stage and self.stage not in (Stage.READY, Stage.DRAINING)
        return PodStatus(
            name=self.pod.name,
            node=self.pod.node,
            stage=self.stage,
            percent=_percent(engine) if engine and loading else None,
            eta_seconds=_eta(engine) if engine and loading else None,
            running=engine.load.running if engine else None,
            queued=engine.load.waiting if engine else None,
            restarts=self.pod.restarts or None,
            revision=self.pod.revision,
        )


_STAGE_WORDS = {
    names.POD_PENDING: "waits for a node",
    names.POD_CREATING: "its container is being created",
    names.POD_CRASHED: "its engine ended and is started again",
    names.POD_UNREACHABLE: "its engine does not answer on the management port",
    names.POD_TERMINATING: "is ending",
}


def replicas(world: World, wanted: Wanted, tick: float) -> tuple[Replica, ...]:
    """All pods that run or will run, those with trouble first, then those that are not ready.

    tick: seconds of the monotonic clock now.
    """
    found = [_replica(pod, world, wanted, tick) for pod in world.pods if not pod.over]
    found.sort(key=lambda replica: (replica.cause is None, replica.ready, replica.pod.terminating, replica.pod.name))
    return tuple(found)


def _replica(pod: Pod, world: World, wanted: Wanted, tick: float) -> Replica:
    engine = world.engines.get(pod.name)
    stage = _stage(pod, engine, tick - world.answered.get(pod.name, tick))
    cause = cause_of(
        pod,
        world.events,
        wanted,
        engine_is_up=engine is not None and engine.stage in (Stage.READY, Stage.DRAINING),
        engine_is_silent=stage == names.POD_UNREACHABLE,
    )
    return Replica(pod, stage, engine, cause)


def _stage(pod: Pod, engine: Statusz | None, silent_s: float) -> str:
    """silent_s: since the engine did answer last, or was first asked."""
    if pod.running and engine is not None:
        # It still takes the requests of nodes that do not know yet, but it is on its way out.
        ending = pod.terminating and engine.stage is Stage.READY
        return Stage.DRAINING.value if ending else engine.stage.value
    if pod.terminating:
        return names.POD_TERMINATING
    if pod.running:
        if pod.ready:
            return Stage.READY.value if silent_s < SILENT_AFTER_S else names.POD_UNREACHABLE
        return Stage.STARTING.value if silent_s < STARTING_GRACE_S else names.POD_UNREACHABLE
    if pod.terminations:
        return names.POD_CRASHED
    return names.POD_CREATING if pod.node else names.POD_PENDING


def headline(found: Sequence[Replica]) -> Replica | None:
    """The replica that explains why not all are ready: the one farthest along among those that are not."""
    order = [names.POD_PENDING, names.POD_CREATING, names.POD_UNREACHABLE, names.POD_CRASHED, *map(str, Stage)]
    waiting = [r for r in found if not r.ready and not r.pod.terminating]
    return max(waiting, key=lambda r: order.index(r.stage) if r.stage in order else -1, default=None)


def _eta(engine: Statusz) -> int | None:
    """In seconds, at least one: what is as good as done is not told to be done, and no clock tells of the past."""
    eta_s = engine.progress.eta_s
    return max(round(eta_s), 1) if eta_s else None


def _percent(engine: Statusz) -> int | None:
    return int(engine.progress.percent) or None
