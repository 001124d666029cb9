"""make gpu-check: everything that only a GPU can show, in one command of under 8 minutes and one JSON file.

    python benchmarks/gpu_check.py [--out gpu_check.json]

1. the tests marked `gpu`;
2. benchmarks/alignment.py: the fused op against torch.compile and eager, and the copy bandwidth;
3. short bf16 training of SiT-B/2 (recipe irepa) from a small synthetic cache, with and without torch.compile, with the
   fused op and with the loss as a trainer writes it in eager PyTorch: steps/s, data wait, peak memory, and the
   alignment loss's share of the step.

Needs torch >= 2.9, triton, numpy, zarr, numcodecs, google-crc32c, pyyaml, tqdm, pillow and pytest: neither ray, timm,
diffusers nor network.
`--device cpu --model SiT-Ti/2 --steps 2` runs the same code where there is no GPU, to try it; it proves nothing.
"""

import argparse
import contextlib
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import alignment
import torch
from conditions import conditions
from synthetic_cache import make_cache

from repa.trainer.distributed import World
from repa.trainer.reading.prefetch import ReadAhead, batches_ahead
from repa.trainer.runs.config import RunConfig
from repa.trainer.runs.run import Run, prepare
from repa.trainer.runs.settings import Layer, recipe_layer, resolve
from repa.trainer.training.loop import train_step

NUM_SAMPLES = 1024  # 0.4 GB of float16 tokens: it stays in the page cache, as a local NVMe's hot set would
WARM_UP = 10
BLOCK = 10  # steps between two looks at the clock: a wait after each would keep the host from running ahead


def main() -> None:
    """Run all three parts and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--cache", type=Path, help="use or make the synthetic cache here [default: a temporary folder]")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--model", default="SiT-B/2")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each training")
    parser.add_argument("--rounds", type=int, default=21, help="rounds of the alignment benchmark")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_check: torch finds no GPU here; try the code with --device cpu --model SiT-Ti/2 --steps 2")
    started = time.monotonic()
    report: dict[str, Any] = {**conditions(), "device": options.device}

    report["gpu_tests"] = gpu_tests()
    report["alignment"] = alignment.run(options.device, options.rounds)
    for line in report["alignment"]:
        print(alignment.show(line))
    with tempfile.TemporaryDirectory() as folder:
        cache = options.cache or Path(folder) / "cache"
        if not cache.exists():
            make_cache(cache, num_samples=NUM_SAMPLES)
        report["training"] = [
            train(cache, Path(folder) / "run", options, compiled=compiled, fused=fused)
            for compiled in (False, True)
            for fused in (True, False)
        ]
    report["minutes"] = (time.monotonic() - started) / 60
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out}: written after {report['minutes']:.1f} minutes")
    sys.exit(report["gpu_tests"]["exit_code"])


def gpu_tests() -> dict[str, Any]:
    """Run the tests marked gpu in a process of their own; return pytest's exit code and closing lines."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "tests/kernels"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    print("\n".join(lines[-40:]))
    return {"command": " ".join(command[1:]), "exit_code": done.returncode, "summary": lines[-10:]}


def train(cache: Path, out: Path, options: argparse.Namespace, *, compiled: bool, fused: bool) -> dict[str, Any]:
    """Time blocks of steps; return medians with quartiles, data wait, peak memory and the alignment's share."""
    config = settings(cache, out, options, compiled)
    device = torch.device(options.device)
    torch.compiler.reset()
    gc.collect()  # a compiled model refers to itself: that of the run before would count in this one's peak memory
    run = prepare(config, World(rank=0, size=1, device=device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    depth = batches_ahead(config.prefetch_bytes, run.batches.num_bytes)
    ahead = ReadAhead(run.batches, first=0, last=config.steps, depth=depth, device=device)
    times = []
    with loss_in_eager_pytorch(not fused), ahead:
        for _ in range(WARM_UP):
            train_step(run, ahead)
        synchronize(device)
        waited, first = ahead.waited_s, time.perf_counter()
        for done in range(0, options.steps, BLOCK):
            steps = min(BLOCK, options.steps - done)
            start = time.perf_counter()
            for _ in range(steps):
                train_step(run, ahead)
            synchronize(device)
            times.append((time.perf_counter() - start) / steps)
        total = time.perf_counter() - first
        data_wait = (ahead.waited_s - waited) / total
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    loss_s = alignment_seconds(run, fused)
    line = {
        "model": config.model,
        "batch_size": config.batch_size,
        "precision": run.config.precision,
        "compile": compiled,
        "alignment": "fused" if fused else "eager",
        "step_ms": 1e3 * statistics.median(times),
        "step_ms_quartiles": [1e3 * quartiles[0], 1e3 * quartiles[2]],
        "steps_per_s": 1 / statistics.median(times),
        "data_wait": data_wait,
        "alignment_ms": 1e3 * loss_s,
        "alignment_share_of_step": loss_s / statistics.median(times),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }
    print(json.dumps(line))
    del run, ahead
    return line


def settings(cache: Path, out: Path, options: argparse.Namespace, compiled: bool) -> RunConfig:
    """Return the recipe irepa on the synthetic cache."""
    values = {
        "cache": str(cache),
        "out": str(out),
        "model": options.model,
        "steps": WARM_UP + options.steps,
        "batch_size": options.batch_size,
        "compile": compiled,
        "latent_norm": "channel",
    }
    return resolve([recipe_layer("irepa", options.model), Layer(source="gpu_check", values=values)])


@contextlib.contextmanager
def loss_in_eager_pytorch(replaced: bool) -> Iterator[None]:
    """Let the trainer compute the alignment loss as one writes it without this project, for comparison."""
    if not replaced:
        yield
        return
    with mock.patch("repa.trainer.diffusion.losses.cosine_alignment", weighted_eager):
        yield


def weighted_eager(z: torch.Tensor, tokens: torch.Tensor, *, weight: float, **rest: Any) -> torch.Tensor:
    """Return the eager loss of benchmarks/alignment.py times `weight`, under the autocast that trainers have on."""
    with torch.autocast(z.device.type, torch.bfloat16):
        return weight * alignment.eager(z, tokens, **rest)


def alignment_seconds(run: Run, fused: bool) -> float:
    """Return the time of the loss alone, forward and backward, at the shapes of the run."""
    features = run.reader.features[0]
    tokens = features.grid[0] * features.grid[1]
    place = run.batches.place
    arguments = alignment.make_arguments(
        place.micro_batch, tokens, features.width, features.dtype, torch.bfloat16, run.world.device.type
    )
    op = alignment.cosine_alignment if fused else alignment.eager
    step = {"op": lambda: alignment.step(op, arguments, backward=True, autocast=not fused)}
    return alignment.time_in_turn(step, run.world.device.type, rounds=5)["op"]["median_ms"] / 1e3


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the time of a block of steps is its own."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
