"""What Ray loses takes the ranks of its trials along: they must not go on beside those that are started in their stead.

A node of its own joins the session's Ray, with GPUs that are pretended, and is killed piece by piece. Ranks enter as
repa-train's do, and then only wait.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

RANK = """
import os, pathlib, sys, time
from repa.trainer.commands import train

def wait(**_):
    pathlib.Path(sys.argv[1], f"rank{os.environ['RANK']}-{os.getpid()}").touch()
    time.sleep(600)

train.train_command = wait
train.train()
"""
DRIVER = """
import sys
from repa.trainer.commands.borrowed import run_on_ray
from repa.trainer.studies.trial import Trial

folder, rank, address = sys.argv[1:]

class Waiting(Trial):
    def command(self):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        return [*launcher, rank, self.folder]

trial = Waiting(folder=folder, device="cpu", threads=1, ranks=2)
run_on_ray([trial], address=address, gpus=2, on_done=print, stop=lambda: False)
"""
PATIENCE_S = 120


def until(holds: Callable[[], object], *processes: "subprocess.Popen[bytes]") -> None:
    """Wait until something holds, while these processes live."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def gone(pids: list[int]) -> bool:
    """Say whether none of the processes runs: a zombie is only waiting to be seen by its parent."""
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                return False
    return True


@pytest.fixture
def node(ray_head: tuple[str, int]) -> Iterator["subprocess.Popen[bytes]"]:
    """Yield a node with two pretended GPUs that has joined the session's Ray."""
    ray = "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; main()"
    command = [sys.executable, "-u", "-W", "ignore", "-c", ray, "start", f"--address={ray_head[0]}", "--block"]
    command += ["--num-gpus=2", "--num-cpus=2", f"--object-store-memory={80 * 2**20}", "--disable-usage-stats"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, start_new_session=True, **pipes) as started:
        assert started.stdout is not None
        assert any(b"Ray runtime started" in line for line in started.stdout)
        yield started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


def test_ranks_die_with_their_worker_and_with_their_node(
    ray_head: tuple[str, int], node: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, str(run), str(tmp_path / "rank.py"), ray_head[0]]

    def ranks() -> list[int]:
        return [int(file.name.partition("-")[2]) for file in run.glob("rank?-*")]

    with subprocess.Popen(command) as driver:
        try:
            first: list[int] = []
            for lost in ("worker", "raylet"):
                until(lambda: len(ranks()) == len(first) + 2, driver)  # noqa: B023  # the loop waits for it
                mine = [pid for pid in ranks() if pid not in first]
                (launcher,) = {parent(pid) for pid in mine}
                worker = parent(launcher)
                os.kill(worker if lost == "worker" else parent(worker), signal.SIGKILL)
                until(lambda: gone([*mine, launcher, worker]))  # noqa: B023
                first += mine
        finally:
            driver.kill()
    assert len(first) == 4
