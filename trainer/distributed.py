"""One process or many: who I am, how gradients and logged numbers are averaged, how all stop at the same step.

torchrun sets the environment that `join` reads; without it there is one process and no process group. Gradients are
averaged over ranks by DistributedDataParallel; everything else that crosses ranks is here.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..cache_specs.errors import JobError, RepaError, UsageError

# A rank that dies is noticed at once: its connections close, and torchrun ends the others. This is for one that hangs,
# and must be longer than what rank 0 does alone: a checkpoint on a slow disk, Inception over 50,000 images.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run and this one's place among them."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` over ranks."""
        if self.size > 1:
            dist.all_reduce(values)
            values = values / self.size
        return values

    def most(self, values: list[float]) -> list[float]:
        """Return, value by value, the largest over ranks."""
        if self.size == 1:
            return values
        largest = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            dist.barrier()


def default_device() -> str:
    """Return "cuda" where there is a CUDA device, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def join(device: str) -> Iterator[World]:
    """Enter the run's process group, if torchrun made one, and leave it at the end of what succeeds.

    What fails leaves it standing: to leave NCCL's group, every rank must come, and the others are waiting in a
    reduction for this one. The process then says why and ends, by which torchrun knows to end the others.

    `device` is "cuda" or "cpu"; ranks on CUDA take the device of their local rank. Raises UsageError for a CUDA
    device that is not there, JobError on the ranks that are left when another one dies or hangs for TIMEOUT.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"local rank {local_rank} wants cuda:{local_rank}, and this machine has {torch.cuda.device_count()} "
                f"CUDA devices. Start fewer processes, or train with --device cpu"
            )
        torch.cuda.set_device(local_rank)
    place = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    if size == 1:
        yield World(rank=0, size=1, device=place)
        return
    # NCCL must know the device: it would otherwise guess it at the first barrier, and warn.
    backend, device_id = ("nccl", place) if device == "cuda" else ("gloo", None)
    dist.init_process_group(backend, device_id=device_id, timeout=TIMEOUT)
    try:
        yield World(rank=rank, size=size, device=place)
    except RepaError:
        raise  # says itself what is wrong, whatever words are in its paths
    except RuntimeError as error:
        # What gloo and NCCL raise where a peer has gone.
        if any(word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer")):
            raise JobError(
                f"rank {rank} stops: another rank was killed, has failed or does not answer; mend what it may have "
                f"printed, then start the same command again (repa-train with --resume auto): it goes on where it was "
                f"last saved"
            ) from error
        raise
    else:
        dist.destroy_process_group()


def wrap(model: nn.Module, world: World) -> nn.Module:
    """Return `model` with its gradients averaged over ranks; alone, the model itself."""
    if world.size == 1:
        return model
    device_ids = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def settle_buckets(wrapped: nn.Module, forward: Callable[[], Iterable[Tensor]]) -> None:
    """Run one step of `forward`, which returns all that the model answers; its gradients are thrown away.

    DistributedDataParallel regroups its buckets after the first backward pass it sees. With three ranks or more the
    order of a ring's additions depends on them, and the first step after a resume would differ in the last bit from
    the same step of an uninterrupted run. After this, every step of either uses the same buckets.
    """
    first, *rest = forward()
    sum((tokens.float().mean() for tokens in rest), start=first.float().mean()).backward()
    wrapped.zero_grad(set_to_none=True)


def averaging(wrapped: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Return the context of one micro-batch: ranks average their gradients in the backward pass of the last only."""
    if last or not isinstance(wrapped, DistributedDataParallel):
        return contextlib.nullcontext()
    return wrapped.no_sync()


class Stopped(Exception):
    """What was done beside the steps ended early, because the run is to stop; it can be taken up again."""


class StopRequest:
    """SIGTERM, Ctrl-C and the clock as questions asked once a step: every rank gets the same answer at the same step.

    With several ranks the answer is that of the step before: its reduction ran while this step did, so nobody waits.
    The first Ctrl-C is a request like SIGTERM, and says so; the second raises KeyboardInterrupt. Where a rank fails,
    torchrun sends SIGTERM to the others within a tenth of a second: the handler then stays, so that they can still
    print why they stop.

    save_after_s  seconds after the last save at which rank 0's clock asks for another; None: never
    """

    def __init__(
        self, world: World, *, save_after_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._world = world
        self._save_after_s = save_after_s
        self._clock = clock
        self._saved_at = clock()
        self._asked = False
        self._previous: dict[signal.Signals, Any] = {}
        self._pending: tuple[Any, Tensor] | None = None
        self._outdated = False  # whether the reduction under way was asked before the last save
        # The device's group must not wait for this one, nor the host for the device.
        self._group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT) if world.size > 1 else None

    def __enter__(self) -> Self:
        handlers: tuple[tuple[signal.Signals, Callable[[int, FrameType | None], None]], ...] = (
            (signal.SIGTERM, self._ask),
            (signal.SIGINT, self._interrupt),
        )
        for number, handler in handlers:
            if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background job ignores interrupts
                self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            if kind is None or self._world.size == 1 or number == signal.SIGINT:
                signal.signal(number, handler)

    def due(self) -> tuple[bool, bool]:
        """Say whether to stop at this step, and whether to save at it."""
        overdue = (
            self._save_after_s is not None
            and self._world.is_main
            and self._clock() - self._saved_at >= self._save_after_s
        )
        if self._world.size == 1:
            return self._asked, overdue
        finished, asked = self._pending, torch.tensor([float(self._asked), float(overdue)])
        work = dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, asked)
        if finished is None:
            return False, False
        finished[0].wait()
        stop, save = (bool(value) for value in finished[1].tolist())
        save, self._outdated = save and not self._outdated, False
        return stop, save

    def saved(self) -> None:
        """Start the clock anew; every rank calls this at the step that is saved."""
        self._saved_at = self._clock()
        self._outdated = self._pending is not None

    def asked(self) -> bool:
        """Say whether this rank has got a signal, for what is done beside the steps."""
        return self._asked

    def agreed(self) -> bool:
        """Say on every rank whether one of them has got a signal, once all have come here."""
        if self._world.size == 1:
            return self._asked
        asked = torch.tensor([float(self._asked)])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
        return bool(asked.item())

    def _ask(self, _signal: int, _frame: FrameType | None) -> None:
        self._asked = True

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        if self._world.is_main:
            # Not print: the signal may have come while the stream's buffer was being written.
            os.write(2, b"\nstopping: the next step is saved. Ctrl-C again aborts\n")
