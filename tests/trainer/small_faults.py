"""Runs from one real cache of a few small images, each in a process of its own, and what is done to them.

    small_faults.py FOLDER    FOLDER/images is there; the cache is built, then trained from:
                                 whole                by nobody disturbed
                                 cut                  killed while it writes a checkpoint, then continued
                                 first, second        at once, while a third process adds an encoder to the cache
                                 readonly             from a cache that cannot be written
                              FOLDER/NAME.txt is what a process printed; exit codes go to stdout as JSON

All are forked from one process that has only imported: importing torch takes longer than the training.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from small_train import ended, forked, train_step

from repa.pipeline.commands.cache import main as cache_command
from repa.pipeline.store.store import CacheStore
from repa.trainer.commands.train import train_command
from repa.trainer.models import checkpoint
from repa.trainer.models.sit import SIZES
from repa.trainer.training import loop

STEPS, SAVE_EVERY = 12, 4
WAIT_S = 100.0

write_all = checkpoint.write_all


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, files
        time.sleep(0.01)


class Faults:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"

    def start(self, name: str, work) -> int:
        return forked(str(self.folder / f"{name}.txt"), {}, work)

    def train(self, name: str, *more: str) -> None:
        settings = ("alignment.encoder_depth=1", f"save_every={SAVE_EVERY}", "log_every=1", "latent_norm=channel")
        arguments = ["--cache", self.cache, "--out", self.folder / name, "--encoder", "hog:grid=4", "--recipe", "irepa"]
        arguments += ["--model", "SiT-Ti/8", "--batch-size", "6", "--steps", STEPS, "--device", "cpu", *more]
        arguments += [f"--set={setting}" for setting in settings]
        train_command.main(list(map(str, arguments)), standalone_mode=False)

    def build(self, *encoders: str) -> None:
        names = [part for name in encoders for part in ("--encoder", name)]
        shape = ["--resolution", "32", "--flip", "--shard-samples", "4", "--workers", "0"]
        sys.argv = ["repa-cache", "build", "--data", str(self.folder / "images"), "--cache", str(self.cache)]
        sys.argv += [*names, "--autoencoder", "pixels", *shape]
        cache_command()

    def train_and_die_in_a_checkpoint(self) -> None:
        """Die by SIGKILL half way through the file of the second one."""
        written = 0

        def half(descriptor: int, data: bytes) -> None:
            nonlocal written
            written += len(data)
            second = (self.folder / "cut/checkpoints" / f"{SAVE_EVERY:07d}.pt").exists()
            if not second:
                written = 0
            elif written > 50_000:
                write_all(descriptor, memoryview(data)[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            write_all(descriptor, data)

        checkpoint.write_all = half
        self.train("cut")

    def train_beside_a_build(self, name: str) -> None:
        """Read before the build begins, while it goes on, and after it has ended."""

        def step(run, ahead):
            if run.step == 2:
                (self.folder / f"{name} reads").touch()
            elif run.step == 5:
                wait_for(self.folder / "building")
            elif run.step == 7:
                (self.folder / f"{name} reads on").touch()
            elif run.step == 9:
                wait_for(self.folder / "built")
            return train_step(run, ahead)

        loop.train_step = step
        self.train(name)

    def build_beside_runs(self) -> None:
        """Begin when both runs read; with one range in the cache, go on when both have read on."""
        commit = CacheStore.commit_range

        def announced(*arguments) -> None:
            commit(*arguments)
            (self.folder / "building").touch()
            wait_for(*(self.folder / f"{name} reads on" for name in ("first", "second")))

        wait_for(*(self.folder / f"{name} reads" for name in ("first", "second")))
        CacheStore.commit_range = announced
        self.build("hog:grid=2")
        (self.folder / "built").touch()

    def read_only(self, work) -> None:
        """Do `work` as a user who may not write the cache; permissions do not bind root, so it gives up its rights."""
        for path in (self.cache, *self.cache.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        if os.geteuid() == 0:
            version, no_rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            assert ctypes.CDLL(None, use_errno=True).capset(version, no_rights) == 0, ctypes.get_errno()
        assert not os.access(self.cache, os.W_OK, effective_ids=True)
        work()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    SIZES["Ti"] = (2, 32, 2)
    faults = Faults(folder)
    codes = {}

    def run(name: str, work) -> None:
        codes[name] = ended([faults.start(name, work)])[0]

    run("build", lambda: faults.build("hog:grid=4"))
    run("whole", lambda: faults.train("whole"))
    run("cut", faults.train_and_die_in_a_checkpoint)
    codes["left"] = sorted(path.name for path in (folder / "cut/checkpoints").iterdir())
    run("continued", lambda: faults.train("cut", "--resume", "auto"))

    beside = [faults.start(name, lambda name=name: faults.train_beside_a_build(name)) for name in ("first", "second")]
    run("third", faults.build_beside_runs)
    codes["beside"] = ended(beside)

    run("readonly", lambda: faults.read_only(lambda: faults.train("readonly")))
    run("refused", lambda: faults.read_only(lambda: faults.build("hog:grid=8")))
    print(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
