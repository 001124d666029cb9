"""A cache as a data set of PyTorch's, for loops that are not ours: batches of tensors by name, in the trainer's order.

Batch s holds what step s of `repa-train` sees with the same seed, batch size and ranks and without accumulation: the
same rows, views and draws from the posterior (batches.py). Epoch e is the steps that begin in it: all batches are
full, one may straddle two epochs, and every rank has as many. So the whole state is the number of the next step.

Reading ahead is done by threads of this process (prefetch.py). Batches are the caller's to keep, as Lightning and
accelerate fetch one ahead: on the CPU each is copied out of the ring, whose buffers are filled anew.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NoReturn

import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ...cache_specs.errors import UsageError
from ..diffusion.latents import LatentNorm, draw_latents, to_model_input
from .batches import Batches, MicroBatch, Place
from .draws import DrawSpec, gaussian, view_coin
from .norm import NORMS, reader_norm
from .order import DEFAULT_WINDOW, Shuffle
from .prefetch import ReadAhead, batches_ahead, map_tensors
from .reader import CacheReader

_NO_WORKERS = (
    "CacheDataset reads ahead by threads of its own, and worker processes would each give every batch. "
    "Use DataLoader(dataset, batch_size=None, num_workers=0)"
)

Item = dict[str, Any]  # tensors by name; features: tensors by name, by encoder


class CacheDataset(IterableDataset[Item]):
    """Batches of a reader's cache for `DataLoader(dataset, batch_size=None, num_workers=0)`, or for a plain loop.

    A batch has rows, labels and views [b] int64; latents [b,C,h,w] float32; and features, by encoder's name what
    `cosine_alignment` takes: tokens, channel_mean, channel_std, token_scale where they are int8 (FeatureBatch), beside
    them cls_token where the reader reads it.

    batch_size      samples a step over all ranks; b is a rank's share
    rank, world     of this process; None: those of torch.distributed where it is initialised, else 0 of 1
    posterior       draw latents from the stored mean and std; without it a batch has `moments` [b,M,h,w] as stored
    latent_norm     None: latents as the autoencoder decodes them; fixed: by its published scale; channel: by the
                    cache's statistics; or a LatentNorm
    flip            read the mirrored view too, where the cache has it
    device          where the batches go; to CUDA they are copied beside the computation, from pinned memory
    prefetch_bytes  of batches read ahead

    Iterating goes on from where the data set stands to the end of that epoch; the next iteration gives the next epoch.
    One iteration at a time: a later one, `load_state_dict` and `set_epoch` end it. Raises UsageError for arguments that
    do not fit, in a DataLoader's worker, and in a process forked amid an iteration; else what the reader raises.
    """

    def __init__(
        self,
        reader: CacheReader,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        epoch: int = 0,
        posterior: bool = True,
        latent_norm: LatentNorm | Literal["fixed", "channel"] | None = None,
        flip: bool = True,
        shuffle: Shuffle = "global",
        window: int = DEFAULT_WINDOW,
        device: torch.device | str = "cpu",
        prefetch_bytes: int = 512_000_000,
    ) -> None:
        super().__init__()
        rank, world = _place(rank, world)
        num = len(reader.valid_rows)
        if not 1 <= batch_size <= num:
            raise UsageError(f"batch_size is {batch_size}; {reader.path} has {num} valid samples: give 1 to {num}")
        if batch_size % world:
            raise UsageError(f"batch_size is {batch_size}, over all ranks; expected a multiple of world={world}")
        if seed < 0:
            raise UsageError(f"seed is {seed}; expected 0 or more")
        if shuffle not in ("global", "blocks"):
            raise UsageError(f"shuffle is {shuffle!r}; expected global or blocks")
        if window < 1:
            raise UsageError(f"window is {window}; expected 1 shard or more")
        if not (latent_norm is None or isinstance(latent_norm, LatentNorm) or latent_norm in NORMS):
            raise UsageError(f"latent_norm is {latent_norm!r}; expected None, fixed, channel or a LatentNorm")
        if latent_norm is not None and not posterior:
            raise UsageError(f"latent_norm is {latent_norm!r} with posterior=False: moments are given as stored")

        self.reader = reader
        self.device = torch.device(device)
        self._posterior, self._prefetch_bytes = posterior, prefetch_bytes
        norm = reader_norm(reader, latent_norm) if isinstance(latent_norm, str) else latent_norm
        if norm is not None and len(norm.scale) != reader.latents.channels:
            raise UsageError(f"latent_norm has {len(norm.scale)} channels; the latents have {reader.latents.channels}")
        self._norm = None if norm is None else norm.tensors(self.device)

        # The first draws of every method, from the same generator: so they are those of a run (objectives/).
        draws = [view_coin(len(reader.views) if flip else 1)]
        if posterior and reader.latents.kind == "mean_std":
            draws.append(gaussian("posterior_noise", (reader.latents.channels, *reader.latents.size)))
        place = Place(batch_size=batch_size, rank=rank, world=world)
        self._batches = Batches(reader, DrawSpec(seed=seed, draws=draws), place, shuffle=shuffle, window=window)
        # What the stream of batches is a function of; the number of ranks may change, as it only divides the positions.
        self._stream: dict[str, int | str] = {"seed": seed, "batch_size": batch_size, "shuffle": shuffle, "flip": flip}
        if shuffle == "blocks":
            self._stream["window"] = window
        self._stream |= reader.fingerprints
        self._step = 0
        self._iteration = 0
        self._reading: dict[int, int] = {}  # iterations that read ahead, and the process whose thread does
        self._go_to(self._first_step(_epoch(epoch)))

    @property
    def step(self) -> int:
        """The number of the batch that comes next, from 0 over all epochs."""
        return self._step

    @property
    def epoch(self) -> int:
        """The epoch, from 0, in which the next batch begins."""
        return self._step * self._batches.place.batch_size // len(self.reader.valid_rows)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; in the midst of this very epoch stay there, for loops that have resumed."""
        if _epoch(epoch) != self.epoch:
            self._go_to(self._first_step(epoch))

    def __len__(self) -> int:
        """Return the batches of an epoch; where its samples are no multiple of a batch, some epochs have one fewer."""
        return self._first_step(1)

    def __iter__(self) -> Iterator[Item]:
        if get_worker_info() is not None:
            raise UsageError(_NO_WORKERS)
        self._iteration += 1
        self._check(self._iteration)
        return self._items(self._iteration)

    def state_dict(self) -> dict[str, Any]:
        """Return where the data set stands, of integers and words alone: the same on every rank.

        Batches that were given out count as used; those read ahead do not.
        """
        return {"step": self._step, **self._stream}

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Go on where the `state_dict` of such a data set stood; another number of ranks divides the same samples.

        Raises UsageError, naming what differs, where it is of another stream of batches.
        """
        ours = self.state_dict()
        for name in [*ours, *stored]:
            there = stored.get(name, "missing")
            if name not in ours or (name != "step" and there != ours[name]):
                here = ours.get(name, "without")
                raise UsageError(
                    f"state_dict: {name} is {there}; this data set of {self.reader.path} is {here}. "
                    f"Resume with the cache and settings that it was saved with"
                )
        step = stored.get("step")
        if type(step) is not int or step < 0:
            raise UsageError(f"state_dict: step is {step!r}; expected the number of a batch, 0 or more")
        self._go_to(step)

    def __reduce__(self) -> NoReturn:
        raise UsageError(_NO_WORKERS)  # how workers get it that are not forked

    def _first_step(self, epoch: int) -> int:
        """Return the first step that begins in `epoch`."""
        return -(-epoch * len(self.reader.valid_rows) // self._batches.place.batch_size)

    def _go_to(self, step: int) -> None:
        self._step = step
        self._iteration += 1

    def _items(self, iteration: int) -> Iterator[Item]:
        """Give the batches from here to the end of the epoch, while `iteration` is the latest and in one process."""
        self._check(iteration)
        steps = range(self._step, self._first_step(self.epoch + 1))
        depth = min(batches_ahead(self._prefetch_bytes, self._batches.num_bytes), len(steps))
        self._reading[iteration] = process = os.getpid()
        try:
            with ReadAhead(self._batches, first=steps.start, last=steps.stop, depth=depth, device=self.device) as ahead:
                for step in steps:
                    self._check(iteration)
                    item = self._item(ahead.next())
                    self._step = step + 1
                    yield item
        finally:
            if process == os.getpid():
                del self._reading[iteration]

    def _check(self, iteration: int) -> None:
        """Raise UsageError where an iteration cannot go on."""
        if any(process != os.getpid() for process in self._reading.values()):  # and may have had the reader's lock
            raise UsageError(
                "this process was forked amid an iteration over a CacheDataset; open the cache again in it, "
                "by a CacheReader and a CacheDataset of its own"
            )
        if iteration != self._iteration:
            raise UsageError(
                "this iteration over a CacheDataset has ended: another one, set_epoch or load_state_dict came after it"
            )

    @torch.no_grad()
    def _item(self, batch: MicroBatch) -> Item:
        if self.device.type == "cpu":  # the ring's buffers are filled anew
            batch = map_tensors(batch, Tensor.clone)
        data = batch.data
        item: Item = {"rows": data.rows, "labels": data.labels, "views": batch.draws["views"]}
        if self._posterior:
            latents = draw_latents(data.moments, batch.draws.get("posterior_noise"), self.reader.latents.kind)
            item["latents"] = latents if self._norm is None else to_model_input(latents, *self._norm)
        else:
            item["moments"] = data.moments
        names = [spec.name for spec in self.reader.features]
        item["features"] = {name: features.tensors() for name, features in zip(names, data.features, strict=True)}
        return item


def _place(rank: int | None, world: int | None) -> tuple[int, int]:
    """Return rank and world, those of torch.distributed where neither is given."""
    if (rank is None) != (world is None):
        raise UsageError(f"rank is {rank}, world {world}; expected both, or neither")
    if rank is None or world is None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 0, 1
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if not 0 <= rank < world:
        raise UsageError(f"rank is {rank} of world {world}; expected 0 to {world - 1}")
    return rank, world


def _epoch(epoch: int) -> int:
    if epoch < 0:
        raise UsageError(f"epoch is {epoch}; expected 0 or more")
    return epoch
