"""The engine's step: schedule, execute, commit, tell. Used in the engine process and, in-process, by LLM.

Commands are taken between steps and never during one, so there is one road for everything that ends a request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from octavo_engine.core.constraint import Constraints
from octavo_engine.core.cost import ChunkLimit, StepCost
from octavo_engine.core.messages import NOT_FINITE, FinishReason, StepOutput, StepStats, Submit, TokenEvent
from octavo_engine.core.pace import Pace
from octavo_engine.core.request import Request
from octavo_engine.core.scheduler import Commit, Scheduler
from octavo_engine.core.step import Sampled, StepPlan
from octavo_engine.status import Load


class Runner(Protocol):
    """Computes steps on a device, in the order in which they are launched."""

    @property
    def depth(self) -> int:
        """Steps that may be under way when the next is launched: 1 lets planning and computing overlap, 0 does not."""

    @property
    def num_compilations(self) -> int:
        """Kernels that had to be compiled since it was ready, each while requests waited."""

    def prepare(self) -> bool:
        """Make later steps faster, for a tenth of a second; called while nothing runs. False: nothing is left."""

    def launch(self, plan: StepPlan) -> Any:
        """Start a step; what it returns is handed to `collect` once, oldest first."""

    def is_done(self, launched: Any) -> bool:
        """Whether a step has ended, so that the device has nothing to do until the next is launched."""

    def collect(self, launched: Any) -> Sampled:
        """Wait for a step and take its result."""


class Clock(Protocol):
    def __call__(self) -> float: ...


MASK_GRACE_S = 0.001
"""A step waits so long for masks, which take some 0.05 ms each; a row whose mask takes longer sits the step out."""
IDLE_WAIT_S = 0.02
"""What a step waits for masks and grammars when nothing else is to be done; a new request may come meanwhile."""
COMPILE_LIMIT_S = 10.0
"""A request whose grammar is not compiled by then ends with an error."""


@dataclass(slots=True)
class _UnderWay:
    """A step that was launched at started_s. in_time: before the one in front of it had ended."""

    plan: StepPlan
    launched: Any
    started_s: float
    in_time: bool
    decodes: int
    context: int
    """Tokens that the decodes have together."""


class Engine:
    """Requests in, tokens out. `clock` counts seconds from any moment; `seed` makes those of unseeded requests."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        clock: Clock,
        seed: int = 0,
        max_slowdown: float | None = None,
        constraints: Constraints | None = None,
        context_share: float = 0.0,
    ) -> None:
        """max_slowdown: by how much prompts may lengthen a step that decodes too; None lets them fill the budget.

        context_share: bytes of a token of context over bytes of the weights, for what is not learned yet.

        constraints: who makes the masks of structured output; None refuses requests that ask for them.
        """
        self.scheduler = scheduler
        self._runner = runner
        self._clock = clock
        self._seed = seed
        self._arrivals = 0
        self._num_steps = 0
        self._last_step_s: float | None = None
        self._constraints = constraints
        self._constrained: list[Request] = []
        """Live requests with a grammar that the scheduler has."""
        self._compiling: dict[str, Request] = {}
        """Requests whose grammar is being compiled: the scheduler does not know them yet."""
        self._pending: list[TokenEvent] = []
        self._live: set[str] = set()
        self._launched: deque[_UnderWay] = deque()
        """Oldest first."""
        self.cost = StepCost()
        self._limit = ChunkLimit(max_slowdown, context_share) if max_slowdown else None
        self._pace = Pace()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._pending or self._launched or self._compiling)

    def submit(self, submit: Submit) -> None:
        """Queue a request. What can never run ends at once, with an error event at the next step."""
        if problem := self._problem(submit):
            self._fail(submit.request_id, problem)
            return
        if submit.grammar is not None and self._constraints is None:
            self._fail(submit.request_id, "this engine has no structured output", "structured_outputs")
            return
        self._live.add(submit.request_id)
        seed = submit.sampling.seed
        if seed is None:  # distinct for each request, the same in each run with the same --seed and order
            seed = (self._seed * 0x9E3779B97F4A7C15 + self._arrivals) % 2**63
        request = Request.of(submit, self._arrivals, self._clock(), seed)
        self._arrivals += 1
        if submit.grammar is None:
            self.scheduler.add(request)
        else:
            assert self._constraints is not None
            request.constraint = self._constraints.start(submit.grammar, request.end_token_ids)
            self._compiling[request.id] = request

    def abort(self, ids: Sequence[str]) -> None:
        compiling = [self._compiling.pop(id) for id in ids if id in self._compiling]
        for request in (*compiling, *self.scheduler.abort(ids)):
            self._live.discard(request.id)
            self._pending.append(TokenEvent(request.id, [], finish_reason=FinishReason.ABORT))

    def hold_s(self) -> float:
        """Seconds for which the next step may wait for requests to arrive, as one is under way; 0: call `step`."""
        # Where requests wait already, one that arrives now would hardly be in the next step.
        if not self._launched or self._pending or self.scheduler.waiting:
            return 0.0
        step = self._launched[-1]
        return self._pace.hold_s(step.decodes, self._clock() - self._began(step))

    def step(self) -> StepOutput:
        """Launch one step if anything can run, take the results that are due; the output carries every event since.

        With a runner of depth 1 the results are those of the step before the one that was launched.
        """
        if self._constraints is not None and (self._constrained or self._compiling):
            self._settle(self._constraints)
        started = self._clock()
        plan = self.scheduler.schedule(started, self._prompt_tokens)
        events, self._pending = self._pending, []
        if plan.items:
            self._launch(plan, started)
        if self._launched and (len(self._launched) > self._runner.depth or not plan.items):
            events += self._collect()
        return StepOutput(events, self.load(), self._stats(self._clock() - started))

    def prepare(self) -> bool:
        """To be called while there is no work: the runner uses the time. False when nothing is left to prepare."""
        return self._runner.prepare()

    def _prompt_tokens(self, decodes: int, context: int) -> int | None:
        """How many prompt tokens a step of so many decodes may take, which have `context` tokens together."""
        return None if self._limit is None else self._limit.tokens(decodes, context, len(self.scheduler.waiting))

    def _settle(self, constraints: Constraints) -> None:
        """Take in what became of grammars: requests that may begin, that are complete, and that cannot go on."""
        self._constrained = [request for request in self._constrained if request.finish_reason is None]
        alive = len(self.scheduler.running) + len(self.scheduler.waiting)
        # Whatever runs has a grammar: without their masks there is nothing to do.
        idle = alive == len(self._constrained) and not (self._launched or self._pending)
        constraints.settle(IDLE_WAIT_S if idle else MASK_GRACE_S, grammars=not alive)
        for request in self._constrained:
            constraint = request.constraint
            assert constraint is not None
            if request.num_pending or not constraint.ready:
                continue
            if constraint.error is not None:
                self.scheduler.finish(request, FinishReason.ERROR)
                self._live.discard(request.id)
                self._fail(request.id, constraint.error, "structured_outputs")
            elif constraint.complete:
                # The end-of-text token, the only one that could follow, tells nothing more.
                self.scheduler.finish(request, FinishReason.STOP)
                self._live.discard(request.id)
                self._pending.append(TokenEvent(request.id, [], finish_reason=FinishReason.STOP))
        now = self._clock()
        for request in list(self._compiling.values()):
            constraint = request.constraint
            assert constraint is not None
            if not constraint.ready and now - request.arrival_s < COMPILE_LIMIT_S:
                continue
            del self._compiling[request.id]
            if constraint.ready and constraint.error is None:
                self.scheduler.add(request)
                self._constrained.append(request)
            else:
                self._live.discard(request.id)
                error = constraint.error or f"the grammar took more than {COMPILE_LIMIT_S:g} s to compile"
                self._fail(request.id, error, "structured_outputs")

    def _fail(self, request_id: str, problem: str, param: str | None = None) -> None:
        event = TokenEvent(request_id, [], finish_reason=FinishReason.ERROR, error=problem, error_param=param)
        self._pending.append(event)

    def _launch(self, plan: StepPlan, started: float) -> None:
        before = self._launched[-1] if self._launched else None
        launched = self._runner.launch(plan)
        in_time = before is not None and not self._runner.is_done(before.launched)
        if before is not None:
            self._pace.launched(in_time)
        contexts = [item.start for item in plan.items if item.count == 1]
        self._launched.append(_UnderWay(plan, launched, started, in_time, len(contexts), sum(contexts)))

    def _collect(self) -> list[TokenEvent]:
        step = self._launched.popleft()
        sampled = self._runner.collect(step.launched)
        now = self._clock()
        took, tokens = now - self._began(step), step.plan.num_tokens
        prompt_tokens = tokens - step.decodes
        self.cost.observe(tokens, took)
        # What was launched on an idle device took the host's time too.
        if step.decodes and not prompt_tokens and step.in_time:
            self._pace.observe(step.decodes, took)
        if self._limit:
            self._limit.observe(step.decodes, step.context, prompt_tokens, took)
        self._num_steps += 1
        self._last_step_s = now
        return [_event(c) for c in self._commit(step.plan, sampled, now)]

    def _began(self, step: _UnderWay) -> float:
        """A step that waited for the one before it took as long as lies between their ends."""
        return step.started_s if self._last_step_s is None else max(step.started_s, self._last_step_s)

    def load(self) -> Load:
        scheduler = self.scheduler
        waiting_tokens = scheduler.waiting_prefill_tokens
        return Load(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._compiling),
            waiting_prefill_tokens=waiting_tokens,
            kv_usage=scheduler.kv_usage,
            predicted_queue_s=self.cost.predict_queue_s(
                waiting_tokens, scheduler.config.max_num_batched_tokens, len(scheduler.running)
            ),
            last_step_age_s=None if self._last_step_s is None else self._clock() - self._last_step_s,
        )

    def check_integrity(self) -> None:
        self.scheduler.check_integrity()
        alive = {r.id for r in (*self.scheduler.running, *self.scheduler.waiting, *self._compiling.values())}
        assert alive == self._live, "a request was lost or lives twice"

    def _commit(self, plan: StepPlan, sampled: Sampled, now: float) -> list[Commit]:
        commits, advanced = [], []
        for commit in self.scheduler.commit(plan, sampled.tokens, now, sampled.logprobs, sampled.scores):
            if commit.finish_reason is not None:
                self._live.discard(commit.request.id)
            elif commit.token is None:
                continue
            elif commit.request.constraint is not None:
                advanced.append((commit.request.constraint, commit.token))
            commits.append(commit)
        if advanced:
            assert self._constraints is not None
            self._constraints.advance(advanced)
        return commits

    def _problem(self, submit: Submit) -> str | None:
        # The API has checked both; a request that slipped through must not take the engine down.
        limit = self.scheduler.config.max_model_len
        if not 0 < len(submit.prompt_token_ids) < limit:
            return f"the prompt has {len(submit.prompt_token_ids)} tokens, allowed are 1 to {limit - 1}"
        if submit.request_id in self._live:
            return f"the request id {submit.request_id} is in use"
        return None

    def _stats(self, seconds: float) -> StepStats:
        return StepStats(
            step_s=seconds,
            preemptions=self.scheduler.num_preemptions,
            prefix_queries=self.scheduler.prefix_queries,
            prefix_hits=self.scheduler.prefix_hits,
            num_steps=self._num_steps,
            compilations=self._runner.num_compilations,
        )


def _event(commit: Commit) -> TokenEvent:
    request = commit.request
    event = TokenEvent(request.id, [] if commit.token is None else [commit.token])
    if commit.finish_reason is not None:
        event.finish_reason, event.stop_token_id = commit.finish_reason, commit.stop_token_id
        if commit.finish_reason is FinishReason.ERROR:
            event.error = NOT_FINITE
    if commit.logprobs is not None:
        event.logprobs = [commit.logprobs]
    if commit.token is not None and request.num_output == 1:
        assert request.first_scheduled_s is not None
        assert request.first_token_s is not None
        event.num_cached_tokens = request.num_cached_prompt
        event.queue_s = request.first_scheduled_s - request.arrival_s
        event.prefill_s = request.first_token_s - request.first_scheduled_s
        if request.sampling.prompt_logprobs is not None:
            event.prompt_logprobs = request.scores
    return event
