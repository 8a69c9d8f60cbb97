"""Shared inputs of the op tests, and `evaluate`, which runs one. Above 800 lines: one list that all op tests read.

The same cases feed the oracle tests, the repeat tests, the ISA comparison and the golden bits. Legend: T tokens,
H hidden, E experts, K top-k, M/N/K GEMM sizes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from glmx import reference
from tests.ops import stored_cases
from tests.ops.inputs import BF16, DTYPES, F32, INF, NAN, Case, ids, offsets_of, spread, tag, topk_ids, values, wild

# The op's public functions by stem: golden bits and revisions are per stem.
STEMS = {
    "rms_norm": ("rms_norm",),
    "add_rms_norm": ("add_rms_norm",),
    "layer_norm": ("layer_norm",),
    "silu_mul": ("silu_mul",),
    "rope": ("rope", "rope_cos_sin"),
    "embedding": ("embedding",),
    "cache_append": ("cache_append",),
    "route_topk": ("route_topk",),
    "expert_plan": ("expert_plan",),
    "grouped_gemm": ("grouped_gemm", "grouped_gemm_dgrad", "grouped_gemm_wgrad", "linear"),
    "head_gemm": ("head_gemm",),
    "moe_combine": ("moe_combine",),
    "moe_mlp": ("moe_mlp",),
    "lm_head_logprob": ("lm_head_logprob",),
    "sum_squares": ("sum_squares",),
    "adamw": ("adamw",),
    "attention": ("attention",),
    "indexer_topk": ("indexer_topk",),
    "sparse_mla": ("sparse_mla",),
    "indexer_kl": ("indexer_kl",),
    "sample": ("sample",),
    "mtp_verify": ("mtp_verify",),
}


# --- row-wise ops
# -----------------------------------------------------------------------------------------------


ROW_SHAPES = [(1, 1), (3, 16), (5, 17), (2, 100), (67, 33), (130, 64)]


def rms_norm_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for T, H in ROW_SHAPES:
            yield Case(
                "rms_norm",
                f"{tag(dtype)}-{T}x{H}",
                lambda T=T, H=H, dtype=dtype: {
                    "x": values(T, H, seed=T, dtype=dtype),
                    "weight": values(H, seed=H + 1, dtype=dtype),
                    "eps": 1e-5,
                },
                ("x", "weight"),
            )
        yield Case(
            "rms_norm",
            f"{tag(dtype)}-leading-dims",
            lambda dtype=dtype: {
                "x": values(2, 3, 40, dtype=dtype),
                "weight": values(40, seed=1, dtype=dtype),
                "eps": 1e-6,
            },
            ("x", "weight"),
        )
        yield Case(
            "rms_norm",
            f"{tag(dtype)}-no-rows",
            lambda dtype=dtype: {
                "x": values(0, 8, dtype=dtype),
                "weight": values(8, dtype=dtype),
                "eps": 1e-5,
            },
            ("x", "weight"),
        )
        yield Case(
            "rms_norm",
            f"{tag(dtype)}-small",  # eps is as large as the mean of squares
            lambda dtype=dtype: {
                "x": values(5, 48, dtype=dtype, scale=2.0**-8),
                "weight": values(48, seed=1, dtype=dtype),
                "eps": 1e-5,
            },
            ("x", "weight"),
        )
        yield Case(
            "rms_norm",
            f"{tag(dtype)}-wild-tiny",  # results around the smallest normal number: FTZ decides bits
            lambda dtype=dtype: {
                "x": spread(6, 40, dtype=dtype, low=-20, high=0),
                "weight": spread(40, seed=1, dtype=dtype, low=-130, high=-118),
                "eps": 1e-5,
            },
            ("x", "weight"),
        )
        yield Case(
            "rms_norm",
            f"{tag(dtype)}-wild",
            lambda dtype=dtype: {
                "x": wild(9, 70, dtype=dtype),
                "weight": spread(70, seed=1, dtype=dtype, low=-8, high=8),
                "eps": 1e-5,
            },
            ("x", "weight"),
        )


def add_rms_norm_cases() -> Iterator[Case]:
    for case in rms_norm_cases():

        def make(case: Case = case) -> dict[str, Any]:
            kwargs = case.make()
            return {**kwargs, "residual": values(*kwargs["x"].shape, seed=77, dtype=kwargs["x"].dtype)}

        yield Case("add_rms_norm", case.name, make, ("x", "residual", "weight"))


def layer_norm_cases() -> Iterator[Case]:
    for case in rms_norm_cases():

        def make(case: Case = case) -> dict[str, Any]:
            kwargs = case.make()
            weight = kwargs["weight"]
            return {**kwargs, "bias": values(weight.shape[0], seed=78, dtype=weight.dtype)}

        yield Case("layer_norm", case.name, make, ("x", "weight", "bias"))
    for dtype in DTYPES:
        yield Case(
            "layer_norm",
            f"{tag(dtype)}-offset",  # a mean far from zero, which a variance from sums of squares would not survive
            lambda dtype=dtype: {
                "x": (values(5, 50, scale=0.25) + torch.tensor([0.0, 3.0, -40.0, 100.0, 1000.0])[:, None]).to(dtype),
                "weight": values(50, seed=1, dtype=dtype),
                "bias": values(50, seed=2, dtype=dtype),
                "eps": 1e-6,
            },
            ("x", "weight", "bias"),
        )


def silu_mul_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for T, I in [(1, 1), (4, 16), (3, 23), (40, 65), (0, 8)]:
            yield Case(
                "silu_mul",
                f"{tag(dtype)}-{T}x{I}",
                lambda T=T, I=I, dtype=dtype: {"x": values(T, 2 * I, seed=I, dtype=dtype, scale=4.0)},
                ("x",),
            )
        yield Case(
            "silu_mul",
            f"{tag(dtype)}-wild-denormal",
            lambda dtype=dtype: {
                "x": torch.cat((spread(4, 9, low=0, high=20), spread(4, 9, seed=1, low=-134, high=-120)), 1).to(dtype)
            },
            ("x",),
        )
        yield Case("silu_mul", f"{tag(dtype)}-wild", lambda dtype=dtype: {"x": wild(8, 94, dtype=dtype)}, ("x",))


def rope_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for interleaved in (False, True):
            for T, A, d, r in [(1, 1, 2, 2), (5, 3, 16, 8), (4, 2, 70, 70), (9, 1, 40, 34), (0, 2, 8, 4)]:

                def make(
                    T: int = T,
                    A: int = A,
                    d: int = d,
                    r: int = r,
                    dtype: torch.dtype = dtype,
                    inter: bool = interleaved,
                ):
                    cos, sin = reference.rope_cos_sin(torch.arange(T) * 991, r, 1e4)
                    # Exact in 16 bits, so that libm's last bit on some machine cannot reach the golden bits.
                    cos, sin = ((t * 2**15).round() / 2**15 for t in (cos, sin))
                    return {"x": values(T, A, d, dtype=dtype), "cos": cos, "sin": sin, "interleaved": inter}

                kind = "interleaved" if interleaved else "half"
                yield Case("rope", f"{tag(dtype)}-{kind}-{T}x{A}x{d}r{r}", make, ("x",))
        yield Case(
            "rope",
            f"{tag(dtype)}-wild",
            lambda dtype=dtype: {
                "x": wild(6, 2, 38, dtype=dtype),
                "cos": values(6, 19, seed=3, scale=0.5),
                "sin": values(6, 19, seed=4, scale=0.5),
            },
            ("x",),
        )
    for r, theta in [(2, 1e4), (64, 1e6), (66, 8e6)]:
        yield Case(
            "rope_cos_sin",
            f"r{r}-theta{theta:g}",
            lambda r=r, theta=theta: {
                "positions": torch.tensor([0, 1, 2, 17, 4095, 131_071, 1_000_000, 1_048_575]),
                "rotary_dim": r,
                "theta": theta,
            },
        )
    yield Case(
        "rope_cos_sin",
        "no-tokens",
        lambda: {"positions": torch.empty(0, dtype=torch.int64), "rotary_dim": 8, "theta": 1e4},
    )


def embedding_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for T, V, H in [(1, 1, 1), (7, 5, 16), (300, 11, 33), (0, 4, 8)]:
            yield Case(
                "embedding",
                f"{tag(dtype)}-{T}x{V}x{H}",
                lambda T=T, V=V, H=H, dtype=dtype: {
                    "ids": ids(T, high=V, seed=T),
                    "weight": values(V, H, dtype=dtype),
                },
                ("weight",),
            )
        yield Case(
            "embedding",
            f"{tag(dtype)}-wild",
            lambda dtype=dtype: {"ids": ids(20, high=6), "weight": wild(6, 19, dtype=dtype)},
            ("weight",),
        )


def cache_append_cases() -> Iterator[Case]:
    def slots(T: int, rows: int) -> torch.Tensor:
        """Distinct slots in no order; every fifth token is skipped."""
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(T))[:T]
        return torch.where(torch.arange(T) % 5 == 4, -1, order)

    for dtype in DTYPES:
        for T, W, rows, stride, column in [
            (1, 1, 1, 1, 0),
            (7, 16, 64, 16, 0),
            (9, 17, 20, 40, 23),
            (70, 576, 128, 576, 0),
            (3, 300, 5, 700, 129),
            (0, 8, 4, 8, 0),
        ]:

            def make(
                T: int = T,
                W: int = W,
                rows: int = rows,
                stride: int = stride,
                column: int = column,
                dtype: torch.dtype = dtype,
            ):
                return {
                    "cache": values(rows, stride, seed=1, dtype=dtype),
                    "rows": values(T, W, dtype=dtype),
                    "slot_mapping": slots(T, rows),
                    "column": column,
                }

            yield Case("cache_append", f"{tag(dtype)}-{T}x{W}-in-{rows}x{stride}-at-{column}", make)
        yield Case(
            "cache_append",
            f"{tag(dtype)}-slots-twice",  # the later token stays, for any number of threads
            lambda dtype=dtype: {
                "cache": values(6, 600, seed=1, dtype=dtype),
                "rows": values(200, 600, dtype=dtype),
                "slot_mapping": ids(200, low=-1, high=5),
            },
        )
        yield Case(
            "cache_append",
            f"{tag(dtype)}-wild",
            lambda dtype=dtype: {
                "cache": torch.zeros(8, 33, dtype=dtype),
                "rows": wild(6, 30, dtype=dtype),
                "slot_mapping": torch.tensor([5, 0, -1, 7, 1, 2]),
                "column": 2,
            },
        )


def sum_squares_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for n in (0, 1, 15, 16, 4095, 4096, 4097, 12_345):
            yield Case(
                "sum_squares",
                f"{tag(dtype)}-{n}",
                lambda n=n, dtype=dtype: {"x": values(n, seed=n, dtype=dtype)},
            )
        yield Case(
            "sum_squares",
            f"{tag(dtype)}-range",
            lambda dtype=dtype: {"x": spread(5, 333, dtype=dtype, low=-120, high=120)},
        )
        yield Case("sum_squares", f"{tag(dtype)}-wild", lambda dtype=dtype: {"x": wild(700, dtype=dtype)})
    yield Case(
        "sum_squares",
        "list",
        lambda: {"x": [values(70, 90), values(3, seed=1, dtype=BF16), values(0), values(5000, seed=2)]},
    )


def adamw_cases() -> Iterator[Case]:
    rates = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    for dtype in DTYPES:
        for n in (0, 1, 15, 16, 33, 16_384, 40_001):

            def make(n=n, dtype=dtype):
                master = values(n, seed=n)
                return {
                    "param": master.to(dtype),
                    "master": master,
                    "exp_avg": values(n, seed=n + 1, scale=0.1),
                    "exp_avg_sq": values(n, seed=n + 2, scale=0.1).square(),
                    "grad": spread(n, seed=n + 3, low=-30, high=10),
                    "updates": n + 1,
                    "weight_decay": 0.1 * (n % 2),
                    **rates,
                }

            yield Case("adamw", f"{tag(dtype)}-{n}", make)
        yield Case(
            "adamw",
            f"{tag(dtype)}-wild",
            lambda dtype=dtype: {
                "param": torch.zeros(20, 35, dtype=dtype),
                "master": wild(20, 35),
                "exp_avg": wild(20, 35, seed=1),
                "exp_avg_sq": wild(20, 35, seed=2).abs(),
                "grad": wild(20, 35, seed=3),
                "updates": 3,
                "weight_decay": 0.1,
                "grad_scale": 0.37,
                **rates,
            },
        )


# --- routing
# ----------------------------------------------------------------------------------------------------


def route_topk_cases() -> Iterator[Case]:
    shapes = [(1, 1, 1), (6, 8, 2), (5, 13, 4), (33, 64, 8), (3, 512, 8), (4, 7, 7), (0, 8, 2)]
    for T, E, K in shapes:
        yield Case(
            "route_topk",
            f"{T}x{E}k{K}",
            lambda T=T, E=E, K=K: {
                "logits": values(T, E, seed=E),
                "bias": values(E, seed=E + 1, scale=0.1),
                "top_k": K,
                "routed_scaling_factor": 2.5,
                "return_scores": True,
            },
            ("logits",),
        )
    for norm in (False, True):
        yield Case(
            "route_topk",
            f"groups-norm{int(norm)}",
            lambda norm=norm: {
                "logits": values(17, 24, seed=5),
                "bias": values(24, seed=6, scale=0.3),
                "top_k": 4,
                "n_group": 6,
                "topk_group": 3,
                "norm_topk_prob": norm,
            },
            ("logits",),
        )
    yield Case(
        "route_topk",
        "ties",
        lambda: {"logits": ties(40, 16), "bias": ties(1, 16, seed=1)[0], "top_k": 5},
        ("logits",),
    )
    yield Case(
        "route_topk",
        "ties-groups",
        lambda: {"logits": ties(40, 16), "bias": torch.zeros(16), "top_k": 4, "n_group": 4, "topk_group": 2},
        ("logits",),
    )
    yield Case(
        "route_topk",
        "wild",
        lambda: {
            "logits": wild(11, 20),
            "bias": spread(20, seed=2, low=-20, high=1),
            "top_k": 6,
            "return_scores": True,
        },
        ("logits",),
    )
    yield Case(
        "route_topk",
        "nan-rows",
        lambda: {
            "logits": torch.tensor([[NAN] * 6, [NAN, 0.0, NAN, 1.0, -INF, INF], [0.0, -0.0, 0.0, -0.0, NAN, -1.0]]),
            "bias": torch.tensor([-0.5, -0.5, -0.5, -0.5, -0.5, NAN]),
            "top_k": 4,
        },
    )


def ties(T: int, E: int, seed: int = 0) -> torch.Tensor:
    """Few distinct values: most selections are ties."""
    return ids(T, E, low=-1, high=2, seed=seed).float() * 0.5


def expert_plan_cases() -> Iterator[Case]:
    for T, K, E in [(1, 1, 1), (5, 2, 4), (33, 8, 64), (200, 4, 7), (0, 2, 4), (3, 2, 512)]:
        for holes in (False, True):
            yield Case(
                "expert_plan",
                f"{T}x{K}e{E}-holes{int(holes)}",
                lambda T=T, K=K, E=E, holes=holes: {
                    "topk_ids": topk_ids(T, K, E, seed=T, holes=holes),
                    "num_experts": E,
                },
            )
    yield Case(
        "expert_plan",
        "all-skipped",
        lambda: {"topk_ids": torch.full((4, 2), -1, dtype=torch.int32), "num_experts": 3},
    )
    yield Case(
        "expert_plan",
        "one-expert",
        lambda: {"topk_ids": torch.full((9, 1), 2, dtype=torch.int32), "num_experts": 4},
    )


def moe_combine_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for T, K, E, H in [(1, 1, 1, 1), (7, 2, 4, 16), (20, 8, 12, 33), (0, 2, 4, 8)]:
            for holes in (False, True):

                def make(
                    T: int = T,
                    K: int = K,
                    E: int = E,
                    H: int = H,
                    dtype: torch.dtype = dtype,
                    holes: bool = holes,
                ):
                    plan = reference.expert_plan(topk_ids(T, K, E, seed=T, holes=holes), E)
                    return {
                        "rows": values(T * K, H, dtype=dtype),
                        "topk_weights": values(T, K, seed=3),
                        "inverse": plan.inverse,
                    }

                yield Case(
                    "moe_combine",
                    f"{tag(dtype)}-{T}x{K}x{H}-holes{int(holes)}",
                    make,
                    ("rows", "topk_weights"),
                )

        def make_denormal(dtype: torch.dtype = dtype):
            return {
                "rows": spread(12, 20, dtype=dtype, low=-134, high=-120),
                "topk_weights": spread(6, 2, seed=1, low=20, high=24),
                "inverse": reference.expert_plan(topk_ids(6, 2, 4), 4).inverse,
            }

        yield Case("moe_combine", f"{tag(dtype)}-wild-denormal", make_denormal, ("rows", "topk_weights"))

        def make_wild(dtype: torch.dtype = dtype):
            plan = reference.expert_plan(topk_ids(9, 3, 5, holes=True), 5)
            return {
                "rows": wild(27, 20, dtype=dtype),
                "topk_weights": spread(9, 3, seed=1),
                "inverse": plan.inverse,
            }

        yield Case("moe_combine", f"{tag(dtype)}-wild", make_wild, ("rows", "topk_weights"))


# --- GEMM
# -------------------------------------------------------------------------------------------------------

RAGGED = [
    ([5, 0, 3, 1], 24, 40),  # ragged with an empty expert and a one-row expert
    ([1], 1, 1),
    ([0, 0], 8, 16),
    ([17, 33], 34, 64),
    ([2, 19, 0, 0, 7], 70, 97),  # no size is a multiple of a vector
]

BLOCKS = [([3, 295], 262, 140), ([2, 35], 66, 1200)]


def gemm_operands(
    counts: list[int],
    N: int,
    K: int,
    dtype: torch.dtype,
    seed: int = 0,
    kind: str = "plain",
    extra_rows: int = 0,
) -> dict[str, Any]:
    make = {"plain": values, "spread": spread, "wild": wild}[kind]
    R = sum(counts) + extra_rows
    return {
        "x": make(R, K, seed=seed, dtype=dtype),
        "w": make(len(counts), N, K, seed=seed + 1, dtype=dtype),
        "expert_offsets": offsets_of(counts),
    }


def gathered_operands(T: int, top_k: int, E: int, N: int, K: int, dtype: torch.dtype, holes: bool) -> dict[str, Any]:
    plan = reference.expert_plan(topk_ids(T, top_k, E, seed=T, holes=holes), E)
    return {
        "x": values(T, K, dtype=dtype),
        "w": values(E, N, K, seed=1, dtype=dtype),
        "expert_offsets": plan.expert_offsets,
        "row_token": plan.row_token,
        "inverse": plan.inverse,
    }


def grouped_gemm_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        out_dtypes = (None, F32) if dtype == BF16 else (None,)
        for (counts, N, K), out_dtype in itertools.product(RAGGED, out_dtypes):
            out = {} if out_dtype is None else {"out_dtype": out_dtype}
            name = f"{tag(dtype)}-{'+'.join(map(str, counts))}x{N}x{K}{'-out32' if out else ''}"

            def forward(
                counts: list[int] = counts,
                N: int = N,
                K: int = K,
                dtype: torch.dtype = dtype,
                out: dict = out,
            ):
                return {**gemm_operands(counts, N, K, dtype, extra_rows=len(counts) // 2), **out}

            def backward(
                counts: list[int] = counts,
                N: int = N,
                K: int = K,
                dtype: torch.dtype = dtype,
                out: dict = out,
            ):
                g = gemm_operands(counts, N, K, dtype, extra_rows=len(counts) // 2)
                dy = values(g["x"].shape[0], N, seed=9, dtype=dtype)
                return {**g, "dy": dy, **out}

            def pick(*names: str, make: Callable = backward) -> Callable[[], dict]:
                return lambda: {k: v for k, v in make().items() if k in (*names, "expert_offsets", "out_dtype")}

            yield Case("grouped_gemm", name, forward, ("x", "w"))
            yield Case("grouped_gemm_dgrad", name, pick("dy", "w"))
            yield Case("grouped_gemm_wgrad", name, pick("dy", "x"))
        for bias, silu in itertools.product((False, True), (False, True)):
            for holes in (False, True):

                def make(
                    dtype: torch.dtype = dtype,
                    bias: bool = bias,
                    silu: bool = silu,
                    holes: bool = holes,
                ):
                    kwargs = gathered_operands(21, 3, 6, 18, 50, dtype, holes)
                    if bias:
                        kwargs["bias"] = values(6, 18, seed=4, dtype=dtype)
                    return {**kwargs, "silu_mul": silu}

                grads = ("x", "w", "bias") if bias else ("x", "w")
                name = f"{tag(dtype)}-gather-bias{int(bias)}-silu{int(silu)}-holes{int(holes)}"
                yield Case("grouped_gemm", name, make, grads)
        for kind in ("spread", "wild"):
            for silu in (False, True):
                yield Case(
                    "grouped_gemm",
                    f"{tag(dtype)}-{kind}-silu{int(silu)}",
                    lambda kind=kind, dtype=dtype, silu=silu: {
                        **gemm_operands([3, 0, 9], 22, 75, dtype, kind=kind),
                        "silu_mul": silu,
                    },
                    ("x", "w"),
                )
        # Larger than the blocks of the kernel: depth above 128, rows above 288, columns above 256, few rows
        # of great depth.
        for counts, N, K in BLOCKS:

            def blocks(counts: list[int] = counts, N: int = N, K: int = K, dtype: torch.dtype = dtype):
                return gemm_operands(counts, N, K, dtype)

            def blocks_dy(counts: list[int] = counts, N: int = N, K: int = K, dtype: torch.dtype = dtype):
                return {**gemm_operands(counts, N, K, dtype), "dy": values(sum(counts), N, seed=9, dtype=dtype)}

            name = f"{tag(dtype)}-blocks-{'+'.join(map(str, counts))}x{N}x{K}"
            yield Case("grouped_gemm", name, blocks)
            yield Case("grouped_gemm_dgrad", name, pick("dy", "w", make=blocks_dy))
            yield Case("grouped_gemm_wgrad", name, pick("dy", "x", make=blocks_dy))
        yield Case(
            "grouped_gemm",
            f"{tag(dtype)}-tiny",  # products around the smallest normal number: FTZ decides bits
            lambda dtype=dtype: {
                "x": spread(8, 70, dtype=dtype, low=-70, high=-58),
                "w": spread(2, 12, 70, seed=1, dtype=dtype, low=-70, high=-58),
                "expert_offsets": offsets_of([3, 5]),
            },
            ("x", "w"),
        )
        yield Case(
            "grouped_gemm",
            f"{tag(dtype)}-denormal",  # half of the inputs count as zero (DAZ), which large weights make visible
            lambda dtype=dtype: {
                "x": spread(8, 40, dtype=dtype, low=-134, high=-120),
                "w": spread(2, 12, 40, seed=1, dtype=dtype, low=118, high=121),
                "expert_offsets": offsets_of([3, 5]),
            },
            ("x", "w"),
        )
        for T, N, K, with_bias, silu in [
            (1, 1, 1, False, False),
            (3, 17, 33, True, False),
            (40, 48, 64, False, False),
            (9, 34, 40, True, True),
            (0, 4, 8, False, False),
        ]:

            def make_linear(
                T: int = T,
                N: int = N,
                K: int = K,
                dtype: torch.dtype = dtype,
                with_bias: bool = with_bias,
                silu: bool = silu,
            ):
                kwargs = {"x": values(T, K, dtype=dtype), "w": values(N, K, seed=1, dtype=dtype), "silu_mul": silu}
                return {**kwargs, "bias": values(N, seed=2, dtype=dtype)} if with_bias else kwargs

            grads = ("x", "w", "bias") if with_bias else ("x", "w")
            name = f"{tag(dtype)}-{T}x{N}x{K}-bias{int(with_bias)}-silu{int(silu)}"
            yield Case("linear", name, make_linear, grads)
    yield Case(
        "linear",
        "bf16-out32-leading-dims",
        lambda: {"x": values(2, 3, 40, dtype=BF16), "w": values(5, 40, seed=1, dtype=BF16), "out_dtype": F32},
        ("x", "w"),
    )


def expert_operands(
    T: int, top_k: int, E: int, H: int, I: int, dtype: torch.dtype, *, holes: bool = False, kind: Callable = values
) -> dict[str, Any]:
    """The arguments of moe_mlp, outputs of about unit size when kind is `values`."""
    return {
        "x": kind(T, H, seed=T, dtype=dtype),
        "topk_weights": values(T, top_k, seed=3),
        "topk_ids": topk_ids(T, top_k, E, seed=T, holes=holes),
        "gate_up_proj": kind(E, 2 * I, H, seed=1, dtype=dtype) * H**-0.5,
        "down_proj": kind(E, H, I, seed=2, dtype=dtype) * I**-0.5,
    }


def moe_mlp_cases() -> Iterator[Case]:
    grads = ("x", "topk_weights", "gate_up_proj", "down_proj")
    for dtype in DTYPES:
        for T, K, E, H, I in [
            (1, 1, 1, 1, 1),
            (1, 8, 12, 40, 24),  # a decode step: one row an expert
            (7, 2, 4, 33, 17),
            (21, 3, 6, 97, 70),
            (40, 2, 2, 48, 140),  # experts of more rows than a tile has
            (0, 2, 4, 8, 16),
        ]:
            for holes in (False, True):

                def make(
                    T: int = T,
                    K: int = K,
                    E: int = E,
                    H: int = H,
                    I: int = I,
                    dtype: torch.dtype = dtype,
                    holes: bool = holes,
                ):
                    return expert_operands(T, K, E, H, I, dtype, holes=holes)

                yield Case("moe_mlp", f"{tag(dtype)}-{T}x{K}e{E}-{H}x{I}-holes{int(holes)}", make, grads)
        yield Case(
            "moe_mlp",
            f"{tag(dtype)}-all-skipped",
            lambda dtype=dtype: {
                **expert_operands(3, 2, 4, 20, 12, dtype),
                "topk_ids": torch.full((3, 2), -1, dtype=torch.int32),
            },
            grads,
        )
        for name, kind in (("wild-spread", spread), ("wild", wild)):
            yield Case(
                "moe_mlp",
                f"{tag(dtype)}-{name}",
                lambda kind=kind, dtype=dtype: expert_operands(9, 3, 5, 40, 24, dtype, holes=True, kind=kind),
                grads,
            )


def head_gemm_cases() -> Iterator[Case]:
    def weight(A: int, N: int, K: int, transposed: bool, make: Callable = values, **kwargs: Any) -> torch.Tensor:
        return make(A, *((K, N) if transposed else (N, K)), seed=1, **kwargs)

    for dtype, transposed in itertools.product(DTYPES, (False, True)):
        kind = f"{tag(dtype)}-{'kn' if transposed else 'nk'}"
        for T, A, N, K in [
            (1, 1, 1, 1),
            (5, 3, 16, 32),
            (7, 2, 33, 50),
            (40, 2, 70, 97),
            (0, 2, 8, 8),
            (300, 1, 20, 40),  # rows above a block of 288
            (3, 2, 262, 140),  # columns above 256, depth above 128
            (2, 2, 64, 192),
        ]:

            def make(T: int = T, A: int = A, N: int = N, K: int = K, dtype: torch.dtype = dtype, tr: bool = transposed):
                w = weight(A, N, K, tr, dtype=dtype)
                return {"x": values(T, A, K, seed=T, dtype=dtype), "w": w, "transposed": tr}

            yield Case("head_gemm", f"{kind}-{T}x{A}x{N}x{K}", make, ("x", "w"))

        def make_views(dtype: torch.dtype = dtype, tr: bool = transposed):
            """The first 24 of 40 columns of x; 20 of 36 rows of every head's part of a weight; a slice of out."""
            w = values(3 * 36, 24 if not tr else 50, seed=1, dtype=dtype).view(3, 36, -1)
            w = w[:, 12:36] if tr else w[:, 4:24]
            out = torch.zeros(6, 3, 60, dtype=dtype)[..., 7 : 57 if tr else 27]
            return {"x": values(6, 3, 40, dtype=dtype)[..., :24], "w": w, "transposed": tr, "out": out}

        yield Case("head_gemm", f"{kind}-views", make_views)

        def make_heads_first(dtype: torch.dtype = dtype, tr: bool = transposed):
            x = values(2, 9, 20, dtype=dtype).transpose(0, 1)
            return {"x": x, "w": weight(2, 12, 20, tr, dtype=dtype), "transposed": tr}

        yield Case("head_gemm", f"{kind}-heads-first", make_heads_first, ("x", "w"))
        for name, make_value in (("spread", spread), ("wild", wild)):

            def make_range(value: Callable = make_value, dtype: torch.dtype = dtype, tr: bool = transposed):
                w = weight(2, 22, 75, tr, make=value, dtype=dtype)
                return {"x": value(5, 2, 75, dtype=dtype), "w": w, "transposed": tr}

            yield Case("head_gemm", f"{kind}-{name}", make_range, ("x", "w"))
        if dtype == BF16:

            def make_out32(tr: bool = transposed):
                x = values(9, 2, 40, dtype=BF16)
                return {"x": x, "w": weight(2, 17, 40, tr, dtype=BF16), "transposed": tr, "out_dtype": F32}

            yield Case("head_gemm", f"{kind}-out32", make_out32, ("x", "w"))


