"""One look at one server: observe, parse, decide, apply, report, and say when to look again.

What the API server knows is in the cache, which the watches fill: a server that loads is looked at every second, and
all that is asked then is its engines, which have no watch. Asked for directly are only objects that the watches do not
tell of: those of kinds that a CRD brings, and what stands where a child could not be made.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Protocol

from octavo_engine.status import Statusz
from octavo_operator import hostnames, metrics, names, observed, status, wake
from octavo_operator.announce import Announcement, announcements
from octavo_operator.cache import WATCHED, Cache, Seen
from octavo_operator.causes import About, Cause, Wanted, alteration, not_scaling, refusal_of_object, refusal_of_pods
from octavo_operator.changes import Altered, Changes, changes, may_be_applied
from octavo_operator.cluster import Cluster, Refusal, UnavailableError, together
from octavo_operator.conditions import Finding, View, conditions, conditions_of_invalid
from octavo_operator.desired import objects
from octavo_operator.desired.cache import store_claim
from octavo_operator.desired.monitoring import pod_annotations
from octavo_operator.desired.wake import endpoint_slice
from octavo_operator.monitoring import Monitoring
from octavo_operator.names import Key
from octavo_operator.neighbours import Neighbours
from octavo_operator.observed import Pod, World
from octavo_operator.prefetch import waits
from octavo_operator.replicas import Replica, replicas
from octavo_operator.report import RevisionStatus, Status
from octavo_operator.rollout import Decision, decide, deletion_costs, put_back
from octavo_operator.scaling import History, scale
from octavo_operator.settings import Settings
from octavo_operator.spec import Problem, Server, parse
from octavo_operator.wake import Waking
from octavo_operator.workers import Next

log = logging.getLogger(__name__)

POLLED = ("PodMonitor", "HTTPRoute", "InferencePool", "ScaledObject")
"""Children of kinds that not every cluster has, and that are not watched."""
REFUSED_POLL_S = 15.0
"""Between tries of what the API server refused: somebody has to mend that first."""
SCALING_POLL_S = 2.0
"""Between looks at the engines of a server that the operator scales."""
EVENTS_AFTER_S = 3.0
"""A pod that is still being created after this long may have its reason in an event."""
PODS_WITH_EVENTS = 4
"""Of how many such pods events are read: all of a server's pods mount the same volumes."""


class Activator(Protocol):
    addresses: tuple[str, ...]

    @property
    def on(self) -> bool: ...
    def asked(self, key: Key) -> bool: ...
    def need(self, key: Key, *, needed: bool) -> None: ...
    def know(self, key: Key) -> None: ...
    def forget(self, key: Key) -> None: ...
    def port(self, key: Key, present: Mapping[str, Any] | None) -> int | None: ...
    async def guard(self, key: Key, port: int) -> str: ...


class Engines(Protocol):
    async def statuses(self, pods: Sequence[Pod]) -> dict[str, Statusz]: ...


@dataclass
class _Known:
    """What is remembered of a server from look to look. A restart loses nothing by it but a moment.

    Times are seconds of the monotonic clock: what is decided by how long something lasts must not depend on a clock
    that may be set, nor on those of other machines.
    """

    polled: dict[str, dict[str, Any]] | None = None
    """Its children of polled kinds, None where they have to be read again."""
    polled_before: frozenset[str] | None = None
    """Of which polled kinds it had children at the last look; None before the first, when all are asked for."""
    first_seen: dict[str, float] = field(default_factory=dict)
    """By pod's uid."""
    answered: dict[tuple[str, int], float] = field(default_factory=dict)
    """By pod's uid and how often its container was restarted: when that engine last answered, or was first asked."""
    silent: frozenset[str] = frozenset()
    """Pods that run and whose engine did not answer at the last look."""
    waits_since: float | None = None
    """Since when a change waits for the engines to be idle."""
    scaling: History | None = None
    """What was recommended lately, where the operator itself scales the server."""
    altered: dict[str, Altered] = field(default_factory=dict)
    """By kind, children that the cluster keeps otherwise than they were applied."""
    settled_with: dict[str, object] | None = None
    """What the engines said at the last look, where nothing was left to be done then."""


