"""Compile the kernels for GPUs that need not be there and print what each takes, one JSON line a kernel.

    python tests/kernels/resources.py

It runs in a process of its own because Triton compiles nothing once it has been imported as an interpreter.
"""

import argparse
import contextlib
import io
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"  # registers and spills of the very code that Triton would launch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from repa.kernels import alignment_triton, statistics_triton

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "i8": 1}
# width, z, tokens, gamma given, row weights, row index, the type of gamma and weight: torch.compile may say fp64
ALIGNMENT = [
    (384, "bf16", "fp16", True, False, False, "fp32"),
    (768, "bf16", "fp16", True, False, False, "fp32"),
    (768, "bf16", "fp16", True, False, False, "fp64"),
    (768, "bf16", "i8", True, False, False, "fp32"),
    (1024, "fp32", "fp32", True, False, False, "fp32"),
    (1152, "bf16", "fp16", True, True, True, "fp32"),
    (1280, "bf16", "bf16", True, False, False, "fp32"),
    (1536, "fp32", "fp32", False, False, False, "fp32"),
    (4096, "bf16", "i8", True, True, True, "fp32"),
    (4096, "fp32", "fp32", True, True, True, "fp32"),
]


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: set[str], arch: str, warps: int
) -> dict[str, int]:
    """Compile one kernel and return its resources; pointers and the sizes in `aligned` are multiples of 16."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    places = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    attributes = {
        places[name]: [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*") or name in aligned
    }
    source = ASTSource(kernel, signature, {places[n]: v for n, v in constants.items()}, attributes)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=TARGETS[arch], options={"num_warps": warps})
    return resources(compiled, arch, log.getvalue())


def resources(compiled: Any, arch: str, log: str) -> dict[str, int]:
    """Return registers and spills of a thread and the number of 128-bit global loads and stores in the code.

    `log` is what ptxas printed; AMD's numbers stand in the assembly.
    """
    if arch.startswith("gfx"):
        asm = compiled.asm["amdgcn"]
        return {
            "registers": int(re.findall(r"\.vgpr_count:\s+(\d+)", asm)[0]),
            "spills": int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", asm)[0]),
            "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", asm)),
            "wide_stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", asm)),
        }
    ptx = compiled.asm["ptx"]
    return {
        "registers": int(re.findall(r"Used (\d+) registers", log)[0]),
        "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
        "wide_loads": len(re.findall(r"ld\.global\.[^;]*v4\.b32", ptx)),
        "wide_stores": len(re.findall(r"st\.global\.[^;]*v4\.b32", ptx)),
    }


def alignment_line(
    width: int, z: str, tokens: str, normalised: bool, weighted: bool, indexed: bool, numbers: str, arch: str
) -> dict[str, Any]:
    """Compile the alignment kernel and say what it takes and what it must at least have."""
    types = {
        "z_ptr": f"*{z}", "tokens_ptr": f"*{tokens}", "token_scale_ptr": "*fp16", "channel_mean_ptr": "*fp32",
        "channel_std_ptr": "*fp32", "row_weight_ptr": "*fp32", "row_index_ptr": "*i64", "total_ptr": "*fp32",
        "loss_ptr": "*fp32", "dz_ptr": f"*{z}", "gamma": numbers, "weight": numbers, "K": "i32", "T": "i32",
    }  # fmt: skip
    constants = {
        "E": width, "BLOCK_E": triton.next_power_of_2(width), "ROWS": alignment_triton.ROWS, "INT8": tokens == "i8",
        "NORMALISED": normalised, "WEIGHTED": weighted, "INDEXED": indexed, "NEEDS_DZ": True,
        "STD_EPS": alignment_triton.STD_EPS, "NORM_EPS": alignment_triton.NORM_EPS,
    }  # fmt: skip
    warp_size = TARGETS[arch].warp_size
    warps = alignment_triton.num_warps(width, warp_size)
    found = compile_kernel(alignment_triton.alignment_kernel, types, constants, {"K", "T"}, arch, warps)
    per_thread = constants["BLOCK_E"] // (warps * warp_size)
    return {
        "kernel": "alignment", "arch": arch, "width": width, "z": z, "tokens": tokens, "gamma": normalised,
        "row_weight": weighted, "row_index": indexed, "numbers": numbers, "warps": warps,
        # z is loaded at two places, before the loop and ahead of each row, and dz stored at one.
        "z_loads_expected": 2 * per_thread * BYTES[z] // 16,
        "token_loads_expected": 2 * (per_thread * BYTES[tokens] // 16),  # int8: 8 bytes a thread, 64-bit loads
        "statistics_loads_expected": 2 * per_thread * 4 // 16 if normalised or tokens == "i8" else 0,
        "dz_stores_expected": per_thread * BYTES[z] // 16,
        **found,
    }  # fmt: skip


def statistics_line(arch: str) -> dict[str, Any]:
    found = compile_kernel(
        statistics_triton.statistics_kernel,
        {"tokens_ptr": "*fp16", "mean_ptr": "*fp32", "std_ptr": "*fp32", "T": "i32"},
        {"E": 768, "BLOCK_T": statistics_triton.BLOCK_T, "BLOCK_E": statistics_triton.BLOCK_E},
        {"T"},
        arch,
        4,
    )
    return {"kernel": "statistics", "arch": arch, "width": 768, **found}


def scale_line(arch: str) -> dict[str, Any]:
    found = compile_kernel(
        alignment_triton.scale_unless_one_kernel,
        {"dz_ptr": "*bf16", "grad_ptr": "*fp32", "n": "i32"},
        {"BLOCK": alignment_triton.SCALE_BLOCK},
        {"n"},
        arch,
        8,
    )
    return {"kernel": "scale_unless_one", "arch": arch, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=list(TARGETS), help="default: all")
    archs = parser.parse_args().arch or list(TARGETS)
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        lines = [pool.submit(alignment_line, *config, arch) for arch in archs for config in ALIGNMENT]
        lines += [pool.submit(line, arch) for arch in archs for line in (statistics_line, scale_line)]
        for line in lines:
            json.dump(line.result(), sys.stdout)
            print(flush=True)


if __name__ == "__main__":
    main()
