"""The GPU's road from plan to token: what requests ask for beyond a draw, in graphs and out of them."""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled here, and tests marked gpu run the real thing", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parent))

import interpreted

from octavo_engine.core.messages import Submit
from octavo_engine.core.step import Admission, StepItem, StepPlan
from octavo_engine.kernels import sampling
from octavo_engine.kernels.gpu import prefill_attention, prefill_attention_hopper, small_linear
from octavo_engine.kernels.sampling import SampleRow
from octavo_engine.models import gpu_decoder
from octavo_engine.runner import gpu_steps
from octavo_engine.runner.layout import Layout, Tiling
from octavo_engine.sampling_params import SamplingParams

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]
GRAPHS = (
    Layout.of_decodes(4, Tiling()), Layout.of_decodes(8, Tiling()), Layout.mixed(4, 32, Tiling()),
    Layout.mixed(8, 64, Tiling()),
)  # fmt: skip
END = 2


def sampling_of(**settings: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 4, **settings})


REQUESTS: dict[str, SamplingParams] = {
    "plain": sampling_of(logprobs=3),
    "repetition": sampling_of(repetition_penalty=3.0, logprobs=0),
    "frequency": sampling_of(frequency_penalty=2.0, presence_penalty=1.0),
    "bias": sampling_of(logit_bias={7: 6.0, 9: 6.0}, frequency_penalty=2.0, logprobs=20),
    "allowed": sampling_of(allowed_token_ids=tuple(range(90, 120)), repetition_penalty=2.0),
    "min_tokens": sampling_of(min_tokens=2, logit_bias={END: 50.0}),
    "free": sampling_of(),
}
PROMPTS = {name: [3 + (5 * i + 31 * n) % 190 for i in range(3 + n + 14 * (n == 3))] for n, name in enumerate(REQUESTS)}


def assert_greedy(name: str, tokens: list[int], told: list[Any]) -> None:
    """Each token is one of the best, as the reference changes the reference's logits; and what is told is its own."""
    prompt, params = PROMPTS[name], REQUESTS[name]
    logits = interpreted.logits_of([*prompt, *tokens])[len(prompt) - 1 : -1]
    for at, (row, token) in enumerate(zip(logits, tokens, strict=True)):
        if params.logprobs is not None:
            expected = row.log_softmax(-1)
            assert abs(told[at].logprob - float(expected[token])) < 0.05
            assert len(told[at].top) == params.logprobs
            assert all(abs(float(expected[id]) - value) < 0.05 for id, value in told[at].top)
        history = torch.tensor([*prompt, *tokens[:at]])
        banned = (END,) if at < params.min_tokens else ()
        changed = row.clone()
        sampling._penalize(changed, SampleRow(params, 0, history, len(prompt), banned))
        assert float(changed.max() - changed[token]) < 0.05, (name, at)


def test_every_request_gets_the_tokens_that_its_own_changes_leave(monkeypatch: pytest.MonkeyPatch):
    engine = interpreted.engine_of(interpreted.steps(monkeypatch, graphs=GRAPHS))
    names = list(REQUESTS)

    results = interpreted.generate(engine, [(PROMPTS[name], REQUESTS[name]) for name in names], (END,))
    # And again, as the prefix cache has the longer prompts now: the device has not seen their first tokens.
    again = interpreted.generate(engine, [(PROMPTS["bias"], REQUESTS["bias"])], (END,))

    found = {name: result[0] for name, result in zip(names, results, strict=True)}
    for name, (tokens, told) in [*zip(names, results, strict=True), ("bias", again[0])]:
        assert_greedy(name, tokens, told)
    assert len(found["min_tokens"]) == 3
    assert found["min_tokens"][-1] == END
    assert len(set(found["repetition"])) == 4
    assert set(found["allowed"]) <= set(range(90, 120))
    assert engine.scheduler.prefix_hits > 0


def test_steps_with_prompts_and_changed_rows_are_graphs(monkeypatch: pytest.MonkeyPatch):
    made = interpreted.steps(monkeypatch, graphs=GRAPHS)
    launched = []
    run = type(made)._run
    monkeypatch.setattr(type(made), "_run", lambda self, step: (launched.append(step.ids.shape[0]), run(self, step)))
    engine = interpreted.engine_of(made)
    names = ["repetition", "bias", "plain"]

    interpreted.generate(engine, [(PROMPTS[name], REQUESTS[name]) for name in names])

    assert set(launched) <= {layout.tokens for layout in GRAPHS}, launched


