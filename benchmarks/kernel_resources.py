"""Compile the kernels for GPUs that need not be there and count what each takes: registers, spills, 128-bit accesses,
and of the alignment kernel the instructions that its warps execute for a row.

    python benchmarks/kernel_resources.py              # appends one line to results/kernel_resources.jsonl
    python benchmarks/kernel_resources.py --out counted.jsonl --disassemble sm_90    # instructions of that one alone

Registers depend on the compiler's version, so they are figures, with that version beside them; what every version must
give, tests/kernels/test_compile.py asks of this same count. It needs a process of its own because Triton compiles
nothing once it has been imported as an interpreter.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"  # registers and spills of the very code that Triton would launch

import triton
from conditions import append_line, conditions
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
SETTINGS = ("width", "z", "tokens", "gamma", "row_weight", "row_index", "numbers")
# The last is the type of the numbers gamma and weight: torch.compile may say fp64.
ALIGNMENT = [
    (384, "bf16", "fp16", True, False, False, "fp32"),
    (768, "bf16", "fp16", True, False, False, "fp32"),
    (768, "bf16", "fp16", True, False, False, "fp64"),
    (768, "bf16", "i8", True, False, False, "fp32"),
    (1024, "fp32", "fp32", True, False, False, "fp32"),
    (1152, "bf16", "fp16", True, True, True, "fp32"),
    (1280, "bf16", "bf16", True, False, False, "fp32"),
    (1536, "fp32", "fp32", False, False, False, "fp32"),
    (4096, "bf16", "fp16", True, False, False, "fp32"),
    (4096, "bf16", "i8", True, True, True, "fp32"),
    (4096, "fp32", "fp32", True, True, True, "fp32"),
]


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    aligned: set[str],
    arch: str,
    warps: int,
    *,
    disassemble: bool,
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
    counted = resources(compiled, arch, log.getvalue())
    return counted | ({"loop_instructions": loop_instructions(compiled.asm["cubin"])} if disassemble else {})


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


def loop_instructions(cubin: bytes) -> int:
    """Return the machine instructions of the longest loop, which a warp executes once a turn; 0 where there is none."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm", "-c", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    at, longest = 0, 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = at
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/(.*);", line):
            at += 1
            branch = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction[1])
            if branch and branch[1] in labels and labels[branch[1]] < at - 1:  # the last one jumps to itself
                longest = max(longest, at - labels[branch[1]])
    return longest


def alignment(
    arch: str,
    disassemble: bool,
    width: int,
    z: str,
    tokens: str,
    normalised: bool,
    weighted: bool,
    indexed: bool,
    numbers: str,
) -> dict[str, int]:
    """Compile the alignment kernel and return its resources."""
    types = {
        "z_ptr": f"*{z}", "tokens_ptr": f"*{tokens}", "token_scale_ptr": "*fp16", "channel_mean_ptr": "*fp32",
        "channel_std_ptr": "*fp32", "row_weight_ptr": "*fp32", "row_index_ptr": "*i64", "total_ptr": "*fp32",
        "loss_ptr": "*fp32", "dz_ptr": f"*{z}", "gamma": numbers, "weight": numbers, "K": "i32", "T": "i32",
    }  # fmt: skip
    rows = alignment_triton.layout(width, TARGETS[arch].warp_size)
    constants = {
        "E": width, "CHUNK": rows.chunk, "CHUNKS": rows.chunks, "ROWS": alignment_triton.ROWS,
        "INT8": tokens == "i8", "NORMALISED": normalised, "WEIGHTED": weighted, "INDEXED": indexed, "NEEDS_DZ": True,
        "STD_EPS": alignment_triton.STD_EPS, "NORM_EPS": alignment_triton.NORM_EPS,
    }  # fmt: skip
    kernel = alignment_triton.alignment_kernel
    counted = compile_kernel(kernel, types, constants, {"K", "T"}, arch, rows.warps, disassemble=disassemble)
    wide = wide_accesses(rows.chunks, z, tokens, normalised)
    if "loop_instructions" in counted:
        counted["instructions_a_row"] = rows.warps * counted.pop("loop_instructions")
    return {**counted, **{f"expected_{name}": number for name, number in wide.items()}}


