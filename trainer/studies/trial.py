"""One run of a study as a process of its own: it trains, logs beside what it writes, and dies with who started it.

The settings come as a file in the run's folder, and every start is a resume: a killed run goes on where it stood, one
that is finished is not touched. Nothing here imports torch; who schedules sends it anywhere.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...cache_specs.files.whole_file import write_whole

SETTINGS_FILE = "settings.json"  # of the run, by the study
LOG_FILE = "log.txt"
OUTCOME_FILE = "outcome.json"  # {"status": "stopped" or "failed", "reason": one line}, by whoever ended a run early
DIE_WITH_PARENT = "REPA_DIE_WITH_PARENT"  # set for ranks, too: torchrun leaves them alive where it is killed
GRACE_S = 120.0  # for a run that is asked to stop: it saves at its next step
STOPPED_AS = "stopped"  # the status of a run that its study let go no further
STOPPED = -1  # the code of a run that was asked to stop and did


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run to be done: its folder, and what it may use of a machine."""

    folder: str
    device: str
    threads: int
    ranks: int = 1  # processes, one a GPU, where the device is cuda
    until: int | None = None  # step at which it pauses, where it does

    def command(self) -> list[str]:
        """Return the command that trains it, or goes on with it."""
        folder = Path(self.folder)
        train = ["--config", str(folder / SETTINGS_FILE), "--out", self.folder, "--resume", "auto"]
        train += ["--device", self.device, *([] if self.until is None else ["--until", str(self.until)])]
        module = "repa.trainer.commands.train"
        if self.ranks == 1:
            return [sys.executable, "-m", module, *train]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*launcher, f"--nproc-per-node={self.ranks}", "-m", module, *train]


def run_trial(trial: Trial, stop: Callable[[], bool] = lambda: False) -> int:
    """Train a run to its end; return its exit code, or STOPPED where `stop` came to say so and it has saved.

    What it prints is appended to its log. A failure is noted in its outcome.json with its last line.
    """
    folder = Path(trial.folder)
    threads = str(trial.threads)
    environment = os.environ | {
        DIE_WITH_PARENT: "1",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONSAFEPATH": "1",
    }
    with open(folder / LOG_FILE, "ab") as log:
        log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(trial.command())}\n".encode())
        log.flush()
        process = subprocess.Popen(
            trial.command(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd=os.getcwd(),
            start_new_session=True,  # a group of its own: Ctrl-C asks the study, which asks its runs
            preexec_fn=die_with_parent,
        )
        try:
            code = _wait(process, stop)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    _note(folder, code)
    return code


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies; Linux only, elsewhere nothing happens."""
    pr_set_pdeathsig = 1
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _wait(process: "subprocess.Popen[bytes]", stop: Callable[[], bool]) -> int:
    asked_at = None
    while True:
        try:
            code = process.wait(timeout=0.5)
            return STOPPED if asked_at is not None and code == 0 else code
        except subprocess.TimeoutExpired:
            if asked_at is None and stop():
                asked_at = time.monotonic()
                os.killpg(process.pid, signal.SIGTERM)
            if asked_at is not None and time.monotonic() - asked_at > GRACE_S:
                os.killpg(process.pid, signal.SIGKILL)


def _note(folder: Path, code: int) -> None:
    """Leave in the run's folder that it failed, or that it no longer has."""
    outcome = folder / OUTCOME_FILE
    if code in (0, STOPPED):
        outcome.unlink(missing_ok=True)
        return
    what = {"status": "failed", "code": code, "reason": last_line(folder / LOG_FILE)}
    write_whole(outcome, (json.dumps(what) + "\n").encode())


def last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    with open(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 10_000))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:1000]
