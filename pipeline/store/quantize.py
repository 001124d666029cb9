"""float32 tokens become what is stored: float16, or normalisation-aware int8, with channel statistics beside them.

The int8 code lives in the space where the alignment loss lives: per image and channel x = (f - mean) / std, then one
scale a token. Outlier channels and outlier tokens are both absorbed, and for any gamma the normalised target is a
per-channel affine of scale * q:

    f' = (std * s * q + (1 - gamma) * mean) / (std + 1e-6)

Statistics come from the float32 tokens before any rounding, accumulated in float64, and are the same
whatever the dtype.
"""

import torch

INT8_MAX = 127


def channel_statistics(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and unbiased std over tokens, each [B, E] float32, of `tokens` [B, T, E] float32 (T >= 2)."""
    wide = tokens.double()
    mean = wide.mean(dim=1)
    std = (wide - mean[:, None]).square_().sum(dim=1).div_(tokens.shape[1] - 1).sqrt_()
    return mean.float(), std.float()


def quantize_int8(tokens: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes q [B, T, E] int8 and token scales s [B, T] float16 of `tokens` [B, T, E] float32.

    `mean`, `std` [B, E] float32 from `channel_statistics`. x is 0 where the std is 0; s = max|x| / 127, rounded to
    float16 before q = clamp(round(x / s), -127, 127) is taken from it; q is 0 where s is 0.
    """
    varies = std > 0
    x = torch.where(varies[:, None], (tokens - mean[:, None]) / torch.where(varies, std, 1.0)[:, None], 0.0)
    scale = (x.abs().amax(dim=2) / INT8_MAX).half()
    divisor = torch.where(scale > 0, scale.float(), 1.0)
    codes = (x / divisor[..., None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    return torch.where(scale[..., None] > 0, codes, 0.0).to(torch.int8), scale


def dequantize_int8(codes: torch.Tensor, scale: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Return tokens [B, T, E] of float32 `codes` [B, T, E], `scale` [B, T], `mean` and `std` [B, E]."""
    return codes * scale[..., None] * std[:, None] + mean[:, None]


def stored_tokens(tokens: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    """Return the arrays of one view by name for `tokens` [B, T, E] float32 stored as `dtype` (float16 or int8)."""
    mean, std = channel_statistics(tokens)
    arrays = {"channel_mean": mean, "channel_std": std}
    if dtype == "int8":
        arrays["patch_tokens"], arrays["token_scale"] = quantize_int8(tokens, mean, std)
    else:
        arrays["patch_tokens"] = tokens.half()
    return arrays
