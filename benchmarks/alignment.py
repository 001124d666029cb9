"""Time the alignment loss: fused against compiled and eager on a GPU, closed form against autograd on a CPU.

    python benchmarks/alignment.py                     # on a GPU if there is one; appends to results/alignment.jsonl
    python benchmarks/alignment.py --device cpu --out timings.jsonl

Each line holds one shape: medians with spread of every path, and on a GPU the bytes that the op must move, their rate,
and that rate's share of the copy bandwidth measured in the same run. Paths are timed in turn, round after round, so
that a slow phase of the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conditions import append_line, conditions
from torch import Tensor

from repa.kernels import composite, cosine_alignment, reference

GPU_WIDTHS = (384, 768, 1024, 1152, 1280, 1536, 4096)
GPU_BATCH, GPU_TOKENS = 256, 256
CPU_SHAPES = ((16, 256, 768), (32, 64, 128))  # SiT/2 at 256 px with a ViT-B's tokens; the demo
GAMMA = 0.6
WAIT_CYCLES = 50_000_000  # about 30 ms at 1.7 GHz: 20 forward and backward calls are launched in less


def make_arguments(B: int, T: int, E: int, dtype: str, z_dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return random arguments of `cosine_alignment`, with statistics as a cache holds them."""
    g = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=g, device=device)
    arguments: dict[str, Any] = {
        "z": normal(B, T, E).to(z_dtype).requires_grad_(),
        "channel_mean": normal(B, E),
        "channel_std": normal(B, E).abs() + 0.5,
        "gamma": GAMMA,
    }
    if dtype == "int8":
        arguments["tokens"] = torch.randint(-127, 128, (B, T, E), generator=g, device=device, dtype=torch.int8)
        arguments["token_scale"] = normal(B, T).abs().div(50).half()
    else:
        arguments["tokens"] = normal(B, T, E).to(getattr(torch, dtype))
    return arguments


def bytes_moved(arguments: dict[str, Any], backward: bool) -> int:
    """Return what one pass must read and write: z, tokens, scales and statistics once, dz once if asked."""
    tensors = [t for t in arguments.values() if isinstance(t, Tensor)]
    dz = arguments["z"].nbytes if backward else 0
    return sum(t.nbytes for t in tensors) + dz


def step(op: Callable[..., Tensor], arguments: dict[str, Any], backward: bool, autocast: bool = False) -> None:
    """Run the op once, and its backward pass."""
    z = arguments["z"]
    with torch.set_grad_enabled(backward), torch.autocast(z.device.type, torch.bfloat16, enabled=autocast):
        loss = op(**arguments)
    if backward:
        torch.autograd.grad(loss, z)


def eager(
    z: Tensor,
    tokens: Tensor,
    channel_mean: Tensor,
    channel_std: Tensor,
    gamma: float,
    token_scale: Tensor | None = None,
) -> Tensor:
    """Return the loss as a trainer writes it without us: in the dtypes at hand, autocast as it comes."""
    if token_scale is not None:
        tokens = channel_std[:, None] * token_scale[..., None] * tokens + channel_mean[:, None]
    f = (tokens - gamma * channel_mean[:, None]) / (channel_std[:, None] + 1e-6)
    cos = torch.nn.functional.normalize(z, dim=-1) * torch.nn.functional.normalize(f.to(z.dtype), dim=-1)
    return -cos.sum(-1).mean()


class CompositeLoss(torch.autograd.Function):
    """The closed form with its gradient as an autograd function: what torch.compile is given on a GPU."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, arguments: dict[str, Any], path: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        names = ("tokens", "token_scale", "channel_mean", "channel_std", "row_weight", "row_index", "gamma")
        loss, dz = path(z, *(arguments.get(name) for name in names), 1.0, ctx.needs_input_grad[0])
        ctx.save_for_backward(dz)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dz,) = ctx.saved_tensors
        return dz, None, None  # the upstream gradient is 1 here, and this path is spared the product


def closed_form(path: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """Return an op with the signature of `cosine_alignment` that runs one path of the closed form."""

    def op(z: Tensor, **rest: Any) -> Tensor:
        return CompositeLoss.apply(z, rest, path)

    return op


def seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Return the mean time of one call, over `repeats` in a row; on a GPU the device's time, not the host's."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # The op takes less time on the device than Python takes to launch it. In training the host runs ahead; here a
    # kernel that waits gives it the time to, and then the device works through the queue without a gap.
    torch.cuda._sleep(WAIT_CYCLES)
    first.record()
    for _ in range(repeats):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / repeats


def time_in_turn(runs: dict[str, Callable[[], None]], device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return the median and quartiles of each run in milliseconds, and the seconds of its first call."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    first_call_s: dict[str, float] = {}
    repeats: dict[str, int] = {}
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        first_call_s[name] = time.perf_counter() - start
        seconds(run, device, 2)
        # On a CPU about 20 ms a round; on a GPU what the queue holds.
        repeats[name] = max(1, min(100, round(0.02 / seconds(run, device, 1)))) if device == "cpu" else 20
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, device, repeats[name]))
    result = {}
    for name, taken in times.items():
        quartiles = statistics.quantiles(taken, n=4)
        result[name] = {
            "median_ms": round(1e3 * statistics.median(taken), 4),
            "quartile_1_ms": round(1e3 * quartiles[0], 4),
            "quartile_3_ms": round(1e3 * quartiles[2], 4),
            "first_call_s": round(first_call_s[name], 2),
        }
    return result


def copy_bandwidth(device: str, rounds: int) -> float:
    """Return bytes a second read plus written by a device-to-device copy of 1 GiB, the median of rounds."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = [seconds(lambda: target.copy_(source), device, 5) for _ in range(rounds)]
    return 2 * source.nbytes / statistics.median(taken)