def test_counts_survive_a_preemption(monkeypatch: pytest.MonkeyPatch):
    engine = interpreted.engine_of(interpreted.steps(monkeypatch))
    step, count = engine.step, 0

    def interrupted() -> Any:
        nonlocal count
        count += 1
        if count in (3, 5):
            engine.scheduler.preempt_all()
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    results = interpreted.generate(engine, [(PROMPTS[name], REQUESTS[name]) for name in ("frequency", "bias")])

    assert engine.scheduler.num_preemptions > 1
    for name, (tokens, told) in zip(("frequency", "bias"), results, strict=True):
        assert_greedy(name, tokens, told)


def test_a_grammars_mask_holds_in_graphs_beside_changes(monkeypatch: pytest.MonkeyPatch):
    made = interpreted.steps(monkeypatch, graphs=GRAPHS)
    engine = interpreted.engine_of(made)
    launch = made.launch

    def masked(plan: Any) -> Any:
        for item in plan.items:
            if item.samples and item.row % 2:
                item.mask = b"\x55" * 28
        return launch(plan)

    monkeypatch.setattr(made, "launch", masked)
    names = ["plain", "repetition", "frequency", "free"]
    results = interpreted.generate(engine, [(PROMPTS[name], REQUESTS[name]) for name in names])

    tokens = [result[0] for result in results]
    even = [all(token % 2 == 0 for token in row) for row in tokens]
    assert even in ([True, False, True, False], [False, True, False, True])


def test_what_a_step_is_described_in_is_not_written_again_before_the_step_has_read_it(monkeypatch: pytest.MonkeyPatch):
    made = interpreted.steps(monkeypatch, max_tokens=8)
    engine = interpreted.engine_of(made)
    launched: list[bool] = []

    class Reached(interpreted.Event):
        def record(self) -> None:
            self.index = len(launched)
            launched.append(False)

        def synchronize(self) -> None:
            launched[self.index] = True

    launch = made.launch

    def checked(plan: Any) -> Any:
        # A device may be that far behind: what was waited for has been read, nothing else.
        assert all(launched[: max(len(launched) - gpu_steps.RING + 1, 0)]), launched
        return launch(plan)

    monkeypatch.setattr(torch.cuda, "Event", Reached)
    monkeypatch.setattr(made, "launch", checked)
    interpreted.generate(engine, [([3 + i % 190 for i in range(60)], sampling_of(max_tokens=2))])

    assert len(launched) >= 8


def answers(engine: Any, requests: list[tuple[list[int], SamplingParams]]) -> list[list[int] | None]:
    """The tokens of each, None where it ended with an error."""
    for index, (prompt, params) in enumerate(requests):
        engine.submit(Submit(str(index), prompt, params))
    found: dict[str, list[int] | None] = {str(index): [] for index in range(len(requests))}
    while engine.has_work:
        for event in engine.step().events:
            found[event.request_id] = None if event.error else [*(found[event.request_id] or []), *event.token_ids]
    engine.check_integrity()
    return list(found.values())


def test_a_request_that_nothing_is_left_of_leaves_the_prefix_it_shares_as_it_is(monkeypatch: pytest.MonkeyPatch):
    made = interpreted.steps(monkeypatch)
    engine = interpreted.engine_of(made)
    shared = [3 + 7 * i % 190 for i in range(40)]
    answers(engine, [(shared, sampling_of(max_tokens=1, ignore_eos=True))])
    cached = list(engine.scheduler.pool._cached.values())
    kept = made._kv_cache[:, :, cached].clone()

    nothing = sampling_of(allowed_token_ids=(5,), bad_words_ids=((5,),))
    assert answers(engine, [([*shared, 9], nothing)]) == [None]

    assert engine.scheduler.prefix_hits == 32
    assert torch.equal(made._kv_cache[:, :, cached], kept)