class Reconciler:
    def __init__(
        self,
        cluster: Cluster,
        cache: Cache,
        engines: Engines,
        activator: Activator,
        settings: Settings,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float],
    ) -> None:
        self._cluster, self._cache, self._engines, self._activator = cluster, cache, engines, activator
        self._settings, self._clock, self._monotonic = settings, clock, monotonic
        self._known: dict[Key, _Known] = {}
        self._neighbours = Neighbours(cluster, settings)
        self._kinds: frozenset[str] = frozenset()
        self._monitoring = Monitoring()

    async def learn(self) -> bool:
        """Asks what of other projects the cluster has. True when that changed: every server is to be looked at then."""
        monitoring = await self._neighbours.monitoring()
        kinds = await self._neighbours.kinds(POLLED)
        if changed := kinds != self._kinds:
            for remembered in self._known.values():
                remembered.polled = remembered.polled_before = None
        changed = changed or monitoring != self._monitoring
        self._kinds, self._monitoring = kinds, monitoring
        return changed

    async def look(self, key: Key, changed: bool) -> Next:
        seen = self._cache.seen(key)
        if seen is None:
            self._known.pop(key, None)
            metrics.STATUSES.forget(key)
            self._activator.forget(key)
            return Next(gone=True)
        if "deletionTimestamp" in seen.resource["metadata"]:
            self._activator.know(key)
            return Next()  # its children go by their owner references
        changed = changed or await self._autoscaler_turned(key)
        world = await self._ask_engines(key, await self._observe(key, seen, changed))
        now, tick, known = self._clock(), self._monotonic(), self._known[key]
        said = {name: _gist(statusz) for name, statusz in world.engines.items()}
        if not changed and said == known.settled_with:
            return Next(self._settings.settled_poll_s)
        known.settled_with = None
        server = parse(seen.resource, self._settings.engine.profiles)
        if not isinstance(server, Server):
            self._activator.know(key)
            return await self._report_invalid(key, seen, server, world, now)
        found = replicas(world, _wanted(server), tick)
        waking = await self._waking(key, server, world)
        # While no pod is ready, and from the moment that the last one is to go: it takes requests for a while yet.
        leads = not any(replica.ready for replica in found) or not server.spec.desired_replicas
        slice = endpoint_slice(server, waking, leads=leads) if waking else None
        wanted = objects(
            *(server, self._settings.engine),
            pod_monitors_known=world.pod_monitors_known,
            sleeps=leads and slice is not None,
        )
        wanted += [slice] if slice else []
        scrape = pod_annotations(server, pod_monitors_known=world.pod_monitors_known)
        present = world.own("Deployment", server.uid)
        told = seen.resource.get("status", {})
        before = status.read_part(RevisionStatus, told.get("revision"))
        waiting = waits(wanted, world.children)
        waited = tick - known.waits_since if known.waits_since is not None else 0.0
        rollout = decide(
            server,
            wanted[0],
            present,
            found,
            before,
            world.refused_pods,
            now,
            tick,
            waited_s=waited,
            seen_generation=told.get("observedGeneration"),
            prefetching=waiting,
        )
        known.waits_since = tick - waited if rollout.held == "idle" else None
        if rollout.restore is not None:
            rollout = await self._restored(key, rollout)
        wanted[0] = rollout.deployment
        costs = deletion_costs(found, present, server.spec.desired_replicas)
        held = {"Deployment"} if waiting and present is None else set[str]()
        todo = changes(
            server.uid, wanted, world.children, world.pods, scrape, server.namespace, costs, held, known.altered
        )
        causes, unannotated = await self._apply(key, server, todo, world, {body["kind"]: body for body in wanted})
        view = View(
            server=server,
            replicas=found,
            revision=rollout.revision,
            rollout=rollout,
            pod_monitors_known=world.pod_monitors_known,
            not_scaling=_not_scaling(world, server),
            monitoring=self._monitoring,
            unannotated=unannotated,
            altered=tuple((kind, known.altered[kind].at[0]) for kind in sorted(known.altered)),
            causes=causes,
            prefetch=await self._look_at_prefetch(key, server) if waiting else None,
            waking=waking,
        )
        if server.spec.scales_itself:
            keeps_last = waking is not None and waking.keeps_last
            await self._scale(key, server, seen, found, now, tick, keeps_last=keeps_last)
        findings = conditions(view)
        new = status.status_of(view, findings, world.pods, seen.resource.get("status", {}), now)
        await self._report(key, seen, new, findings, todo, now)
        if any(cause.about is About.OBJECTS for cause in causes):
            return Next(REFUSED_POLL_S)  # nobody watches what stands in the way
        if not view.settled:
            return Next(self._settings.loading_poll_s)
        if server.spec.scales_itself and (view.desired or self._activator.asked(key)):
            return Next(SCALING_POLL_S)
        known.settled_with = said if len(said) == view.desired else None
        return Next(self._settings.settled_poll_s)

    async def _observe(self, key: Key, seen: Seen, changed: bool) -> World:
        known = self._known.setdefault(key, _Known())
        if changed or known.polled is None:
            asked = POLLED if known.polled_before is None else {*_asked_for(seen.resource), *known.polled_before}
            known.polled = await self._get([kind for kind in POLLED if kind in asked and kind in self._kinds], key)
            known.polled_before = frozenset(known.polled)
        children = {**seen.children, **known.polled}
        tick = self._monotonic()
        known.first_seen = {pod.uid: known.first_seen.get(pod.uid, tick) for pod in seen.pods}
        pods = tuple(replace(pod, known_since=known.first_seen[pod.uid]) for pod in seen.pods)
        return World(children, pods, pod_monitors_known="PodMonitor" in self._kinds)

    async def _autoscaler_turned(self, key: Key) -> bool:
        """Whether the ScaledObject of a server at rest works no more, or works again: nobody watches it."""
        known = self._known.get(key)
        if known is None or known.settled_with is None or "ScaledObject" not in (known.polled or {}):
            return False
        assert known.polled is not None
        found = (await self._get(["ScaledObject"], key)).get("ScaledObject")
        return found is None or not_scaling(found) != not_scaling(known.polled["ScaledObject"])

    async def _waking(self, key: Key, server: Server, world: World) -> Waking | None:
        """How the server is woken; None where it does not go to sleep."""
        sleeps = wake.may_sleep(server)
        why = wake.barrier(server, activator=self._activator.on) if sleeps else ""
        self._activator.need(key, needed=sleeps and not why)
        if not sleeps:
            return None
        port = None if why else self._activator.port(key, world.own("EndpointSlice", server.uid))
        if port is None:
            why = why or f"all {len(wake.PORTS)} ports of the activator stand for other servers"
            # Where nobody is to be woken by requests, that is known; here, nobody reckons with it.
            return Waking(barrier=why, keeps_last=self._activator.on and server.spec.scales_itself)
        # First those whom the server lets in are the only ones to reach its port, and then the port leads to it.
        if why := await self._activator.guard(key, port):
            return Waking(barrier=why, keeps_last=server.spec.scales_itself)
        return Waking(port, self._activator.addresses)

    async def _restored(self, key: Key, rollout: Decision) -> Decision:
        """With the template of the revision that worked, from the ReplicaSet that it left behind."""
        labels = f"{names.SERVER_LABEL}={key[1]},{names.REVISION_LABEL}={rollout.restore}"
        for document in await self._cluster.list("ReplicaSet", key[0], labels=labels):
            log.warning("rolled back server=%s/%s reason=%r", *key, rollout.report.reason)
            return put_back(rollout, document["spec"]["template"])
        return replace(rollout, held=None)  # nothing is left of it: the new revision goes on trying

    async def _get(self, kinds: Sequence[str], key: Key) -> dict[str, dict[str, Any]]:
        found = await together(self._cluster.get(kind, *key) for kind in kinds)
        return {kind: document for kind, document in zip(kinds, found, strict=True) if document is not None}

    async def _look_at_prefetch(self, key: Key, server: Server) -> tuple[Replica, ...]:
        """The pods of the Job that downloads the model, told of like replicas."""
        found = await self._cluster.list("Pod", key[0], labels=f"{names.PREFETCH_LABEL}={key[1]}")
        pods = tuple(map(observed.read_pod, found))
        engines = await self._engines.statuses(pods)
        return replicas(World(pods=pods, engines=engines), _wanted(server), self._monotonic())

    async def _ask_engines(self, key: Key, world: World) -> World:
        """The world with what is asked at each look: the engines, and the events of pods that do not come up."""
        tick = self._monotonic()
        late = [p for p in world.pods if p.node and not (p.running or p.terminating or p.over or p.terminations)]
        late = [p for p in late if tick - p.known_since > EVENTS_AFTER_S]
        # An engine that did not answer at the last look: the event may say that its node is lost.
        silent = [p for p in world.pods if p.running and p.name in self._known[key].silent]
        late = [*late, *silent][:PODS_WITH_EVENTS]
        fields = "involvedObject.kind=Pod,type=Warning,involvedObject.name="
        engines, events = await asyncio.gather(
            self._engines.statuses(world.pods),
            together(self._cluster.list("Event", key[0], fields=fields + pod.name) for pod in late),
        )
        read = observed.read_events(event for found in events for event in found)
        known = self._known.setdefault(key, _Known())
        runs = {pod.name: (pod.uid, pod.restarts) for pod in world.pods if pod.running}
        answered = {name: tick if name in engines else known.answered.get(run, tick) for name, run in runs.items()}
        known.answered = {runs[name]: at for name, at in answered.items()}
        known.silent = frozenset(runs) - frozenset(engines)
        return replace(world, engines=engines, events=read, answered=answered)

    async def _scale(
        self,
        key: Key,
        server: Server,
        seen: Seen,
        found: Sequence[Replica],
        now: datetime,
        tick: float,
        *,
        keeps_last: bool,
    ) -> None:
        known, spec = self._known[key], server.spec
        assert spec.autoscaling is not None
        known.scaling = known.scaling or History(tick)
        loads = [replica.engine.load for replica in found if replica.ready and replica.engine]
        asked = self._activator.asked(key)
        decision = scale(
            spec.autoscaling, spec.replicas, loads, known.scaling, tick, asked=asked, keeps_last=keeps_last
        )
        if decision is None or decision.replicas == spec.replicas:
            return
        answer = await self._cluster.scale(seen.resource, decision.replicas)
        if isinstance(answer, Refusal):
            # Somebody changed the server meanwhile: the next look knows more.
            log.info("not scaled server=%s/%s: %s", *key, answer.message)
            return
        message = f"Scaled from {spec.replicas} to {decision.replicas}. {decision.reason}"
        log.info("scaled server=%s/%s from=%d to=%d reason=%r", *key, spec.replicas, decision.replicas, decision.reason)
        await self._cluster.create(_event(seen.resource, Announcement("Normal", "Scaled", message), now))

    async def _apply(
        self, key: Key, server: Server, todo: Changes, world: World, wanted: Mapping[str, dict[str, Any]]
    ) -> tuple[tuple[Cause, ...], str | None]:
        """Carries the changes out. Returns what stands in the way, and why pods could not be annotated."""
        causes = [_name_taken(kind, server.name) for kind in todo.foreign]
        if why := hostnames.refusal(server.spec.expose, self._settings.engine.hostnames, server.namespace):
            causes.append(Cause(About.OBJECTS, "HostnameRefused", f"{why}."))
        # First the pods: when fewer are wanted, what their ends would cost is known before any is chosen.
        answers = await asyncio.gather(*(self._cluster.apply(pod) for pod in todo.annotate))
        for annotated in answers:
            if not isinstance(annotated, Refusal):
                self._cache.put("Pod", annotated)
        for body in (*todo.create, *todo.update):
            answer = await (self._cluster.apply(body) if body in todo.update else self._make(server, body))
            if answer is None:
                causes.append(_name_taken(body["kind"], server.name))
                continue
            self._note_alteration(key, body, answer)
            if isinstance(answer, Refusal):
                causes.append(refusal_of_object(body["kind"], answer.message))
            elif body["kind"] in WATCHED:
                self._cache.put(body["kind"], answer)
            elif (before := self._known[key].polled_before) is not None:
                self._kinds |= {body["kind"]}
                self._known[key].polled_before = before | {body["kind"]}
        for body in todo.delete:
            refusal = await self._cluster.delete(body)
            causes += [refusal_of_object(body["kind"], refusal.message)] if refusal else []
            if refusal is None and body["kind"] in WATCHED:
                self._cache.drop(body["kind"], body["metadata"])
        unannotated = next((a.message for a in answers if isinstance(a, Refusal) and a.status == 403), None)
        if todo.create or todo.update or todo.delete or todo.annotate:
            log.info(
                "applied server=%s/%s created=%d updated=%d deleted=%d annotated=%d refused=%d",
                *key, len(todo.create), len(todo.update), len(todo.delete), len(todo.annotate), len(causes),
            )  # fmt: skip
            self._known[key].polled = None
        for kind in set(self._known[key].altered) - wanted.keys():
            del self._known[key].altered[kind]
        if (altered := self._known[key].altered.get("Deployment")) is not None:
            volumes = wanted["Deployment"]["spec"]["template"]["spec"]["volumes"]
            if fatal := alteration(altered.at, [volume["name"] for volume in volumes if "image" in volume]):
                causes.append(fatal)
        if why := world.refused_pods:
            causes.append(refusal_of_pods(why))
        return tuple(causes), unannotated

    async def _make(self, server: Server, body: dict[str, Any]) -> dict[str, Any] | Refusal | None:
        """The child that was not there; None where somebody else's object has its name.

        Nothing is looked for before: what was not told of is mostly not there, and the API server says so if it is.
        """
        answer = await self._cluster.apply_new(body)
        if not (isinstance(answer, Refusal) and answer.status == 409):
            return answer
        present = await self._cluster.get(body["kind"], server.namespace, server.name)
        if present is None:
            # It went meanwhile. Not by force: whoever makes an object of that name in this moment keeps it.
            return await self._cluster.apply(body, force=False)
        if not may_be_applied(present, body, server.uid):
            return None
        if body["kind"] in WATCHED:
            self._cache.put(body["kind"], present)
        raise UnavailableError(f"make {body['kind']}: it is there already, and no watch has told of it yet")

    def _note_alteration(self, key: Key, body: dict[str, Any], answer: dict[str, Any] | Refusal) -> None:
        altered = None if isinstance(answer, Refusal) else Altered.read(body, answer)
        if altered is None:
            self._known[key].altered.pop(body["kind"], None)
            return
        self._known[key].altered[body["kind"]] = altered
        log.warning("kept otherwise server=%s/%s kind=%s at=%s", *key, body["kind"], altered.at[0])

    async def _report_invalid(
        self, key: Key, seen: Seen, problems: Sequence[Problem], world: World, now: datetime
    ) -> Next:
        """Nothing is applied for a spec that cannot be served, and nothing is tried again until it changes."""
        found = replicas(world, Wanted("", 0, None, None), self._monotonic())
        findings = conditions_of_invalid(problems, sum(replica.ready for replica in found))
        metadata, before = seen.resource["metadata"], seen.resource.get("status", {})
        new = status.status_of_invalid(key[1], int(metadata["generation"]), findings, found, before, now)
        await self._report(key, seen, new, findings, Changes(), now)
        return Next()

    async def _report(
        self, key: Key, seen: Seen, new: Status, findings: Sequence[Finding], todo: Changes, now: datetime
    ) -> None:
        before, document = seen.resource.get("status", {}), status.as_document(new)
        metrics.STATUSES.tell(key, document)
        if not status.same(document, before):
            metadata = {name: seen.resource["metadata"][name] for name in ("name", "namespace", "uid")}
            body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": metadata, "status": document}
            answer = await self._cluster.apply(body, subresource="status")
            if isinstance(answer, Refusal):
                if answer.status in (404, 409):
                    return  # the server is gone, or another of its name is there: a watch wakes us for that
                raise UnavailableError(f"write the status: {answer.message}")
            self._cache.put(names.KIND, answer)
        for told in announcements(findings, new.last_failure, todo, before):
            log.info("event server=%s/%s reason=%s message=%r", *key, told.reason, told.message)
            await self._cluster.create(_event(seen.resource, told, now))


