"""Arguments that do not fit get one error that names them, what was found and what to do."""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from repa.kernels import cosine_alignment
from repa.kernels.arguments import check

HALF, INT8 = torch.float16, torch.int8
WRONG = [
    ({"z": torch.zeros(2, 5, 24, dtype=HALF)}, "z is float16 [2, 5, 24] on cpu; expected bfloat16 or float32.", "86 %"),
    ({"z": torch.zeros(2, 5, 24, dtype=torch.float64)}, "z is float64 [2, 5, 24]", "reference.cosine_alignment"),
    ({"z": torch.zeros(2, 24, 5, 1)}, "z is float32 [2, 24, 5, 1] on cpu; expected [B, T, E]", "transpose(1, 2)"),
    ({"z": torch.zeros(2, 5, 0)}, "expected a width E of 1 or more", ""),
    ({"tokens": torch.zeros(2, 5, 24, dtype=torch.uint8)}, "tokens is uint8 [2, 5, 24]", "int8 with token_scale"),
    ({"tokens": torch.zeros(2, 24)}, "tokens is float32 [2, 24] on cpu; expected [2, T, 24]", ""),
    ({"tokens": torch.zeros(2, 5, 32)}, "tokens is float32 [2, 5, 32] on cpu; expected [2, T, 24]", "encoder"),
    ({"tokens": torch.zeros(3, 5, 24)}, "tokens is float32 [3, 5, 24] on cpu; expected [2, T, 24]", ""),
    ({"tokens": torch.zeros(2, 6, 24)}, "expected [2, 5, 24], as z is", "give row_index [B, K]"),
    ({"tokens": torch.zeros(2, 5, 24, dtype=INT8)}, "token_scale is None; expected float16 [2, 5]", "int8"),
    ({"token_scale": torch.ones(2, 5, dtype=HALF)}, "token_scale is float16 [2, 5] on cpu; expected None", ""),
    (
        {"tokens": torch.zeros(2, 5, 24, dtype=INT8), "token_scale": torch.ones(2, 4, dtype=HALF)},
        "token_scale is float16 [2, 4] on cpu; expected float16 or float32 [2, 5] [B, T]",
        "",
    ),
    (
        {
            "tokens": torch.zeros(2, 5, 24, dtype=INT8),
            "token_scale": torch.ones(2, 5, dtype=HALF),
            "channel_mean": None,
            "channel_std": None,
        },
        "channel_mean is None; expected float32 [2, 24]",
        "int8 tokens are stored relative to it",
    ),
    ({"channel_std": None}, "channel_std is None; expected float32 [2, 24]", "mean and std come together"),
    ({"channel_mean": torch.zeros(2, 1, 24)}, "channel_mean is float32 [2, 1, 24]", "float32 [2, 24] [B, E]"),
    ({"channel_std": torch.ones(2, 24, dtype=HALF)}, "channel_std is float16 [2, 24]", "float32 [2, 24] [B, E]"),
    ({"gamma": float("nan")}, "gamma is nan; expected a finite number", "None for no spatial"),
    ({"weight": float("inf")}, "weight is inf; expected a finite number", ""),
    ({"row_weight": torch.ones(2, 4)}, "row_weight is float32 [2, 4] on cpu; expected", "[2, 5] [B, T] of z"),
    ({"row_weight": torch.ones(2, 5, dtype=torch.int64)}, "row_weight is int64 [2, 5]", "bool"),
    ({"row_index": torch.zeros(2, 4, dtype=torch.int64)}, "row_index is int64 [2, 4]", "[2, 5] [B, K] of z"),
    ({"row_index": torch.zeros(2, 5)}, "row_index is float32 [2, 5]", "int64 or int32"),
    ({"tokens": torch.zeros(2, 5, 24, requires_grad=True)}, "tokens is float32 [2, 5, 24]", "tokens.detach()"),
    ({"channel_mean": torch.zeros(2, 24, device="meta")}, "channel_mean is float32 [2, 24] on meta; expected cpu", ""),
    (
        {
            "z": torch.zeros(2, 1, 24),
            "tokens": torch.zeros(2, 1, 24),
            "channel_mean": None,
            "channel_std": None,
        },
        "tokens is float32 [2, 1, 24]",
        "at least 2 tokens",
    ),
]


@pytest.mark.parametrize(("changes", "found", "advice"), WRONG, ids=[w[1][:60] for w in WRONG])
def test_one_clear_error(make_case, changes, found, advice):
    with pytest.raises(ValueError, match=re.escape(found)) as error:
        cosine_alignment(**make_case() | changes)
    assert str(error.value).startswith("cosine_alignment: ")
    assert advice in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("width", "where", "fits"), [(4096, "cuda", True), (4097, "cuda", False), (4097, "cpu", True)])
def test_only_the_fused_kernel_has_a_largest_width(width, where, fits):
    with FakeTensorMode():  # a CUDA tensor without a GPU
        z = torch.empty(2, 5, width, device=where)
    arguments = (z, z, None, None, None, None, 1.0, None, None)
    if fits:
        check(*arguments)
    else:
        with pytest.raises(ValueError, match=r"expected a width E of 1 to 4096 on a GPU\. repa\.kernels\.reference"):
            check(*arguments)
