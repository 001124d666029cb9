"""Two gloo ranks train each method as one process does that is fed the micro-batches of both."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import torch

from repa.trainer.distributed import World
from repa.trainer.models.checkpoint import load_checkpoint
from repa.trainer.reading.batches import Batches, Place
from repa.trainer.runs.run import prepare
from repa.trainer.runs.settings import Layer, recipe_layer, resolve, set_layer
from repa.trainer.training import loop

from ..test_distributed import ALONE, SCRIPT, free_ports

RECIPES = {"reg": "reg.cls_coeff=0.5", "reg-irepa": "label_dropout=0.4", "sra": "sra.teacher_depth=2"}
RECIPES["irepa-internal"] = "internal.depth=1"


def test_two_ranks_are_one_process(make_cache, tmp_path, run_outcome, small_sit):
    """Three steps of two micro-batches on each rank, against three of four: losses, and the weights at the end.

    The teacher of SRA is each rank's own average: did ranks drift apart, the second step would show it.
    """
    cache = make_cache().path
    ports = free_ports(len(RECIPES))
    words = [
        word for port, (recipe, setting) in zip(ports, RECIPES.items(), strict=True) for word in (port, recipe, setting)
    ]
    command = [sys.executable, SCRIPT, "recipes", cache, tmp_path, *words]
    done = subprocess.run(command, env=ALONE, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    printed = {file.name: file.read_text() for file in tmp_path.glob("*.[01]")}
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[0, 0]] * len(RECIPES), printed

    for recipe, setting in RECIPES.items():
        flags = {"cache": str(cache), "out": "unused", "model": "SiT-Ti/2", "batch_size": 8}
        changed = set_layer(["accumulation=4", "alignment.encoder_depth=1", setting])
        layers = [recipe_layer(recipe, "SiT-Ti/2"), Layer(source="flags", values=flags), changed]
        run = prepare(resolve(layers), World(rank=0, size=1, device=torch.device("cpu")))
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