def wide_accesses(chunks: int, z: str, tokens: str, normalised: bool) -> dict[str, int]:
    """Return the 128-bit loads and stores in the alignment kernel's code where rows move 128 bits at a time."""
    elements = alignment_triton.ELEMENTS_PER_THREAD
    row = elements * BYTES[z] // 16 + elements * BYTES[tokens] // 16  # int8: 8 bytes a thread, a 64-bit load
    statistics = 2 * elements * 4 // 16 if normalised or tokens == "i8" else 0
    return {"wide_loads": chunks * (row + statistics), "wide_stores": chunks * (elements * BYTES[z] // 16)}


def statistics(arch: str, disassemble: bool) -> dict[str, int]:
    """Compile the kernel of channel statistics and return its resources."""
    return compile_kernel(
        statistics_triton.statistics_kernel,
        {"tokens_ptr": "*fp16", "mean_ptr": "*fp32", "std_ptr": "*fp32", "T": "i32"},
        {"E": 768, "BLOCK_T": statistics_triton.BLOCK_T, "BLOCK_E": statistics_triton.BLOCK_E},
        {"T"},
        arch,
        4,
        disassemble=disassemble,
    )


def scale_unless_one(arch: str, disassemble: bool) -> dict[str, int]:
    """Compile the kernel that scales dz and return its resources."""
    return compile_kernel(
        alignment_triton.scale_unless_one_kernel,
        {"dz_ptr": "*bf16", "grad_ptr": "*fp32", "n": "i32"},
        {"BLOCK": alignment_triton.SCALE_BLOCK},
        {"n"},
        arch,
        8,
        disassemble=disassemble,
    )


def count(disassembled: Sequence[str]) -> list[dict[str, Any]]:
    """Compile every kernel for every target; return a row a kernel: what it is, then its resources by target."""
    kernels: list[tuple[dict[str, Any], Callable[..., dict[str, int]], tuple[Any, ...]]] = [
        (dict(zip(SETTINGS, given, strict=True)), alignment, given) for given in ALIGNMENT
    ]
    kernels += [({"width": 768, "tokens": "fp16"}, statistics, ()), ({"z": "bf16"}, scale_unless_one, ())]
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        counted = [
            {arch: pool.submit(of, arch, arch in disassembled, *given) for arch in TARGETS} for _, of, given in kernels
        ]
        return [
            {"kernel": of.__name__, **what, **{arch: future.result() for arch, future in futures.items()}}
            for (what, of, _), futures in zip(kernels, counted, strict=True)
        ]


def cell(counted: dict[str, int]) -> str:
    """Return what the table says of one kernel on one target."""
    spills = f" +{counted['spills']} B" if counted["spills"] else ""
    instructions = f", {counted['instructions_a_row']}" if "instructions_a_row" in counted else ""
    return f"{counted['registers']}{spills}{instructions}"


def show(rows: list[dict[str, Any]]) -> str:
    """Return registers by target, bytes spilled where there are any, and instructions a row, as a table."""
    lines = [f"{'kernel':<16} {'E':>4}  {'z':<4}  {'tokens':<6}" + "".join(f"  {arch:>12}" for arch in TARGETS)]
    for row in rows:
        cells = [cell(row[arch]) for arch in TARGETS]
        names = f"{row['kernel']:<16} {row.get('width', ''):>4}  {row.get('z', ''):<4}  {row.get('tokens', ''):<6}"
        lines.append(names + "".join(f"  {text:>12}" for text in cells))
    return "\n".join(lines)


def main() -> None:
    """Count, print the table and write the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the line here, not to results/kernel_resources.jsonl")
    nvidia = [arch for arch in TARGETS if arch.startswith("sm_")]
    parser.add_argument(
        "--disassemble", nargs="*", choices=nvidia, default=nvidia, help="count instructions of these: half of the time"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # a kernel from the user's cache would come without ptxas's log
        line = conditions() | {"kernels": count(asked.disassemble)}
    print(show(line["kernels"]))
    if asked.out:
        asked.out.write_text(json.dumps(line) + "\n", encoding="utf-8")
    else:
        append_line("kernel_resources", line)


if __name__ == "__main__":
    main()