def lm_head_logprob_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for T, V, H in [
            (1, 1, 1),
            (5, 37, 16),
            (9, 1024, 20),
            (4, 2500, 33),
            (0, 12, 8),
            (260, 50, 12),
            (257, 3100, 8),
        ]:

            def make(T: int = T, V: int = V, H: int = H, dtype: torch.dtype = dtype):
                return {
                    "hidden": values(T, H, dtype=dtype),
                    "weight": values(V, H, seed=1, dtype=dtype),
                    "ids": ids(T, low=-1 if V > 1 else 0, high=V, seed=T),
                    "temperature": 0.7,
                    "top_n": min(3, V),
                }

            yield Case("lm_head_logprob", f"{tag(dtype)}-{T}x{V}x{H}", make, ("hidden", "weight"))
        yield Case(
            "lm_head_logprob",
            f"{tag(dtype)}-ties",
            lambda dtype=dtype: {
                "hidden": values(3, 8, dtype=dtype),
                "weight": values(7, 8, seed=1, dtype=dtype).repeat(300, 1),
                "ids": torch.tensor([2099, 0, 7]),
                "top_n": 5,
            },
            ("hidden", "weight"),
        )
        yield Case(
            "lm_head_logprob",
            f"{tag(dtype)}-spread",
            lambda dtype=dtype: {
                "hidden": spread(4, 24, dtype=dtype, low=-30, high=4),
                "weight": spread(90, 24, seed=1, dtype=dtype, low=-30, high=3),
                "ids": ids(4, high=90),
                "top_n": 4,
            },
            ("hidden", "weight"),
        )
        yield Case(
            "lm_head_logprob",
            f"{tag(dtype)}-wild",
            lambda dtype=dtype: {
                "hidden": wild(6, 24, dtype=dtype),
                "weight": values(90, 24, seed=1, dtype=dtype),
                "ids": ids(6, high=90),
                "top_n": 4,
            },
        )


