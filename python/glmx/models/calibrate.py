"""Quantisation that knows what a matrix multiplies: least error of outputs on calibration text, not of weights.

A row w of a matrix gives x . w, so the mean square error of a rounded row q is (q - w) M (q - w)^T with M = E[x x^T],
the second moments of the input. Columns are rounded in order; the error of each is taken over by the columns behind
it, by which the output changes least (OPTQ: Frantar et al. 2023, algorithm 1). On the demo's model this leaves two
fifths of the divergence that rounding to nearest has; scales searched for by E[x^2] leave all of it (docs/log.md).

Legend: T tokens, R rows, K columns, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch

from glmx import ops
from glmx.layers.linear import Linear
from glmx.layers.mlp import MLP
from glmx.layers.moe import Experts
from glmx.models.batch import Batch
from glmx.models.compressed import Format, Quantised, is_quantised, nearest, scale_of
from glmx.models.decoder import Decoder
from glmx.models.stored import GROUP

WINDOW = 512  # tokens of a sequence: what the demo is trained on, and every GLM reads; many windows are many contexts
_BATCH = 4  # windows in a forward
_DAMPING = 0.03  # of the mean of M's diagonal, added to it: of 0.01, 0.03, 0.1 the least divergence of the demo's model
_PRIOR = 64  # rows of the layer's mean that an expert's own are mixed with: an expert that saw none has the mean alone
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class Moments:
    """M = E[x x^T] of a matrix's input, fp32 [K, K]."""

    def __init__(self, mean_KK: torch.Tensor) -> None:
        self.mean_KK = mean_KK

    def norm2(self, weight_RK: torch.Tensor) -> float:
        """The mean square of the output of `weight`, summed over its rows."""
        return float(((weight_RK @ self.mean_KK) * weight_RK).sum(dtype=torch.float64))

    @cached_property
    def factor_KK(self) -> torch.Tensor:
        """U upper with U^T U = (M, damped)^-1: row j says how the columns behind j take over an error in j."""
        damped_KK = self.mean_KK.clone()
        diagonal_K = damped_KK.diagonal()
        diagonal_K += diagonal_K.mean().clamp_min(1e-30) * _DAMPING
        inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(damped_KK))
        return torch.linalg.cholesky(inverse_KK, upper=True)


def compensated(weight_RK: torch.Tensor, moments: Moments, to: Format) -> Quantised:
    """fp32 [R, K] -> values of least output error, one column after the other.

    A group's scale is chosen when the columns before it have been rounded; int8's, of the whole row, at the start.
    """
    left_RK, U_KK = weight_RK.clone(), moments.factor_KK
    values = torch.empty(weight_RK.shape, dtype=torch.int8)
    scale_R1, scales = scale_of(weight_RK, to), []
    for first in range(0, weight_RK.shape[1], GROUP):
        last = min(first + GROUP, weight_RK.shape[1])
        block, U = left_RK[:, first:last].T.contiguous(), U_KK[first:last, first:last]  # a column is a row of `block`
        if to == "int4":
            scale_R1 = scale_of(left_RK[:, first:last], to)
            scales.append(scale_R1)
        errors = torch.empty_like(block)
        for j, column in enumerate(block):
            q = nearest(column, scale_R1[:, 0], to)
            values[:, first + j] = q
            errors[j] = (column - q * scale_R1[:, 0]) / U[j, j]
            block[j + 1 :] -= U[j, j + 1 :, None] * errors[j]
        left_RK[:, last:] -= errors.T @ U_KK[first:last, last:]
    return Quantised(values, torch.cat(scales, 1) if scales else scale_R1)


