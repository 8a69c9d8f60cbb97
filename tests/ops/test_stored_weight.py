"""Products with weights as checkpoints store them: the bits of each format's definition by the emulated tree, values
against fp64, X2, and what is refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glmx import ops, reference
from glmx.ops import Matrix, StoredWeight
from glmx.ops.stored_weight import StoredFormat
from glmx.reference.gemm_tree import flush32, gemm_tree, round32_sum
from glmx.reference.stored_weight import dense, int4_values
from tests.ops.backends import needs_the_cpus_products
from tests.ops.cases import BF16, F32, Case, cases, offsets_of, same_bits, values
from tests.ops.checks import F64, U32, assert_within, gemm_bound, rounding
from tests.ops.stored_cases import FORMATS, SMALL, operands, stored
from tests.ops.test_grouped_gemm import as_grouped, silu_exact, spans

CASES = [case for op in ("grouped_gemm", "linear") for case in cases(op) if case.name.startswith("stored-")]


def as_stored(kwargs: dict[str, Any]) -> dict[str, Any]:
    weight = kwargs["w"]
    return {**as_grouped({**kwargs, "w": torch.empty(0)}), "w": weight}


@pytest.mark.parametrize("case", [c for c in CASES if "silu1" not in c.name], ids=str)
def test_forward_has_the_bits_of_the_definition(case: Case) -> None:
    """The tree over bf16 weights; where a row has one scale, its sum times that, then the bias, then one rounding."""
    kwargs = as_stored(case.make())
    x, (w_ENK, factor_EN) = kwargs["x"], dense(kwargs["w"])
    want = torch.zeros(len(x), w_ENK.shape[1])
    for e, span in enumerate(spans(kwargs["expert_offsets"])):
        want[span] = gemm_tree(x[span], w_ENK[e])
        if factor_EN is not None:
            want[span] = flush32((want[span] * factor_EN[e]).to(F64)).float()
        if "bias" in kwargs:
            want[span] = round32_sum(want[span].to(F64), kwargs["bias"][e].to(F64).expand_as(want[span])).float()
    got = getattr(ops, case.op)(**case.make())
    assert same_bits(got.view(want.shape), want.to(got.dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_against_the_oracle(case: Case) -> None:
    kwargs = as_stored(case.make())
    x, (w_ENK, factor_EN), silu = kwargs["x"], dense(kwargs["w"]), kwargs.get("silu_mul", False)
    got = getattr(ops, case.op)(**case.make())
    exact = getattr(reference, case.op)(**case.make(), exact=True)
    bound = torch.zeros_like(exact)
    for e, span in enumerate(spans(kwargs["expert_offsets"])):
        factor = 1.0 if factor_EN is None else factor_EN[e].to(F64)
        sums, error = x[span].to(F64) @ w_ENK[e].to(F64).T * factor, gemm_bound(x[span], w_ENK[e]) * factor
        bias = kwargs["bias"][e].to(F64) if "bias" in kwargs else 0.0
        error = error + U32 * (2 * sums.abs() + 2 * error + bias)
        bound[span] = silu_exact(sums + bias, error)[1] if silu else error.abs()
    assert_within(got, exact, bound + rounding(exact, got.dtype), str(case))


@pytest.mark.parametrize("format", ["int4", "fp8_blocks", "bf16"])
def test_blocks_and_groups_have_the_bits_of_the_dense_weight(format: StoredFormat) -> None:
    needs_the_cpus_products(BF16)
    gate_up, down = stored(format, 3, 160, 200, parts=2), stored(format, 3, 200, 80, seed=1)
    x, weights = values(9, 200, dtype=BF16), values(9, 2, seed=1)
    ids = torch.randint(-1, 3, (9, 2), generator=torch.Generator().manual_seed(2)).int()
    want = ops.moe_mlp(x, weights, ids, dense(gate_up)[0], dense(down)[0])
    assert same_bits(ops.moe_mlp(x, weights, ids, gate_up, down), want)


def test_every_value_of_a_byte_is_what_torch_says() -> None:
    """One column of x: the sums are the weights themselves, all 256 of them, NaN included."""
    bytes_ = torch.arange(256, dtype=torch.int64).to(torch.uint8).view(256, 1)
    ones, x = torch.ones(256, 1), torch.ones(1, 1, dtype=BF16)
    for format, view in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        matrix = Matrix(bytes_.view(view), ones)
        got = ops.linear(x, StoredWeight(format, [matrix]), out_dtype=F32)
        assert same_bits(got[0] + 0.0, matrix.values.float()[:, 0] + 0.0), format
    # The last two: products beyond the largest and below the smallest normal number.
    for scale in ([0.3, -7.0], [1.3 * 2.0**120, -1.3 * 2.0**-122]):
        blocks = Matrix(bytes_.view(torch.float8_e4m3fn), torch.tensor(scale)[:, None])
        got = ops.linear(x, StoredWeight("fp8_blocks", [blocks]), out_dtype=F32)
        product = flush32((blocks.values.float() * blocks.scale.repeat_interleave(128, 0)).to(F64)).bfloat16()
        assert same_bits(got[0] + 0.0, product.float()[:, 0] + 0.0), scale
    nibbles = torch.arange(16, dtype=torch.int32).view(16, 1)
    scale = torch.linspace(0.1, 3.0, 16).view(16, 1)
    got = ops.linear(x, StoredWeight("int4", [Matrix(nibbles, scale)], columns=1), out_dtype=F32)
    assert same_bits(got[0], ((nibbles - 8).float() * scale).bfloat16().float()[:, 0] + 0.0)


def test_int4_values_are_eight_in_a_word() -> None:
    assert int4_values(torch.tensor([[0x76543210, -0x01234568]], dtype=torch.int32), 16)[0].tolist() == [*range(-8, 8)]
    assert int4_values(torch.tensor([[0x76543210]], dtype=torch.int32), 3)[0].tolist() == [-8, -7, -6]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 31, 33, 300])
def test_x2_for_every_kind_of_block(rows: int, format: StoredFormat) -> None:
    x, w = values(300, 150, dtype=BF16), stored(format, 1, 70, 150)
    full = ops.linear(x, w)
    for start in (0, 300 - rows):
        assert same_bits(ops.linear(x[start : start + rows], w), full[start : start + rows])


@pytest.mark.parametrize("format", SMALL)
def test_matrices_may_lie_anywhere(format: StoredFormat) -> None:
    """At odd addresses, where the values' dtype allows, each with a page end behind its last byte."""
    w = stored(format, 2, 48, 260)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        step = tensor.element_size()
        room = torch.zeros(tensor.nbytes + 3 * step, dtype=torch.uint8)
        place = room[3 * step :].view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor)

    again = StoredWeight(format, [Matrix(moved(q), moved(s)) for q, s in w.matrices], columns=260)
    call = operands([1, 6], w)
    assert same_bits(ops.grouped_gemm(**{**call, "w": again}), ops.grouped_gemm(**call))
    assert again.nbytes == w.nbytes == sum(q.nbytes + s.nbytes for q, s in w.matrices)


