"""The Ray job: the same bytes as in this process, whatever dies on the way. One Ray instance for all of it."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import JobError
from repa.pipeline.building import ray_pool, ray_session
from repa.pipeline.building.build import run_build
from repa.pipeline.building.job import JobOptions, RangeWork
from repa.pipeline.building.plan import BuildOptions, plan_build
from repa.pipeline.building.ray_pool import RayPool, gpu_share
from repa.pipeline.images.manifest import scan_folder

# Ray's own files and sockets, and what its protocol libraries deprecate.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def images(make_images: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray") / "images"
    make_images(folder, num=40)
    return folder


@pytest.fixture
def in_process(images: Path, tree: Callable[[Path], dict[str, bytes]], build: Callable[..., Any]) -> dict[str, bytes]:
    """Return the tree that this process builds."""
    if not (images.parent / "in process").exists():
        assert build(images, images.parent / "in process").code == 0
    return tree(images.parent / "in process")


def options(images: Path, cache: Path, **asked: Any) -> BuildOptions:
    return BuildOptions(
        manifest=scan_folder(images),
        cache=cache,
        encoders=("hog:grid=4",),
        autoencoder="pixels",
        resolution=16,
        flip=True,
        shard_samples=4,
        batch_size=3,
        **asked,
    )


def job_options(asked: BuildOptions) -> JobOptions:
    """Return what the workers of this build are told, for a pool of its own."""
    plan = plan_build(asked)
    return JobOptions(
        cache=asked.cache,
        layout=plan.layout,
        requests=plan.requests,
        source=asked.manifest.source,
        batch_size=4,
        device=None,
        threads=1,
        skip_bad=False,
    )


def descendants(ancestor: int, title: str) -> list[int]:
    """Return the processes below `ancestor` whose command line starts with `title`."""
    parents, titled = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_text().startswith(title):
                titled.append(int(folder.name))
        except OSError:
            continue  # it ended

    def below(pid: int) -> bool:
        while pid in parents and pid != ancestor:
            pid = parents[pid]
        return pid == ancestor

    return [pid for pid in titled if below(pid)]


def runs(pid: int) -> bool:
    """Return whether a process is there and not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_two_workers_give_the_bytes_of_this_process(
    images: Path,
    tmp_path: Path,
    ray_head: tuple[str, int],
    in_process: dict[str, bytes],
    tree: Callable[[Path], dict[str, bytes]],
    build: Callable[..., Any],
) -> None:
    outcome = build(images, tmp_path / "cache", "--workers", 2, "--address", ray_head[0])
    assert outcome.code == 0, outcome.err
    assert "2 Ray workers on cpu" in outcome.err
    assert tree(tmp_path / "cache") == in_process


def test_a_worker_that_is_killed_costs_nothing(
    images: Path,
    tmp_path: Path,
    ray_head: tuple[str, int],
    in_process: dict[str, bytes],
    tree: Callable[[Path], dict[str, bytes]],
) -> None:
    killed: list[int] = []

    def kill_once(samples: int) -> None:
        if not killed:
            (pid,) = descendants(ray_head[1], "ray::_RayWorker")
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    asked = options(images, tmp_path / "cache", workers=1, address=ray_head[0])
    report = run_build(asked, on_start=lambda done, total: None, on_progress=kill_once)
    assert killed
    assert len(report.completed) == 2
    assert tree(tmp_path / "cache") == in_process


def test_a_driver_that_is_killed_leaves_what_a_second_build_finishes(
    images: Path,
    tmp_path: Path,
    in_process: dict[str, bytes],
    tree: Callable[[Path], dict[str, bytes]],
    build: Callable[..., Any],
    small_options: list[str],
) -> None:
    # A Ray of its own, started by the command as a user's would be: it must end with the driver.
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", "from repa.pipeline.commands.cache import main; main()", "build", "--data", images]
    driver = subprocess.Popen([*map(str, command), "--cache", str(cache), *small_options, "--workers", "1"])
    first = cache / "features/hog-grid4/valid/c.0"
    deadline = time.monotonic() + 120
    while not first.exists() and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    helpers, workers = descendants(driver.pid, ""), descendants(driver.pid, "ray::_RayWorker")
    driver.kill()
    driver.wait()
    assert driver.returncode == -signal.SIGKILL, "the build was over before it was killed"
    # At once, while the workers may still be writing.
    assert build(images, cache).code == 0
    deadline = time.monotonic() + 60
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in filter(runs, helpers):  # Ray's agents take a while to see that they are alone
        os.kill(pid, signal.SIGKILL)
    assert workers
    assert not any(map(runs, workers)), "workers outlived their driver"
    assert tree(cache) == in_process


