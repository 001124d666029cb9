"""What a step of a run costs here: seconds and peak memory, measured in a process of its own.

    python -m repa.trainer.studies.probe SETTINGS.json DEVICE     prints {"step_s": ..., "peak_bytes": ...}

Guessed from shapes, either would be off by the allocator, by threads and by what the method adds. A probe builds the
run, does a few steps and leaves nothing behind.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cache_specs.errors import JobError
from .trial import DIE_WITH_PARENT, die_with_parent

WARM_UP, MEASURED = 2, 3
TIMEOUT_S = 900


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of an optimizer step and the peak memory of its process, in bytes: of the device where it has its own."""

    step_s: float
    peak_bytes: int
    row_bytes: int  # read for a sample


def probe(settings: Path, *, device: str, threads: int) -> Cost:
    """Measure the run of a settings file with this many threads; raise JobError with its last line where it fails."""
    command = [sys.executable, "-m", "repa.trainer.studies.probe", str(settings), device]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), DIE_WITH_PARENT: "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S, preexec_fn=die_with_parent
        )
    except subprocess.TimeoutExpired as error:
        raise JobError(f"{settings}: a probe of {WARM_UP + MEASURED} steps took more than {TIMEOUT_S} s") from error
    if done.returncode != 0:
        said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit {done.returncode}")
        raise JobError(f"{settings}: a probe of it failed: {said.strip()}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def _measure(settings: Path, device_name: str) -> dict[str, Any]:
    import torch

    from ..distributed import World
    from ..reading.prefetch import ReadAhead
    from ..runs.run import prepare
    from ..runs.settings import file_layer, resolve
    from ..training.loop import train_step

    device = torch.device(device_name, 0) if device_name == "cuda" else torch.device(device_name)
    run = prepare(resolve([file_layer(settings)]), World(rank=0, size=1, device=device))
    times = []
    with ReadAhead(run.batches, first=0, last=WARM_UP + MEASURED, depth=1, device=device) as ahead:
        for _ in range(WARM_UP + MEASURED):
            start = time.perf_counter()
            train_step(run, ahead)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"step_s": statistics.median(times[WARM_UP:]), "peak_bytes": peak, "row_bytes": run.batches.row_bytes()}


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]), sys.argv[2])))
