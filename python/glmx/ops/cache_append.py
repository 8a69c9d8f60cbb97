"""cache_append: rows of keys, values or latents into a cache, by slot."""

from __future__ import annotations

import torch
from torch import Tensor

from glmx.ops._library import check_dim, check_model_dtype, check_same_dtype, op

_append = op("cache_append")


def cache_append(cache: Tensor, rows: Tensor, slot_mapping: Tensor, column: int = 0) -> Tensor:
    """cache[slot_mapping[t], column : column + W] = rows[t], in place.

    Args:
        cache: [cache_rows, stride], fp32 or bf16, contiguous; written.
        rows: [T, W], the dtype of cache; made contiguous if it is not.
        slot_mapping: int64 [T], each in [0, cache_rows), or -1: that row is skipped.
        column: where the rows begin in the cache's rows; column + W <= stride.

    Returns:
        cache. Bits are copied, denormals and NaN too. What no slot names stays as it is; where two tokens name one
        slot, the later one stays.

    Raises:
        ValueError: dtypes or shapes that do not fit, a cache that is not contiguous, a slot outside the cache.

    Not differentiable: a cache holds what was computed, and rows are detached.
    """
    check_model_dtype(rows, "rows")
    check_dim(rows, "rows", 2)
    check_dim(cache, "cache", 2)
    check_same_dtype(cache, "cache", rows.dtype)
    check_dim(slot_mapping, "slot_mapping", 1)
    check_same_dtype(slot_mapping, "slot_mapping", torch.int64)
    with torch.no_grad():
        _append(cache, rows.detach().contiguous(), slot_mapping.contiguous(), column)
    return cache
