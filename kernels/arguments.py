"""What `cosine_alignment` accepts, checked before anything runs.

Only shapes, dtypes and devices are looked at, never values: reading one would wait for the GPU. Each error names the
argument, what was found, what fits, and what to do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Z_DTYPES = (torch.float32, torch.bfloat16)
TOKEN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int8)
MAX_WIDTH = 4096  # of the fused kernel: up to here its tests find that nothing spills


def _found(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}"


def _refuse(name: str, found: str, expected: str, advice: str = "") -> None:
    raise ValueError(f"cosine_alignment: {name} is {found}; expected {expected}.{' ' + advice if advice else ''}")


def _check_z(z: Tensor) -> None:
    if z.dtype == torch.float16:
        _refuse(
            "z",
            _found(z),
            "bfloat16 or float32",
            "With the mean's 1/65536 folded in, 86 % of a float16 gradient underflows to 0. "
            "Train under bfloat16 autocast, or call z.float() first.",
        )
    if z.dtype not in Z_DTYPES:
        _refuse("z", _found(z), "bfloat16 or float32", "repa.kernels.reference.cosine_alignment takes float64.")
    if z.dim() != 3:
        _refuse("z", _found(z), "[B, T, E]", "A conv projector's [B, E, h, w] is z.flatten(2).transpose(1, 2).")
    if z.shape[2] == 0:
        _refuse("z", _found(z), "a width E of 1 or more")
    if z.is_cuda and z.shape[2] > MAX_WIDTH:
        _refuse(
            "z",
            _found(z),
            f"a width E of 1 to {MAX_WIDTH} on a GPU",
            "repa.kernels.reference.cosine_alignment takes any width.",
        )


def _check_shape(name: str, t: Tensor, shape: tuple[int, ...], legend: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if t.dtype not in dtypes or tuple(t.shape) != shape:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        _refuse(name, _found(t), f"{names} {list(shape)} {legend}")


def check(
    z: Tensor,
    tokens: Tensor,
    token_scale: Tensor | None,
    channel_mean: Tensor | None,
    channel_std: Tensor | None,
    gamma: float | None,
    weight: float,
    row_weight: Tensor | None,
    row_index: Tensor | None,
) -> None:
    """Raise ValueError naming the first argument that does not fit; shapes as in `cosine_alignment`."""
    _check_z(z)
    B, K, E = z.shape
    if tokens.dtype not in TOKEN_DTYPES:
        _refuse("tokens", _found(tokens), "float16, bfloat16, float32, or int8 with token_scale")
    if tokens.dim() != 3:
        _refuse("tokens", _found(tokens), f"[{B}, T, {E}], as z is {_found(z)}")
    T = tokens.shape[1]
    if tokens.shape[0] != B or tokens.shape[2] != E:
        _refuse("tokens", _found(tokens), f"[{B}, T, {E}], as z is {_found(z)}", "Is this the projector's encoder?")
    if row_index is None and T != K:
        _refuse(
            "tokens",
            _found(tokens),
            f"[{B}, {K}, {E}], as z is {_found(z)}",
            "For a subset of the target's tokens give row_index [B, K].",
        )

    int8 = tokens.dtype == torch.int8
    if token_scale is None and int8:
        _refuse("token_scale", "None", f"float16 [{B}, {T}], as tokens are int8", "It stands beside patch_tokens.")
    if token_scale is not None:
        if not int8:
            _refuse("token_scale", _found(token_scale), f"None, as tokens are {_found(tokens)}")
        _check_shape("token_scale", token_scale, (B, T), "[B, T]", (torch.float16, torch.float32))

    for name, t, other in (
        ("channel_mean", channel_mean, channel_std),
        ("channel_std", channel_std, channel_mean),
    ):
        if t is not None:
            _check_shape(name, t, (B, E), "[B, E]", (torch.float32,))
        elif other is not None or int8:
            why = "int8 tokens are stored relative to it" if int8 else "mean and std come together"
            _refuse(name, "None", f"float32 [{B}, {E}]: {why}")
    if gamma is not None:
        if not -math.inf < gamma < math.inf:  # torch.compile traces a comparison, not math.isfinite
            _refuse("gamma", str(gamma), "a finite number, or None for no spatial normalisation")
        if channel_mean is None and T < 2:
            _refuse("tokens", _found(tokens), "at least 2 tokens: gamma needs a standard deviation over T")
    if not -math.inf < weight < math.inf:
        _refuse("weight", str(weight), "a finite number")

    if row_weight is not None:
        _check_shape(
            "row_weight", row_weight, (B, K), "[B, T] of z", (torch.float32, torch.bfloat16, torch.float16, torch.bool)
        )
    if row_index is not None:
        _check_shape("row_index", row_index, (B, K), "[B, K] of z", (torch.int64, torch.int32))

    for name, t in (
        ("tokens", tokens),
        ("token_scale", token_scale),
        ("channel_mean", channel_mean),
        ("channel_std", channel_std),
        ("row_weight", row_weight),
        ("row_index", row_index),
    ):
        if t is None:
            continue
        if t.device != z.device:
            _refuse(name, _found(t), f"{z.device}, where z is")
        if t.requires_grad:
            _refuse(
                name,
                f"{_found(t)} with requires_grad",
                "a constant: only z gets a gradient",
                f"Call {name}.detach(), or repa.kernels.reference.cosine_alignment for a gradient of the target.",
            )
