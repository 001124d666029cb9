"""How a run came about: date, command, version and commit, device; a line each time it is started or resumed."""

import datetime
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ..distributed import World

CHECKOUT = Path(__file__).parents[2]


def start_of(step: int, world: World) -> dict[str, Any]:
    """Return when, from which step, by which command and version, and on what a run is started, as JSON values."""
    from ... import __version__

    device = world.device
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "version": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "world_size": world.size,
        "threads": torch.get_num_threads(),
    }


def commit() -> str | None:
    """Return the commit of the checkout that runs, with "+changes" where it has some; None where there is none."""
    if not (CHECKOUT / ".git").exists():
        return None
    try:
        told = [
            subprocess.run(
                ["git", *words], cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return told[0] + ("+changes" if told[1] else "")
