"""The learning rate: linear warm-up from 0, then a cosine to min_lr at the last planned token.

The rate depends on the token count alone, never on the clock: a run cut short by `train.minutes` keeps the
schedule of the whole plan (it stops at a higher rate than min_lr) and goes on along the same curve when it
is resumed.
"""

from __future__ import annotations

import math


def learning_rate(tokens: int, total_tokens: int, *, lr: float, min_lr: float, warmup_tokens: int) -> float:
    """Rate of the step that ends at `tokens` trained tokens (so the first step's rate is above 0)."""
    if tokens < warmup_tokens:
        return lr * tokens / warmup_tokens
    if tokens >= total_tokens:
        return min_lr
    progress = (tokens - warmup_tokens) / (total_tokens - warmup_tokens)
    return min_lr + 0.5 * (lr - min_lr) * (1.0 + math.cos(math.pi * progress))
