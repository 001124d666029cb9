"""A derivation killed at any moment and run again leaves the tree of one that was never killed, names and bytes."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import SOURCE

OPTIONS = ("--from", SOURCE, "--with", "pca:6", "--dtype", "int8")


@pytest.fixture(scope="module")
def clean(
    sources: Path, run_and_die: Callable[..., tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """Return the cache by a derivation that nothing disturbed, and its number of disk operations."""
    cache = Path(shutil.copytree(sources / "c", tmp_path_factory.mktemp("clean") / "c"))
    ended, operations = run_and_die(0, "derive", cache, *OPTIONS)
    assert ended == "exit 0"
    assert operations > 80
    return cache, operations


# Of the fit alone (its 12 files), then of anything.
@pytest.mark.parametrize("seed", range(6))
def test_killed_anywhere_and_run_again_it_is_the_same(
    clean: tuple[Path, int],
    cache: Path,
    run_and_die: Callable[..., tuple[str, int]],
    tree: Callable[[Path], dict[str, bytes]],
    seed: int,
) -> None:
    undisturbed, operations = clean
    rng = random.Random(seed)
    points = [rng.randint(1, 30 if seed < 2 else operations), rng.randint(1, operations // 2), rng.randint(1, 40)]
    ends = [run_and_die(point, "derive", cache, *OPTIONS)[0] for point in points]
    assert ends[0] == "killed"
    assert run_and_die(0, "derive", cache, *OPTIONS)[0] == "exit 0"
    assert tree(cache) == tree(undisturbed), points
