"""Independent pieces of work as Ray tasks, each with its share of a machine: the runs of a study.

A task that is lost with its node is done again elsewhere, up to ATTEMPTS times: it must be something that goes on where
it stood.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ...cache_specs.errors import JobError, reason
from .ray_session import ray_session

ATTEMPTS = 4
POLL_S = 1.0

Item = TypeVar("Item")


def run_tasks(
    work: Callable[[Item], int],
    items: Sequence[Item],
    *,
    address: str | None,
    cpus: float,
    gpus: float,
    on_done: Callable[[Item, int], None],
    stop: Callable[[], bool],
) -> None:
    """Do `work` on every item, on the cluster at `address` or on this machine; `on_done` is told each answer.

    `work` is imported by name where it is done. `cpus` and `gpus` are what a task holds. Once `stop` says so, what
    waits is cancelled and what runs is killed: it goes on when the same is asked again. Raises JobError where no node
    can hold a task, or one was lost ATTEMPTS times.
    """
    with ray_session(address, instead="give --serial") as ray:
        there = ray.cluster_resources()
        lacking = [name for name, wanted in (("CPU", cpus), ("GPU", gpus)) if wanted > there.get(name, 0)]
        if lacking:
            raise JobError(
                f"a run wants {cpus:g} CPUs and {gpus:g} GPUs, and Ray has {there.get('CPU', 0):g} and "
                f"{there.get('GPU', 0):g}; add nodes, or ask for less"
            )
        task = ray.remote(_do).options(num_cpus=cpus, num_gpus=gpus, max_retries=ATTEMPTS - 1)
        waiting: dict[Any, Item] = {task.remote(work, item): item for item in items}
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=POLL_S)
            for future in ready:
                item = waiting.pop(future)
                try:
                    on_done(item, int(ray.get(future)))
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
                    raise JobError(
                        f"{item}: its node or process was lost {ATTEMPTS} times ({reason(error)}); give the same "
                        f"command again to go on"
                    ) from error
            if stop() and waiting:
                for future in waiting:
                    ray.cancel(future, force=True)
                return


def _do(work: Callable[[Item], int], item: Item) -> int:
    return work(item)