def _not_scaling(world: World, server: Server) -> str | None:
    own = (world.own(kind, server.uid) for kind in ("HorizontalPodAutoscaler", "ScaledObject"))
    return next((why for autoscaler in own if autoscaler is not None and (why := not_scaling(autoscaler))), None)


def _gist(statusz: Statusz) -> object:
    """What of it the resource tells. Its clocks go on when nothing happens."""
    load = statusz.load
    return statusz.stage, statusz.progress, statusz.effective, statusz.failure, load.running, load.waiting


def _asked_for(resource: Mapping[str, Any]) -> set[str]:
    """Polled kinds that the resource may ask for."""
    spec = resource.get("spec") or {}
    routes = ("HTTPRoute", "InferencePool") if "gateway" in (spec.get("expose") or {}) else ()
    return {"PodMonitor", *routes, *(("ScaledObject",) if "autoscaling" in spec else ())}


def _wanted(server: Server) -> Wanted:
    hardware = server.spec.hardware
    limits = (hardware.resources.limits if hardware.resources else None) or {}
    memory = str(limits["memory"]) if "memory" in limits else None
    return Wanted(hardware.resource_name, hardware.gpus, memory, server.spec.model.claim or store_claim(server))


def _name_taken(kind: str, name: str) -> Cause:
    message = f"A {kind} named {name} exists and is not this LLMServer's: delete or rename one of the two."
    return Cause(About.OBJECTS, "NameTaken", message)


def _event(resource: dict[str, Any], told: Announcement, now: datetime) -> dict[str, Any]:
    metadata, time = resource["metadata"], observed.write_time(now)
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{metadata['name']}.", "namespace": metadata["namespace"]},
        "involvedObject": {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            **{name: metadata[name] for name in ("name", "namespace", "uid")},
        },
        "type": told.type,
        "reason": told.reason,
        "message": told.message,
        "source": {"component": names.FIELD_MANAGER},
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    }
