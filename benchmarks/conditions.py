"""Under which conditions a figure was measured, and the committed file that it goes to.

Every figure in a README comes from one of these lines: commit, date, hardware, versions, and what was measured.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "numpy", "zarr", "numcodecs", "ray", "timm")


def conditions(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return commit, date, processor, GPU and versions of this machine, those of more `packages` too, as JSON."""
    import torch

    # What benchmarks have written into results since the commit says nothing of the code.
    changes = _git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if changes else ""),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "versions": {name: version for name in (*PACKAGES, *packages) if (version := _version(name))},
    }


def append_line(name: str, line: dict[str, Any], out: Path | None = None) -> None:
    """Append one JSON line to benchmarks/results/NAME.jsonl, or to the file `out` instead."""
    RESULTS.mkdir(exist_ok=True)
    with (out or RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""  # measured outside a checkout
    return done.stdout.strip()
