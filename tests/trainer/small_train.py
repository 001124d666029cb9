"""repa-train with the small SiT on one thread, for tests that need processes of their own.

    small_train.py alone ARGUMENTS...            repa-train as it is
    small_train.py ranks CACHE FOLDER PORT...    two ranks train FOLDER/whole, then FOLDER/killed, in which rank 1 dies
                                                 by SIGKILL at step 8; two new ones continue it. FOLDER/RUN.RANK is what
                                                 a rank printed; the exit codes go to stdout as JSON

Ranks are forked from a process that has only imported: importing torch six times would take longer than the test.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from repa.trainer import grids, loop  # noqa: F401  # everything that a run needs, before the forks
from repa.trainer.cli import train_command
from repa.trainer.sit import SIZES

ARGUMENTS = ["--model", "SiT-Ti/2", "--recipe", "irepa", "--batch-size", "8", "--steps", "11", "--device", "cpu"]
SETTINGS = ("accumulation=2", "alignment.encoder_depth=1", "save_every=3", "log_every=2")
ARGUMENTS += [f"--set={setting}" for setting in SETTINGS]


def fork_ranks(printed: Path, port: str, work: Callable[[], None]) -> list[int]:
    """Do `work` in two ranks; return their exit codes, minus the signal where one was killed."""
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.dup2(os.open(f"{printed}.{rank}", os.O_WRONLY | os.O_CREAT, 0o666), 1)
            os.dup2(1, 2)
            code = 1
            try:
                work()
                code = 0
            except SystemExit as exit_:
                code = int(exit_.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(phase: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    SIZES["Ti"] = (2, 32, 2)
    if phase == "alone":
        train_command.main(list(arguments), standalone_mode=False)
        return
    cache, folder, *ports = arguments

    def train(name: str, *more: str) -> Callable[[], None]:
        command = ["--cache", cache, "--out", f"{folder}/{name}", *ARGUMENTS, *more]
        return lambda: train_command.main(command, standalone_mode=False)

    step = loop.train_step

    def dying(run, ahead, norm):
        if run.step == 7 and run.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(run, ahead, norm)

    codes = {"whole": fork_ranks(Path(folder, "whole"), ports[0], train("whole"))}
    loop.train_step = dying
    codes["killed"] = fork_ranks(Path(folder, "killed"), ports[1], train("killed"))
    loop.train_step = step
    codes["continued"] = fork_ranks(Path(folder, "continued"), ports[2], train("killed", "--resume", "auto"))
    print(json.dumps(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
