"""Steps with requests that keep to a grammar: they wait for their masks, and nobody waits for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo_engine.core.constraint import Constraint
from octavo_engine.core.engine import COMPILE_LIMIT_S, IDLE_WAIT_S, MASK_GRACE_S, Engine
from octavo_engine.core.messages import FinishReason, Grammar, Submit, TokenEvent
from octavo_engine.core.scheduler import Scheduler, SchedulerConfig
from octavo_engine.core.step import Sampled, StepPlan
from octavo_engine.sampling_params import SamplingParams

EOS = 2


class Counting:
    """A grammar of the tokens 10, 11, 12 … up to a last one; its masks name the token that may come."""

    def __init__(self, last: int) -> None:
        self.next, self.last = 10, last
        self.ready, self.complete, self.error = False, False, None

    @property
    def mask(self) -> bytes | None:
        assert self.ready
        return bytes([self.next])

    def take(self, token: int | None) -> None:
        if token is not None:
            assert token == self.next, f"sampled {token} where {self.next} was the only one"
            self.next += 1
        self.complete = self.next > self.last
        self.ready = True


class Slow:
    """Constraints that are ready when the test says so, or at once when they are waited for."""

    def __init__(self, patient: bool = True) -> None:
        self.patient = patient
        self.waits: list[float] = []
        self.due: list[tuple[Counting, int | None]] = []

    def start(self, grammar: Grammar, end_token_ids: frozenset[int]) -> Constraint:
        if grammar.text == "broken":
            constraint = Counting(0)
            constraint.error, constraint.ready = "it is broken", True  # type: ignore[assignment]
            return constraint
        constraint = Counting(int(grammar.text))
        self.due.append((constraint, None))
        return constraint

    def advance(self, tokens: Sequence[tuple[Constraint, int]]) -> None:
        for constraint, token in tokens:
            assert isinstance(constraint, Counting)
            constraint.ready = False
            self.due.append((constraint, token))

    def settle(self, timeout_s: float, *, grammars: bool = False) -> None:
        self.waits.append(timeout_s)
        if self.patient:
            self.finish()

    def finish(self) -> None:
        for constraint, token in self.due:
            constraint.take(token)
        self.due = []


class Runner:
    """Samples what a mask names, and 7 without one."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.steps: list[list[int]] = []

    def launch(self, plan: StepPlan) -> Any:
        self.steps.append([item.row for item in plan.items])
        return [7 if item.mask is None else item.mask[0] for item in plan.items if item.samples]

    def is_done(self, launched: Any) -> bool:
        return False

    def collect(self, launched: Any) -> Sampled:
        return Sampled(launched)

    num_compilations = 0

    def prepare(self) -> bool:
        return False


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_engine(depth: int, constraints: Slow | None, clock: Clock | None = None, blocks: int = 64) -> Engine:
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, block_size=4)
    return Engine(Scheduler(config, blocks), Runner(depth), clock or Clock(), constraints=constraints)


def submit(engine: Engine, id: str, grammar: str | None = None, max_tokens: int = 8, prompt: int = 5) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    form = None if grammar is None else Grammar(grammar)
    engine.submit(Submit(id, list(range(100, 100 + prompt)), sampling, (EOS,), grammar=form))


def run(engine: Engine, steps: int = 100) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    for _ in range(steps):
        if not engine.has_work:
            break
        events += engine.step().events
        engine.check_integrity()
    return events


def tokens(events: list[TokenEvent], id: str) -> list[int]:
    return [token for event in events if event.request_id == id for token in event.token_ids]


def ends(events: list[TokenEvent]) -> dict[str, FinishReason]:
    return {event.request_id: event.finish_reason for event in events if event.finish_reason is not None}


def test_every_token_is_sampled_under_the_mask_that_the_ones_before_it_make() -> None:
    for depth in (0, 1):
        engine = make_engine(depth, Slow())
        submit(engine, "a", "13")
        submit(engine, "b")
        submit(engine, "c", "11")

        events = run(engine)

        assert tokens(events, "a") == [10, 11, 12, 13]
        assert tokens(events, "c") == [10, 11]
        assert tokens(events, "b") == [7] * 8
        assert ends(events) == {"a": "stop", "c": "stop", "b": "length"}


