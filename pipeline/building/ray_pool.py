"""Ranges encoded by Ray: an actor for each device, CPU tasks that decode for them. The only importer of ray.

Lost actors are replaced, and a range that was lost with one is tried once more.
"""

import contextlib
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import torch

from ...cache_specs.errors import JobError
from ...cache_specs.layout import CacheLayout
from ...cache_specs.schema import ComponentSpec
from ..images.decode import DecodedBatch, decode_batch
from .encode import RangeResult, Worker
from .job import JobOptions, RangeWork
from .ray_session import head_answers, ray_session
from .resources import CPU_IMAGES, images_a_pass

RANGES_IN_FLIGHT = 3  # a worker: one being committed, one being encoded, one being decoded
REPLACEMENT_TIMEOUT_S = 600  # for a node to come back, or models to load, once no worker is left
WATCH_S = 5  # between looks at Ray's head
HEAD_LOST_S = 20  # that it may be away, to be started again: after 60 Ray ends this process, in a wall of its own
ATTEMPTS = 2  # a range that kills its worker this often is reported, not tried for ever

DECODE = {"num_cpus": 1, "max_retries": ATTEMPTS - 1}


class _RayWorker:
    """A `Worker` as a Ray actor. Models are loaded in a call, so that their error reaches the driver as itself.

    Calls run in threads of Ray's, so that one range is committed while the next is encoded. One thread of our own has
    the device: torch would start as many threads again for every other that computes.
    """

    def load(self, options: JobOptions, device: str, share: float) -> tuple[list[ComponentSpec], str, int]:
        """Return the components, the node that this worker is on, and how many images a forward pass takes there."""
        import ray

        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
        threads = options.threads_on(device)
        self._worker = self._device.submit(
            Worker, options.cache, options.layout, options.requests, device=device, threads=threads
        ).result()
        batch_size = options.batch_size or images_a_pass(device, options.layout.resolution, share=share)
        return self._worker.components, ray.get_runtime_context().get_node_id(), batch_size

    def encode_range(self, index: int, paths: Sequence[str], refs: list[Any], skip_bad: bool) -> RangeResult:
        import ray

        def fetched() -> Iterator[DecodedBatch]:
            while refs:
                yield ray.get(refs.pop(0))  # popped: the object store may drop it as soon as it is encoded

        committing = self._device.submit(self._worker.encode_range, index, paths, fetched(), skip_bad=skip_bad).result()
        return committing.result()


