"""Memory for a model that was built without any: what each of its tensors becomes, and what the files bring to it.

A weight in few bits stays so where an op computes with it (stored.stays), as a StoredWeight; elsewhere, in fp32 or when
asked for, it becomes a Parameter of bf16(q * scale). With mappings what lies in the files as the model needs it is used
there, bf16 experts and gate beside up as StoredWeights too; what does not is copied. A model that holds a StoredWeight
has no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from glmx.layers.moe import Experts
from glmx.models import stored
from glmx.models.mapped import Mapped
from glmx.models.safetensors import TORCH, Files
from glmx.models.stored import Stored
from glmx.ops.stored_weight import Matrix, StoredFormat, StoredWeight

if TYPE_CHECKING:
    from glmx.models.decoder import Decoder


def not_finite(values: torch.Tensor) -> int:
    """How many are NaN or infinite."""
    return values.numel() - int(values.isfinite().sum())


class Place(NamedTuple):
    """Where a tensor of the files goes, or where it is used if it is `mapped`.

    how         it is dequantised by this
    not_finite  counts what must not be there, in a part of `tensor`
    """

    tensor: torch.Tensor
    how: Stored | None = None
    mapped: bool = False
    not_finite: Callable[[torch.Tensor], int] = not_finite


class Source(NamedTuple):
    """A weight or other tensor of the checkpoint, and the part of the model's tensor that it is."""

    key: str
    view: torch.Tensor


def allocate(
    model: Decoder,
    files: Files,
    found: Mapping[str, Stored],
    sources: Callable[[str, torch.Tensor], Sequence[Source]],
    mapped: Mapped | None,
    *,
    keep_small: bool,
    device: torch.device,
) -> dict[str, Place]:
    """Gives every tensor of a model on the meta device its memory -> the Place of each tensor of the files.

    sources     the model's tensors, by name, in the checkpoint's spelling
    device      where the memory is; StoredWeights, mapped or not, are on the CPU alone
    keep_small  weights in few bits stay so; False: they become Parameters
    Raises RuntimeError, torch's, where memory is short, and CheckpointError for a file that cannot be mapped.
    """
    allocation = _Allocation(files, found, sources, mapped, keep_small, model.dtype, device)
    allocation.give(model)
    if model.stored_weights():
        model.requires_grad_(False)
    return allocation.places


class _Allocation:
    def __init__(
        self,
        files: Files,
        found: Mapping[str, Stored],
        sources: Callable[[str, torch.Tensor], Sequence[Source]],
        mapped: Mapped | None,
        keep_small: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert device.type == "cpu" or not (mapped or keep_small)
        self._device = device
        self.places: dict[str, Place] = {}
        self._files, self._found, self._sources, self._mapped = files, found, sources, mapped
        self._keep_small = keep_small and dtype == torch.bfloat16
        self._keep_bf16 = mapped is not None and dtype == torch.bfloat16

    def give(self, model: Decoder) -> None:
        made: dict[int, nn.Parameter] = {}  # by what they replace: a tied head is its embedding
        for prefix, module in model.named_modules():
            held = {name: old for name, old in module._parameters.items() if old is not None}
            sources = {name: self._sources(f"{prefix}.{name}", old) for name, old in held.items()}
            formats = {name: self._format(f"{prefix}.{name}", parts) for name, parts in sources.items()}
            if isinstance(module, Experts) and len(set(formats.values())) > 1:  # moe_mlp takes two of a kind
                formats = dict.fromkeys(formats)
            scale_dtype = self._scale_dtype([source for parts in sources.values() for source in parts])
            for name, parts in sources.items():
                old, format = held[name], formats[name]
                if format is not None:
                    delattr(module, name)
                    new = self._stored_weight(format, parts, scale_dtype, 2 if "gate_up" in prefix + name else 1)
                    setattr(module, name, new)
                else:
                    if id(old) not in made:
                        made[id(old)] = self._parameter(f"{prefix}.{name}", old, parts)
                    module._parameters[name] = made[id(old)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = own = torch.empty(buffer.shape, dtype=buffer.dtype, device=self._device)
                    self._receive(f"{prefix}.{name}", own)

    def _format(self, name: str, sources: Sequence[Source]) -> StoredFormat | None:
        """What a StoredWeight of these would be; None: they make a Parameter."""
        if not all(stored.stays(source.key) for source in sources):
            return None
        found = {self._found[key].format if key in self._found else None for key, _ in sources}
        if self._keep_small and len(found) == 1 and None not in found:
            return found.pop()
        assembled = found == {None} and sources[0].key != name
        bf16 = assembled and all(self._files.headers[key].dtype == "BF16" for key, _ in sources)
        return "bf16" if bf16 and self._keep_bf16 else None

    def _scale_dtype(self, sources: Sequence[Source]) -> torch.dtype:
        found = [self._found[key] for key, _ in sources if key in self._found]
        dtypes = {TORCH[self._files.headers[how.scale].dtype] for how in found}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def _parameter(self, name: str, old: nn.Parameter, sources: Sequence[Source]) -> nn.Parameter:
        if len(sources) == 1 and sources[0].key not in self._found and self._mapped is not None:
            key = sources[0].key
            tensor = self._mapped.tensor(key)
            if tensor is not None and tensor.dtype == old.dtype:
                self.places[key] = Place(tensor, mapped=True)
                return nn.Parameter(tensor, requires_grad=False)
        new = nn.Parameter(torch.empty(old.shape, dtype=old.dtype, device=self._device))  # empty_like imports sympy
        self._receive(name, new.detach())
        return new

    def _receive(self, name: str, tensor: torch.Tensor) -> None:
        for key, view in self._sources(name, tensor):
            how = self._found.get(key)
            self.places[key if how is None else how.values] = Place(view, how)

    def _stored_weight(
        self, format: StoredFormat, sources: Sequence[Source], scale_dtype: torch.dtype, parts: int
    ) -> StoredWeight:
        if format == "bf16":
            values = self._held([key for key, _ in sources], torch.bfloat16, not_finite)
            return StoredWeight(format, [Matrix(each, None) for each in values], parts=parts)
        found = [self._found[key] for key, _ in sources]
        dtype = TORCH[self._files.headers[found[0].values].dtype]
        values = self._held([how.values for how in found], dtype, partial(stored.not_finite, format, scale=False))
        scales = self._held([how.scale for how in found], scale_dtype, partial(stored.not_finite, format, scale=True))
        pairs = [Matrix(value, scale) for value, scale in zip(values, scales, strict=True)]
        return StoredWeight(format, pairs, parts=parts, columns=found[0].shape[1])

    def _held(
        self, keys: Sequence[str], dtype: torch.dtype, not_finite: Callable[[torch.Tensor], int]
    ) -> list[torch.Tensor]:
        """The tensors, mapped where they can be; the others in one new tensor that fill copies them to."""
        out: dict[str, torch.Tensor] = {}
        for key in keys:
            tensor = None if self._mapped is None else self._mapped.tensor(key)
            if tensor is not None and tensor.dtype == dtype:
                out[key] = tensor
                self.places[key] = Place(tensor, mapped=True, not_finite=not_finite)
        copied = [key for key in keys if key not in out]
        if copied:
            shape = self._files.headers[copied[0]].shape
            for key, tensor in zip(copied, torch.empty(len(copied), *shape, dtype=dtype), strict=True):
                out[key] = tensor
                self.places[key] = Place(tensor, not_finite=not_finite)
        return [out[key] for key in keys]
