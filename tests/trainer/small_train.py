"""repa-train with the small SiT on one thread, for tests that need processes of their own.

small_train.py alone ARGUMENTS...                    repa-train as it is
small_train.py first CACHE FOLDER PORT PORT          a rank: FOLDER/whole, then FOLDER/killed until rank 1 dies
small_train.py second CACHE FOLDER PORT PORT         a rank: FOLDER/killed, continued
"""

import os
import signal
import sys
from pathlib import Path

import torch

from repa.trainer import loop
from repa.trainer.cli import train_command
from repa.trainer.sit import SIZES

ARGUMENTS = ["--model", "SiT-Ti/2", "--recipe", "irepa", "--batch-size", "8", "--steps", "9", "--device", "cpu"]
SETTINGS = ("accumulation=2", "alignment.encoder_depth=1", "save_every=3", "log_every=1")
ARGUMENTS += [f"--set={setting}" for setting in SETTINGS]


def train(cache: str, out: Path, port: str, *arguments: str) -> None:
    os.environ["MASTER_PORT"] = port
    train_command.main(["--cache", cache, "--out", str(out), *ARGUMENTS, *arguments], standalone_mode=False)


def main(phase: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    SIZES["Ti"] = (2, 32, 2)
    if phase == "alone":
        train_command.main(list(arguments), standalone_mode=False)
        return
    cache, folder, *ports = arguments
    if phase == "second":
        train(cache, Path(folder, "killed"), ports[0], "--resume", "auto")
        return
    train(cache, Path(folder, "whole"), ports[0])
    step = loop.train_step

    def dying(run, ahead, norm):
        if run.step == 7 and run.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(run, ahead, norm)

    loop.train_step = dying
    train(cache, Path(folder, "killed"), ports[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