# --- attention
# --------------------------------------------------------------------------------------------------


def attention_operands(
    q_lens: list[int],
    seq_lens: list[int],
    A: int,
    G: int,
    Dk: int,
    Dv: int,
    dtype: torch.dtype,
    *,
    shared: bool = False,
    kind: Callable[..., torch.Tensor] = values,
) -> dict[str, Any]:
    """Contiguous keys; shared: the values are the first Dv of the keys."""
    rows = sum(seq_lens)
    return {
        "q": kind(sum(q_lens), A, Dk, seed=Dk, dtype=dtype),
        "k": kind(rows, G, Dk, seed=Dk + 1, dtype=dtype),
        "v": None if shared else kind(rows, G, Dv, seed=Dk + 2, dtype=dtype),
        "cu_seqlens_q": offsets_of(q_lens),
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32),
        "cu_seqlens_k": offsets_of(seq_lens),
        "v_dim": Dv,
    }


def paged(kwargs: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same call over a cache of pages in a random order; rows that hold no key are zeros."""
    lens, cu_k = kwargs["seq_lens"].tolist(), kwargs["cu_seqlens_k"].tolist()
    counts = [-(-n // 64) for n in lens]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(seed))
    table = torch.full((len(lens), max([*counts, 1])), -1, dtype=torch.int32)
    out = {**kwargs, "cu_seqlens_k": None, "block_table": table}
    planes = [name for name in ("k", "v", "kv") if kwargs.get(name) is not None]
    for name in planes:
        out[name] = kwargs[name].new_zeros(64 * len(order), *kwargs[name].shape[1:])
    at = 0
    for i, n in enumerate(lens):
        table[i, : counts[i]] = order[at : at + counts[i]].int()
        at += counts[i]
        j = torch.arange(n)
        rows = table[i].long()[j // 64] * 64 + j % 64
        for name in planes:
            out[name][rows] = kwargs[name][cu_k[i] : cu_k[i] + n]
    return out


def attention_cases() -> Iterator[Case]:
    shapes = [  # query lengths, key lengths, A, G, Dk, Dv
        ([1], [1], 1, 1, 1, 1),
        ([5, 0, 3], [5, 2, 3], 4, 2, 16, 16),
        ([1, 1, 1], [1, 64, 130], 12, 1, 33, 20),
        ([70, 2], [131, 66], 6, 3, 24, 40),
        ([150], [150], 2, 2, 20, 8),
        ([0, 0], [0, 3], 2, 1, 8, 8),
    ]
    for dtype in DTYPES:
        for shape in shapes:
            lens = "of".join("+".join(map(str, n)) for n in shape[:2])
            name = f"{tag(dtype)}-{lens}-{'x'.join(map(str, shape[2:]))}"
            yield Case(
                "attention",
                name,
                lambda shape=shape, dtype=dtype: {**attention_operands(*shape, dtype), "return_lse": True},
                ("q", "k", "v"),
            )
            yield Case(
                "attention",
                f"{name}-paged",
                lambda shape=shape, dtype=dtype: {**paged(attention_operands(*shape, dtype), 1), "return_lse": True},
            )
        yield Case(
            "attention",
            f"{tag(dtype)}-latent",
            lambda dtype=dtype: {
                **attention_operands([70, 1], [70, 5], 5, 1, 40, 24, dtype, shared=True),
                "scale": 0.3,
            },
            ("q", "k"),
        )
        yield Case(
            "attention",
            f"{tag(dtype)}-peaked",  # the maximum moves by much more than 87: probabilities that are flushed
            lambda dtype=dtype: {**attention_operands([9], [140], 3, 1, 16, 16, dtype), "scale": 40.0},
            ("q", "k", "v"),
        )
        yield Case(
            "attention",
            f"{tag(dtype)}-wild-tiny",  # products and sums around the smallest normal number
            lambda dtype=dtype: {
                **attention_operands([66], [70], 4, 2, 16, 16, dtype),
                "v": spread(70, 2, 16, dtype=dtype, low=-134, high=-120),
                "scale": 8.0,
            },
            ("q", "k", "v"),
        )
        for name in ("q", "k", "v"):
            yield Case(
                "attention",
                f"{tag(dtype)}-wild-{name}",
                lambda dtype=dtype, name=name: {
                    **(kwargs := attention_operands([66], [70], 4, 2, 16, 16, dtype)),
                    name: wild(*kwargs[name].shape, dtype=dtype),
                },
                ("q", "k", "v"),
            )


def mla_operands(
    q_lens: list[int],
    seq_lens: list[int],
    A: int,
    Dk: int,
    Dv: int,
    top_k: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    kind: Callable[..., torch.Tensor] = values,
) -> dict[str, Any]:
    """Contiguous keys; each row lists at most top_k of the keys that it sees, at random."""
    dense = attention_operands(q_lens, seq_lens, A, 1, Dk, Dv, dtype, shared=True, kind=kind)
    g = torch.Generator().manual_seed(seed)
    lists = torch.full((sum(q_lens), min(top_k, max([*seq_lens, 0]))), -1, dtype=torch.int32)
    rows = iter(lists)
    for q_len, keys in zip(q_lens, seq_lens, strict=True):
        for seen in range(keys - q_len + 1, keys + 1):
            listed = torch.randperm(seen, generator=g)[: lists.shape[1]].sort().values
            next(rows)[: len(listed)] = listed.int()
    kept = {name: dense[name] for name in ("q", "cu_seqlens_q", "seq_lens", "cu_seqlens_k", "v_dim")}
    return {**kept, "kv": dense["k"][:, 0], "topk_indices": lists, "scale": 0.2}


def sparse_mla_cases() -> Iterator[Case]:
    shapes = [  # query lengths, key lengths, A, Dk, Dv, top_k
        ([1], [1], 1, 1, 1, 1),
        ([5, 0, 3], [5, 2, 90], 4, 16, 16, 20),
        ([1, 1], [300, 130], 9, 40, 24, 100),
        ([70], [140], 3, 33, 20, 64),
        ([2], [80], 70, 24, 16, 70),
        ([0], [3], 2, 8, 8, 2),
    ]
    for dtype in DTYPES:
        for shape in shapes:
            lens = "of".join("+".join(map(str, n)) for n in shape[:2])
            name = f"{tag(dtype)}-{lens}-{'x'.join(map(str, shape[2:5]))}-k{shape[5]}"
            yield Case(
                "sparse_mla",
                name,
                lambda shape=shape, dtype=dtype: {**mla_operands(*shape, dtype), "return_lse": True},
                ("q", "kv"),
            )
            yield Case(
                "sparse_mla",
                f"{name}-paged",
                lambda shape=shape, dtype=dtype: {**paged(mla_operands(*shape, dtype), 1), "return_lse": True},
            )
        yield Case(
            "sparse_mla",
            f"{tag(dtype)}-empty-lists",
            lambda dtype=dtype: {
                **(kwargs := mla_operands([6], [50], 3, 16, 8, 10, dtype)),
                "topk_indices": kwargs["topk_indices"].index_fill(0, torch.tensor([0, 4]), -1),
            },
            ("q", "kv"),
        )
        for name in ("q", "kv"):
            yield Case(
                "sparse_mla",
                f"{tag(dtype)}-wild-{name}",
                lambda dtype=dtype, name=name: {
                    **(kwargs := mla_operands([9], [90], 5, 24, 16, 40, dtype)),
                    name: wild(*kwargs[name].shape, dtype=dtype),
                },
                ("q", "kv"),
            )


def indexer_operands(
    q_lens: list[int],
    seq_lens: list[int],
    Hi: int,
    Di: int,
    top_k: int,
    dtype: torch.dtype,
    *,
    kind: Callable[..., torch.Tensor] = values,
) -> dict[str, Any]:
    """Contiguous keys; head weights of both signs."""
    return {
        "q": kind(sum(q_lens), Hi, Di, seed=Di, dtype=dtype),
        "weights": values(sum(q_lens), Hi, seed=Di + 1),
        "k": kind(sum(seq_lens), Di, seed=Di + 2, dtype=dtype),
        "cu_seqlens_q": offsets_of(q_lens),
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32),
        "top_k": top_k,
        "cu_seqlens_k": offsets_of(seq_lens),
    }


def few_values(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> torch.Tensor:
    """-1, 0 and 1: most scores are ties."""
    return ids(*shape, low=-1, high=2, seed=seed).to(dtype)


def indexer_topk_cases() -> Iterator[Case]:
    shapes = [  # query lengths, key lengths, Hi, Di, top_k
        ([1], [1], 1, 1, 1),
        ([5, 0, 3], [5, 2, 90], 4, 16, 20),
        ([1, 1], [300, 130], 9, 40, 100),
        ([70], [140], 3, 33, 64),
        ([70], [70], 2, 24, 1),
        ([3, 1], [3, 9], 5, 8, 50),
        ([0, 0], [0, 3], 2, 8, 2),
        ([2], [900], 2, 7, 30),  # more candidates than a buffer holds
    ]
    for dtype in DTYPES:
        for shape in shapes:
            lens = "of".join("+".join(map(str, n)) for n in shape[:2])
            name = f"{tag(dtype)}-{lens}-{'x'.join(map(str, shape[2:4]))}-k{shape[4]}"
            yield Case("indexer_topk", name, lambda shape=shape, dtype=dtype: indexer_operands(*shape, dtype))
            yield Case(
                "indexer_topk",
                f"{name}-paged",
                lambda shape=shape, dtype=dtype: paged(indexer_operands(*shape, dtype), 1),
            )
        yield Case(
            "indexer_topk",
            f"{tag(dtype)}-ties",
            lambda dtype=dtype: {
                **indexer_operands([20], [700], 3, 5, 40, dtype, kind=few_values),
                "weights": few_values(20, 3, seed=1),
            },
        )
        for name in ("q", "weights", "k"):
            yield Case(
                "indexer_topk",
                f"{tag(dtype)}-wild-{name}",
                lambda dtype=dtype, name=name: {
                    **(kwargs := indexer_operands([9], [90], 5, 40, 30, dtype)),
                    name: wild(*kwargs[name].shape, dtype=kwargs[name].dtype),
                },
            )
        yield Case(
            "indexer_topk",
            f"{tag(dtype)}-wild-tiny",  # products and sums around the smallest normal number
            lambda dtype=dtype: {
                **(kwargs := indexer_operands([9], [90], 5, 40, 30, dtype)),
                "q": spread(*kwargs["q"].shape, dtype=dtype, low=-70, high=-58),
                "k": spread(*kwargs["k"].shape, seed=1, dtype=dtype, low=-70, high=-58),
                "weights": spread(*kwargs["weights"].shape, seed=2, low=-8, high=8),
            },
        )


def indexer_kl_operands(
    q_lens: list[int],
    seq_lens: list[int],
    A: int,
    Dk: int,
    Hi: int,
    Di: int,
    top_k: int | None,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    scale: float = 0.2,
) -> dict[str, Any]:
    """Contiguous keys; lists of top_k keys at random, or none. lse is that of the main attention over the same keys,
    in steps of 2^-12, so that libm's last bit on some machine cannot reach the golden bits.
    """
    main = mla_operands(q_lens, seq_lens, A, Dk, Dk, 10**6 if top_k is None else top_k, dtype, seed=seed)
    main["scale"] = scale
    lse = reference.sparse_mla(**main, return_lse=True, exact=True).lse
    T, rows, lists = sum(q_lens), sum(seq_lens), main.pop("topk_indices")
    del main["v_dim"]
    return {
        "index_q": values(T, Hi, Di, seed=Di, dtype=dtype),
        "index_weights": values(T, Hi, seed=Di + 1, scale=2 * (Hi * Di) ** -0.5),
        "index_k": values(rows, Di, seed=Di + 2, dtype=dtype),
        **main,
        "lse": ((lse * 4096).round() / 4096).float(),
        "topk_indices": None if top_k is None else lists,
    }


def indexer_kl_cases() -> Iterator[Case]:
    shapes = [  # query lengths, key lengths, A, Dk, Hi, Di, top_k
        ([1], [1], 1, 1, 1, 1, 1),
        ([5, 0, 3], [5, 2, 90], 4, 16, 3, 16, 20),
        ([1, 1], [300, 130], 9, 40, 8, 24, 100),
        ([70], [140], 3, 33, 5, 20, 64),
        ([2], [80], 70, 24, 66, 40, 70),
        ([0], [3], 2, 8, 2, 8, 2),
    ]
    leaves = ("index_q", "index_weights", "index_k")
    for dtype in DTYPES:
        for shape, dense in itertools.product(shapes, (True, False)):
            lens = "of".join("+".join(map(str, n)) for n in shape[:2])
            name = f"{tag(dtype)}-{lens}-{'x'.join(map(str, shape[2:6]))}-{'all' if dense else f'k{shape[6]}'}"
            top_k = None if dense else shape[6]
            yield Case(
                "indexer_kl",
                name,
                lambda shape=shape, top_k=top_k, dtype=dtype: indexer_kl_operands(*shape[:6], top_k, dtype),
                leaves,
            )
        yield Case(
            "indexer_kl",
            f"{tag(dtype)}-empty-lists",
            lambda dtype=dtype: {
                **(kwargs := indexer_kl_operands([6], [50], 3, 16, 4, 8, 10, dtype)),
                "topk_indices": kwargs["topk_indices"].index_fill(0, torch.tensor([0, 4]), -1),
            },
            leaves,
        )
        yield Case(
            "indexer_kl",
            f"{tag(dtype)}-peaked",  # both distributions have places far below e^-87 of their largest
            lambda dtype=dtype: {
                **(kwargs := indexer_kl_operands([5], [140], 3, 16, 4, 16, None, dtype, scale=8.0)),
                "index_weights": kwargs["index_weights"] * 64,
            },
            leaves,
        )
        for name in (*leaves, "q", "kv", "lse"):
            for top_k in (None, 40):
                yield Case(
                    "indexer_kl",
                    f"{tag(dtype)}-wild-{name}-{top_k or 'all'}",
                    lambda dtype=dtype, name=name, top_k=top_k: {
                        **(kwargs := indexer_kl_operands([9], [90], 5, 24, 4, 16, top_k, dtype)),
                        name: wild(*kwargs[name].shape, dtype=kwargs[name].dtype),
                    },
                    leaves,
                )


# --- sampling
# ---------------------------------------------------------------------------------------------------


def sampling_rules(*lead: int, seed: int = 0, V: int) -> dict[str, Any]:
    """One of everything for each row: rules of every kind, and none, in many combinations."""
    rows = torch.arange(seed, seed + torch.Size(lead).numel()).view(lead)
    pick = lambda options, step: torch.tensor(options)[rows // step % len(options)]
    return {
        "seeds": rows * 1_000_003 - 5,
        "positions": rows % 7 + (1 << 33) * (rows % 2),
        "temperature": pick([1.0, 0.7, 0.0, 2.5, 1.0], 1),
        "top_k": pick([0, 5, 0, 60, 1], 2),
        "top_p": pick([1.0, 0.9, 0.5], 1),
        "min_p": pick([0.0, 0.0, 0.02, 1.0], 3),
    }


def histories(*lead: int, V: int, seed: int = 0) -> dict[str, Any]:
    """Overlapping spans of one list, some of them empty, and biases."""
    rows = torch.arange(torch.Size(lead).numel()).view(lead)
    begin = rows % 5 * 3
    return {
        "token_ids": ids(40, high=V, seed=seed),
        "history": torch.stack((begin, begin + rows % 3 * 4, begin + rows % 3 * 4 + rows % 4 * 5), -1),
        "repetition_penalty": 1.0 + rows % 3 * 0.25,
        "presence_penalty": 0.5,
        "frequency_penalty": (rows % 2) * 0.75 - 0.25,
        "bias_ids": ids(9, high=V, seed=seed + 1),
        "bias_values": values(9, seed=seed + 2, scale=3.0),
        "bias_spans": torch.stack((rows % 4, rows % 4 + rows % 6), -1),
    }


def sample_cases() -> Iterator[Case]:
    for R, V in [(1, 1), (24, 7), (60, 50), (30, 1025), (20, 3000), (0, 5)]:
        for ruled in (False, True):

            def make(R: int = R, V: int = V, ruled: bool = ruled) -> dict[str, Any]:
                kwargs = {"logits": values(R, V, seed=V, scale=3.0), **sampling_rules(R, V=V)}
                return {**kwargs, **histories(R, V=V)} if ruled else kwargs

            yield Case("sample", f"{R}x{V}{'-ruled' if ruled else ''}", make)
    for name, logits in (
        ("ties", lambda: few_values(30, 500)),
        ("sharp", lambda: values(30, 2000, scale=30.0)),
        ("wild", lambda: wild(30, 90)),
        ("wild-denormal", lambda: spread(30, 40, low=-134, high=-120)),
        ("nan-rows", lambda: torch.tensor([NAN, -INF, 0.0, INF, INF, NAN])[ids(30, 6, high=6)]),
    ):
        for ruled in (False, True):

            def make_kind(logits: Callable = logits, ruled: bool = ruled) -> dict[str, Any]:
                x = logits()
                kwargs = {"logits": x, **sampling_rules(30, V=x.shape[1], seed=7)}
                return {**kwargs, **histories(30, V=x.shape[1])} if ruled else kwargs

            yield Case("sample", f"{name}{'-ruled' if ruled else ''}", make_kind)
    yield Case(
        "sample",
        "per-position",
        lambda: {
            "logits": values(4, 3, 100, scale=2.0),
            **sampling_rules(4, 3, V=100),
            **histories(4, 3, V=100),
            "seeds": torch.arange(4)[:, None],
            "draw": 3,
        },
    )


def verify_operands(
    B: int, K: int, V: int, mode: str, *, ruled: bool = False, probs: bool = False, seed: int = 0, scale: float = 2.0
) -> dict[str, Any]:
    """Drafts that the model often agrees with: mostly the largest logits, others at random, some chains shorter."""
    logits = values(B, K + 1, V, seed=seed, scale=scale)
    drafts = logits[:, :K].argmax(-1)
    drafts = torch.where(ids(B, K, high=4, seed=seed) == 0, ids(B, K, high=V, seed=seed + 1), drafts)
    drafts = torch.where(ids(B, K, high=12, seed=seed + 2) == 0, -1, drafts)
    rules = sampling_rules(B, K + 1, V=V, seed=seed)
    rules["seeds"], rules["positions"] = torch.arange(B) * 991 - 3, torch.arange(B) * 17
    if ruled:
        rules |= histories(B, K + 1, V=V, seed=seed)
    if probs:  # sums are near 1, which nobody checks; some entries are zero
        rules["draft_probs"] = values(B, K, V, seed=seed + 3).clamp(min=0) / (0.2 * V)
    return {"draft_ids": drafts, "logits": logits, "mode": mode, **rules}


def chain_operands(B: int, K: int, V: int, mode: str, **options: Any) -> dict[str, Any]:
    """verify_operands cut to chains of 1 to K+1 rows, one behind the other."""
    kwargs = verify_operands(B, K, V, mode, **options)
    rows_B = ids(B, high=K + 1, seed=5) + 1
    mask = torch.arange(K + 1) < rows_B[:, None]
    for name in ("seeds", "positions"):
        kwargs[name] = kwargs[name].repeat_interleave(rows_B)
    kwargs["positions"] += torch.arange(K + 1).expand(B, -1)[mask]
    last = torch.full((B, 1), -1)
    kwargs["draft_ids"] = torch.cat([kwargs["draft_ids"], last], 1)
    if "draft_probs" in kwargs:
        kwargs["draft_probs"] = torch.cat([kwargs["draft_probs"], torch.zeros(B, 1, V)], 1)
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and value.shape[:2] == (B, K + 1):
            kwargs[name] = value[mask]
    offsets = torch.zeros(B + 1, dtype=torch.int32)
    offsets[1:] = rows_B.cumsum(0)
    return {**kwargs, "row_offsets": offsets}


def mtp_verify_cases() -> Iterator[Case]:
    for mode, probs in (("greedy", False), ("sample", False), ("rejection", False), ("rejection", True)):
        name = mode + ("-probs" if probs else "")
        for B, K, V in [(1, 1, 1), (9, 3, 7), (12, 4, 60), (6, 2, 1100), (0, 2, 5), (4, 0, 9)]:
            for ruled in (False, True):
                yield Case(
                    "mtp_verify",
                    f"{name}-{B}x{K}x{V}{'-ruled' if ruled else ''}",
                    lambda B=B, K=K, V=V, mode=mode, ruled=ruled, probs=probs: verify_operands(
                        B, K, V, mode, ruled=ruled, probs=probs
                    ),
                )
        for B, K, V in [(9, 3, 7), (12, 4, 60), (0, 2, 5), (4, 0, 9)]:
            for ruled in (False, True):
                yield Case(
                    "mtp_verify",
                    f"{name}-chains-{B}x{K}x{V}{'-ruled' if ruled else ''}",
                    lambda B=B, K=K, V=V, mode=mode, ruled=ruled, probs=probs: chain_operands(
                        B, K, V, mode, ruled=ruled, probs=probs
                    ),
                )
        yield Case(
            "mtp_verify",
            f"{name}-wild",
            lambda mode=mode, probs=probs: {
                **(kwargs := verify_operands(10, 3, 40, mode, probs=probs)),
                "logits": wild(10, 4, 40),
                **({"draft_probs": wild(10, 3, 40, seed=1)} if probs else {}),
                "temperature": 1.0 + kwargs["temperature"],
            },
        )


CASES: dict[str, list[Case]] = {
    stem: list(globals()[f"{stem}_cases"]()) for stem in STEMS if f"{stem}_cases" in globals()
}
for stored_format in stored_cases.FORMATS:
    CASES["grouped_gemm"] += [*stored_cases.grouped(stored_format), *stored_cases.linears(stored_format)]
    CASES["moe_mlp"] += stored_cases.moe(stored_format)


def cases(op: str, *, wild: bool = True) -> list[Case]:
    """The cases of one public function; without `wild`, only those an fp64 oracle can judge element by
    element.
    """
    found = [case for stem, names in STEMS.items() if op in names for case in CASES[stem] if case.op == op]
    return found if wild else [case for case in found if not any(w in case.name for w in ("wild", "nan-rows"))]


def dense_cases(op: str, *, wild: bool = True) -> list[Case]:
    """Those whose weights are tensors; test_stored_weight.py judges the others."""
    return [case for case in cases(op, wild=wild) if not case.name.startswith("stored-")]


# --- running a case
# ---------------------------------------------------------------------------------------------


def results(op: Callable[..., Any], kwargs: dict[str, Any], **extra: Any) -> dict[str, torch.Tensor]:
    """The tensors of a call; of an op that returns nothing those that it was given, since it has written them."""
    result = op(**kwargs, **extra)
    if result is None:
        return {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    return named_tensors(result)


def named_tensors(result: Any) -> dict[str, torch.Tensor]:
    """The tensors of an op's result: a tensor, a tuple or a NamedTuple."""
    if isinstance(result, torch.Tensor):
        return {"out": result}
    names = getattr(result, "_fields", [f"out{i}" for i in range(len(result))])
    return dict(zip(names, result, strict=True))


def cotangent(name: str, out: torch.Tensor) -> torch.Tensor:
    """A fixed upstream gradient for each output."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return values(*out.shape, seed=seed, dtype=torch.float64).to(out.dtype)


def with_grad(kwargs: dict[str, Any], grads: tuple[str, ...], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Copies of the arguments, those to differentiate as leaves (in `dtype`, if given)."""
    out = dict(kwargs)
    for name in grads:
        out[name] = kwargs[name].detach().to(dtype or kwargs[name].dtype, copy=True).requires_grad_()
    return out


def evaluate(ops: ModuleType | Any, case: Case, *, gradients: bool = True, **extra: Any) -> dict[str, torch.Tensor]:
    """Outputs and gradients ("d_<argument>") of one case under `ops`, glmx.ops or glmx.reference."""
    kwargs = with_grad(case.make(), case.grads if gradients else ())
    tensors = results(getattr(ops, case.op), kwargs, **extra)
    out = {name: tensor.detach() for name, tensor in tensors.items()}
    if gradients and case.grads:
        live = {n: t for n, t in tensors.items() if t.requires_grad}
        torch.autograd.backward(list(live.values()), [cotangent(n, t) for n, t in live.items()])
        out.update({f"d_{name}": kwargs[name].grad for name in case.grads})
    return out


def canonical(tensor: torch.Tensor) -> torch.Tensor:
    """The bits as integers, every NaN alike (payloads are not part of the promise), zeros keep their sign."""
    tensor = tensor.detach().contiguous()
    if not tensor.is_floating_point():
        return tensor
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.where(tensor.isnan(), torch.full((), NAN, dtype=tensor.dtype), tensor).view(ints)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(canonical(a), canonical(b)))


def digest(tensors: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        sha.update(canonical(tensor).numpy().tobytes())
    return sha.hexdigest()
