"""Two gloo ranks train each method as one process does that is fed the micro-batches of both."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import torch

from repa.trainer.models import jit
from repa.trainer.models.checkpoint import load_checkpoint
from repa.trainer.reading.batches import Batches, Place
from repa.trainer.training import loop

from ..test_distributed import ALONE, SCRIPT, free_ports
from .small_runs import make_run

RECIPES = {"reg": "reg.cls_coeff=0.5", "reg-irepa": "label_dropout=0.4", "sra": "sra.teacher_depth=2"}
RECIPES |= {"irepa-internal": "internal.depth=1", "jit-irepa": "optimizer.warmup_steps=0"}
MODELS = {"jit-irepa": "JiT-Ti/2"}  # and SiT-Ti/2


def test_two_ranks_are_one_process(make_cache, tmp_path, run_outcome, small_sit, monkeypatch):
    """Three steps of two micro-batches on each rank, against three of four: losses, and the weights at the end.

    The teacher of SRA is each rank's own average: did ranks drift apart, the second step would show it.
    """
    monkeypatch.setitem(jit.SIZES, "Ti", (4, 32, 2, 8, 2, 0.2))  # as small_train.py has it
    cache = make_cache().path
    ports = free_ports(len(RECIPES))
    words = [
        word
        for port, (recipe, setting) in zip(ports, RECIPES.items(), strict=True)
        for word in (port, recipe, MODELS.get(recipe, "SiT-Ti/2"), setting)
    ]
    command = [sys.executable, SCRIPT, "recipes", cache, tmp_path, *words]
    done = subprocess.run(command, env=ALONE, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    printed = {file.name: file.read_text() for file in tmp_path.glob("*.[01]")}
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[0, 0]] * len(RECIPES), printed

    for recipe, setting in RECIPES.items():
        run = make_run(cache, recipe, "accumulation=4", setting, model=MODELS.get(recipe, "SiT-Ti/2"))
        places = [Place(batch_size=8, accumulation=2, rank=rank, world=2) for rank in range(2)]
        parts = [Batches(run.reader, run.batches.spec, place) for place in places]
        stream = iter([part.read(step, micro) for step in range(3) for micro in range(2) for part in parts])
        for record in run_outcome(tmp_path / recipe).records:
            result = loop.train_step(run, SimpleNamespace(next=lambda: next(stream)))  # type: ignore[arg-type]  # noqa: B023  # stands in for ReadAhead
            expected = [record[name] for name in result.names]
            np.testing.assert_allclose(result.values.numpy(), expected, rtol=2e-5, err_msg=recipe)
        assert run.step == 3
        stored = load_checkpoint(tmp_path / recipe / "checkpoints/0000003.pt")
        for part, model in (("model", run.model), ("ema", run.ema.model)):
            for name, value in model.state_dict().items():
                torch.testing.assert_close(stored[part][name], value, rtol=1e-4, atol=2e-5, msg=f"{recipe} {name}")