class RayPool:
    """`num_workers` actors (None: one a GPU) and CPU decode tasks, on this machine or on the cluster at `address`."""

    def __init__(self, options: JobOptions, *, num_workers: int | None, address: str | None, go_on: str = "") -> None:
        """Make the pool; `go_on` is the command that goes on where Ray is lost, for the line that says so."""
        self._options = options
        self._address = address
        self._go_on = go_on or "the same command"
        self._looked, self._away_since = 0.0, math.inf  # at Ray's head
        self._num_workers = num_workers
        self._stack = contextlib.ExitStack()
        self._ready: list[Any] = []  # workers whose models are loaded
        self._loading: dict[Any, Any] = {}  # the others, by the future of their `load`
        self._decode_near: dict[Any, Any] = {}  # by worker, the decoding for it
        self._passes: list[int] = []  # of each worker that was ready, the images that its device takes at a time
        self.components: list[ComponentSpec] = []
        self.batch_size = 0  # of the smallest device, once the workers are ready

    def __enter__(self) -> Self:
        with self._stack as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        local: dict[str, Any] = {}
        if self._address is None:
            here = torch.cuda.device_count()
            store = object_store_bytes(self._options.layout, self._num_workers or max(1, here))
            local = {"num_gpus": here, "object_store_memory": store}
        ray = stack.enter_context(
            ray_session(self._address, instead="encode in this process with --workers 0", **local)
        )
        # Asked of the cluster: the driver's own machine may be a head node without a GPU.
        gpus = int(ray.cluster_resources().get("GPU", 0))
        self._device = self._options.device or ("cuda" if gpus else "cpu")
        on_gpu = self._device != "cpu"
        if on_gpu and not gpus:
            raise JobError(f"--device {self._device}: Ray has no GPU here; add nodes with one, or ask for --device cpu")
        workers = self._num_workers or (max(1, gpus) if on_gpu else 1)
        self._share = share = gpu_share(workers, gpus) if on_gpu else 0
        _say(f"{workers} Ray worker{'s' * (workers > 1)} on {self._device}{f', {share:g} GPU each' * on_gpu}")
        # num_cpus 0: a worker waits for its decode tasks, and must not hold the CPUs that they need.
        self._actor = ray.remote(_RayWorker).options(
            num_cpus=0, num_gpus=share, max_restarts=0, max_concurrency=RANGES_IN_FLIGHT
        )
        self._decode = ray.remote(decode_batch)
        for _ in range(workers):
            self._start_worker()
        # Nothing to decode, but the processes for it start while models load: each takes about a second of a core.
        nothing = (self._options.source, (), self._options.layout.resolution, np.zeros(0, dtype=np.int64))
        batch_size = self._options.batch_size or CPU_IMAGES
        most = workers * RANGES_IN_FLIGHT * math.ceil(self._options.layout.shard_samples / batch_size)
        for _ in range(min(most, int(ray.cluster_resources().get("CPU", 1)))):
            self._decode.options(**DECODE).remote(*nothing)
        for future in list(self._loading):  # they load side by side; here only their answers are taken in turn
            self._take_loaded(future)
        self.batch_size = min(self._passes, default=CPU_IMAGES)

    def _start_worker(self) -> None:
        actor: Any = self._actor.remote()
        self._loading[actor.load.remote(self._options, self._device, self._share)] = actor

    def _take_loaded(self, future: Any) -> Any:
        """Return the worker that has answered `future`, now ready; raise what its `load` raised."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = self._loading.pop(future)
        try:
            components, node, batch_size = ray.get(future)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            raise self._lost(f"a worker died while it loaded its models ({_first_line(error)})") from error
        if self.components and components != self.components:
            raise JobError(
                "two workers loaded different weights for one component; give every node the same files and versions"
            )
        self.components = components
        # Pixels stay on the node that encodes them, while it has a core: 0.2 MB an image would cross the network.
        near = NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)
        self._decode_near[actor] = self._decode.options(**DECODE, scheduling_strategy=near)
        self._passes.append(batch_size)
        self._ready.append(actor)
        return actor

    def _replace(self, worker: Any) -> None:
        """Start another worker in the place of a lost one; the others go on while it loads."""
        import ray

        self._ready.remove(worker)
        del self._decode_near[worker]
        ray.kill(worker)  # where it is only out of reach, it must not keep its GPU
        self._start_worker()

    def _lost(self, what: str) -> JobError:
        without = "" if self._address else "; without Ray: --workers 0"
        return JobError(f"{what}; finished ranges are kept, and this goes on: {self._go_on}{without}")

    def run(self, work: Iterable[RangeWork]) -> Iterator[RangeResult]:
        """Yield results as ranges finish.

        Lost workers are replaced, and those that live go on. Raises `JobError` where none is left, where Ray itself is
        lost, and at the end where a range killed its worker twice.
        """
        import ray

        try:
            yield from self._run(work)
        except ray.exceptions.RayError as error:  # those of a worker or a task were dealt with
            raise self._lost(f"Ray was lost ({_first_line(error)})") from error

    def _run(self, work: Iterable[RangeWork]) -> Iterator[RangeResult]:
        import ray

        queue = iter(work)
        following = next(queue, None)
        retry: deque[RangeWork] = deque()
        attempts: Counter[int] = Counter()
        lost: dict[int, str] = {}
        load = dict.fromkeys(self._ready, 0)
        running: dict[Any, tuple[RangeWork, Any, int]] = {}
        while True:
            for worker in self._ready:
                while load[worker] < RANGES_IN_FLIGHT:
                    # A retried range runs alone: if its worker dies again, no other range is to blame or to suffer.
                    cost = RANGES_IN_FLIGHT if retry else 1
                    if load[worker] and cost > 1:
                        break
                    if retry:
                        item = retry.popleft()
                    elif following is not None:
                        item, following = following, next(queue, None)
                    else:
                        break
                    decode = self._decode_near[worker]
                    refs = [decode.remote(*part) for part in self._options.batches(item, self.batch_size)]
                    future = worker.encode_range.remote(item.index, item.paths, refs, self._options.skip_bad)
                    running[future] = (item, worker, cost)
                    load[worker] += cost
            if not running and not retry and following is None:
                break
            done = self._wait(running)
            if done in self._loading:
                try:
                    load[self._take_loaded(done)] = 0
                except Exception as error:  # whatever a model's loader raises: no reason to stop those that work
                    if not self._ready and not self._loading:
                        why = _first_line(error.__cause__ or error)
                        raise self._lost(f"no worker is left, and none could be started ({why})") from error
                    _say(f"a worker was lost and could not be replaced ({_first_line(error)})")
                continue
            item, worker, cost = running.pop(done)
            load[worker] -= cost
            try:
                yield ray.get(done)
                continue
            except ray.exceptions.RayTaskError as error:
                # Anything of Ray's own here is the loss of a decoded batch: its task crashed, or ran out of memory.
                if not isinstance(error.cause, ray.exceptions.RayError):
                    raise error.cause from error
                reason = f"its images killed a decoder ({_first_line(error.cause)})"
            except ray.exceptions.RayError as error:
                # Not only RayActorError: a worker killed for memory, or a node that is gone, have errors of their own.
                reason = f"it killed its worker {ATTEMPTS} times ({_first_line(error)})"
                if worker in self._ready:
                    self._replace(worker)
            attempts[item.index] += 1
            if attempts[item.index] < ATTEMPTS:
                retry.append(item)
            else:
                lost[item.index] = reason
        if lost:
            index, reason = next(iter(sorted(lost.items())))
            start, stop = self._options.layout.sample_range(index)
            raise JobError(
                f"{self._options.cache}: {len(lost)} ranges were not encoded, first samples {start} to {stop - 1}: "
                f"{reason}. Run the same command again; if it stays, look at these images and at the memory left"
            )

    def _wait(self, running: Iterable[Any]) -> Any:
        """Return the first future to be done, of a range or of a worker that loads."""
        import ray

        running = list(running)
        until = math.inf if running else time.monotonic() + REPLACEMENT_TIMEOUT_S
        while (left := until - time.monotonic()) > 0:
            done, _ = ray.wait([*running, *self._loading], timeout=min(WATCH_S, left))
            self._look()
            if done:
                return done[0]
        raise self._lost(
            f"no worker is left, and no new one was ready in {REPLACEMENT_TIMEOUT_S} s; see that nodes are up "
            "(ray status)"
        )

    def _look(self) -> None:
        """Raise `JobError` where Ray's head has been away for too long: its workers go on, and nobody may ask more."""
        import ray

        now = time.monotonic()
        if now - self._looked < WATCH_S:
            return
        self._looked = now
        self._away_since = math.inf if head_answers(ray) else min(now, self._away_since)
        if now - self._away_since >= HEAD_LOST_S:
            raise self._lost("Ray was lost: its head (gcs_server) does not answer")


def gpu_share(workers: int, gpus: int) -> float:
    """Return the part of a GPU a worker asks Ray for, so that all fit: a worker never spans two.

    Rounded down to the four digits that Ray keeps: 6 workers with 0.16667 of one GPU would not fit.
    """
    return 10_000 // math.ceil(workers / gpus) / 10_000


def object_store_bytes(layout: CacheLayout, workers: int) -> int:
    """Return the memory for the decoded batches of what `workers` have in flight, twice over."""
    range_bytes = layout.shard_samples * layout.resolution**2 * 3
    return max(2**28, 2 * workers * RANGES_IN_FLIGHT * range_bytes)


def _say(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)  # above the progress bar, where there is one


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
