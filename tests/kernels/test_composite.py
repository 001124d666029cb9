"""The CPU paths: chunked, whole and compiled say the same, and the switch between them is explicit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from repa.kernels import composite, reference

NAMES = ("z", "tokens", "token_scale", "channel_mean", "channel_std", "row_weight", "row_index", "gamma", "weight")


def run(path, case, needs_dz=True):
    return path(*(case[name] for name in NAMES), needs_dz)


@pytest.mark.parametrize("path", [composite.chunked, composite.whole])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
@pytest.mark.parametrize("gamma", [None, 0.0, 0.6, 1.0])
@pytest.mark.parametrize(("weights", "K"), [(None, None), ("real", None), ("mask", 3)])
def test_value_and_gradient(make_case, truth, assert_close, path, dtype, gamma, weights, K):
    case = make_case(T=7, dtype=dtype, gamma=gamma, weights=weights, K=K)
    before = case["tokens"].clone()
    assert_close(*run(path, case), truth(case))
    assert torch.equal(case["tokens"], before)


@pytest.mark.parametrize("images_a_chunk", [1, 2, 3])
def test_chunks_change_no_gradient(make_case, truth, assert_close, monkeypatch, images_a_chunk):
    case = make_case(B=5, T=7, E=24, dtype="int8", weights="real")
    monkeypatch.setattr(composite, "CHUNK_ELEMENTS", images_a_chunk * 7 * 24)
    loss, dz = run(composite.chunked, case)
    assert_close(loss, dz, truth(case))
    assert torch.equal(dz, run(composite.chunked, case)[1])


def test_a_bfloat16_gradient_is_the_rounded_one(make_case):
    case = make_case(z_dtype=torch.bfloat16)
    exact = run(composite.chunked, case | {"z": case["z"].float()})[1]
    dz = run(composite.chunked, case)[1]
    assert dz.dtype == torch.bfloat16
    assert torch.equal(dz, exact.to(torch.bfloat16))


def test_zero_rows_follow_normalize(make_case, truth):
    case = make_case(B=1, dtype="float32", gamma=None)
    case["z"][0, 1] = 0.0
    case["z"][0, 2] *= 1e-15
    case["tokens"][0, 3] = 0.0
    _, dz = run(composite.chunked, case)
    expected = truth(case)[1]
    assert dz[0, 3].eq(0).all()
    assert (dz[0, [0, 1, 2, 4]] / expected[0, [0, 1, 2, 4]]).sub(1).abs().max() < 1e-4


def test_statistics():
    tokens = torch.randn(2, 37, 9, generator=torch.Generator().manual_seed(0))
    tokens[..., 0] = 0.1
    tokens[..., 1] += 5000.0
    tokens[:, 0, 2] = 1e4  # an outlier as the first token, which the sums are relative to
    mean, std = composite.channel_statistics(tokens)
    true_mean, true_std = reference.channel_statistics(tokens)
    assert std[:, 0].eq(0).all()
    # Rounded to float32 once, and sums that are right to 1e-6 of a deviation.
    assert ((mean.double() - true_mean).abs() <= 2**-24 * true_mean.abs() + 1e-6 * true_std).all()
    assert torch.allclose(std.double(), true_std, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_statistics_are_computed_where_they_are_missing(make_case, truth, assert_close, dtype):
    case = make_case(B=3, T=9, dtype=dtype, K=4) | {"channel_mean": None, "channel_std": None}
    assert_close(*run(composite.chunked, case), truth(case))


def test_no_gradient_is_made_where_none_is_needed(make_case):
    loss, dz = run(composite.chunked, make_case(), needs_dz=False)
    assert dz.numel() == 0
    assert torch.equal(loss, run(composite.chunked, make_case())[0])


def test_the_switch(monkeypatch):
    monkeypatch.delenv(composite.SWITCH, raising=False)
    assert composite.eager_path() is composite.chunked
    monkeypatch.setenv(composite.SWITCH, "fast")
    with pytest.raises(ValueError, match=r"REPA_CPU_ALIGNMENT is 'fast'; expected chunked \(the default\) or compiled"):
        composite.eager_path()


COMPILED = """
import torch, warnings
from repa.kernels import composite, cosine_alignment, reference
g = torch.Generator().manual_seed(0)
for B in (4, 3):
    z = torch.randn(B, 7, 24, generator=g, requires_grad=True)
    tokens = torch.randn(B, 7, 24, generator=g).half()
    mean, std = tokens.float().mean(1), tokens.float().std(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = cosine_alignment(z, tokens, channel_mean=mean, channel_std=std, gamma=0.6)
    print(sum("no C++ compiler" in str(w.message) for w in caught), end=" ")
    (dz,) = torch.autograd.grad(loss, z)
    exact = z.detach().double().requires_grad_()
    true = reference.cosine_alignment(exact, tokens, channel_mean=mean, channel_std=std, gamma=0.6)
    (true_dz,) = torch.autograd.grad(true, exact)
    assert abs(loss.item() - true.item()) < 1e-6
    assert (dz - true_dz).norm() < 1e-6 * true_dz.norm()
print(composite.eager_path() is composite.chunked)
"""


def _in_a_process_of_its_own(**environment: str) -> str:
    env = os.environ | {composite.SWITCH: "compiled"} | environment
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_compiled():
    assert _in_a_process_of_its_own() == "0 0 False"


def test_without_a_compiler_it_says_so_once_and_goes_on():
    assert _in_a_process_of_its_own(CXX="no-such-compiler", PATH="") == "1 0 True"
