"""The kernels compiled for real GPUs, without one: what every supported compiler gives.

How many registers they take differs by version: benchmarks/kernel_resources.py, whose count this is, keeps those.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COUNT = Path(__file__).parents[2] / "benchmarks/kernel_resources.py"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Compile everything once, in a process without the interpreter; count the instructions of one target."""
    line = tmp_path_factory.mktemp("kernels") / "line.json"
    command = [sys.executable, str(COUNT), "--out", str(line), "--disassemble", "sm_80"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(line.read_text())["kernels"]


def test_every_kernel_compiles_for_every_target(kernels):
    assert {x["kernel"] for x in kernels} == {"alignment", "statistics", "scale_unless_one"}
    widths = {384, 768, 1024, 1152, 1280, 1536, 4096}
    assert {x["width"] for x in kernels if x["kernel"] == "alignment"} == widths
    assert all(x[target]["registers"] > 0 for x in kernels for target in TARGETS)
    assert all(x["sm_80"]["instructions_a_row"] > 100 for x in kernels if x["kernel"] == "alignment")


def test_nothing_spills(kernels):
    for x, target in itertools.product(kernels, TARGETS):
        assert x[target]["spills"] == 0, (target, x)


def test_rows_are_loaded_and_stored_in_128_bits(kernels):
    alignments = [x for x in kernels if x["kernel"] == "alignment"]
    for x, target in itertools.product(alignments, TARGETS):
        assert x[target]["wide_loads"] == x[target]["expected_wide_loads"] > 0, (target, x)
        assert x[target]["wide_stores"] == x[target]["expected_wide_stores"] > 0, (target, x)


GRAPHS = """
import json, torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from repa.kernels import alignment

def op(z, tokens):
    return alignment.loss_and_dz(z, tokens, None, None, None, None, None, 0.6, 0.5, True)

def calls(varying):
    B, shapes = 4, ShapeEnv()
    if varying:
        source = ConstantSource("B")
        B = shapes.create_symbol(4, source=source, dynamic_dim=DimDynamic.DYNAMIC)
        B = shapes.create_symintnode(B, hint=4, source=source)
    with FakeTensorMode(shape_env=shapes):
        z = torch.empty(B, 32, 64, device="cuda", dtype=torch.bfloat16)
        tokens = torch.empty(B, 32, 64, device="cuda", dtype=torch.float16)
    graph = make_fx(op, tracing_mode="symbolic" if varying else "fake")(z, tokens)
    return [node for node in graph.graph.nodes if node.op == "call_function"]

symbols = [node.meta["val"] for call in calls(varying=True) for node in call.all_input_nodes]
print(json.dumps({
    "fixed": [[node.target.__name__, node.kwargs.get("grid")] for node in calls(varying=False)],
    "varying": [type(symbol).__name__ for symbol in symbols if not isinstance(symbol, torch.Tensor)],
}))
"""


@pytest.fixture(scope="module")
def traced():
    """Trace the op on fake CUDA tensors, as torch.compile sees it: its calls, and its inputs that are no tensors where
    the batch varies."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, "-c", GRAPHS], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_cuda_path_is_two_launches_and_a_sum_of_partials(traced):
    """Nothing else touches z, tokens or dz."""
    calls = [call for call in traced["fixed"] if not call[0].startswith("empty")]
    launch = "triton_kernel_wrapper_mutation"  # channel statistics, then the alignment
    assert [name for name, _ in calls] == [launch, launch, "sum.default"]
    # One dimension each, for 4 images: the second and third end at 65,535.
    assert [grid for _, grid in calls[:2]] == [[[4 * 1, 1, 1]], [[4 * 2, 1, 1]]]


def test_a_batch_that_varies_gives_the_launches_whole_numbers_only(traced):
    """Inductor declares any other number that it does not know at compile time as an integer too."""
    assert set(traced["varying"]) == {"SymInt"}
