"""A build killed at any moment and run again leaves the tree of one that was never killed, names and bytes."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def build_and_die(
    run_and_die: Callable[..., tuple[str, int]], small_options: list[str]
) -> Callable[..., tuple[str, int]]:
    """Return a function that makes the small build, killed at its point-th disk operation (0: not at all)."""

    def run(point: int, images: Path, cache: Path, *options: str) -> tuple[str, int]:
        return run_and_die(point, "build", "--data", images, "--cache", cache, *small_options, *options)

    return run


@pytest.fixture(scope="module")
def clean_build(
    make_images: Callable[..., list[Path]],
    build_and_die: Callable[..., tuple[str, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, int]:
    """Return a folder of images, their cache by a build that nothing disturbed, and its number of operations."""
    folder = tmp_path_factory.mktemp("clean")
    make_images(folder / "images", num=10)
    ended, operations = build_and_die(0, folder / "images", folder / "cache")
    assert ended == "exit 0"
    assert operations > 100  # the points below lie within a real build
    return folder / "images", folder / "cache", operations


@pytest.mark.parametrize("seed", range(5))
def test_a_build_killed_anywhere_and_run_again_equals_one_never_killed(
    clean_build: tuple[Path, Path, int],
    build_and_die: Callable[..., tuple[str, int]],
    tmp_path: Path,
    tree: Callable[[Path], dict[str, bytes]],
    seed: int,
) -> None:
    images, clean, operations = clean_build
    cache = tmp_path / "cache"
    # Three builds of one cache die in turn, each at a random operation of what is left to it; the last one may have
    # come to its end before.
    rng = random.Random(seed)
    points = [rng.randint(1, operations), rng.randint(1, operations // 2), rng.randint(1, 40)]
    ends = [build_and_die(point, images, cache)[0] for point in points]
    assert ends[0] == "killed"
    assert build_and_die(0, images, cache)[0] == "exit 0"
    assert tree(cache) == tree(clean), points


@pytest.mark.parametrize(
    ("point", "options"), [(60, ("--encoder", "hog:grid=3", "--dtype", "int8")), (30, ("--dtype", "uint8"))]
)
def test_a_second_component_killed_while_it_is_added_leaves_the_first_alone(
    make_images: Callable[..., list[Path]],
    build_and_die: Callable[..., tuple[str, int]],
    tmp_path: Path,
    tree: Callable[[Path], dict[str, bytes]],
    point: int,
    options: tuple[str, ...],
) -> None:
    images, cache = tmp_path / "images", tmp_path / "cache"
    make_images(images, num=10)
    assert build_and_die(0, images, cache)[0] == "exit 0"
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in cache.rglob("*") if file.is_file()}
    assert build_and_die(point, images, cache, *options)[0] == "killed"
    begun = set(tree(cache))
    assert all((file.read_bytes(), file.stat().st_mtime_ns) == was for file, was in before.items())
    assert build_and_die(0, images, cache, *options)[0] == "exit 0"
    assert all((file.read_bytes(), file.stat().st_mtime_ns) == was for file, was in before.items())
    assert not [name for name in tree(cache) if "partial" in name]
    assert set(map(str, (file.relative_to(cache) for file in before))) < begun
    other = tmp_path / "other"  # where nothing was killed
    assert [build_and_die(0, images, other, *more)[0] for more in ((), options)] == ["exit 0"] * 2
    assert tree(other) == tree(cache)
