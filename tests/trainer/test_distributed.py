"""Two gloo ranks: the same equations, an exact resume, and no rank that waits for ever for a dead one."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import JobError, UsageError
from repa.trainer.distributed import TIMEOUT, World, join
from repa.trainer.models.checkpoint import load_checkpoint
from repa.trainer.reading.batches import Batches, Place
from repa.trainer.runs.run import prepare
from repa.trainer.runs.settings import Layer, recipe_layer, resolve, set_layer
from repa.trainer.training import loop

SCRIPT = Path(__file__).with_name("small_train.py")
ALONE = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}


def free_ports(num: int) -> list[str]:
    sockets = [socket.socket() for _ in range(num)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    ports = [str(opened.getsockname()[1]) for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def settings(cache: Path, *assignments: str):
    flags = {"cache": str(cache), "out": "unused", "model": "SiT-Ti/2", "batch_size": 8, "alignment.encoder_depth": 1}
    layers = [recipe_layer("irepa", "SiT-Ti/2"), Layer(source="flags", values=flags), set_layer(assignments)]
    return resolve(layers)


def test_two_ranks_train_and_resume_exactly_after_a_death_or_an_end(make_cache, tmp_path, run_outcome, small_sit):
    """One run, under torchrun, loses a rank by SIGKILL, another is ended by SIGTERM; both go on to the same numbers.

    In a third a rank stands still: the other one stops when the timeout, here of 10 seconds, is over.
    """
    cache = make_cache().path
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    pipes: dict[str, Any] = {"env": ALONE, "cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    ranks = [sys.executable, SCRIPT, "ranks", cache, tmp_path, *free_ports(5)]
    with subprocess.Popen(ranks, text=True, stdin=subprocess.PIPE, **pipes) as others:
        command = [sys.executable, *launch, SCRIPT, "killed", cache, tmp_path]
        done = subprocess.run(command, text=True, timeout=200, check=False, **pipes)
        codes, errors = others.communicate(timeout=200)
    assert done.returncode == 1
    line = "repa-train: rank 0 stops: another rank was killed, has failed or does not answer; mend what it may have"
    assert done.stderr.count(line) == 1, done.stderr
    assert "start the same command again (repa-train with --resume auto)" in done.stderr
    assert others.returncode == 0, errors
    printed = {file.name: file.read_text() for file in tmp_path.glob("*.[01]")}
    assert json.loads(codes) == [[0, 0]] * 4 + [[1]], printed
    assert printed["hung.0"].count(line) == 1
    assert "7 of 11 steps done" in printed["1.0"]
    assert "11 of 11 steps done" in printed["2.0"]
    assert "step 8/11" in printed["3.0"]  # from the checkpoint of step 6 on
    assert "step 6/11" not in printed["3.0"]
    whole = run_outcome(tmp_path / "whole")
    assert [record["step"] for record in whole.records] == list(range(1, 12))
    # Gradients are averaged anew from the stop step on: one run is ended just there, one killed before it.
    assert ["alignment_loss" in record for record in whole.records] == [True] * 7 + [False] * 4
    expected = load_checkpoint(tmp_path / "whole/checkpoints/0000011.pt")["model"]
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in expected)
    for name in ("killed", "ended"):
        assert run_outcome(tmp_path / name).losses() == whole.losses()
        state = load_checkpoint(tmp_path / name / "checkpoints/0000011.pt")["model"]
        assert all(torch.equal(state[key], expected[key]) for key in expected)

    # The mean over two ranks of two micro-batches is the mean over the four of them in one process.
    run = prepare(settings(cache, "accumulation=4"), World(rank=0, size=1, device=torch.device("cpu")))
    places = [Place(batch_size=8, accumulation=2, rank=rank, world=2) for rank in range(2)]
    parts = [Batches(run.reader, run.batches.spec, place) for place in places]
    stream = iter([part.read(0, micro) for micro in range(2) for part in parts])
    together = loop.train_step(run, SimpleNamespace(next=lambda: next(stream)))  # type: ignore[arg-type]  # stands in for ReadAhead
    first = whole.records[0]
    expected = [first["denoising_loss"], first["alignment_loss"], first["grad_norm"]]
    np.testing.assert_allclose(together.values.numpy(), expected, rtol=1e-5)


def test_a_batch_that_ranks_cannot_share_is_refused(make_cache, small_sit):
    world = World(rank=0, size=3, device=torch.device("cpu"))
    with pytest.raises(UsageError, match="batch_size 8 is not a multiple of 3 ranks x 2 micro-batches"):
        prepare(settings(make_cache().path, "accumulation=2"), world)


def test_a_missing_device_is_named(monkeypatch):
    if torch.cuda.is_available():
        monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(UsageError, match=r"wants cuda:\d.*--device cpu"), join("cuda"):
        pass


def test_buckets_are_settled_in_the_precision_of_the_run(make_cache, small_sit):
    run = prepare(settings(make_cache().path, "precision=bf16"), World(rank=0, size=1, device=torch.device("cpu")))
    run.world = World(rank=0, size=2, device=torch.device("cpu"))  # where there is something to settle
    seen = []
    with run.model.projectors[0].register_forward_hook(lambda _module, _inputs, out: seen.append(out.dtype)):
        loop.settle(run)
    assert seen == [torch.bfloat16]
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_nccl_is_told_its_device_and_how_long_to_wait(monkeypatch):
    told = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: told.update(options))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "2"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    with join("cuda") as world:
        assert told["timeout"] == TIMEOUT
        assert told["device_id"] == world.device == torch.device("cuda", 2)


@pytest.mark.parametrize("failure", [JobError("no room"), KeyError("a bug"), KeyboardInterrupt(), None])
def test_only_what_succeeds_leaves_the_group(monkeypatch, failure):
    """Leaving NCCL's waits for all ranks, which wait in a reduction for the one that has failed: it would hang mute."""
    left = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with contextlib.suppress(JobError, KeyError, KeyboardInterrupt), join("cpu"):
        if failure is not None:
            raise failure
    assert left == ([True] if failure is None else [])


def test_an_error_of_ours_is_not_taken_for_a_lost_rank(monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(JobError, match=r"^runs/gloo-test: no room$"), join("cpu"):
        raise JobError("runs/gloo-test: no room")
    with pytest.raises(JobError, match="another rank was killed"), join("cpu"):
        raise RuntimeError("[../third_party/gloo] Connection reset by peer")
