"""repa-train with the small SiT on one thread, for tests that need processes of their own.

    small_train.py alone ARGUMENTS...                repa-train as it is
    small_train.py killed CACHE FOLDER               a rank, under torchrun, of FOLDER/killed: rank 1 dies by SIGKILL in
                                                     step 8
    small_train.py ranks CACHE FOLDER PORT...        two ranks train FOLDER/whole, then FOLDER/ended, to which SIGTERM
                                                     comes in step 6, then continue it and, when stdin is closed,
                                                     FOLDER/killed. Meanwhile two others train FOLDER/hung, one of which
                                                     stands still from step 4 on. FOLDER/NUMBER.RANK is what a rank
                                                     printed; exit codes go to stdout
    small_train.py recipes CACHE FOLDER [PORT RECIPE MODEL KEY=VALUE]...
                                                     two ranks train FOLDER/RECIPE for three steps, one after another

Ranks of the last two are forked from a process that has only imported: importing torch takes longer than the training.
"""

import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.utils.tensorboard  # with the next two lines what a run imports by and by, once for all forks
import zarr  # noqa: F401

from repa.trainer import distributed
from repa.trainer.commands import borrowed  # noqa: F401
from repa.trainer.commands.train import train_command
from repa.trainer.evaluating import grids  # noqa: F401
from repa.trainer.models import jit
from repa.trainer.models.sit import SIZES
from repa.trainer.runs import resume  # noqa: F401
from repa.trainer.training import loop

ARGUMENTS = ["--model", "SiT-Ti/2", "--recipe", "irepa", "--batch-size", "8", "--steps", "11", "--device", "cpu"]
SETTINGS = ("accumulation=2", "alignment.encoder_depth=1", "alignment.stop_step=7", "save_every=3", "log_every=2")
ARGUMENTS += [f"--set={setting}" for setting in SETTINGS]

train_step = loop.train_step


def forked(printed: str, environment: dict[str, str], work: Callable[[], None]) -> int:
    """Do `work` in a process of its own, its output in `printed`; return its id."""
    child = os.fork()
    if child == 0:
        os.environ |= environment
        os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT, 0o666), 1)
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
    return child


def ended(children: list[int]) -> list[int]:
    """Wait for processes; return their exit codes, minus the signal where one was killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def start_ranks(printed: str, port: str, work: Callable[[], None]) -> list[int]:
    """Do `work` in two ranks; return their ids."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [forked(f"{printed}.{rank['RANK']}", rank, work) for rank in ranks]


def fork_ranks(printed: str, port: str, work: Callable[[], None]) -> list[int]:
    """Do `work` in two ranks; return their exit codes. Where they wait for SIGTERM, send it, as torchrun would."""
    children = start_ranks(printed, port, work)
    if loop.train_step is waits_for_its_end:
        folder = Path(printed).parent
        while len(list(folder.glob("waits.*"))) < 2:
            time.sleep(0.01)
        for child in children:
            os.kill(child, signal.SIGTERM)
    return ended(children)


def killed(run, ahead):
    if run.step == 7 and run.world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(run, ahead)


def stands_still(run, ahead):
    if run.step == 3 and run.world.rank == 1:
        time.sleep(60)
    return train_step(run, ahead)


def waits_for_its_end(run, ahead):
    if run.step == 5:
        Path(run.folder.parent, f"waits.{run.world.rank}").touch()
        request = signal.getsignal(signal.SIGTERM).__self__
        while not request._asked:
            time.sleep(0.01)
    return train_step(run, ahead)


def main(phase: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    SIZES["Ti"] = (2, 32, 2)
    jit.SIZES["Ti"] = (4, 32, 2, 8, 2, 0.2)
    if phase == "alone":
        train_command.main(list(arguments), standalone_mode=False)
        return
    cache, folder, *ports = arguments

    def train(name: str, *more: str) -> None:
        command = ["--cache", cache, "--out", f"{folder}/{name}", *ARGUMENTS, *more]
        train_command.main(command, standalone_mode=False)

    if phase == "recipes":
        importlib.import_module("torch._dynamo")
        codes = []
        for port, recipe, model, setting in zip(*(ports[i::4] for i in range(4)), strict=True):
            settings = ("--set", "alignment.stop_step=null", "--set", setting)
            more = ("--recipe", recipe, "--model", model, "--steps", "3", *settings)
            codes.append(fork_ranks(f"{folder}/{recipe}", port, lambda: train(recipe, *more)))  # noqa: B023  # done here
        print(json.dumps(codes))
        return
    if phase == "killed":
        loop.train_step = killed
        train("killed")
        return
    importlib.import_module("torch._dynamo")  # DistributedDataParallel does, where there are ranks
    timeout, distributed.TIMEOUT, loop.train_step = distributed.TIMEOUT, timedelta(seconds=10), stands_still
    hung = start_ranks(f"{folder}/hung", ports.pop(), lambda: train("hung"))
    distributed.TIMEOUT = timeout
    codes = []
    runs = (
        ("whole", train_step, ()),
        ("ended", waits_for_its_end, ()),
        ("ended", train_step, ("--resume", "auto")),
        ("killed", train_step, ("--resume", "auto")),
    )
    for number, (name, step, more) in enumerate(runs):
        loop.train_step = step
        if name == "killed":
            sys.stdin.read()
        codes.append(fork_ranks(f"{folder}/{number}", ports[number], lambda: train(name, *more)))  # noqa: B023  # done here
    codes.append(ended(hung[:1]))
    os.kill(hung[1], signal.SIGKILL)
    print(json.dumps(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
