"""Products of a few tokens with a weight matrix, bound by reading the weights, with what surrounds them fused in.

The weights fill the rows of the matrix unit and the tokens its columns, so that few tokens waste nothing. A program
owns WIDTH rows of the weights and reads them once. Each program reads the tokens, too, from the second-level cache:
many of them want many rows to a program, and a narrow matrix then has too few programs, so that its inner dimension is
split. The parts are added up in their order by the program that ends last.

RMSNorm is spread over the products around it. A product that ends a residual branch adds the residual, stores the sum,
stores it again times the weight of the norm that follows, and stores its share of the sum of squares; the product that
begins the next branch reads the second and scales its result by the root of the shares' total. Five launches a layer
fewer than with kernels of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from octavo_engine.kernels import act_mul
from octavo_engine.kernels.gpu.act_mul import activated
from octavo_engine.kernels.gpu.early_launch import LINE, asked_lines, early_launch, prefetch, release, wait

MAX_TOKENS = 128
"""Tokens that a program holds at most."""
MAX_SPLIT_OUTPUTS = 1 << 15
"""Outputs times parts of a product that is split; a matrix with more outputs has programs enough."""
MIN_WIDTH = 16


@dataclass(frozen=True)
class Shape:
    """How a product is cut: rows of weights per program, inner elements per step, steps in flight, warps, parts of the
    inner dimension.
    """

    width: int
    depth: int
    stages: int
    warps: int
    splits: int = 1


@dataclass(frozen=True)
class Partial:
    """Where the parts of a product meet."""

    sums: Tensor  # float32
    finished: Tensor  # [programs] int32, zero between launches

    @classmethod
    def allocate(cls, tokens: int, device: torch.device) -> Partial:
        """For products of up to so many tokens."""
        columns = _columns(tokens)
        return cls(
            torch.empty(MAX_SPLIT_OUTPUTS * columns, dtype=torch.float32, device=device),
            torch.zeros(MAX_SPLIT_OUTPUTS // MIN_WIDTH, dtype=torch.int32, device=device),
        )


def choose_shape(
    tokens: int, outputs: int, inputs: int, gated: bool = False, shared_memory_bytes: int = 227 * 1024
) -> Shape:
    """What `benchmarks/tune_small_linear.py` found for the shapes of 8 billion parameters, carried over by size.

    Narrow matrices are cut so that each multiprocessor gets one program or two; wide ones coarsely, so that the tokens
    are read less often. shared_memory_bytes: what a program may have on this device.
    """
    narrow = outputs <= 2 * 132 * 16
    if tokens == 1:
        # A whole tile of 16 to 32 KiB is asked for at once, and a program has one or a few of them.
        if gated:
            shape = Shape(2, 4096, 1, 8)
        else:
            shape = Shape(8, 2048, 1, 4) if outputs * inputs < 2**25 else Shape(4, 2048, 1, 8)
    elif gated:
        # Few stages leave room for a second program, or for the kernel behind.
        if tokens <= 16:
            shape = Shape(64, 128, 3, 4)
        elif tokens <= 32:
            shape = Shape(128, 128, 3, 4) if outputs >= 96 * 128 else Shape(64, 128, 5, 4)
        else:
            shape = Shape(128, 64, 4, 8) if outputs >= 96 * 128 else Shape(64, 64, 3, 4 if tokens <= 64 else 8)
    elif outputs > 32768:
        shape = Shape(128, 128, 3, 4) if tokens <= 16 else Shape(128, 128, 2, 8)
    elif not narrow and outputs <= 132 * 64:
        shape = Shape(64, 128, 5 if tokens <= 32 else 4, 4)
    elif tokens <= 16:
        shape = Shape(16, 256, 6, 2) if narrow else Shape(32, 256, 4, 2)
    elif tokens <= 32 and narrow:
        shape = Shape(32, 256, 6, 2)
    else:
        # With 32 rows and no split the products of 64 tokens took 5.5 ms a step on an H200 (floor 3.5): the tokens came
        # from the cache twice as often as the weights from memory.
        shape = Shape(64, 128, 4 if narrow else 3, 4, splits=2)
    depth, stages, splits = shape.depth, shape.stages, shape.splits
    if inputs % (splits * 32) or outputs * splits > MAX_SPLIT_OUTPUTS:
        splits = 1
    while inputs % (splits * depth):
        depth //= 2
    columns = 0 if tokens == 1 else _columns(tokens)
    row_bytes = 2 * (shape.width * (2 if gated else 1) + columns)
    while columns and depth * row_bytes * stages > shared_memory_bytes and stages > 2:
        stages -= 1
    while columns and depth * row_bytes * stages > shared_memory_bytes and depth > 32:
        depth //= 2
    return Shape(shape.width, depth, stages, shape.warps, splits)


def shared_memory_bytes(device: torch.device) -> int:
    """What a program may have at most, as triton's launcher checks it."""
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return int(properties["max_shared_mem"])


