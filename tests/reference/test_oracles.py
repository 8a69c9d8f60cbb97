"""The oracles against torch's own functions and transformers, and their interface: names, exact form,
imports.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import glmx.reference as reference

F64 = torch.float64


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def test_import_needs_torch_alone() -> None:
    """glmx.reference must import without the compiled libraries and without anything but torch."""
    code = (
        "import sys, torch; before = set(sys.modules); import glmx.reference; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names); "
        "assert new <= {'glmx', 'torch', 'numpy'}, new; "
        "assert 'glmx._native' not in sys.modules and 'glmx.ops' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", reference.__all__)
def test_every_name_is_a_function_not_a_module(name: str) -> None:
    assert callable(getattr(reference, name))


def test_norms() -> None:
    x, r, w = randn(3, 5, 40), randn(3, 5, 40, seed=1), randn(40, seed=2)
    torch.testing.assert_close(reference.rms_norm(x, w, 1e-5, exact=True), F.rms_norm(x, (40,), w, 1e-5))
    y, total = reference.add_rms_norm(x, r, w, 1e-5, exact=True)
    torch.testing.assert_close(total, x + r)
    torch.testing.assert_close(y, F.rms_norm(x + r, (40,), w, 1e-5))
    # bf16: weight * round(x / rms) is rounded twice, so it differs from one rounding in some places.
    xb, wb = x.bfloat16(), w.bfloat16()
    once = reference.rms_norm(xb, wb, 1e-5, exact=True).bfloat16()
    assert not torch.equal(reference.rms_norm(xb, wb, 1e-5), once)


def test_layer_norm() -> None:
    x, w, b = randn(3, 5, 40) + 7, randn(40, seed=2), randn(40, seed=3)
    torch.testing.assert_close(reference.layer_norm(x, w, b, 1e-6, exact=True), F.layer_norm(x, (40,), w, b, 1e-6))
    xb, wb, bb = x.bfloat16(), w.bfloat16(), b.bfloat16()
    assert (reference.layer_norm(xb, wb, bb, 1e-6) != F.layer_norm(xb, (40,), wb, bb, 1e-6)).float().mean() < 0.01


def test_cache_append() -> None:
    cache, rows = torch.zeros(5, 4), randn(3, 2)
    out = reference.cache_append(cache, rows.float(), torch.tensor([4, -1, 0]), 1)
    want = torch.zeros(5, 4)
    want[4, 1:3], want[0, 1:3] = rows[0].float(), rows[2].float()
    assert out is cache and torch.equal(out, want)


def test_head_gemm() -> None:
    x, w = randn(4, 3, 10), randn(3, 6, 10, seed=1)
    want = torch.einsum("tak,ank->tan", x, w)
    torch.testing.assert_close(reference.head_gemm(x, w, exact=True), want)
    torch.testing.assert_close(reference.head_gemm(x, w.transpose(1, 2), transposed=True, exact=True), want)


def test_silu_mul() -> None:
    x = randn(4, 14) * 5
    torch.testing.assert_close(reference.silu_mul(x, exact=True), F.silu(x[:, :7]) * x[:, 7:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_half_split_has_the_bits_of_transformers(dtype: torch.dtype) -> None:
    modeling = pytest.importorskip("transformers.models.glm4_moe.modeling_glm4_moe")
    cos, sin = reference.rope_cos_sin(torch.arange(7) * 1000, 8, 1e4)
    q, k = randn(7, 3, 16, dtype=dtype), randn(7, 2, 16, seed=1, dtype=dtype)
    wide = [torch.cat((t, t), -1)[None].to(dtype) for t in (cos, sin)]
    want = modeling.apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *wide)
    for x, y in zip((q, k), want, strict=True):
        assert torch.equal(reference.rope(x, cos, sin), y[0].transpose(0, 1))


def test_rope_interleaved_is_a_complex_product() -> None:
    positions = torch.tensor([0, 1, 17, 1_000_000])
    cos, sin = reference.rope_cos_sin(positions, 6, 8e6, exact=True)
    x = randn(4, 2, 8)
    got = reference.rope(x, cos, sin, interleaved=True, exact=True)
    turned = torch.view_as_complex(x[..., :6].reshape(4, 2, 3, 2)) * torch.complex(cos, sin)[:, None]
    torch.testing.assert_close(got[..., :6], torch.view_as_real(turned).flatten(-2))
    assert torch.equal(got[..., 6:], x[..., 6:])


def test_rope_cos_sin_against_integer_reduction() -> None:
    """theta = 1 makes every angle the position itself; sin and cos of 1e6 are known to 12 digits."""
    cos, sin = reference.rope_cos_sin(torch.tensor([1_000_000]), 2, 1.0, exact=True)
    assert abs(float(cos) - 0.936752127533) < 1e-11 and abs(float(sin) + 0.349993502171) < 1e-11


def test_router_against_transformers_formula() -> None:
    """n_group = 1 without ties: plain topk of sigmoid + bias; with groups: the masked form."""
    logits, bias = randn(9, 12, dtype=torch.float32), randn(12, seed=1, dtype=torch.float32) * 0.1
    scores = torch.sigmoid(logits.double())
    weights, ids, counts, out = reference.route_topk(logits, bias, 3, routed_scaling_factor=2.5, return_scores=True)
    want = torch.topk(scores + bias, 3).indices
    assert torch.equal(ids.long(), want) and ids.dtype == torch.int32
    picked = scores.gather(1, want)
    torch.testing.assert_close(weights, (picked / picked.sum(1, keepdim=True) * 2.5).float())
    assert torch.equal(counts, torch.bincount(want.flatten(), minlength=12).int())
    torch.testing.assert_close(out, scores.float())
    _, ids, _ = reference.route_topk(logits, bias, 3, n_group=4, topk_group=2)
    groups = (scores + bias).view(9, 4, 3)
    kept = groups.topk(2, dim=-1).values.sum(-1).topk(2).indices
    for t in range(9):
        assert {int(i) // 3 for i in ids[t]} <= set(kept[t].tolist())


def test_router_order_of_ties_nan_and_zero() -> None:
    zero, nan = 0.0, float("nan")
    logits, bias = torch.tensor([[1.0, 1.0, 0.0, 1.0], [nan, 0.0, nan, -5.0]]), torch.zeros(4)
    assert reference.route_topk(logits, bias, 3)[1].tolist() == [[0, 1, 3], [1, 3, 0]]
    biased = torch.tensor([[-zero, zero, -1.0]])
    from glmx.reference.route_topk import select_experts

    assert select_experts(biased, 2).tolist() == [[0, 1]]


def test_moe_block_against_a_loop_over_tokens() -> None:
    """plan + gathered GEMM + combine equal sum_k weight * silu_mul(w x), one token at a time."""
    T, E, K, H, N = 6, 4, 2, 5, 6
    x, w = randn(T, H), randn(E, N, H, seed=1)
    ids = torch.tensor([[0, 2], [2, -1], [3, 0], [-1, -1], [2, 3], [0, 3]], dtype=torch.int32)
    weights = randn(T, K, seed=2).abs()
    plan = reference.expert_plan(ids, E)
    assert plan.expert_offsets.tolist() == [0, 3, 3, 6, 9]
    assert plan.row_token.tolist() == [0, 2, 5, 0, 1, 4, 2, 4, 5, -1, -1, -1]
    rows = reference.grouped_gemm(
        x, w, plan.expert_offsets, row_token=plan.row_token, inverse=plan.inverse, silu_mul=True, exact=True
    )
    got = reference.moe_combine(rows, weights, plan.inverse, exact=True)
    want = torch.zeros(T, N // 2, dtype=F64)
    for t in range(T):
        for k in range(K):
            if ids[t, k] >= 0:
                y = w[ids[t, k]] @ x[t]
                want[t] += weights[t, k] * F.silu(y[: N // 2]) * y[N // 2 :]
    torch.testing.assert_close(got, want)


def test_gradients_of_the_gemm_are_its_autograd() -> None:
    offsets = torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    x, w = randn(7, 5).requires_grad_(), randn(3, 4, 5, seed=1).requires_grad_()
    dy = randn(7, 4, seed=2)
    reference.grouped_gemm(x, w, offsets, exact=True).backward(dy)
    torch.testing.assert_close(reference.grouped_gemm_dgrad(dy, w.detach(), offsets, exact=True), x.grad)
    torch.testing.assert_close(reference.grouped_gemm_wgrad(dy, x.detach(), offsets, exact=True), w.grad)
    out = torch.ones(3, 4, 5, dtype=torch.float32)
    reference.grouped_gemm_wgrad(dy.float(), x.detach().float(), offsets, out=out, accumulate=True)
    torch.testing.assert_close(out, (w.grad + 1).float())


def test_lm_head_logprob() -> None:
    hidden, weight = randn(5, 8), randn(11, 8, seed=1)
    ids = torch.tensor([3, -1, 0, 10, 7])
    got = reference.lm_head_logprob(hidden, weight, ids, temperature=0.7, top_n=2, exact=True)
    logp = F.log_softmax(hidden @ weight.T / 0.7, dim=1)
    want = logp.gather(1, ids.clamp(min=0)[:, None])[:, 0] * (ids >= 0)
    torch.testing.assert_close(got.logprob, want)
    torch.testing.assert_close(got.top_logprobs, logp.topk(2).values)
    assert torch.equal(got.top_ids.long(), logp.topk(2).indices)


def test_embedding_and_sum_squares() -> None:
    weight = randn(6, 3)
    assert torch.equal(reference.embedding(torch.tensor([5, 0, 5]), weight), weight[[5, 0, 5]])
    tensors = [randn(4, 3), randn(7, seed=1)]
    got = reference.sum_squares(tensors)
    torch.testing.assert_close(got, torch.cat([t.flatten() for t in tensors]).square().sum())
    assert got.dim() == 0 and got.dtype == F64


def test_attention_and_sparse_mla() -> None:
    """Against torch's SDPA: one sequence whose last 5 of 9 tokens ask, then a list of every second key."""
    q, k, v = randn(5, 6, 8), randn(9, 2, 8, seed=1), randn(9, 2, 10, seed=2)
    cu, lens, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5], [9], [0, 9]))
    parts = [x.transpose(0, 1) for x in (q, k, v)]
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    want = F.scaled_dot_product_attention(*parts, mask, enable_gqa=True).transpose(0, 1)
    got = reference.attention(q, k, v, cu, lens, cu_seqlens_k=cu_k, return_lse=True, exact=True)
    torch.testing.assert_close(got.out, want)
    torch.testing.assert_close(got.lse[0, 0], torch.logsumexp(k[:5, 0] @ q[0, 0] * 8**-0.5, 0))
    lists = torch.tensor([[0, 2, 4, -1, -1]] * 4 + [[0, 2, 4, 6, 8]], dtype=torch.int32)
    kv = k[:, 0]
    got = reference.sparse_mla(q, kv, lists, cu, lens, cu_seqlens_k=cu_k, scale=0.3, v_dim=5, exact=True)
    for t, keys in ((0, kv[:5:2]), (4, kv[::2])):
        want = F.scaled_dot_product_attention(q[t], keys, keys[:, :5], scale=0.3)
        torch.testing.assert_close(got[t], want)


