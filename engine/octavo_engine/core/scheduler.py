"""Decide which requests run next, for how many tokens each, on which blocks. Called by engine.step; knows no tensors.

The one idea: a request has `num_tokens` and `num_computed`, and a step hands out a budget of tokens to let the
second catch up with the first. Prefill, chunked prefill, decode, prefix hits and recomputing after preemption are
the same arithmetic; there are no phases.

A step may be planned before the tokens of the one before it are known: its requests then have a pending token, whose
id the device puts in by itself. Plans are computed in the order in which they were made, so a block that one plan
gives up can be handed out by the next without waiting.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from octavo_engine.config import EngineConfig
from octavo_engine.core.blocks import BlockId, BlockPool, extend_hashes
from octavo_engine.core.messages import FinishReason, TokenLogprobs
from octavo_engine.core.request import Request
from octavo_engine.core.step import Admission, StepItem, StepPlan
from octavo_engine.plan import Plan

LOOKED_AT = 8
"""Requests behind a prompt that a step looks at, as each may have to be hashed."""


@dataclass(frozen=True)
class SchedulerConfig:
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True


@dataclass(slots=True)
class Commit:
    """What a step gave one request: a token (None after a chunk that samples nothing), perhaps its end."""

    request: Request
    token: int | None
    finish_reason: FinishReason | None
    stop_token_id: int | None = None
    logprobs: TokenLogprobs | None = None


@dataclass(slots=True)
class _Grant:
    """A request's part of the step being planned."""

    request: Request
    count: int
    new_blocks: list[BlockId]


@dataclass(frozen=True, slots=True)
class _Long:
    """A prompt that needs more tokens than the step has."""

    request: Request
    needs: int

    def comes_before(self, request: Request, needs: int) -> bool:
        """Whether one that needs so many waits for it: one behind it that is no shorter."""
        return needs >= self.needs and request.order > self.request.order


