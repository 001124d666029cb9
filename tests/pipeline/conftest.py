"""Small builds through the command line's own entry, in this process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from repa.pipeline.commands.cache import main

# Two components, two views, shards of 4 and sub-batches of 3: nothing divides anything.
SMALL = "--encoder hog:grid=4 --autoencoder pixels --resolution 16 --flip --shard-samples 4 --batch-size 3 --workers 0"
SMALL += " --threads 1"


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code, and what it said."""

    code: int
    out: str
    err: str

    @property
    def unfolded(self) -> str:
        """The output with what was folded at 80 columns, or cut for a shell, on one line again."""
        return " ".join(self.out.replace("\\\n", "").split())


@pytest.fixture
def repa_cache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Return a function that runs `repa-cache` with these arguments, as a shell would."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["repa-cache", *map(str, arguments)])
        code = 0
        capsys.readouterr()
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        said = capsys.readouterr()
        return Outcome(code, said.out, said.err)

    return run


@pytest.fixture
def build(repa_cache: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Return a function that makes the small build of `images` in `cache`; later options override earlier ones."""

    def run(images: Path, cache: Path, *options: object) -> Outcome:
        return repa_cache("build", "--data", images, "--cache", cache, *SMALL.split(), *options)

    return run


@pytest.fixture
def verified(repa_cache: Callable[..., Any]) -> Callable[[Path], list[str]]:
    """Return a function that runs `repa-cache verify` and returns its lines of problems, without the last one."""

    def run(cache: Path) -> list[str]:
        outcome = repa_cache("verify", cache)
        lines = outcome.err.splitlines()
        assert outcome.code == (1 if lines else 0), outcome.err
        return lines[:-1]

    return run


def tree_of(cache: Path) -> dict[str, bytes]:
    """Return the bytes of every file below `cache` by its relative name, folders too (as empty bytes)."""
    return {
        str(path.relative_to(cache)): path.read_bytes() if path.is_file() else b"" for path in sorted(cache.rglob("*"))
    }


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Return `tree_of`."""
    return tree_of


@pytest.fixture(scope="session")
def small_options() -> list[str]:
    """Return the options of the small build."""
    return SMALL.split()


@pytest.fixture(scope="session")
def run_and_die() -> Iterator[Callable[..., tuple[str, int]]]:
    """Yield a function that runs `repa-cache`, killed at its point-th write, rename or put (0: not at all).

    Returns how it ended and the number of its operations. One process imports torch for all of them; buckets are those
    of the AWS_ variables at the call.
    """
    script = Path(__file__).with_name("build_and_die.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def run(point: int, *arguments: object) -> tuple[str, int]:
            buckets = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
            stdin.write(json.dumps([point, list(map(str, arguments)), buckets]) + "\n")
            stdin.flush()
            ended, operations = json.loads(stdout.readline())
            return ended, operations

        yield run
        stdin.close()
