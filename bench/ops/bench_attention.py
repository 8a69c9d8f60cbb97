"""attention against torch's SDPA: decode at GLM-4.5's heads.

    pytest bench/ops/bench_attention.py            (OMP_NUM_THREADS sets the threads)

One new token, 96 query and 8 kv heads of 128 values, over 4K and 32K cached keys. The peers get the same keys, and both
forms of the call: grouped heads as they are (`enable_gqa`), and the stronger one with the 12 heads of a group folded
into rows, so that torch's products have 12 rows instead of one. Twelve heads on each byte of the cache make the step
run against the FMA units, not against memory; the ceilings are measured in the same test (bench/roofline.py).
"""

from __future__ import annotations

import harness
import pytest
import torch

import glmx.ops

A, G, D = 96, 8, 128
ROUNDS = 7


def values(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("keys", [4096, 32768])
def test_decode(benchmark, record_row, keys: int, dtype: torch.dtype) -> None:
    q, k, v = values(1, A, D, dtype=dtype), values(keys, G, D, dtype=dtype), values(keys, G, D, dtype=dtype)
    cu_seqlens_q, seq_lens = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([keys], dtype=torch.int32)
    pages = torch.randperm(keys // 64, generator=torch.Generator().manual_seed(0)).int()[None]
    rows = (pages[0].long()[:, None] * 64 + torch.arange(64)).flatten()
    k_paged, v_paged = torch.empty_like(k), torch.empty_like(v)
    k_paged[rows], v_paged[rows] = k, v
    # torch reads keys as [1, G, keys, D]: laid out that way for it, so that it need not stride over heads.
    k_t, v_t = (x.transpose(0, 1).contiguous()[None] for x in (k, v))
    plain_q, folded_q = q.view(1, A, 1, D), q.view(1, G, A // G, D)

    def ours() -> torch.Tensor:
        return glmx.ops.attention(q, k_paged, v_paged, cu_seqlens_q, seq_lens, block_table=pages)

    sdpa = torch.nn.functional.scaled_dot_product_attention
    peers = {
        "torch SDPA": lambda: sdpa(plain_q, k_t, v_t, enable_gqa=True),
        "torch SDPA, heads as rows": lambda: sdpa(folded_q, k_t, v_t),
    }
    expected = peers["torch SDPA, heads as rows"]().float().view(1, A, D)
    assert (ours().float() - expected).norm() <= (2**-6 if dtype == torch.bfloat16 else 2**-17) * expected.norm()
    if benchmark.disabled:
        return

    harness.compare(
        benchmark,
        record_row,
        f"attention decode {A}/{G} x {D}, {keys} keys, {'bf16' if dtype == torch.bfloat16 else 'fp32'}",
        "attention",
        ours,
        peers,
        flop=2 * A * keys * 2 * D,
        touched=2 * keys * G * D * q.element_size(),
        rounds=ROUNDS,
        dtype="bf16" if dtype == torch.bfloat16 else "fp32",
    )
