"""The run's own loss on samples that it never trains on, with the same noise, times and labels each time.

In: a run, and rows of its cache or of another. Out, for the trained weights and for their average, each loss of the
method: val_denoising_loss, val_ema_denoising_loss, ... What is random is a function of split_seed and of a sample's
place among those rows: neither step, rank nor batch size changes it, nor does it change anything in the run.
"""

import dataclasses
import math
from typing import Any, cast

import numpy as np
import torch

from ..models.sit import SiT
from ..reading.batches import MicroBatch
from ..reading.draws import DrawSpec
from ..reading.prefetch import map_tensors
from ..runs.held_out import ValidationData
from ..runs.run import Run
from ..sampling.sample import evaluating

BLOCK = 64  # samples at a time, which share a generator: not the run's micro-batch, as the draws must not depend on it
_STREAM = 7  # the word of this use among the streams of one seed; the others: runs/held_out.py


class Validation:
    """Judges a run by its losses on the rows of `data`. Every rank calls `at`; each takes some of the blocks."""

    def __init__(self, run: Run, data: ValidationData) -> None:
        self._data = data
        given, views = run.objective.given, len(data.reader.views) if run.config.flip else 1
        given = dataclasses.replace(given, accumulation=1, micro_batch=BLOCK, num_views=views, compile=False)
        self._objective = type(run.objective)(given, run.objective.settings)
        words = np.random.SeedSequence(run.config.split_seed, spawn_key=(_STREAM,)).generate_state(2, np.uint64)
        self._draws = DrawSpec(seed=int(words[0]) << 64 | int(words[1]), draws=self._objective.draws())

    def due(self, run: Run) -> bool:
        """Say whether the run is judged at this step."""
        return run.step == run.config.steps or run.step % run.config.validation.every == 0

    @torch.no_grad()
    def at(self, run: Run) -> dict[str, float]:
        """Return the losses at this step by name, means over all rows, on every rank; NaN where one is not finite."""
        world, num_blocks = run.world, math.ceil(len(self._data.rows) / BLOCK)
        self._objective.load_state_dict(run.objective.state_dict())
        mine = range(world.rank, num_blocks, world.size)
        names: tuple[str, ...] = ()
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        # A rank without a block takes part with the weight 0: it must know the names.
        for block in mine or range(1):
            batch, share = self._block(block, run), len(mine) > 0
            losses = {
                f"val_{which}{name}": value
                for which, model in (("", run.model), ("ema_", run.ema.model))
                for name, value in self._losses(run, model, batch).items()
            }
            names = tuple(losses)
            total = total + share * len(batch.data.rows) * torch.stack(list(losses.values())).double()
        means = world.mean(total) * (world.size / len(self._data.rows))
        return dict(zip(names, means.tolist(), strict=True))

    def _block(self, block: int, run: Run) -> MicroBatch:
        rows = self._data.rows[block * BLOCK : (block + 1) * BLOCK]
        draws = self._draws.draw(len(rows), step=block, micro=0, rank=0)
        batch = MicroBatch(data=self._data.reader.rows(rows, draws["views"].numpy()), draws=draws)
        batch = map_tensors(batch, lambda tensor: tensor.to(run.world.device))
        return dataclasses.replace(batch, data=self._data.reader.complete(batch.data))

    def _losses(self, run: Run, model: SiT, batch: MicroBatch) -> dict[str, torch.Tensor]:
        with evaluating(model):
            posed = self._objective.pose(batch, model, run.ema.model)
            with run.autocast():  # not compiled: this would compile the model once more, for passes without gradient
                answer = cast(Any, model).forward(*posed.inputs, return_projections=run.aligned)
        prediction, projections = answer if run.aligned else (answer, ())
        terms = self._objective.terms(prediction, projections, posed, batch, max(run.step - 1, 0))
        return {term.name: term.logged for term in terms}


def as_line(step: int, losses: dict[str, float]) -> str:
    """Return a line for people, of the first loss alone; metrics.jsonl has all."""
    name, value = next(iter(losses.items()))
    average = losses[name.replace("val_", "val_ema_", 1)]
    name = name.removeprefix("val_").removesuffix("_loss")
    return f"validation at step {step}  {name} {value:.4f}, of the average {average:.4f}"