def int8(rows: int = 4, K: int = 8, **changes: Any) -> Matrix:
    made = Matrix(torch.zeros(rows, K, dtype=torch.int8), torch.ones(rows, 1))
    return made._replace(**changes)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: StoredWeight("int2", [int8()]), "expected one of bf16, int8, int4, fp8, fp8_blocks: got 'int2'"),
        (lambda: StoredWeight("int8", []), "expected a multiple of parts, which is 1 or 2: got 0, parts is 1"),
        (lambda: StoredWeight("int8", [int8()], parts=2), "got 1, parts is 2"),
        (lambda: StoredWeight("int8", [int8(scale=None)]), r"matrices\[0\].scale: expected a tensor of shape \[4, 1\]"),
        (lambda: StoredWeight("int8", [int8(scale=torch.ones(4, 1).half())]), "scale: expected dtype torch.float32 or"),
        (lambda: StoredWeight("int8", [int8(scale=torch.ones(4))]), r"expected torch.float32 \[4, 1\]: got .* \[4\]"),
        (lambda: StoredWeight("int8", [int8(), int8(5)]), r"matrices\[1\].values: expected torch.int8 \[4, 8\]: got"),
        (lambda: StoredWeight("int8", [int8(values=torch.zeros(8, 4, dtype=torch.int8).T)]), "expected a contiguous"),
        (lambda: StoredWeight("fp8", [int8()]), "expected torch.float8_e4m3fn"),
        (lambda: StoredWeight("int4", [int8(values=torch.zeros(4, 2).int())], columns=17), r"int32 \[4, 3\]: got"),
        (lambda: StoredWeight("bf16", [int8(values=torch.zeros(4, 8).bfloat16())]), "scale: expected None with bf16"),
        (lambda: ops.linear(torch.ones(1, 8), StoredWeight("int8", [int8()])), "x: expected dtype torch.bfloat16 with"),
        (
            lambda: ops.linear(torch.ones(1, 8).bfloat16().requires_grad_(), StoredWeight("int8", [int8()])),
            "w: stored weights have no gradient, x requires one",
        ),
        (lambda: ops.linear(values(1, 9, dtype=BF16), StoredWeight("int8", [int8()])), r"w: expected w.shape\[-1\] =="),
        (
            lambda: ops.linear(values(1, 8, dtype=BF16), StoredWeight("int8", [int8()]), silu_mul=True),
            r"w: expected parts == 2 \(gate and up apart, for silu_mul\): got 1",
        ),
        (lambda: ops.linear(values(1, 8, dtype=BF16), StoredWeight("int8", [int8()] * 2)), "expected one expert's"),
        (
            lambda: ops.grouped_gemm(values(1, 8, dtype=BF16), StoredWeight("int8", [int8()] * 2), offsets_of([1])),
            r"expert_offsets: expected shape \[3\] \(E \+ 1\): got \[2\]",
        ),
        (
            lambda: ops.grouped_gemm(
                values(1, 8, dtype=BF16), StoredWeight("int8", [int8()]), offsets_of([1]), bias=values(1, 4)
            ),
            "bias: expected dtype bf16: got fp32",
        ),
        (
            lambda: ops.moe_mlp(
                values(1, 8, dtype=BF16),
                torch.ones(1, 1),
                torch.zeros(1, 1).int(),
                StoredWeight("int8", [int8()] * 2, parts=2),
                values(1, 8, 4, dtype=BF16),
            ),
            "expected both to be a StoredWeight, or none",
        ),
        (
            lambda: ops.moe_mlp(
                values(1, 8, dtype=BF16),
                torch.ones(1, 1),
                torch.zeros(1, 1).int(),
                StoredWeight("int8", [int8()] * 2, parts=2),
                stored("fp8", 1, 8, 4),
            ),
            "down_proj: expected format and scales of gate_up_proj",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