def test_a_form_that_is_complete_ends_the_answer_without_another_step() -> None:
    engine = make_engine(0, Slow())
    submit(engine, "a", "12")

    run(engine)

    assert len(engine._runner.steps) == 3


def test_a_mask_that_takes_long_holds_up_its_own_request_alone() -> None:
    for depth in (0, 1):
        constraints = Slow(patient=False)
        engine = make_engine(depth, constraints)
        submit(engine, "a", "20")
        constraints.finish()  # compiled; the masks after it are not made
        submit(engine, "b", max_tokens=6)

        events = run(engine, steps=20)

        assert tokens(events, "b") == [7] * 6
        assert tokens(events, "a") == [10]
        constraints.finish()
        events += run(engine, steps=3)
        assert tokens(events, "a") == [10, 11]


def test_a_step_waits_longer_for_masks_when_there_is_nothing_else_to_do() -> None:
    constraints = Slow()
    engine = make_engine(0, constraints)
    submit(engine, "a", "15")
    run(engine, steps=3)
    alone = list(constraints.waits)
    submit(engine, "b", max_tokens=20)
    engine.step()
    constraints.waits.clear()

    run(engine, steps=2)

    assert set(alone) == {IDLE_WAIT_S}
    assert set(constraints.waits) == {MASK_GRACE_S}


def test_others_go_on_while_a_grammar_is_compiled() -> None:
    constraints = Slow(patient=False)
    engine = make_engine(1, constraints)
    submit(engine, "a", "10")
    submit(engine, "b", max_tokens=3)

    events = run(engine, steps=10)

    assert tokens(events, "b") == [7] * 3
    assert engine.step().load.waiting == 1
    constraints.finish()
    assert tokens(run(engine), "a") == [10]


def test_a_grammar_that_is_broken_ends_its_request_with_the_field_at_fault() -> None:
    engine = make_engine(0, Slow())
    submit(engine, "a", "broken")

    (event,) = run(engine)

    assert event.finish_reason is FinishReason.ERROR
    assert (event.error, event.error_param) == ("it is broken", "structured_outputs")


def test_a_grammar_that_does_not_come_ends_its_request_in_time() -> None:
    clock = Clock()
    engine = make_engine(0, Slow(patient=False), clock)
    submit(engine, "a", "10")
    engine.step()
    clock.now += COMPILE_LIMIT_S

    (event,) = run(engine)

    assert event.error_param == "structured_outputs"
    assert not engine.has_work


def test_a_constraint_that_fails_in_the_middle_ends_its_request_alone() -> None:
    constraints = Slow(patient=False)
    engine = make_engine(1, constraints)
    submit(engine, "a", "20")
    submit(engine, "b", max_tokens=4)
    constraints.finish()
    engine.step()
    engine.step()
    ((failing, _),) = constraints.due
    failing.error = "too complex"  # type: ignore[assignment]
    failing.ready = True
    constraints.due = []

    events = run(engine)

    assert ends(events) == {"a": "error", "b": "length"}


def test_an_abort_finds_a_request_at_every_state() -> None:
    constraints = Slow(patient=False)
    engine = make_engine(1, constraints)
    submit(engine, "compiling", "20")
    engine.step()
    engine.abort(["compiling"])
    assert ends(run(engine)) == {"compiling": "abort"}

    submit(engine, "awaiting", "20")
    constraints.finish()
    run(engine, steps=4)
    engine.abort(["awaiting"])

    assert ends(run(engine)) == {"awaiting": "abort"}
    assert engine.scheduler.kv_usage == 0


def test_preemption_does_not_lose_the_place_in_the_grammar() -> None:
    for depth in (0, 1):
        engine = make_engine(depth, Slow())
        submit(engine, "a", "17", max_tokens=20)
        events = run(engine, steps=4)
        engine.scheduler.preempt_all()

        events += run(engine)

        assert tokens(events, "a") == [10, 11, 12, 13, 14, 15, 16, 17]
        assert ends(events) == {"a": "stop"}


def test_an_engine_without_constraints_refuses_a_grammar() -> None:
    engine = make_engine(0, None)
    submit(engine, "a", "10")

    (event,) = run(engine)

    assert event.finish_reason is FinishReason.ERROR