def _columns(tokens: int) -> int:
    return min(max(16, triton.next_power_of_2(tokens)), MAX_TOKENS)


def num_shares(outputs: int, shape: Shape) -> int:
    return triton.cdiv(outputs, shape.width)


def small_linear(
    x: Tensor, weight: Tensor, out: Tensor, *, shape: Shape, bias: Tensor | None = None,
    norm_shares: Tensor | None = None, eps: float = 0.0, gated: bool = False, residual: Tensor | None = None,
    next_norm: Tensor | None = None, shares: Tensor | None = None, partial: Partial | None = None,
    activation: str = "silu",
) -> None:  # fmt: skip
    """out = x · weightᵀ + bias, with:

    norm_shares: [n, tokens] float32, x is normed by the root of their total over its width;
    gated: weight is gate over up, and out activation(gate) * up; bias must be None then;
    residual: [tokens, outputs], the sum goes there, and out becomes sum * next_norm, shares [n, tokens] its squares;
    partial: for a shape with splits.
    x: [tokens, inputs], weight: [outputs, inputs] (twice the outputs when gated), out: [tokens, outputs].
    """
    tokens, inputs = x.shape
    outputs = out.shape[1]
    if tokens == 1:
        _one_token(x, weight, out, shape, bias, norm_shares, eps, gated, residual, next_norm, shares, activation)
        return
    columns = _columns(tokens)
    if shape.splits == 1:
        partial = None
    else:
        assert partial, shape
        assert outputs * (2 if gated else 1) * shape.splits <= MAX_SPLIT_OUTPUTS, shape
    grid = (triton.cdiv(outputs, shape.width), triton.cdiv(tokens, MAX_TOKENS), shape.splits)
    _small_linear[grid](
        x, weight, bias, norm_shares, 0 if norm_shares is None else norm_shares.shape[0], residual, next_norm, shares,
        out, partial.sums if partial else None, partial.finished if partial else None, tokens, eps, INPUTS=inputs,
        OUTPUTS=outputs, WIDTH=shape.width, COLUMNS=columns, DEPTH=shape.depth, STAGES=shape.stages,
        SPLITS=shape.splits, GATED=gated, ACTIVATION=activation,
        SHARES=1 if norm_shares is None else triton.next_power_of_2(norm_shares.shape[0]),
        FULL=tokens % columns == 0,
        LINES=asked_lines(weight.shape[0] * shape.splits, inputs // shape.splits * weight.element_size()),
        num_warps=shape.warps, **early_launch(tokens),
    )  # fmt: skip


def _one_token(
    x: Tensor, weight: Tensor, out: Tensor, shape: Shape, bias: Tensor | None, norm_shares: Tensor | None, eps: float,
    gated: bool, residual: Tensor | None, next_norm: Tensor | None, shares: Tensor | None, activation: str,
) -> None:  # fmt: skip
    inputs, outputs = x.shape[1], out.shape[1]
    _one_token_linear[(triton.cdiv(outputs, shape.width),)](
        x, weight, bias, norm_shares, 0 if norm_shares is None else norm_shares.shape[0], residual, next_norm, shares,
        out, eps, INPUTS=inputs, OUTPUTS=outputs, WIDTH=shape.width, DEPTH=shape.depth, STAGES=shape.stages,
        GATED=gated, ACTIVATION=activation,
        SHARES=1 if norm_shares is None else triton.next_power_of_2(norm_shares.shape[0]), num_warps=shape.warps,
        **early_launch(1),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_norm_shares"])
def _one_token_linear(
    x, weight, bias, norm_shares, num_norm_shares, residual, next_norm, shares, out, eps,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, SHARES: tl.constexpr, EARLY: tl.constexpr,
    LATE: tl.constexpr,
):  # fmt: skip
    """The same for a single token, without matrix units: weights go from memory to registers, many at a time."""
    program = tl.program_id(0)
    output = program * WIDTH + tl.arange(0, WIDTH)
    inner = tl.arange(0, DEPTH)
    is_output = output < OUTPUTS
    at_weight = tl.where(is_output, output, 0).to(tl.int64)[:, None] * INPUTS + inner[None, :]
    if EARLY:
        first = tl.load(weight + at_weight, eviction_policy="evict_first")
        if GATED:
            first_up = tl.load(weight + OUTPUTS * INPUTS + at_weight, eviction_policy="evict_first")
        wait(EARLY, LATE)
    if norm_shares is not None:
        share = tl.arange(0, SHARES)
        squares = tl.load(norm_shares + share, mask=share < num_norm_shares, other=0.0)
    added, old, factor = _beside(bias, residual, next_norm, output, is_output, output, is_output, None)
    sums = tl.zeros([WIDTH], tl.float32)
    up_sums = tl.zeros([WIDTH], tl.float32)
    if EARLY:
        first_x = tl.load(x + inner).to(tl.float32)[None, :]
        sums += tl.sum(first.to(tl.float32) * first_x, 1)
        if GATED:
            up_sums += tl.sum(first_up.to(tl.float32) * first_x, 1)
    for start in tl.range(DEPTH if EARLY else 0, INPUTS, DEPTH, num_stages=STAGES):
        w = tl.load(weight + at_weight + start, eviction_policy="evict_first").to(tl.float32)
        v = tl.load(x + start + inner).to(tl.float32)[None, :]
        if GATED:
            u = tl.load(weight + OUTPUTS * INPUTS + at_weight + start, eviction_policy="evict_first").to(tl.float32)
            up_sums += tl.sum(u * v, 1)
        sums += tl.sum(w * v, 1)
    if norm_shares is not None:
        scale = tl.rsqrt(tl.sum(squares, 0) / INPUTS + eps)
        sums *= scale
        up_sums *= scale
    _finish(
        sums, up_sums, added, old, factor, output, is_output, bias, residual, shares, program, None, None, None, out,
        GATED, ACTIVATION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "num_norm_shares"])
def _small_linear(
    x, weight, bias, norm_shares, num_norm_shares, residual, next_norm, shares, out, partial, finished, tokens, eps,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, SPLITS: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, SHARES: tl.constexpr,
    FULL: tl.constexpr, LINES: tl.constexpr, EARLY: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    output = program * WIDTH + tl.arange(0, WIDTH)
    token = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    is_token = token < tokens
    is_output = output < OUTPUTS
    # Rows past the end read the first row instead: a mask on every load would cost more than the waste.
    at_weight = tl.where(is_output, output, 0).to(tl.int64)[:, None] * INPUTS + inner[None, :]
    # Tokens past the end read nothing: all programs asking for the same row sixteen times slowed a product by 7 %.
    # Where there are none, the mask itself would cost 6 % at 64 tokens.
    at_x = token[None, :] * INPUTS + inner[:, None]
    EACH: tl.constexpr = INPUTS // SPLITS
    split = tl.program_id(2)
    at_weight += split * EACH
    at_x += split * EACH
    if EARLY and LINES:
        SIZE: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
        line = tl.arange(0, LINES) * (LINE // SIZE)
        asked = tl.where(is_output, output, 0).to(tl.int64)[:, None] * INPUTS + split * EACH + line[None, :]
        prefetch(weight + asked)
        if GATED:
            prefetch(weight + OUTPUTS * INPUTS + asked)
    wait(EARLY, LATE)
    if norm_shares is not None:
        # Asked for before the weights and used after them: its latency hides behind theirs.
        share = tl.arange(0, SHARES)
        squares = tl.load(
            norm_shares + share[:, None] * tokens + token[None, :],
            mask=(share < num_norm_shares)[:, None] & is_token[None, :], other=0.0,
        )  # fmt: skip
    mask = is_output[:, None] & is_token[None, :]
    to = token.to(tl.int64)[None, :] * OUTPUTS + output[:, None]
    added, old, factor = _beside(bias, residual, next_norm, output, is_output, to, mask, token)
    sums = tl.zeros([WIDTH, COLUMNS], tl.float32)
    up_sums = tl.zeros([WIDTH, COLUMNS], tl.float32)
    for start in tl.range(0, EACH, DEPTH, num_stages=STAGES):
        w = tl.load(weight + at_weight + start, eviction_policy="evict_first")
        v = tl.load(x + at_x + start) if FULL else tl.load(x + at_x + start, mask=is_token[None, :], other=0.0)
        sums = tl.dot(w, v, sums)
        if GATED:
            u = tl.load(weight + OUTPUTS * INPUTS + at_weight + start, eviction_policy="evict_first")
            up_sums = tl.dot(u, v, up_sums)
    release(LATE)
    is_last = True
    if SPLITS > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + program
        at_part = tl.arange(0, WIDTH)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        PART: tl.constexpr = WIDTH * COLUMNS * (2 if GATED else 1)
        parts = partial + tile * (SPLITS * PART) + at_part
        tl.store(parts + split * PART, sums)
        if GATED:
            tl.store(parts + split * PART + WIDTH * COLUMNS, up_sums)
        tl.debug_barrier()  # every thread's part is written before the count says so
        is_last = tl.atomic_add(finished + tile, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            tl.store(finished + tile, 0)
            sums = tl.zeros([WIDTH, COLUMNS], tl.float32)
            up_sums = tl.zeros([WIDTH, COLUMNS], tl.float32)
            for part in tl.static_range(SPLITS):
                # From the second-level cache: the first-level one of this processor may hold an older product's.
                sums += tl.load(parts + part * PART, cache_modifier=".cg")
                if GATED:
                    up_sums += tl.load(parts + part * PART + WIDTH * COLUMNS, cache_modifier=".cg")
    if is_last:
        if norm_shares is not None:
            scale = tl.rsqrt(tl.sum(squares, 0) / INPUTS + eps)[None, :]
            sums *= scale
            up_sums *= scale
        _finish(
            sums, up_sums, added, old, factor, to, mask, bias, residual, shares, program, tokens, token, is_token,
            out, GATED, ACTIVATION,
        )  # fmt: skip


@triton.jit
def _beside(bias, residual, next_norm, output, is_output, to, mask, token):
    """What is added to the product and multiplied with it: bias, residual, the next norm's weights; 0 for none.

    Asked for before the product: after it nothing else is under way, and a microsecond's wait is one between kernels.
    Of a layer of 8 sequences, four such products, it was 2.2 % (H200).
    """
    added, old, factor = 0.0, 0.0, 0.0
    if bias is not None:
        added = _of_output(bias, output, is_output, token)
    if residual is not None:
        old = tl.load(residual + to, mask=mask, other=0.0)
        factor = _of_output(next_norm, output, is_output, token)
    return added, old, factor


@triton.jit
def _finish(
    sums, up_sums, added, old, factor, to, mask, bias, residual, shares, program, tokens, token, is_token,
    out, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """What comes after the product: bias, activation, residual and what the next norm needs.

    sums: [outputs, tokens], as are old, to and mask, or [outputs] for a single token, which is None then.
    """
    if bias is not None:
        sums += added
    kind = out.dtype.element_ty
    if GATED:
        sums = activated(sums, ACTIVATION) * up_sums
    if residual is not None:
        sums = sums.to(kind).to(tl.float32) + old.to(tl.float32)
        kept = sums.to(kind)
        tl.store(residual + to, kept, mask=mask)
        sums = kept.to(tl.float32)
        share = tl.sum(tl.where(mask, sums * sums, 0.0), 0)
        if token is None:
            tl.store(shares + program, share)
        else:
            tl.store(shares + program * tokens + token, share, mask=is_token)
        sums *= factor
    tl.store(out + to, sums.to(kind), mask=mask)


@triton.jit
def _of_output(values, output, is_output, token):
    """One number for each output, in the shape of the sums."""
    found = tl.load(values + output, mask=is_output, other=0.0).to(tl.float32)
    return found if token is None else found[:, None]


def reference(
    x: Tensor, weight: Tensor, *, bias: Tensor | None = None, norm_shares: Tensor | None = None, eps: float = 0.0,
    gated: bool = False, residual: Tensor | None = None, next_norm: Tensor | None = None, activation: str = "silu",
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(out, residual, squares of the residual's rows) in float32; the last two None without a residual."""
    y = F.linear(x.float(), weight.float())
    if norm_shares is not None:
        y *= torch.rsqrt(norm_shares.sum(0) / x.shape[1] + eps).unsqueeze(1)
    if bias is not None:
        y += bias.float()
    if gated:
        y = act_mul.reference(y, activation)
    if residual is None:
        return y, None, None
    assert next_norm is not None
    total = y + residual.float()
    return total * next_norm.float(), total, total.square().sum(-1)
