"""The specification against numbers worked out by hand or by numpy loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from repa.kernels import reference


def by_loops(case):
    """The loss, row by row in numpy float64, straight from the equations and nothing else."""
    array = {k: v.detach().double().numpy() for k, v in case.items() if isinstance(v, torch.Tensor)}
    z, tokens = array["z"], array["tokens"]
    if case["tokens"].dtype == torch.int8:
        tokens = array["channel_std"][:, None] * array["token_scale"][..., None] * tokens
        tokens = tokens + array["channel_mean"][:, None]
    total = share = 0.0
    for b in range(z.shape[0]):
        for k in range(z.shape[1]):
            t = k if case["row_index"] is None else int(case["row_index"][b, k])
            f = tokens[b, t]
            if case["gamma"] is not None:
                if case["channel_mean"] is None:
                    mean, std = tokens[b].mean(0), tokens[b].std(0, ddof=1)
                else:
                    mean, std = array["channel_mean"][b], array["channel_std"][b]
                f = (f - case["gamma"] * mean) / (std + 1e-6)
            w = 1.0 if case["row_weight"] is None else array["row_weight"][b, k]
            total += w * -(z[b, k] @ f) / (np.linalg.norm(z[b, k]) * np.linalg.norm(f))
            share += w
    return case["weight"] * total / share


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
@pytest.mark.parametrize("gamma", [None, 0.0, 0.6, 1.0])
@pytest.mark.parametrize(("weights", "K"), [(None, None), ("real", None), ("mask", 3)])
def test_value(make_case, dtype, gamma, weights, K):
    case = make_case(dtype=dtype, gamma=gamma, weights=weights, K=K, z_dtype=torch.float64)
    assert reference.cosine_alignment(**case).item() == pytest.approx(by_loops(case), rel=1e-12)


@pytest.mark.parametrize("K", [None, 3])
def test_statistics_are_computed_where_they_are_missing(make_case, K):
    case = make_case(dtype="float32", K=K, z_dtype=torch.float64) | {"channel_mean": None, "channel_std": None}
    assert reference.cosine_alignment(**case).item() == pytest.approx(by_loops(case), rel=1e-12)


def test_by_hand():
    # Target rows (3,4) and (0,2); z rows (1,0) and (0,-1): cosines 0.6 and -1.
    z = torch.tensor([[[1.0, 0.0], [0.0, -1.0]]])
    tokens = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    assert reference.cosine_alignment(z, tokens).item() == pytest.approx(0.2)
    assert reference.cosine_alignment(z, tokens, row_weight=torch.tensor([[3.0, 1.0]])).item() == pytest.approx(-0.2)
    # gamma 1: mean (1.5, 3), std (2.1213, 1.4142): both rows become +-(1, 1)/sqrt 2.
    aligned = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]])
    assert reference.cosine_alignment(aligned, tokens, gamma=1.0, weight=0.5).item() == pytest.approx(-0.5)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(("weights", "K"), [(None, None), ("real", 3)])
def test_gradient(make_case, dtype, weights, K):
    case = make_case(T=4, E=6, dtype=dtype, weights=weights, K=K, z_dtype=torch.float64)
    z = case.pop("z").requires_grad_()
    assert torch.autograd.gradcheck(lambda z: reference.cosine_alignment(z, **case), z)
    assert torch.autograd.gradgradcheck(lambda z: reference.cosine_alignment(z, **case), z)


def test_statistics_of_a_constant_channel_are_exact():
    tokens = torch.full((1, 49, 2), 4999.3)
    mean, std = reference.channel_statistics(tokens)
    assert std.eq(0).all()
    assert mean.float().eq(tokens[:, 0]).all()


def test_weights_that_are_0_or_1_equal_an_index_of_the_tokens_kept(make_case):
    case = make_case(T=6, gamma=0.6)
    kept = torch.tensor([[0, 2, 5], [1, 2, 3]])
    mask = torch.zeros(2, 6).scatter(1, kept, 1.0)
    fewer = case | {"z": case["z"].gather(1, kept[..., None].expand(-1, -1, 24)), "row_index": kept}
    assert torch.allclose(
        reference.cosine_alignment(**case | {"row_weight": mask}), reference.cosine_alignment(**fewer), rtol=1e-6
    )


def test_a_token_left_out_may_hold_anything(make_case):
    case = make_case(dtype="float32", weights="mask")
    expected = reference.cosine_alignment(**case)
    case["z"][:, 0] = math.nan
    case["tokens"][:, 0] = math.inf
    z = case.pop("z").requires_grad_()
    loss = reference.cosine_alignment(z, **case)
    (dz,) = torch.autograd.grad(loss, z)
    assert torch.equal(loss, expected)
    assert dz[:, 0].eq(0).all()
    assert dz.isfinite().all()


def test_nothing_to_average_is_zero(make_case):
    case = make_case()
    z = case["z"].requires_grad_()
    loss = reference.cosine_alignment(**case | {"row_weight": torch.zeros(2, 5)})
    assert loss.item() == 0
    assert torch.autograd.grad(loss, z)[0].eq(0).all()
    assert reference.cosine_alignment(**make_case(B=0)).item() == 0


def test_dtype_is_at_least_float32_whatever_autocast_says(make_case):
    case = make_case(z_dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = reference.cosine_alignment(**case)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, reference.cosine_alignment(**case))