class Scheduler:
    """Running and waiting requests over one block pool."""

    def __init__(self, config: SchedulerConfig, num_blocks: int) -> None:
        # With this, a request that runs alone always fits: preempting all others is enough for any step.
        assert num_blocks * config.block_size >= config.max_model_len, (num_blocks, config)
        self.config = config
        self.pool = BlockPool(num_blocks, enable_caching=config.enable_prefix_caching)
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        """Both in the order of service; a preempted request comes back to its old place."""
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._planned: deque[tuple[StepPlan, list[Request]]] = deque()
        """Plans whose results are outstanding, oldest first, with the request of each item."""

    @classmethod
    def of(cls, config: EngineConfig, plan: Plan) -> Scheduler:
        """For a model that is loaded as planned."""
        settings = SchedulerConfig(
            plan.max_num_seqs, plan.max_num_batched_tokens, plan.max_model_len, plan.block_size,
            config.enable_prefix_caching, config.enable_chunked_prefill,
        )  # fmt: skip
        return cls(settings, plan.num_blocks)

    def add(self, request: Request) -> None:
        assert 0 < request.num_tokens < self.config.max_model_len
        bisect.insort(self.waiting, request, key=lambda r: r.order)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def waiting_prefill_tokens(self) -> int:
        return sum(request.num_tokens for request in self.waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the blocks that requests hold, 0..1; cached blocks that nobody holds count as free."""
        return self.pool.num_used / self.pool.num_blocks

    # ---- planning

    def schedule(self, now: float, prompt_tokens: Callable[[int, int], int | None] | None = None) -> StepPlan:
        """Plan one step. Moves requests between waiting and running and hands out blocks.

        Decodes first, as somebody is reading each of them; then prompts that have begun; then new ones, all together
        at most `prompt_tokens` of them, which is told how many requests decode and how many tokens they have together;
        None: as many as the step may have.
        A prompt that needs more than the step has leaves half of them to those behind it that need less than it does;
        others wait for it, as two that share their steps both end when the second would have ended anyway.
        """
        before = self.num_preemptions
        grants: dict[Request, _Grant] = {}
        decodes: list[Request] = []
        chunks: list[Request] = []
        for request in self.running:
            (decodes if request.num_remaining <= 1 else chunks).append(request)

        budget = self.config.max_num_batched_tokens
        for request in decodes:
            if request.row is not None and not self._has_nothing_to_do(request):
                budget -= self._extend(request, self._chunk(request.num_remaining, budget), grants)
        if prompt_tokens is not None and self.config.enable_chunked_prefill:
            allowed = prompt_tokens(len(decodes), sum(request.num_computed for request in decodes))
            budget = budget if allowed is None else min(budget, allowed)
        room = budget
        long: _Long | None = None
        for index, request in enumerate(chunks):
            needs = request.num_remaining
            if request.row is None or (long is not None and long.comes_before(request, needs)):
                continue
            count = self._chunk(needs, budget)
            if needs > room:
                long = _Long(request, needs)
                count = self._share(long, count, budget, itertools.chain(chunks[index + 1 :], self.waiting))
            budget -= self._extend(request, count, grants)

        # A step that had to preempt admits nobody: the blocks would be taken back at once.
        preempted = self.num_preemptions != before
        passed = 0  # by those behind them
        while not preempted and budget > 0 and len(self.running) < self.config.max_num_seqs:
            if passed == min(len(self.waiting), LOOKED_AT):
                break
            request = self.waiting[passed]
            # Preempted while its token was under way: known after the next commit.
            if request.num_pending or request.awaits_token:
                break
            found = self._find(request)
            needs = request.num_tokens - len(found) * self.config.block_size
            if long is not None and long.comes_before(request, needs):
                passed += 1
                continue
            count = self._chunk(needs, budget)
            if needs > room:
                long = _Long(request, needs)
                count = self._share(long, count, budget, itertools.islice(self.waiting, passed + 1, None))
            admitted = self._admit(request, found, count, now)
            if admitted is None:
                break
            self.waiting.pop(passed)
            grants[request] = admitted
            budget -= count

        return self._plan(grants)

    def _extend(self, request: Request, count: int, grants: dict[Request, _Grant]) -> int:
        """Let a running request compute `count` more tokens, at the cost of the last ones in order if blocks are short.

        Returns the tokens that the step's budget loses by it, which are negative if others or itself gave way.
        """
        if count == 0:
            return 0
        freed = 0
        while (new_blocks := self.pool.allocate(self._blocks_missing(request, count))) is None:
            victim = self.running[-1]
            if grant := grants.pop(victim, None):
                freed += grant.count
            self._preempt(victim)
            if victim is request:
                return -freed
        request.blocks += new_blocks
        grants[request] = _Grant(request, count, new_blocks)
        return count - freed

    def _has_nothing_to_do(self, request: Request) -> bool:
        waits = request.constraint is not None and request.awaits_token
        return waits or self._ends_with_pending(request)

    def _ends_with_pending(self, request: Request) -> bool:
        """Whether the pending token is the last one that its length allows, so that there is nothing to compute."""
        return request.num_pending > 0 and self._is_full(request, request.num_tokens)

    def _is_full(self, request: Request, num_tokens: int) -> bool:
        limit = request.sampling.max_tokens
        too_many = limit is not None and num_tokens - request.num_prompt >= limit
        return too_many or num_tokens >= self.config.max_model_len

    def _chunk(self, remaining: int, budget: int) -> int:
        if self.config.enable_chunked_prefill or remaining <= budget:
            return min(remaining, budget)
        return 0

    def _blocks_missing(self, request: Request, count: int) -> int:
        return _blocks_needed(request.num_computed + count, self.config.block_size) - len(request.blocks)

    def _find(self, request: Request) -> list[BlockId]:
        """Its cached prefix, as far as a request that waits may use it."""
        # Cached tokens have keys and values and no logits: a prompt whose tokens are to be scored is computed.
        if not self.config.enable_prefix_caching or request.num_unscored:
            return []
        size = self.config.block_size
        extend_hashes(request.hashes, request.tokens, size, request.cache_salt)
        # The last token is always computed: its logits are what the request came for.
        return self.pool.find(request.hashes[: (request.num_tokens - 1) // size])

    def _share(self, long: _Long, count: int, budget: int, behind: Iterable[Request]) -> int:
        """What a long prompt gets of the step: all that no shorter one behind it wants, and half of it at least."""
        half, wanted = max(budget // 2, 1), 0
        for request in itertools.islice(behind, LOOKED_AT):
            needs = request.num_remaining
            if request.row is None:
                needs -= len(self._find(request)) * self.config.block_size
            if not long.comes_before(request, needs):
                wanted += needs
            if wanted >= half:
                break
        return min(count, max(budget - wanted, half))

    def _admit(self, request: Request, found: list[BlockId], count: int, now: float) -> _Grant | None:
        """Give a waiting request its row, its cached prefix and its first chunk; None if it does not fit now."""
        size = self.config.block_size
        num_cached = len(found) * size
        # Room for all of its tokens and not only for the first chunk: half a prompt that waits for blocks
        # holds the others' blocks and helps nobody.
        whole = _blocks_needed(request.num_tokens, size) - len(found)
        if count == 0 or whole > self.pool.num_free_after(found):
            return None
        self.pool.acquire(found)
        new_blocks = self.pool.allocate(_blocks_needed(num_cached + count, size) - len(found))
        assert new_blocks is not None
        if request.num_cached_prompt is None:
            request.num_cached_prompt = min(num_cached, request.num_prompt)
            request.first_scheduled_s = now
            if self.config.enable_prefix_caching and not request.num_unscored:
                self.prefix_queries += request.num_prompt
                self.prefix_hits += request.num_cached_prompt
        request.row = self._rows.pop()
        request.admitted = False
        request.num_computed = num_cached
        request.num_hashed = len(found)
        request.blocks = [*found, *new_blocks]
        bisect.insort(self.running, request, key=lambda r: r.order)
        return _Grant(request, count, list(request.blocks))

    def _plan(self, grants: dict[Request, _Grant]) -> StepPlan:
        items, requests = [], []
        for grant in sorted(grants.values(), key=lambda g: g.count > 1):
            request = grant.request
            assert request.row is not None
            admission = None
            if not request.admitted:
                request.admitted = True
                admission = Admission(
                    tokens=list(request.tokens), num_prompt=request.num_prompt, sampling=request.sampling,
                    min_tokens_ids=tuple(sorted(request.end_token_ids)), seed=request.seed,
                )  # fmt: skip
            end = request.num_computed + grant.count
            samples = end == request.num_tokens
            scored = min(end, request.num_prompt - 1) - request.num_computed if request.num_unscored else 0
            items.append(
                StepItem(
                    row=request.row,
                    start=request.num_computed,
                    count=grant.count,
                    new_blocks=grant.new_blocks,
                    samples=samples,
                    admission=admission,
                    num_scored=max(0, scored),
                    mask=request.constraint.mask if samples and request.constraint is not None else None,
                )
            )
            requests.append(request)
            request.num_computed += grant.count
            request.num_pending += samples
        plan = StepPlan(items)
        if items:
            self._planned.append((plan, requests))
        return plan

    # ---- results

    def commit(
        self,
        plan: StepPlan,
        tokens: list[int],
        now: float,
        logprobs: Sequence[TokenLogprobs | None] | None = None,
        scores: Iterable[TokenLogprobs] = (),
    ) -> list[Commit]:
        """Take the result of the oldest plan: `tokens` holds one id for each item that samples, in order.

        A negative id says that the request's logits were not finite: it ends with ERROR, the others go on. What a
        plan computed for a request that has ended since is dropped.
        """
        oldest, requests = self._planned.popleft()
        assert oldest is plan, "results must come in the order of the plans"
        sampled = iter(zip(tokens, logprobs or [None] * len(tokens), strict=True))
        commits = []
        scored = iter(scores)
        for item, request in zip(plan.items, requests, strict=True):
            token, chances = next(sampled) if item.samples else (None, None)
            if item.num_scored:
                # What was computed a second time, after a preemption, is known already.
                of_item = list(itertools.islice(scored, item.num_scored))
                request.scores += of_item[len(request.scores) - item.start :]
            if request.finish_reason is not None:
                continue
            if token is not None:
                request.num_pending -= 1
                if token < 0:
                    self.finish(request, FinishReason.ERROR)
                    commits.append(Commit(request, None, FinishReason.ERROR))
                    continue
                request.tokens.append(token)
            if self.config.enable_prefix_caching:
                self._offer_blocks(request)
            if token is None:
                commits.append(Commit(request, None, None))
                continue
            if request.first_token_s is None:
                request.first_token_s = now
            reason, stop_token_id = self._end_of(request, token)
            if reason is not None:
                self.finish(request, reason)
            commits.append(Commit(request, token, reason, stop_token_id, chances))
        return commits

    def abort(self, ids: Iterable[str]) -> list[Request]:
        """End these requests wherever they are; returns the ones that were alive."""
        wanted = set(ids)
        ended = [request for request in (*self.running, *self.waiting) if request.id in wanted]
        for request in ended:
            self.finish(request, FinishReason.ABORT)
        return ended

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a live request, wherever it is."""
        request.finish_reason = reason
        if request.row is None:
            self.waiting.remove(request)
        else:
            self._give_up(request)

    def preempt_all(self) -> None:
        """Send every running request back to waiting; their outputs do not change by it."""
        for request in list(self.running):
            self._preempt(request)

    def check_integrity(self) -> None:
        """Assert that blocks, rows and requests add up; tests call it after every step, the engine when idle."""
        self.pool.check_integrity()
        held: dict[BlockId, int] = {}
        for request in self.running:
            request.check()
            assert request.row is not None
            assert _blocks_needed(request.num_computed, self.config.block_size) <= len(request.blocks)
            for block in request.blocks:
                held[block] = held.get(block, 0) + 1
        for request in self.waiting:
            request.check()
            assert request.row is None
        for block in map(BlockId, range(self.pool.num_blocks)):
            expected = held.get(block, 0)
            assert self.pool.references(block) == expected, f"block {block} leaked or double-booked"
        rows = [request.row for request in self.running]
        assert sorted([*rows, *self._rows]) == list(range(self.config.max_num_seqs)), "a row leaked"  # type: ignore[type-var]
        assert self.waiting == sorted(self.waiting, key=lambda r: r.order)

    def _offer_blocks(self, request: Request) -> None:
        """Let others find the blocks that are full now."""
        if request.row is None:
            return
        size = self.config.block_size
        num_full = min(request.num_computed, len(request.tokens)) // size
        if num_full > request.num_hashed:
            extend_hashes(request.hashes, request.tokens, size, request.cache_salt)
            for index in range(request.num_hashed, num_full):
                self.pool.cache(request.blocks[index], request.hashes[index])
            request.num_hashed = num_full

    def _end_of(self, request: Request, token: int) -> tuple[FinishReason | None, int | None]:
        sampling = request.sampling
        if request.num_output > sampling.min_tokens and token in request.end_token_ids:
            return FinishReason.STOP, token
        if self._is_full(request, len(request.tokens)):
            return FinishReason.LENGTH, None
        return None, None

    def _preempt(self, request: Request) -> None:
        self.num_preemptions += 1
        request.num_preemptions += 1
        self._give_up(request)
        bisect.insort(self.waiting, request, key=lambda r: r.order)

    def _give_up(self, request: Request) -> None:
        assert request.row is not None
        self.running.remove(request)
        self.pool.release(request.blocks)
        self._rows.append(request.row)
        request.blocks = []
        request.row = None
        request.num_computed = 0
        request.num_hashed = 0


def _blocks_needed(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)
