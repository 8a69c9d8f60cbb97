"""What torch may compute inside the model: copies, views, gathers, adds and muls. Everything else is an op of
glmx, because torch's own reductions and products change bits with position, batch and thread count.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from glmx.models.batch import Batch
from tiny_glm import CASES, random_ids, random_model, tiny_config

ALLOWED = {
    # memory: new tensors, copies, casts
    "arange", "empty", "empty_like", "new_empty", "zeros", "new_zeros", "zero_", "fill_", "full", "lift_fresh",
    "clone", "copy_", "_to_copy", "cat", "stack", "detach",
    # views
    "alias", "as_strided", "expand", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias",
    # gathers
    "index", "index_select", "gather",
    # sums and products of two tensors, element by element
    "add", "mul",
}  # fmt: skip


class Allowlist(TorchDispatchMode):
    """Collects the names of torch ops that are not allowed; glmx's own are."""

    def __init__(self):
        super().__init__()
        self.refused, self.seen = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        self.seen.add(f"{namespace}::{name}")
        if namespace != "glmx" and name not in ALLOWED:
            self.refused.add(name)
        return func(*args, **kwargs or {})


def serve(model, ids):
    """Prefill, a chunk, decode and an MTP step over a cache."""
    state = model.new_state(2, 16)
    model(ids[:, :5], state=state)
    model(ids[:, 5:8], lengths=[2, 3], state=state, logits_to_keep=1)
    hidden = model.forward_tokens(ids[:, 8], torch.tensor([7, 8]), Batch([0, 1, 2], [8, 9], [0, 1]), state)
    mtp_batch = Batch([0, 1, 2], [1, 1], [0, 1])
    return model.logits(model.mtp_hidden(hidden, ids[:, 9], torch.tensor([7, 8]), mtp_batch, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_torch_ops_in_the_forward(case, dtype):
    model = random_model(tiny_config(**CASES[case]), 1, dtype)
    ids = random_ids(model.config, 2, 10)
    with Allowlist() as mode:
        with torch.no_grad():
            serve(model, ids)
        model.train()
        model.collect_scores = True
        model(ids, lengths=[4, 10], mtp=True)
    assert not mode.refused, f"not on the list: {sorted(mode.refused)}"
    assert any(name.startswith("glmx::") for name in mode.seen), "the mode saw no op of glmx: it tests nothing"


@pytest.mark.parametrize(
    "planted",
    [
        lambda x: F.silu(x),
        lambda x: x @ x.T,
        lambda x: x.sum(),
        lambda x: x.softmax(-1),
        lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    ],
)
def test_the_list_refuses(planted):
    with Allowlist() as mode:
        planted(torch.ones(2, 2))
    assert mode.refused