def test_a_request_whose_values_are_not_finite_harms_no_other(monkeypatch: pytest.MonkeyPatch):
    asked = [([5 + n] * n, sampling_of(max_tokens=2, ignore_eos=True)) for n in (3, 19)]
    expected = answers(interpreted.engine_of(interpreted.steps(monkeypatch)), asked)
    made = interpreted.steps(monkeypatch)
    engine = interpreted.engine_of(made)
    made._decoder._tensors["embedding"][199] = float("nan")

    assert answers(engine, [([199] * 40, sampling_of())]) == [None]
    left = made._kv_cache.isnan().any(-1).any(-1).any(-1).any(0).any(0).nonzero().flatten().tolist()
    engine.scheduler.pool.forget_cached()
    # What it left is handed out next.
    engine.scheduler.pool._free = OrderedDict.fromkeys([*left, *engine.scheduler.pool._free])

    assert len(left) == 3
    assert answers(engine, asked) == expected


def test_what_is_compiled_while_requests_wait_is_counted_and_logged(monkeypatch, caplog):
    made = interpreted.steps(monkeypatch)
    engine = interpreted.engine_of(made)
    source = SimpleNamespace(name="_decode")

    def compiled(*_: Any, cache_hit: bool = False) -> None:
        made._compilations(src=source, cache_hit=cache_hit, times=None)

    def counted() -> int:
        engine.submit(Submit("a", PROMPTS["free"], sampling_of(max_tokens=1), ()))
        stats = [engine.step().stats for _ in iter(lambda: engine.has_work, False)]
        return stats[-1].compilations

    compiled()
    made.is_ready()
    compiled(cache_hit=True)
    monkeypatch.setattr(made, "_capture", compiled)
    made._uncaptured.append(GRAPHS[0])
    assert made.prepare()
    assert counted() == 0
    assert not caplog.records

    compiled()

    assert counted() == 1
    assert "compiled the kernel _decode while requests waited" in caplog.text


class Made(TorchDispatchMode):
    """The operations that make a tensor, by name. Views and what is written in place make none."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        if isinstance(result, torch.Tensor) and not operation.is_view and not any(result is of for of in given):
            self.operations.add(str(operation))
        return result


def test_a_steady_step_makes_no_tensor(monkeypatch: pytest.MonkeyPatch):
    made = interpreted.steps(monkeypatch, graphs=GRAPHS[:2], max_tokens=32)
    engine, seen = interpreted.engine_of(made), Made()
    launch, count = made.launch, 0

    def watched(plan: Any) -> Any:
        nonlocal count
        if any(item.admission for item in plan.items):
            return launch(plan)
        count += 1
        with seen:
            return launch(plan)

    monkeypatch.setattr(made, "launch", watched)
    drawn = sampling_of(temperature=1.0, top_p=0.9, logprobs=20, max_tokens=3)
    # One chunk after the other beside the streams: those steps are launched, the others replayed.
    long = [3 + i % 190 for i in range(50)]
    interpreted.generate(engine, [(PROMPTS["bias"], REQUESTS["bias"]), (PROMPTS["free"], drawn), (long, drawn)])

    assert count > 3
    # Those are the interpreter's: it makes copies of a kernel's arguments.
    assert seen.operations <= {"aten.empty.memory_format", "aten.new_empty.default"}


@pytest.fixture
def rows_of_mlps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many tokens each launched MLP was, since the test began."""
    rows: list[int] = []
    activate = gpu_decoder.act_mul

    def counted(gate_up: torch.Tensor, out: torch.Tensor, *others: object) -> None:
        rows.append(len(out))
        activate(gate_up, out, *others)

    monkeypatch.setattr(gpu_decoder, "act_mul", counted)
    return rows


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_the_last_layer_of_a_prompt_ends_with_the_tokens_that_yield_logits(monkeypatch, rows_of_mlps, biased):
    model = replace(interpreted.MODEL, num_layers=2, windows=(None, None), output_bias=biased, mlp_bias=biased)
    made = interpreted.steps(monkeypatch, model)
    prompts = [[3 + (7 * i + 41 * n) % 190 for i in range(9 + 8 * n)] for n in range(3)]
    # The second is a chunk of a longer prompt.
    items = [StepItem(row, 0, len(of), [2 * row, 2 * row + 1], samples=row != 1) for row, of in enumerate(prompts)]
    for item, tokens in zip(items, prompts, strict=True):
        item.admission = Admission([*tokens, 5], len(tokens), sampling_of(), (), 0)

    launched = made.launch(StepPlan(items))

    assert rows_of_mlps == [51, 2]
    tokens = made.collect(launched).tokens
    logits = made._decoder.logits[:2].float()
    for of, row, token in zip((prompts[0], prompts[2]), logits, tokens, strict=True):
        expected = interpreted.logits_of(of, model)[-1]
        assert (row - expected).norm() < 0.01 * expected.norm()
        assert token == int(row.argmax())


