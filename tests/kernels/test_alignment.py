"""The public op: same numbers as the specification, whole under torch.compile, and a gradient that costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from repa.kernels import cosine_alignment, reference, registered

# Linear in time with the case: a small one of each kind.
KINDS = [
    {"dtype": "float16"},
    {"dtype": "bfloat16", "gamma": None},
    {"dtype": "float32", "weights": "real"},
    {"dtype": "int8", "K": 3},
    {"dtype": "int8", "gamma": 1.0, "weights": "mask"},
]


def loss_and_dz(case, times=1.0):
    z = case["z"].detach().requires_grad_()
    loss = cosine_alignment(**case | {"z": z})
    (dz,) = torch.autograd.grad(loss * times if times != 1.0 else loss, z)
    return loss, dz


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_value_and_gradient(make_case, truth, assert_close, on, device, kind):
    case = make_case(T=19, **kind)
    loss, dz = loss_and_dz(on(device, case))
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert_close(loss, dz, truth(case))


def test_missing_statistics_are_computed(make_case, truth, assert_close, on, device):
    case = make_case(T=37, dtype="float32") | {"channel_mean": None, "channel_std": None}
    assert_close(*loss_and_dz(on(device, case)), truth(case))


def test_bfloat16(make_case, truth, on, device):
    case = make_case(T=19, z_dtype=torch.bfloat16)
    loss, dz = loss_and_dz(on(device, case))
    expected, true_dz = truth(case)
    assert abs(loss.item() - expected.item()) < 1e-6
    assert dz.dtype == torch.bfloat16
    # One rounding to 8 significant bits, element by element.
    error = (dz.cpu().double() - true_dz).abs()
    assert (error <= 2**-8 * true_dz.abs() + 1e-6 * true_dz.abs().max()).all()


def test_autocast_changes_nothing(make_case, on, device):
    case = on(device, make_case(z_dtype=torch.bfloat16))
    outside = loss_and_dz(case)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = loss_and_dz(case)
    assert torch.equal(inside[0], outside[0])
    assert torch.equal(inside[1], outside[1])


@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0)])
def test_an_empty_batch_is_zero(make_case, on, device, B, T):
    case = make_case(B=B, T=5)
    if T == 0:
        case |= {"z": case["z"][:, :0], "row_index": torch.zeros(B, 0, dtype=torch.int64)}
    loss, dz = loss_and_dz(on(device, case))
    assert loss.item() == 0
    assert dz.shape == (B, T, 24)


def test_memory_layouts(make_case, on, device):
    case = on(device, make_case(B=3, T=7, E=24))
    expected = loss_and_dz(case)
    strided = case | {
        "z": case["z"].transpose(1, 2).contiguous().transpose(1, 2),
        "tokens": torch.cat([case["tokens"], case["tokens"]], dim=-1)[..., :24],
        "channel_mean": case["channel_mean"].t().contiguous().t(),
    }
    assert not any(strided[name].is_contiguous() for name in ("z", "tokens", "channel_mean"))
    loss, dz = loss_and_dz(strided)
    assert torch.allclose(loss, expected[0], rtol=1e-6)
    assert torch.allclose(dz, expected[1], rtol=1e-5, atol=1e-9)


def test_the_same_bits_twice(make_case, on, device):
    case = on(device, make_case(T=19))
    first, second = loss_and_dz(case), loss_and_dz(case)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_weight_is_in_loss_and_gradient(make_case, on, device):
    case = on(device, make_case(weight=1.0))
    one, half = loss_and_dz(case), loss_and_dz(case | {"weight": 0.5})
    assert torch.equal(half[0], 0.5 * one[0])
    assert torch.equal(half[1], 0.5 * one[1])


@pytest.mark.parametrize("z_dtype", [torch.float32, torch.bfloat16])
def test_another_upstream_gradient(make_case, on, device, z_dtype):
    case = on(device, make_case(z_dtype=z_dtype))
    expected = (3.0 * loss_and_dz(case)[1].float()).to(z_dtype)
    assert torch.equal(loss_and_dz(case, times=3.0)[1], expected)


def test_backward_twice_gives_the_same_gradient(make_case, on, device):
    case = on(device, make_case())
    z = case["z"].requires_grad_()
    loss = cosine_alignment(**case)
    first, *others = (torch.autograd.grad(loss * factor, z, retain_graph=True)[0] for factor in (1.0, 3.0, 1.0, 0.0))
    kept = first.clone()
    first.mul_(100)  # a caller may do this to what it was handed
    last = torch.autograd.grad(loss, z)[0]
    assert torch.equal(others[0], 3.0 * kept)
    assert torch.equal(others[1], kept)
    assert others[2].eq(0).all()
    assert torch.equal(last, kept)


def test_an_upstream_gradient_of_1_hands_out_the_buffer_itself(make_case):
    z = make_case()["z"].requires_grad_()
    loss = cosine_alignment(**make_case() | {"z": z})
    held = loss.grad_fn.saved_tensors[0].data_ptr()
    assert torch.autograd.grad(loss, z)[0].data_ptr() == held


def test_no_gradient_is_made_where_z_needs_none(make_case, monkeypatch):
    from repa.kernels import composite

    asked = []
    chunked = composite.chunked
    monkeypatch.setattr(composite, "chunked", lambda *args: asked.append(args[-1]) or chunked(*args))
    case = make_case()
    assert not cosine_alignment(**case).requires_grad
    with torch.no_grad():
        cosine_alignment(**case | {"z": case["z"].clone().requires_grad_()})
    cosine_alignment(**case | {"z": case["z"].clone().requires_grad_()})
    assert asked == [False, False, True]


def test_a_second_derivative_is_refused(make_case):
    z = make_case()["z"].requires_grad_()
    loss = cosine_alignment(**make_case() | {"z": z})
    with pytest.raises(RuntimeError, match=r"second derivative.*Use repa\.kernels\.reference"):
        torch.autograd.grad(loss, z, create_graph=True)


def test_an_index_outside_raises_on_the_cpu(make_case):
    case = make_case(T=5, K=3)
    case["row_index"][1, 2] = 5
    with pytest.raises(RuntimeError, match="index 5 is out of bounds"):
        cosine_alignment(**case)


def test_integer_and_weight_dtypes(make_case, on, device):
    case = make_case(T=7, K=4, weights="mask")
    assert case["row_weight"].dtype == torch.bool
    other = case | {"row_index": case["row_index"].int(), "row_weight": case["row_weight"].half()}
    ours, theirs = loss_and_dz(on(device, case)), loss_and_dz(on(device, other))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")  # torch's own, at the first call
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device; torch finds none")
def test_nothing_waits_for_the_gpu(make_case, on):
    case = on("cuda", make_case(weights="real", K=3) | {"channel_mean": None, "channel_std": None})
    loss_and_dz(case, times=3.0)  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss_and_dz(case)
        loss_and_dz(case, times=3.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device; torch finds none")
def test_more_images_than_a_grid_has_rows(make_case, truth, assert_close, on):
    case = make_case(B=70_000, T=2, E=8) | {"channel_mean": None, "channel_std": None}
    assert_close(*loss_and_dz(on("cuda", case)), truth(case))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_torch_compile_keeps_it_whole(make_case, on, device, kind, dynamic):
    case = on(device, make_case(T=19, **kind))
    z, rest = case.pop("z").requires_grad_(), case
    # On the CPU no C++ is compiled: what is tested is the graph. On a GPU it is Inductor and its Triton launch.
    backend = "inductor" if device == "cuda" else "aot_eager"
    torch.compiler.reset()  # it refuses to compile one piece of code more than 8 times over
    whole = {"fullgraph": True, "backend": backend, "dynamic": dynamic}
    compiled = torch.compile(lambda z: 2.0 * cosine_alignment(z, **rest), **whole)
    loss = compiled(z)
    (dz,) = torch.autograd.grad(loss, z)
    expected, expected_dz = loss_and_dz({"z": z, **rest}, times=2.0)
    assert torch.allclose(loss, 2.0 * expected, rtol=1e-6)
    assert torch.allclose(dz, expected_dz, rtol=1e-5, atol=1e-8)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in opcheck
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_opcheck(make_case, on, device, kind):
    case = on(device, make_case(**kind))
    tensors = ("z", "tokens", "token_scale", "channel_mean", "channel_std", "row_weight", "row_index")
    args = [case["z"].requires_grad_(), *(case[name] for name in tensors[1:]), case["gamma"], case["weight"], True]
    results = torch.library.opcheck(registered.cosine_alignment, args)
    assert set(results.values()) == {"SUCCESS"}


def test_equals_the_reference_in_a_training_step(make_case):
    """Through a projector: the parameters' gradients are those that autograd finds through the specification."""
    case = make_case(T=19, E=24)
    hidden = torch.randn(2, 19, 16, generator=torch.Generator().manual_seed(1))
    gradients = []
    for op in (cosine_alignment, reference.cosine_alignment):
        torch.manual_seed(0)
        projector = torch.nn.Linear(16, 24)
        op(**case | {"z": projector(hidden)}).backward()
        gradients.append([p.grad for p in projector.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-8)


def test_importing_the_package_loads_no_torch_and_the_cpu_needs_no_triton():
    code = (
        "import sys, repa.kernels; assert not {'torch', 'triton'} & set(sys.modules), 'at import'\n"
        "import torch; z = torch.randn(1, 3, 4, requires_grad=True)\n"
        "sys.modules['triton'] = None\n"
        "repa.kernels.cosine_alignment(z, torch.randn(1, 3, 4), gamma=0.6).backward()\n"
        "assert z.grad.isfinite().all()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