def cpu_lines(rounds: int) -> Iterator[dict[str, Any]]:
    """Time the closed form in chunks and compiled against autograd through the reference, forward and backward."""
    for B, T, E in CPU_SHAPES:
        for dtype in ("float16", "int8"):
            for z_dtype in (torch.bfloat16, torch.float32):
                arguments = make_arguments(B, T, E, dtype, z_dtype, "cpu")
                paths = {
                    "chunked": closed_form(composite.chunked),
                    "compiled": closed_form(composite.compiled()),
                    "op": cosine_alignment,
                    "eager": reference.cosine_alignment,
                }
                times = time_in_turn({n: partial(step, op, arguments, True) for n, op in paths.items()}, "cpu", rounds)
                shape = {"B": B, "T": T, "E": E, "tokens": dtype, "z": str(z_dtype).removeprefix("torch.")}
                yield {"device": "cpu", **shape, "backward": True, "paths": times}


def gpu_lines(
    rounds: int, widths: Sequence[int] = GPU_WIDTHS, rivals: Sequence[int] = GPU_WIDTHS
) -> Iterator[dict[str, Any]]:
    """Time the fused op at B = T = 256, bfloat16 z, with bandwidth shares; compiled and eager at `rivals`."""
    bandwidth = copy_bandwidth("cuda", rounds)
    for E in widths:
        for dtype in ("float16", "int8"):
            torch.compiler.reset()  # each shape compiled for itself, as static as it gets: the stronger rival
            compiled = closed_form(torch.compile(composite.whole, fullgraph=True, dynamic=False))
            arguments = make_arguments(GPU_BATCH, GPU_TOKENS, E, dtype, torch.bfloat16, "cuda")
            for backward in (False, True):
                run = partial(step, arguments=arguments, backward=backward)
                runs: dict[str, Callable[[], None]] = {"fused": partial(run, cosine_alignment)}
                if E in rivals:
                    runs["compiled"] = partial(run, compiled)
                    runs["eager"] = partial(run, eager)
                    runs["eager_autocast"] = partial(run, eager, autocast=True)
                times = time_in_turn(runs, "cuda", rounds)
                moved = bytes_moved(arguments, backward)
                for taken in times.values():
                    rate = moved / (taken["median_ms"] / 1e3)
                    taken |= {"gb_s": round(rate / 1e9, 1), "share_of_copy": round(rate / bandwidth, 4)}
                shape = {"B": GPU_BATCH, "T": GPU_TOKENS, "E": E, "tokens": dtype, "z": "bfloat16"}
                copied = {"bytes": moved, "copy_gb_s": round(bandwidth / 1e9, 1)}
                yield {"device": "cuda", **shape, "backward": backward, **copied, "paths": times}
            del arguments
            torch.cuda.empty_cache()


def run(device: str | None = None, rounds: int = 21) -> Iterator[dict[str, Any]]:
    """Yield one JSON-ready dict a shape, each with commit, date, hardware and versions; writes nothing."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    about = conditions() | {"load_before": round(os.getloadavg()[0], 2)}  # others at work on a shared machine
    for line in gpu_lines(rounds) if device == "cuda" else cpu_lines(rounds):
        yield about | line


def show(line: dict[str, Any]) -> str:
    """Return a line as a reader wants it."""
    shape = f"B {line['B']} T {line['T']} E {line['E']} tokens {line['tokens']} z {line['z']}"
    parts = []
    for name, taken in line["paths"].items():
        share = f" ({taken['gb_s']:.0f} GB/s, {taken['share_of_copy']:.0%} of copy)" if "gb_s" in taken else ""
        parts.append(
            f"  {name:<15} {taken['median_ms']:8.3f} ms [{taken['quartile_1_ms']:.3f}, {taken['quartile_3_ms']:.3f}]"
            f"{share}, first call {taken['first_call_s']:.1f} s"
        )
    return "\n".join([f"{shape}, forward{' + backward' if line['backward'] else ''}", *parts])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    parser.add_argument("--rounds", type=int, default=21, help="timings of each path (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="append the JSON lines here instead of to the committed results")
    arguments = parser.parse_args()
    for line in run(arguments.device, arguments.rounds):
        print(show(line))
        if arguments.out is None:
            append_line("alignment", line)
        else:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