@pytest.mark.parametrize("size", [70, 130])
def test_the_gated_product_of_up_to_128_tokens_is_one_with_its_activation(monkeypatch, rows_of_mlps, size):
    model = replace(interpreted.MODEL, num_layers=2, windows=(None, None))
    made = interpreted.steps(monkeypatch, model, max_tokens=192)
    prompts = [[3 + (7 * i + 41 * n) % 190 for i in range(of)] for n, of in enumerate((size // 2, size - size // 2))]
    items = [StepItem(row, 0, len(of), [*range(5 * row, 5 * row + 5)], True) for row, of in enumerate(prompts)]
    for item, tokens in zip(items, prompts, strict=True):
        item.admission = Admission(tokens, len(tokens), sampling_of(), (), 0)

    made.collect(made.launch(StepPlan(items)))

    assert rows_of_mlps == ([2] if size <= gpu_decoder.GATED_TOKENS else [size, 2])
    for of, row in zip(prompts, made._decoder.logits[:2].float(), strict=True):
        expected = interpreted.logits_of(of, model)[-1]
        assert (row - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(
    ("sizes", "max_tokens", "graphs", "rows"),
    [((40,), 16, (), [0, 0, 1]), ((40, 20), 44, GRAPHS[2:3], [1, 12])],
    ids=["launched", "graphs"],
)
def test_tokens_after_prompts_in_chunks_are_the_references(monkeypatch, rows_of_mlps, sizes, max_tokens, graphs, rows):
    made = interpreted.steps(monkeypatch, graphs=graphs, max_tokens=max_tokens)
    prompts = [[3 + (7 * i + 41 * n) % 190 for i in range(size)] for n, size in enumerate(sizes)]

    results = interpreted.generate(interpreted.engine_of(made), [(of, sampling_of(max_tokens=2)) for of in prompts])

    assert rows_of_mlps == rows
    for prompt, (tokens, _) in zip(prompts, results, strict=True):
        assert len(tokens) == 2
        logits = interpreted.logits_of([*prompt, *tokens])[len(prompt) - 1 : -1]
        assert all(float(row.max() - row[token]) < 0.05 for row, token in zip(logits, tokens, strict=True))


def test_a_long_prompt_whose_keys_are_split_over_programs_yields_the_references_tokens(monkeypatch):
    monkeypatch.setattr(prefill_attention, "LEAST_KEYS", 16)
    split: list[int] = []
    attend = gpu_decoder.prefill_attention

    def watched(qkv: Any, loads: Any, tables: Any, tiles: torch.Tensor, *rest: Any, **options: Any) -> None:
        if int(tiles[:, 7].max()) > 1:
            split.append(len(tiles))
        attend(qkv, loads, tables, tiles, *rest, **options)

    monkeypatch.setattr(gpu_decoder, "prefill_attention", watched)
    tiling = interpreted.steps(monkeypatch)._tiling
    layout = Layout.mixed(2, 16, tiling)
    made = interpreted.steps(monkeypatch, max_tokens=26, graphs=(layout,))
    scratch = made._decoder._tile_scratch
    assert scratch is not None
    scratch.partial.fill_(float("nan"))
    prompts = [[3 + (7 * i + 41 * n) % 190 for i in range(size)] for n, size in enumerate((3, 57))]
    engine = interpreted.engine_of(made)
    engine._prompt_tokens = lambda decodes, context: 16

    results = interpreted.generate(engine, [(of, sampling_of(max_tokens=2)) for of in prompts])

    assert split == [layout.tiles] * 2
    assert not scratch.finished.any()
    for prompt, (tokens, _) in zip(prompts, results, strict=True):
        logits = interpreted.logits_of([*prompt, *tokens])[len(prompt) - 1 : -1]
        assert len(tokens) == 2
        assert all(float(row.max() - row[token]) < 0.05 for row, token in zip(logits, tokens, strict=True))


@pytest.mark.parametrize(("max_tokens", "tiles"), [(96, [1, 1]), (72, [])])
def test_wide_tiles_are_compiled_before_a_request_needs_them(monkeypatch, max_tokens, tiles):
    launched: list[int] = []
    monkeypatch.setattr(prefill_attention_hopper, "takes", lambda cache, dtype: True)
    monkeypatch.setattr(prefill_attention_hopper, "prefill_attention", lambda *given: launched.append(len(given[4])))
    made = interpreted.steps(monkeypatch, max_tokens=max_tokens)

    made.capture(lambda: None)

    assert launched == tiles
    assert made._decoder._kv_cache[:, :, :-1].abs().max() == 0, "written where no padding is"


def test_without_graphs_the_products_of_any_number_of_decodes_are_compiled_before_they_are_needed(monkeypatch):
    made = interpreted.steps(monkeypatch, max_seqs=64)

    made.capture(lambda: None, eager=True)

    def kernel(tokens: int) -> tuple[int, bool]:
        """What small_linear compiles for a number of tokens: the columns of a tile, and whether they are full."""
        columns = small_linear._columns(tokens)
        return columns, tokens % columns == 0

    tried = {kernel(layout.decodes) for layout in made._graphs}
    assert tried == {kernel(decodes) for decodes in range(1, 65)}


@pytest.mark.parametrize(("max_tokens", "tiles"), [(70, {"not full"}), (130, {"full", "not full"})])
def test_the_gated_product_of_any_step_is_compiled_before_it_is_needed(monkeypatch, max_tokens, tiles):
    model = replace(interpreted.MODEL, num_layers=2, windows=(None, None))
    made = interpreted.steps(monkeypatch, model, max_seqs=4, max_tokens=max_tokens)
    tried: set[str] = set()

    def counted(x: torch.Tensor, *given: Any, **options: Any) -> None:
        if options.get("gated") and len(x) > gpu_decoder.FUSED_TOKENS:
            tried.add("full" if len(x) % small_linear.MAX_TOKENS == 0 else "not full")

    monkeypatch.setattr(gpu_decoder, "small_linear", counted)
    for other in ("prefill_attention", "decode_attention", "rope_kv", "rms_norm"):
        monkeypatch.setattr(gpu_decoder, other, lambda *given, **options: None)
    made.capture(lambda: None)

    assert tried == tiles


def test_a_prompt_that_is_scored_goes_through_the_whole_model(monkeypatch, rows_of_mlps):
    made = interpreted.steps(monkeypatch, max_tokens=24)
    engine = interpreted.engine_of(made)
    prompt = [3 + 7 * i % 190 for i in range(40)]
    for name, of, params in (
        ("beside", prompt[:9], sampling_of()), ("scored", prompt, sampling_of(prompt_logprobs=1, max_tokens=1)),
    ):  # fmt: skip
        engine.submit(Submit(name, of, params))
    told = None
    while engine.has_work:
        for event in engine.step().events:
            assert event.error is None
            told = event.prompt_logprobs or told

    assert rows_of_mlps == [24, 24, 3]
    assert told is not None
    expected = interpreted.logits_of(prompt).log_softmax(-1)
    assert len(told) == len(prompt) - 1
    for row, found, token in zip(expected, told, prompt[1:], strict=False):
        assert abs(found.logprob - float(row[token])) < 0.05


def test_deterministic_steps_give_the_same_bits_alone_in_company_launched_and_in_graphs(monkeypatch):
    interpreted.products_of_a_matrix_unit(monkeypatch)
    tiling = interpreted.steps(monkeypatch, deterministic=True)._tiling
    graphs = (Layout.of_decodes(4, tiling), Layout.mixed(4, 32, tiling))
    request = (PROMPTS["bias"], sampling_of(temperature=1.0, top_p=0.9, seed=3, logprobs=1, max_tokens=3))
    others = [(PROMPTS[name], sampling_of(max_tokens=2)) for name in ("free", "plain")]

    def told(others: list[Any], **settings: Any) -> Any:
        made = interpreted.steps(monkeypatch, deterministic=True, **settings)
        return interpreted.generate(interpreted.engine_of(made), [*others, request])[-1]

    alone = told([])
    assert len(alone[1]) == 3
    assert told(others, graphs=graphs) == alone
    assert told(others[:1], max_tokens=16) == alone
