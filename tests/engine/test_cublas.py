"""Which algorithm a product takes; on a GPU, that it computes the same."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from octavo_engine.kernels.gpu.cublas import CANDIDATES, TABLE, Lt, Products, place, places  # noqa: E402

MEASURED = {"a card": {"130100": {"6144 x 4096": {"80": 5}, "4096 x 4096 +": {"80": 2}}}}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_measured_shape_takes_the_measured_algorithm():
    assert place(places(MEASURED, "a card", 130100), 80, 6144, 4096) == 5


@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(81, 6144, 4096), (80, 4096, 6144)])
def test_a_shape_that_was_not_measured_is_left_to_cublas(tokens, outputs, inputs):
    assert place(places(MEASURED, "a card", 130100), tokens, outputs, inputs) is None


@pytest.mark.parametrize(("add", "expected"), [(True, 2), (False, None)])
def test_an_addition_is_measured_apart(add, expected):
    assert place(places(MEASURED, "a card", 130100), 80, 4096, 4096, add) == expected


@pytest.mark.parametrize(("device", "version"), [("another card", 130100), ("a card", 130200)])
def test_a_table_of_another_device_or_version_is_not_used(device, version):
    assert place(places(MEASURED, device, version), 80, 6144, 4096) is None


def test_the_table_names_algorithms_that_cublas_is_asked_for():
    table = json.loads(TABLE.read_text())
    found = [
        number for card in table.values() for shapes in card.values() for s in shapes.values() for number in s.values()
    ]

    assert found
    assert all(0 <= number < CANDIDATES for number in found)


def test_without_a_gpu_a_product_is_torchs():
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    out = torch.empty(3, 5)

    Products(torch.device("cpu")).mm(x, weight, out)

    assert torch.equal(out, torch.mm(x, weight.t()))


@pytest.mark.parametrize("tokens", [0, 3])
def test_without_a_gpu_a_product_is_added_by_torch_in_place(tokens):
    x, weight, start = torch.randn(tokens, 8), torch.randn(5, 8), torch.randn(tokens, 5)
    into = start.clone()

    Products(torch.device("cpu")).add(x, weight, into)

    assert torch.allclose(into, start + torch.mm(x, weight.t()), atol=1e-5)


def operands(tokens: int, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    return x, torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) / 16


SHAPES = [(80, 6144, 4096), (896, 4096, 14336), (77, 512, 256)]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), SHAPES)
def test_every_ranked_algorithm_computes_the_product(tokens, outputs, inputs):
    lt = Lt(torch.device("cuda"))
    x, weight = operands(tokens, outputs, inputs)
    expected = x.float() @ weight.float().t()
    ranked = lt.candidates(tokens, outputs, inputs)

    assert ranked
    for algorithm in ranked:
        out = torch.full((tokens, outputs), float("nan"), device="cuda", dtype=torch.bfloat16)
        lt.run(algorithm, x, weight, out)
        assert (out.float() - expected).norm() / expected.norm() < 6e-3


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), SHAPES)
def test_a_ranked_algorithm_adds_the_product_or_refuses(tokens, outputs, inputs):
    lt = Lt(torch.device("cuda"))
    x, weight = operands(tokens, outputs, inputs)
    start = 8 * torch.randn(tokens, outputs, device="cuda", dtype=torch.bfloat16)
    expected = start.float() + x.float() @ weight.float().t()
    added = 0

    for algorithm in lt.candidates(tokens, outputs, inputs):
        into = start.clone()
        try:
            lt.run(algorithm, x, weight, into, add=True)
        except RuntimeError:  # the ranking knows of no addition
            continue
        assert (into.float() - expected).norm() / expected.norm() < 6e-3
        added += 1

    assert added


@pytest.mark.gpu
@needs_gpu
def test_a_shape_that_was_measured_both_ways_is_computed_both_ways():
    products = Products(torch.device("cuda"))
    products._known = {"512 x 256": {"77": 0}, "512 x 256 +": {"77": 0}}
    x, weight = operands(77, 512, 256)
    out = torch.full((77, 512), float("nan"), device="cuda", dtype=torch.bfloat16)
    expected = x.float() @ weight.float().t()

    products.mm(x, weight, out)
    assert (out.float() - expected).norm() / expected.norm() < 6e-3
    products.add(x, weight, out)

    assert (out.float() - 2 * expected).norm() / expected.norm() < 1.2e-2
    assert None not in products._taken.values()
