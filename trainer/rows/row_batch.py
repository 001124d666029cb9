"""Rows of a cache as one batch of tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from ...cache_specs.errors import UsageError, nearest


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class FeatureBatch:
    """One encoder's rows as stored. E channels, T tokens.

    tokens [B,T,E] float16 | int8, float32 where they were computed (reading/online.py); token_scale [B,T] float16 with
    int8 only; channel_mean, channel_std [B,E] float32;
    cls_token [B,E], float16 as stored, where the encoder has one and the reader was asked for it.
    """

    tokens: Tensor
    channel_mean: Tensor
    channel_std: Tensor
    token_scale: Tensor | None = None
    cls_token: Tensor | None = None

    def __repr__(self) -> str:
        return f"FeatureBatch({_shapes(self.tensors())})"

    def tensors(self) -> dict[str, Tensor]:
        """Return what is there, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Return these rows on `device`, as `Tensor.to` does: what lies there already is not copied."""
        return replace(self, **{k: v.to(device, non_blocking=non_blocking) for k, v in self.tensors().items()})


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Batch:
    """Rows of a cache: rows [B] int64 and labels [B] int64, moments [B,M,h,w], one FeatureBatch an encoder.

    moments are float16, or uint8 of pixels that are stored so.
    `encoders` are their names, in the order of `features`; `batch.of("dinov2-vit-b")` is one by name.
    Where encoders are computed, images [B,3,R,R] uint8 stand for their features until the batch is on the device.
    """

    rows: Tensor
    labels: Tensor
    moments: Tensor
    features: list[FeatureBatch] = field(default_factory=list)
    images: Tensor | None = None
    encoders: tuple[str, ...] = ()

    def __repr__(self) -> str:
        each = (f", {name}: {features}" for name, features in zip(self.encoders, self.features, strict=False))
        return f"Batch({_shapes(self._own())}{''.join(each)})"

    def of(self, encoder: str) -> FeatureBatch:
        """Return an encoder's rows, by the name that the reader gives it; raise UsageError where it is not read."""
        if encoder not in self.encoders:
            raise UsageError(f"this batch has no tokens of {encoder!r}; {nearest(encoder, self.encoders)}")
        return self.features[self.encoders.index(encoder)]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Return the batch on `device`, as `Tensor.to` does.

        With `non_blocking` the copy to CUDA goes on while the host does, from pinned memory alone
        (`reader.empty_batch(num, pin_memory=True)`, filled by `reader.rows(..., out=)`): fill that again only once the
        device has it.
        """
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._own().items()}
        features = [features.to(device, non_blocking=non_blocking) for features in self.features]
        return replace(self, features=features, **cast(Any, moved))

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, those of encoder i as features[i].tokens and so on."""
        named = self._own()
        for i, features in enumerate(self.features):
            named |= {f"features[{i}].{name}": tensor for name, tensor in features.tensors().items()}
        return named

    def _own(self) -> dict[str, Tensor]:
        found = {"rows": self.rows, "labels": self.labels, "moments": self.moments}
        return found if self.images is None else found | {"images": self.images}


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    """Return names, dtypes and shapes, and no numbers."""
    return ", ".join(f"{name} {described(tensor, len(tensor))}" for name, tensor in tensors.items())


def described(tensor: Tensor, num: int) -> str:
    """Return dtype and shape of a tensor, had it `num` rows."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {[num, *tensor.shape[1:]]}"


def mirror(moments: np.ndarray, views: np.ndarray) -> None:
    """Turn the rows of `moments` [B,M,h,w] around, in place, of which view 1 is wanted: of pixels that is exact."""
    for row in np.flatnonzero(views).tolist():
        moments[row] = moments[row, ..., ::-1].copy()
