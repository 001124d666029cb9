"""The kernels compiled for real GPUs, without one: no spills, few registers, 128-bit loads and stores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Compile everything once in a process without the interpreter, and with a cache that cannot answer from before."""
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).with_name("resources.py"))]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_table(lines, capsys):
    with capsys.disabled():
        print("\nkernel            arch    width  z     tokens  registers  spills  128-bit loads, stores")
        for x in lines:
            print(
                f"{x['kernel']:<17} {x['arch']:<7} {x.get('width', '-'):>5}  {x.get('z', '-'):<5} "
                f"{x.get('tokens', '-'):<7} {x['registers']:>9}  {x['spills']:>6}  "
                f"{x['wide_loads']:>13}, {x['wide_stores']}"
            )
    for kernel in ("alignment", "statistics", "scale_unless_one"):
        assert {x["arch"] for x in lines if x["kernel"] == kernel} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    widths = {384, 768, 1024, 1152, 1280, 1536, 4096}
    assert {x["width"] for x in lines if x["kernel"] == "alignment"} == widths


def test_nothing_spills_and_registers_are_few(lines):
    for line in lines:
        assert line["spills"] == 0, line
        assert line["registers"] <= 96, line


def test_1024_threads_fit_a_multiprocessor_of_sm_90(lines):
    """They share its 65,536 registers: 64 each. Caches hold no float32 tokens, which take more."""
    stored = [x for x in lines if x["arch"] == "sm_90" and x.get("tokens") != "fp32"]
    assert len(stored) > 5
    assert all(x["registers"] <= 64 for x in stored)


def test_rows_are_loaded_and_stored_in_128_bits(lines):
    for x in lines:
        if x["kernel"] == "alignment":
            expected = x["z_loads_expected"] + x["token_loads_expected"] + x["statistics_loads_expected"]
            assert x["wide_loads"] == expected > 0, x
            assert x["wide_stores"] == x["dz_stores_expected"] > 0, x


GRAPH = """
import json, torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from repa.kernels import alignment
B, shapes = 4, ShapeEnv()
if VARYING:
    source = ConstantSource("B")
    B = shapes.create_symbol(4, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    B = shapes.create_symintnode(B, hint=4, source=source)
with FakeTensorMode(shape_env=shapes):
    z = torch.empty(B, 32, 64, device="cuda", dtype=torch.bfloat16)
    tokens = torch.empty(B, 32, 64, device="cuda", dtype=torch.float16)
def op(z, tokens):
    return alignment.loss_and_dz(z, tokens, None, None, None, None, None, 0.6, 0.5, True)
graph = make_fx(op, tracing_mode="symbolic" if VARYING else "fake")(z, tokens)
calls = [node for node in graph.graph.nodes if node.op == "call_function"]
if VARYING:
    symbols = [node.meta["val"] for call in calls for node in call.all_input_nodes]
    print(json.dumps([type(symbol).__name__ for symbol in symbols if not isinstance(symbol, torch.Tensor)]))
else:
    print(json.dumps([[node.target.__name__, node.kwargs.get("grid")] for node in calls]))
"""


def traced(*, varying):
    """Trace the op on fake CUDA tensors, as torch.compile sees it; return the JSON that GRAPH prints."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}
    code = GRAPH.replace("VARYING", str(varying))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_cuda_path_is_two_launches_and_a_sum_of_partials():
    """Nothing else touches z, tokens or dz."""
    calls = [call for call in traced(varying=False) if not call[0].startswith("empty")]
    launch = "triton_kernel_wrapper_mutation"  # channel statistics, then the alignment
    assert [name for name, _ in calls] == [launch, launch, "sum.default"]
    # One dimension each, for 4 images: the second and third end at 65,535.
    assert [grid for _, grid in calls[:2]] == [[[4 * 1, 1, 1]], [[4 * 2, 1, 1]]]


def test_a_batch_that_varies_gives_the_launches_whole_numbers_only():
    """Inductor declares any other number that it does not know at compile time as an integer too."""
    assert set(traced(varying=True)) == {"SymInt"}
