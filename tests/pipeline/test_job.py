"""The Ray job: the same bytes as in this process, whatever dies on the way. One Ray instance for all of it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repa.cache_specs.errors import JobError
from repa.pipeline.build import BuildOptions, plan_build, run_build
from repa.pipeline.job import JobOptions, RangeWork, RayPool
from repa.pipeline.manifest import scan_folder

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
    command = [sys.executable, "-c", "from repa.pipeline.cli import main; main()", "build", "--data", images]
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
    job = JobOptions(
        cache=tmp_path / "cache",
        layout=plan.layout,
        requests=plan.requests,
        source=asked.manifest.source,
        batch_size=4,
        device="cpu",
        threads=1,
        skip_bad=False,
    )
    run_build(
        options(images, tmp_path / "cache", workers=0), on_start=lambda done, total: None, on_progress=lambda n: None
    )

    def work(index: int, sizes: Any = None) -> RangeWork:
        ids = tuple(asked.manifest.sample_ids[4 * index : 4 * index + 4].tolist())
        known = np.zeros(4, dtype=np.int64) if sizes is None else sizes
        return RangeWork(index=index, paths=tuple(plan.missing), sample_ids=ids, expected_bytes=known)

    with RayPool(job, num_workers=1, address=ray_head[0]) as opened:
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
    ray_pool, work = pool
    done, said = run_all(ray_pool, [work(0), work(_DeadlyIndex(1)), work(2), work(3)])
    assert done == [0, 2, 3]
    assert "1 ranges were not encoded, first samples 4 to 7: it killed its worker 2 times" in said

    class Sizes:
        def __getitem__(self, part: slice) -> Any:
            return _DeadlySizes()

    # Or its decoder: a worker that waits for it does not die with it.
    done, said = run_all(ray_pool, [work(0), work(2, Sizes()), work(3)])
    assert done == [0, 3]
    assert "1 ranges were not encoded, first samples 8 to 11: its images killed a decoder" in said


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
    # An error of the worker's own reaches the user as the same one line.
    outcome = build(
        *(tmp_path / "images", tmp_path / "cache", "--encoder", "dinov2-vit-s:grid=2"),
        *("--workers", 1, "--address", ray_head[0]),
    )
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert "could not be had from the hub" in outcome.err


def test_a_cluster_that_is_not_there_is_one_line(images: Path, tmp_path: Path, build: Callable[..., Any]) -> None:
    outcome = build(images, tmp_path / "cache", "--workers", 1, "--address", "127.0.0.1:1")
    assert outcome.code == 1
    assert "--address 127.0.0.1:1: Ray could not be reached" in outcome.err
