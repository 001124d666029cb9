"""The peak memory of a process, from a point on: what `VmHWM` in /proc/self/status says since it was last reset."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def reset_peak() -> int:
    """Begin to count from here; return the bytes that the process holds now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def peak_bytes(process: int | str = "self") -> int:
    """Return the most bytes that this process has held since `reset_peak`, or another one since its start."""
    return _status("VmHWM", process)


def in_own_process(script: str, *arguments: object) -> dict[str, Any]:
    """Run a benchmark's script in a process of its own; return the JSON object on its last line of output."""
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _status(field: str, process: int | str = "self") -> int:
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)
