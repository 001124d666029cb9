"""Rows of a cache as one batch of CPU tensors."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
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

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Rows of a cache: rows [B] int64 and labels [B] int64, moments [B,M,h,w] float16, one FeatureBatch an encoder.

    Where encoders are computed, images [B,3,R,R] uint8 stand for their features until the batch is on the device.
    """

    rows: Tensor
    labels: Tensor
    moments: Tensor
    features: list[FeatureBatch] = field(default_factory=list)
    images: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, those of encoder i as features[i].tokens and so on."""
        named: dict[str, Tensor] = {"rows": self.rows, "labels": self.labels, "moments": self.moments}
        for i, features in enumerate(self.features):
            named |= {f"features[{i}].{name}": tensor for name, tensor in features.tensors().items()}
        return named if self.images is None else named | {"images": self.images}
