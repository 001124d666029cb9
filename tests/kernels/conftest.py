"""Cases for the alignment op: random arguments of every kind and the devices to run them on."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from repa.kernels import reference

TOKEN_DTYPES = ["float16", "bfloat16", "float32", "int8"]


def _quantise(f: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """The cache's int8 rule: x = (f - mean) / std, 0 where std is 0; scale rounded to float16 first."""
    x = torch.where(std[:, None] > 0, (f - mean[:, None]) / std[:, None].clamp_min(1e-30), 0.0)
    scale = (x.abs().amax(-1) / 127).half()
    q = torch.where(scale[..., None] > 0, x / scale[..., None].double().clamp_min(1e-30), 0.0)
    return q.round().clamp(-127, 127).to(torch.int8), scale


@pytest.fixture
def make_case() -> Callable[..., dict[str, Any]]:
    """Return a maker of argument dicts for `cosine_alignment`; tokens have a mean of a few deviations."""

    def make(
        B: int = 2,
        T: int = 5,
        E: int = 24,
        dtype: str = "float16",
        gamma: float | None = 0.6,
        *,
        z_dtype: torch.dtype = torch.float32,
        weights: str | None = None,
        K: int | None = None,
        weight: float = 0.7,
        seed: int = 0,
    ) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed)
        centre = 3 * torch.randn(B, 1, E, generator=g, dtype=torch.float64)
        f = centre + (0.5 + torch.rand(B, 1, E, generator=g, dtype=torch.float64)) * torch.randn(
            B, T, E, generator=g, dtype=torch.float64
        )
        mean = f.mean(1)
        std = ((f - mean[:, None]).square().sum(1) / (T - 1)).sqrt()  # torch.std warns at B = 0
        scale = None
        if dtype == "int8":
            tokens, scale = _quantise(f, mean, std)
        else:
            tokens = f.to(getattr(torch, dtype))
        rows = T if K is None else K
        row_weight = None
        if weights is not None:
            kept = torch.rand(B, rows, generator=g) > 0.4
            kept[:, 0] = False
            kept[0, 1] = True
            row_weight = {"mask": kept, "real": kept * torch.rand(B, rows, generator=g)}[weights]
        return {
            "z": torch.randn(B, rows, E, generator=g, dtype=torch.float64).to(z_dtype),
            "tokens": tokens,
            "token_scale": scale,
            "channel_mean": mean.float(),
            "channel_std": std.float(),
            "gamma": gamma,
            "weight": weight,
            "row_weight": row_weight,
            "row_index": None if K is None else torch.randint(0, T, (B, K), generator=g),
        }

    return make


@pytest.fixture
def truth() -> Callable[[dict[str, Any]], tuple[Tensor, Tensor]]:
    """Return the float64 loss and gradient of a case, by autograd through the reference, on the CPU."""

    def of(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
        given = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in case.items()}
        z = given.pop("z").detach().double().requires_grad_()
        loss = reference.cosine_alignment(z, **given)
        (dz,) = torch.autograd.grad(loss, z)
        return loss.detach(), dz

    return of


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """Assert that a loss and a gradient are the float64 ones, the gradient row by row relative to the row's size."""

    def check(loss: Tensor, dz: Tensor, expected: tuple[Tensor, Tensor], *, dz_error: float = 2e-6) -> None:
        true_loss, true_dz = expected
        assert abs(loss.item() - true_loss.item()) <= 1e-6
        error = (dz.detach().cpu().double() - true_dz).norm(dim=-1)
        # A row whose z points along its target has a gradient near 0: it may be off by a rounding of its terms.
        floor = 1e-3 * true_dz.norm(dim=-1).median() if true_dz.numel() else torch.zeros(())
        assert (error <= dz_error * true_dz.norm(dim=-1).clamp_min(floor)).all(), error.max()

    return check


def _released(package: str) -> tuple[int, ...]:
    """Return major and minor version of an installed package."""
    return tuple(int(number) for number in importlib.metadata.version(package).split(".")[:2])


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request: pytest.FixtureRequest) -> str:
    """The device whose tensors the Triton kernels take: the CPU under the interpreter, or a GPU."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if request.param == "interpreter":
        pytest.importorskip("triton")
        if not interpreted:
            pytest.skip("TRITON_INTERPRET is not 1: a GPU is here and the kernels are compiled")
        if _released("triton") < (3, 7) and _released("numpy") >= (2, 4):
            pytest.skip("Triton's interpreter before 3.7 makes numbers of arrays in a way that numpy 2.4 refuses")
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device; torch finds none")
    return "cuda"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """A device that the public op runs on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device; torch finds none")
    return request.param


@pytest.fixture
def on() -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    """Return a case with its tensors moved to a device."""

    def move(where: str, case: dict[str, Any]) -> dict[str, Any]:
        return {k: v.to(where) if isinstance(v, Tensor) else v for k, v in case.items()}

    return move