class Inputs:
    """What every quantised matrix of a model multiplied when the model ran over a text; moments on demand.

    The inputs are kept in the model's dtype, T x K values for each module; experts' are selected from their layer's,
    and what goes into their down projections is computed again.
    """

    def __init__(self, model: Decoder, windows: Sequence[torch.Tensor]) -> None:
        """Runs the model, its MTP layer too, over windows of ids int64 [n]."""
        self._model = model
        self._seen: dict[str, list[tuple[torch.Tensor, ...]]] = {}
        self._recent: tuple[object, Moments] | None = None
        self._means: dict[tuple[str, str], torch.Tensor] = {}
        hooks = []
        for name, module in model.named_modules():
            if isinstance(module, (MLP, Experts)) or isinstance(module, Linear) and is_quantised(f"{name}.weight"):
                hooks.append(module.register_forward_pre_hook(self._keeper(name)))
            elif name.endswith(".kv_a_layernorm"):  # kv_b_proj is not called: attention absorbs its two halves
                keep = self._keeper(name.replace("kv_a_layernorm", "kv_b_proj"))
                hooks.append(module.register_forward_hook(lambda module, args, out, keep=keep: keep(module, (out,))))
        try:
            for first in range(0, len(windows), _BATCH):
                _forward(model, windows[first : first + _BATCH])
        finally:
            for hook in hooks:
                hook.remove()

    def moments(self, key: str) -> Moments:
        """Of the input of the checkpoint's matrix `key`. The last ones are kept: several matrices share an input."""
        expert = _EXPERT.fullmatch(key)
        if expert:
            layer, e, part = expert.groups()
            site: tuple[str, ...] = (layer, e, "down" if part == "down" else "gate_up")
        elif ".mlp." in key and not key.endswith(".down_proj.weight"):
            site = (key.rsplit(".", 2)[0],)
        elif key.endswith((".q_proj.weight", ".k_proj.weight", ".v_proj.weight")):
            site = (key.rsplit(".", 2)[0] + ".q_proj",)
        elif key.endswith(("q_a_proj.weight", ".kv_a_proj_with_mqa.weight")):
            site = (key.rsplit(".", 2)[0] + ".kv_a_proj_with_mqa",)
        else:
            site = (key.removesuffix(".weight"),)
        if self._recent is None or self._recent[0] != site:
            mean = self._expert_mean(site[0], int(site[1]), site[2]) if expert else self._mean(site[0])
            self._recent = site, Moments(mean)
        return self._recent[1]

    def _keeper(self, name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._seen.setdefault(name, []).append(args)

        return keep

    def _mean(self, name: str) -> torch.Tensor:
        return _mean([x_TK for (x_TK,) in self._seen[name]])

    def _expert_mean(self, layer: str, e: int, part: str) -> torch.Tensor:
        """Of the expert's own rows and _PRIOR rows that are the mean of the rows of all experts of the layer."""
        if (layer, part) not in self._means:
            experts = range(self._model.config.n_routed_experts)
            rows = [x for e in experts for x in self._expert_rows(layer, e, part)]
            if len(self._means) > 1:  # gate_up and down of one layer: files hold the layers one after the other
                self._means.clear()
            self._means[layer, part] = _mean(rows)
        own = [*self._expert_rows(layer, e, part)]
        seen = sum(map(len, own))
        prior = self._means[layer, part]
        return (_mean(own) * seen + prior * _PRIOR) / (seen + _PRIOR) if seen else prior

    def _expert_rows(self, layer: str, e: int, part: str) -> Iterator[torch.Tensor]:
        """What the tokens routed to an expert bring to its matrices."""
        experts = self._model.get_submodule(layer)
        assert isinstance(experts, Experts)
        for x_TH, _, ids_TK in self._seen[layer]:
            x_RH = x_TH[(ids_TK == e).any(1)]
            yield ops.linear(x_RH, experts.gate_up_proj[e].detach(), silu_mul=True) if part == "down" else x_RH


def _mean(inputs: list[torch.Tensor]) -> torch.Tensor:
    """E[x x^T] over the rows of all inputs."""
    K = inputs[0].shape[1]
    total_KK = torch.zeros(K, K)
    for x_RK in inputs:
        rows = x_RK.float()
        total_KK.addmm_(rows.T, rows)
    return total_KK / max(sum(map(len, inputs)), 1)


@torch.no_grad()
def _forward(model: Decoder, windows: Sequence[torch.Tensor]) -> None:
    ids_T = torch.cat([*windows])
    positions_T = torch.cat([torch.arange(len(window)) for window in windows])
    batch = Batch.from_lengths([len(window) for window in windows])
    hidden_TH = model.forward_tokens(ids_T, positions_T, batch)
    if model.config.num_nextn_predict_layers:
        # The last row of a window has no next token and takes its first: one wrong row in WINDOW.
        next_T = torch.cat([window.roll(-1) for window in windows])
        model.mtp_step(hidden_TH, next_T, positions_T, batch)


def windows(ids_T: torch.Tensor, tokens: int) -> list[torch.Tensor]:
    """About `tokens` tokens of a text, in windows from all of it."""
    length = min(WINDOW, len(ids_T))
    count = max(1, min(tokens, len(ids_T)) // length)
    starts = [i * (len(ids_T) - length) // max(count - 1, 1) for i in range(count)]
    return [ids_T[start : start + length] for start in starts]
