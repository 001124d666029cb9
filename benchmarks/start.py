"""Time a fresh `repa-train` from its start to its first finished step, on a cache of a million samples.

    python benchmarks/start.py                           # makes a cache (0.3 GB, 30 s); appends to start.jsonl
    python benchmarks/start.py --cache DIR               # keeps it there, or takes what is there

One round is two fresh processes: one that imports torch and no more, and `repa-train` with SiT-Ti/2 and recipe irepa,
whose first step counts as finished when its line of metrics.jsonl is there. So in the figure are the interpreter, all
imports, opening the cache, building the model, filling the ring of batches that the default --prefetch-bytes allows,
the step, and the log; left out is the checkpoint after it. Peak memory is taken at the same moment. What is over torch
is the difference of the two processes of one round. The files are in the page cache but for the first round, which is
reported apart.

The cache's rows are all the same (synthetic_cache.py): the work is that of any numbers.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from conditions import append_line, conditions
from peak_memory import peak_bytes
from rounds import median_interval, show
from synthetic_cache import make_large_cache

SECONDS_BAR = 3.0
MEMORY_BAR = 300 * 2**20
POLL_S = 0.002
IMPORT_TORCH = "import torch, sys; print(flush=True); sys.stdin.read()"


def torch_alone() -> tuple[float, int]:
    """Return the seconds until a fresh process has imported torch, and its peak memory in bytes."""
    start = time.perf_counter()
    command = [sys.executable, "-c", IMPORT_TORCH]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        seconds, memory = time.perf_counter() - start, peak_bytes(process.pid)
        process.communicate()
    return seconds, memory


def first_step(cache: Path, *, batch_size: int) -> tuple[float, int]:
    """Return the seconds until a fresh `repa-train` has logged its first step, and its peak memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        arguments = {
            "cache": cache,
            "model": "SiT-Ti/2",
            "recipe": "irepa",
            "steps": 1,
            "batch-size": batch_size,
            "out": out,
            "device": "cpu",
        }
        command = [sys.executable, "-m", "repa.trainer.commands.train"]
        command += [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
        command += ["--set", "log_every=1", "--set", "grid.every=0"]
        log, start = out / "metrics.jsonl", time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not (log.exists() and log.stat().st_size):
                time.sleep(POLL_S)
            if process.returncode is not None:  # it waits for the checkpoint after its step
                raise SystemExit("repa-train failed; its message stands above")
            seconds, memory = time.perf_counter() - start, peak_bytes(process.pid)
    return seconds, memory


def measure(cache: Path, *, rounds: int, batch_size: int) -> dict[str, Any]:
    cold = first_step(cache, batch_size=batch_size)[0]
    pairs = [(torch_alone(), first_step(cache, batch_size=batch_size)) for _ in range(rounds)]
    return {
        "first_round_s": round(cold, 3),
        "torch_s": median_interval([torch[0] for torch, _ in pairs]),
        "first_step_s": median_interval([step[0] for _, step in pairs]),
        "over_torch_s": median_interval([step[0] - torch[0] for torch, step in pairs]),
        "torch_mib": median_interval([torch[1] / 2**20 for torch, _ in pairs]),
        "over_torch_mib": median_interval([(step[1] - torch[1]) / 2**20 for torch, step in pairs]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--num-samples", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = options.cache or Path(folder) / "cache"
        if not cache.exists():
            make_large_cache(cache, num_samples=options.num_samples)
        found = measure(cache, rounds=options.rounds, batch_size=options.batch_size)
    print(f"start to first step, {options.num_samples:,} samples, batch {options.batch_size}, {options.rounds} rounds")
    print(f"  torch alone      {show(found['torch_s'])} s, {show(found['torch_mib'], '.0f')} MiB")
    print(f"  first step       {show(found['first_step_s'])} s (bar: under {SECONDS_BAR:g} s over torch alone)")
    print(f"  over torch alone {show(found['over_torch_s'])} s, {show(found['over_torch_mib'], '.0f')} MiB")
    bars = {"seconds": SECONDS_BAR, "mib": MEMORY_BAR / 2**20}
    settings = {name: getattr(options, name) for name in ("num_samples", "batch_size", "rounds")}
    append_line("start", {**conditions(), **settings, "bars": bars, **found})


if __name__ == "__main__":
    main()
