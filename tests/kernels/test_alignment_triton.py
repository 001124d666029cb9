"""The Triton kernels against float64: interpreted on the CPU, or compiled where a GPU is."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from repa.kernels import reference

WIDTHS = [384, 768, 1024, 1152, 1280, 1536, 4096]


def run(case, *, dz_dtype=torch.float32):
    """Launch the kernel. dz is float32: the interpreter truncates bfloat16 stores; rounding is tested on a GPU."""
    from repa.kernels.alignment_triton import fused

    dz = torch.full(case["z"].shape, math.nan, dtype=dz_dtype, device=case["z"].device)
    names = ("z", "tokens", "token_scale", "channel_mean", "channel_std", "row_weight", "row_index", "gamma")
    loss = fused(*(case[name] for name in names), case["weight"], dz)
    return loss, dz


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
@pytest.mark.parametrize("width", WIDTHS)
def test_widths_and_dtypes(make_case, truth, assert_close, on, triton_device, width, dtype):
    for i, gamma in enumerate([None, 0.0, 0.6, 1.0]):
        z_dtype = torch.bfloat16 if i % 2 else torch.float32
        case = make_case(B=1, T=3, E=width, dtype=dtype, gamma=gamma, z_dtype=z_dtype, seed=i)
        assert_close(*run(on(triton_device, case)), truth(case))


@pytest.mark.parametrize("warp_size", [32, 64])
def test_the_chunks_of_a_row_cover_it_and_no_more(warp_size):
    pytest.importorskip("triton")
    from repa.kernels.alignment_triton import layout

    for width in range(1, 4097):
        rows = layout(width, warp_size)
        assert rows.chunk & (rows.chunk - 1) == 0
        assert rows.chunk * (rows.chunks - 1) < width <= rows.chunk * rows.chunks
        assert rows.warps == 1 or rows.chunk == 8 * warp_size * rows.warps  # no warp without elements


@pytest.mark.parametrize("T", [1, 15, 16, 17, 37])
def test_partial_blocks(make_case, truth, assert_close, on, triton_device, T):
    case = make_case(T=T + 1, K=T, E=40)
    assert_close(*run(on(triton_device, case)), truth(case))
    if T > 1:
        case = make_case(T=T, E=33, dtype="int8")  # a width that is no multiple of 8 either
        assert_close(*run(on(triton_device, case)), truth(case))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("gamma", [None, 0.6])
@pytest.mark.parametrize(("weights", "K"), [("real", None), ("mask", None), (None, 3), ("real", 23)])
def test_row_weight_and_row_index(make_case, truth, assert_close, on, triton_device, dtype, gamma, weights, K):
    case = make_case(T=7 if K else 19, dtype=dtype, gamma=gamma, weights=weights, K=K)
    assert_close(*run(on(triton_device, case)), truth(case))


def test_a_token_left_out_is_not_read(make_case, triton_device, on):
    case = make_case(dtype="float32", weights="mask")
    expected = run(on(triton_device, case))
    case["z"][:, 0] = math.nan
    case["tokens"][:, 0] = math.inf
    loss, dz = run(on(triton_device, case))
    assert torch.equal(loss, expected[0])
    assert torch.equal(dz, expected[1])
    assert dz[:, 0].eq(0).all()


def test_weights_all_zero(make_case, on, triton_device):
    loss, dz = run(on(triton_device, make_case() | {"row_weight": torch.zeros(2, 5)}))
    assert loss.item() == 0
    assert dz.eq(0).all()


@pytest.mark.parametrize("wrong", [5, -1])
def test_an_index_outside_is_nan(make_case, on, triton_device, wrong):
    case = make_case(T=5, K=4)
    case["row_index"][1, 2] = wrong
    loss, dz = run(on(triton_device, case))
    assert loss.isnan()
    assert dz[0].isfinite().all()


@pytest.mark.parametrize("gamma", [None, 0.6])
def test_zero_rows_follow_normalize(make_case, truth, assert_close, on, triton_device, gamma):
    case = make_case(B=1, dtype="float32", gamma=gamma)
    case["z"][0, 1] = 0.0
    case["z"][0, 2] *= 1e-15  # norm under F.normalize's eps: the gradient is the target over eps
    case["tokens"][0, 3] = 0.0
    expected = truth(case)
    loss, dz = run(on(triton_device, case))
    if gamma is None:
        assert dz[0, 3].eq(0).all()
    tiny = [1, 2]
    assert (dz[0, tiny].cpu() / expected[1][0, tiny]).sub(1).abs().max() < 1e-4
    rest = [0, 4] if gamma is None else [0, 3, 4]
    assert_close(loss, dz[:, rest], (expected[0], expected[1][:, rest]))


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_constant_and_outlier_channels(make_case, truth, assert_close, on, triton_device, dtype, gamma):
    case = make_case(B=1, T=9, E=48, dtype=dtype, gamma=gamma)
    case["channel_std"][:, 0] = 0.0  # constant: 4 everywhere
    case["channel_mean"][:, 0] = 4.0
    case["tokens"][:, :, 0] = 0 if dtype == "int8" else 4.0
    case["channel_mean"][:, 1] += 5000.0  # outlier: 5000 deviations from zero
    if dtype != "int8":
        case["tokens"][:, :, 1] += 5000.0
    expected = truth(case)
    loss, dz = run(on(triton_device, case))
    # Where a channel's mean is 5000 deviations, float32 subtraction alone is off by 5000 * 6e-8 of one deviation.
    assert_close(loss, dz, expected, dz_error=3e-4 if dtype != "int8" and gamma == 1.0 else 3e-5)


def test_the_same_bits_twice(make_case, on, triton_device):
    case = on(triton_device, make_case(T=37))
    first, second = run(case), run(case)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_no_gradient_is_written_where_none_is_needed(make_case, on, triton_device):
    from repa.kernels.alignment_triton import fused

    case = on(triton_device, make_case())
    names = ("z", "tokens", "token_scale", "channel_mean", "channel_std", "row_weight", "row_index", "gamma")
    before = case["z"].clone()
    loss = fused(*(case[name] for name in names), case["weight"], None)
    assert torch.equal(loss, run(case)[0])
    assert torch.equal(case["z"], before)  # the pointer that stands in for dz was not written through


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device; torch finds none")
def test_bfloat16_gradient_is_the_rounded_one(make_case, on):
    case = on("cuda", make_case(T=37, E=768, z_dtype=torch.bfloat16))
    exact, rounded = run(case)[1], run(case, dz_dtype=torch.bfloat16)[1]
    assert torch.equal(exact.to(torch.bfloat16), rounded)


class Copies(TorchDispatchMode):
    """Collects the operators that write a whole new copy of a tensor of `numel` elements."""

    supports_higher_order_operators = True  # on a GPU, the launch is one

    def __init__(self, numel):
        super().__init__()
        self.numel = numel
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "overloadpacket", func).__name__
        if name in ("clone", "copy_", "_to_copy", "contiguous") and out.numel() == self.numel:
            self.found.append(name)
        return out


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_channels_last_convolution_needs_no_copy(make_case, on, triton_device, memory_format):
    case = on(triton_device, make_case(T=12, E=32))
    conv = torch.nn.Conv2d(8, 32, 3, padding=1, device=triton_device).to(memory_format=memory_format)
    x = torch.randn(2, 8, 3, 4, device=triton_device).to(memory_format=memory_format)
    with torch.no_grad():
        out = conv(x)
        with Copies(out.numel()) as copies:
            z = out.flatten(2).transpose(1, 2)
            run(case | {"z": z})
    # The other format shows that a copy would have been seen.
    assert copies.found == ([] if memory_format == torch.channels_last else ["clone"])
    assert z.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_statistics(triton_device, dtype):
    from repa.kernels.statistics_triton import channel_statistics

    tokens = torch.randn(2, 37, 70, generator=torch.Generator().manual_seed(0))
    if dtype == "float32":
        tokens[..., 1] += 5000.0
    tokens[..., 0] = 0.1
    tokens = tokens.to(getattr(torch, dtype))
    mean, std = channel_statistics(tokens.to(triton_device))
    true_mean, true_std = reference.channel_statistics(tokens)
    assert std[:, 0].eq(0).all()
    assert mean[:, 0].eq(tokens[0, 0, 0].to(triton_device).float()).all()
    # Rounded to float32 once, and sums that are right to 1e-6 of a deviation.
    assert ((mean.cpu().double() - true_mean).abs() <= 2**-24 * true_mean.abs() + 1e-6 * true_std).all()
    assert torch.allclose(std.cpu().double(), true_std, rtol=1e-5, atol=0)


@pytest.mark.parametrize("grad", [1.0, 0.0, -2.5])
def test_scale_unless_one(triton_device, grad):
    from repa.kernels.alignment_triton import SCALE_BLOCK, scale_unless_one

    dz = torch.randn(2 * SCALE_BLOCK + 5, device=triton_device)
    expected = dz * grad
    scale_unless_one(dz, torch.tensor(grad, device=triton_device))
    assert torch.equal(dz, expected)