def test_indexer_kl() -> None:
    """Against torch's kl_div of the averaged attention, all keys and listed ones; gradients by finite differences."""
    index_q, weights, index_k = randn(5, 3, 6), randn(5, 3, seed=1), randn(9, 6, seed=2)
    q, kv = randn(5, 4, 8, seed=3), randn(9, 8, seed=4)
    cu, lens, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5], [9], [0, 9]))
    lists = torch.tensor([[0, 2, 4, -1, -1]] * 4 + [[0, 2, 4, 6, 8]], dtype=torch.int32)
    for listed in (None, lists):
        wanted, lses = [], []
        for t in range(5):
            keys = torch.arange(5 + t) if listed is None else listed[t][listed[t] >= 0].long()
            s = q[t] @ kv[keys].T * 0.3
            scores = sum(weights[t, h] * (index_k[keys] @ index_q[t, h]).clamp(min=0) for h in range(3))
            wanted.append(F.kl_div(torch.log_softmax(scores, 0), torch.softmax(s, 1).mean(0), reduction="sum"))
            lses.append(torch.logsumexp(s, 1))
        rows = {"cu_seqlens_q": cu, "seq_lens": lens, "cu_seqlens_k": cu_k, "scale": 0.3, "topk_indices": listed}

        def kl(index_q, weights, index_k, rows=rows, lse=torch.stack(lses)):
            return reference.indexer_kl(index_q, weights, index_k, q, kv, lse, **rows, exact=True)

        torch.testing.assert_close(kl(index_q, weights, index_k), torch.stack(wanted))
        assert torch.autograd.gradcheck(kl, [x.clone().requires_grad_() for x in (index_q, weights, index_k)])