class _KillsItsReader:
    """Something that kills the process in which it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("__import__('os').kill(__import__('os').getpid(), 9)",)


class _DeadlyIndex(_KillsItsReader, int):
    pass


class _DeadlySizes(_KillsItsReader):
    pass


@pytest.fixture
def pool(images: Path, tmp_path: Path, ray_head: tuple[str, int]) -> Iterator[tuple[RayPool, Callable[..., RangeWork]]]:
    """Yield one worker on the shared Ray, and what makes the work of a range."""
    asked = options(images, tmp_path / "cache")
    plan = plan_build(asked)
    run_build(
        options(images, tmp_path / "cache", workers=0), on_start=lambda done, total: None, on_progress=lambda n: None
    )

    def work(index: int, sizes: Any = None) -> RangeWork:
        ids = tuple(asked.manifest.sample_ids[4 * index : 4 * index + 4].tolist())
        known = np.zeros(4, dtype=np.int64) if sizes is None else sizes
        return RangeWork(index=index, paths=tuple(plan.missing), sample_ids=ids, expected_bytes=known)

    with RayPool(job_options(asked), num_workers=1, address=ray_head[0]) as opened:
        yield opened, work


def run_all(pool: RayPool, work: list[RangeWork]) -> tuple[list[int], str]:
    """Return the ranges that were encoded, and what the pool says of the others."""
    done: list[int] = []
    try:
        done.extend(result.index for result in pool.run(work))
    except JobError as error:
        return sorted(done), str(error)
    return sorted(done), ""


def test_a_range_that_kills_its_worker_twice_is_reported_and_the_others_are_done(
    pool: tuple[RayPool, Callable[..., RangeWork]],
) -> None:
    opened, work = pool
    done, said = run_all(opened, [work(0), work(_DeadlyIndex(1)), work(2), work(3)])
    assert done == [0, 2, 3]
    assert "1 ranges were not encoded, first samples 4 to 7: it killed its worker 2 times" in said

    class Sizes:
        def __getitem__(self, part: slice) -> Any:
            return _DeadlySizes()

    # Or its decoder: a worker that waits for it does not die with it.
    done, said = run_all(opened, [work(0), work(2, Sizes()), work(3)])
    assert done == [0, 3]
    assert "1 ranges were not encoded, first samples 8 to 11: its images killed a decoder" in said


def test_work_goes_on_with_the_workers_that_live(
    pool: tuple[RayPool, Callable[..., RangeWork]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    opened, work = pool
    get, failures = ray.get, [ray.exceptions.OutOfMemoryError("killed for memory"), None]

    def get_or_fail(ref: Any) -> Any:
        if failures and (failure := failures.pop(0)):
            raise failure
        return get(ref)

    # Ray's memory monitor has an error that is not a RayActorError.
    with monkeypatch.context() as patched:
        patched.setattr(ray, "get", get_or_fail)
        assert run_all(opened, [work(0), work(1)]) == ([0, 1], "")
    assert not failures

    # As where a node was lost: the replacement waits for a GPU that nobody has.
    opened._actor = ray.remote(num_gpus=1)(ray_pool._RayWorker)
    opened._start_worker()
    assert run_all(opened, [work(0), work(1), work(2)]) == ([0, 1, 2], "")
    monkeypatch.setattr(ray_pool, "REPLACEMENT_TIMEOUT_S", 1)
    done, said = run_all(opened, [work(0), work(_DeadlyIndex(1)), work(2)])
    assert 2 not in done
    assert "no worker is left, and no new one was ready in 1 s" in said


def test_a_lost_ray_is_one_line_with_the_command_that_goes_on(
    images: Path, tmp_path: Path, ray_head: tuple[str, int], build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    asked = (images, tmp_path / "cache", "--workers", 1, "--address", ray_head[0])
    with monkeypatch.context() as patched:
        patched.setattr(ray_pool, "WATCH_S", 0)
        patched.setattr(ray_pool, "HEAD_LOST_S", 0)
        patched.setattr(ray_session, "socket", SimpleNamespace(create_connection=refuse_connection))
        patched.setattr(ray_session, "_check_reachable", lambda address: None)
        at_exit: list[Any] = []
        patched.setattr(ray_session, "atexit", SimpleNamespace(register=at_exit.append, unregister=at_exit.append))
        outcome = build(*asked)
    ray.shutdown()  # of one without a head nobody takes leave, and this one has its head
    assert outcome.code == 1
    assert at_exit == [ray.shutdown, ray_session._end]
    assert "Traceback" not in outcome.err
    said = outcome.err.splitlines()[-1]
    assert "Ray was lost: its head (gcs_server) does not answer; finished ranges are kept, and this goes on: " in said
    words = shlex.split(said.partition("goes on: ")[2])
    assert words[:2] == ["repa-cache", "build"]
    assert words[-4:] == ["--workers", "1", "--address", ray_head[0]]
    # What Ray raises of itself is the same line.
    with monkeypatch.context() as patched:
        patched.setattr(ray, "wait", lambda *_, **__: (_ for _ in ()).throw(ray.exceptions.RaySystemError("gone")))
        outcome = build(*asked)
    assert outcome.code == 1
    assert "Ray was lost (System error: gone); finished ranges are kept" in outcome.err.splitlines()[-1]
    assert build(images, tmp_path / "cache").code == 0


def refuse_connection(*_: object, **__: object) -> None:
    raise ConnectionRefusedError


@pytest.mark.parametrize(("workers", "gpus"), [(1, 1), (1, 8), (3, 2), (6, 1), (7, 3), (16, 8), (17, 8)])
def test_the_gpu_shares_of_all_workers_fit(workers: int, gpus: int) -> None:
    a_gpu = 10_000 // round(10_000 * gpu_share(workers, gpus))  # Ray counts in units of 1e-4; none spans two GPUs
    assert (a_gpu - 1) * gpus < workers <= a_gpu * gpus


def test_the_device_is_that_of_the_cluster_not_of_the_driver(
    images: Path,
    tmp_path: Path,
    ray_head: tuple[str, int],
    build: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcome = build(images, tmp_path / "cache", "--workers", 1, "--address", ray_head[0], "--device", "cuda")
    assert outcome.code == 1
    assert "--device cuda: Ray has no GPU here" in outcome.err

    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0})
    monkeypatch.setattr(RayPool, "_start_worker", lambda pool: None)
    for num_workers, said in ((3, "3 Ray workers on cuda, 0.5 GPU each"), (None, "2 Ray workers on cuda, 1 GPU each")):
        with RayPool(job_options(options(images, tmp_path / "cache")), num_workers=num_workers, address=ray_head[0]):
            assert said in capsys.readouterr().err


def test_a_local_ray_has_memory_for_a_worker_on_each_gpu(
    images: Path, tmp_path: Path, ray_head: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    settings: dict[str, Any] = {}

    def init(**asked: Any) -> None:
        settings.update(asked)
        raise ConnectionError("not started by this test")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    asked = job_options(replace(options(images, tmp_path / "cache"), resolution=256, shard_samples=256))
    with pytest.raises(JobError, match="Ray did not start"), RayPool(asked, num_workers=None, address=None):
        pass
    assert settings["num_gpus"] == 8
    # Three ranges in flight a worker.
    assert settings["object_store_memory"] >= 8 * 3 * 256 * (256 * 256 * 3)


def test_a_bad_file_is_reported_through_ray_too(
    images: Path, tmp_path: Path, ray_head: tuple[str, int], build: Callable[..., Any]
) -> None:
    for file in sorted((images / "class 0").iterdir())[:6]:
        (tmp_path / "images/class 0").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images/class 0" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "images/class 0/005.png").write_text("text")
    outcome = build(tmp_path / "images", tmp_path / "cache", "--workers", 1, "--address", ray_head[0])
    assert outcome.code == 1
    assert "bad image: class 0/005.png: not an image" in outcome.err
    # An error of the worker's own reaches the user as the same one line, after the one that says where.
    outcome = build(
        *(tmp_path / "images", tmp_path / "cache", "--encoder", "dinov2-vit-s:grid=2"),
        *("--workers", 1, "--address", ray_head[0]),
    )
    assert (outcome.code, outcome.err.count("\n")) == (2, 2), outcome.err
    assert "could not be had from the hub" in outcome.err


def test_a_cluster_that_is_not_there_is_one_line(images: Path, tmp_path: Path, build: Callable[..., Any]) -> None:
    outcome = build(images, tmp_path / "cache", "--workers", 1, "--address", "127.0.0.1:1")
    assert outcome.code == 1
    assert "--address 127.0.0.1:1: Ray could not be reached" in outcome.err
