"""What a user installs: the wheel, alone in a folder, holds every module and table and gives every public name."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
ROOMS = ("cache_specs", "kernels", "pipeline", "trainer")
SHIPPED = {".py", ".yaml", ".md", ".jinja", ".css", ".js"}

# With the wheel's folder as its argument: every public name, every command's function, and from where.
IMPORT = """
import importlib, importlib.metadata, json, pkgutil, sys
import repa
rooms = [importlib.import_module(f"repa.{room.name}") for room in pkgutil.iter_modules(repa.__path__)]
names = {f"{room.__name__}.{name}": getattr(room, name) for room in rooms for name in room.__all__}
(wheel,) = importlib.metadata.distributions(path=sys.argv[1:])
commands = {entry.name: entry.load() for entry in wheel.entry_points}
files = [module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "repa"]
rooms = [room.__name__ for room in rooms]
print(json.dumps({"rooms": rooms, "names": list(names), "commands": sorted(commands), "files": files}))
"""


def run(*command: str, env: dict[str, str], cwd: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy (setuptools leaves a build/ behind, and ships what lies in it) and install it."""
    pytest.importorskip("pip")  # not in every environment that other tools make
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for file in HOUSE.iterdir():
        if file.is_file():
            shutil.copy(file, source)
    for folder in (*ROOMS, "tests", "benchmarks"):
        shutil.copytree(HOUSE / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--no-compile"]
    pip = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "install", "--quiet"]
    run(*pip, *offline, "--target", str(target), ".", env=dict(os.environ), cwd=source)
    return target


def test_every_module_and_table_is_in_the_wheel_and_nothing_else(installed: Path) -> None:
    files = [file for room in ROOMS for file in (HOUSE / room).rglob("*") if file.suffix in SHIPPED]
    files += [HOUSE / "__init__.py", HOUSE / "py.typed", *HOUSE.glob("*.md")]
    expected = {str(file.relative_to(HOUSE)) for file in files}
    assert {"trainer/runs/recipes.yaml", "cache_specs/encoders.yaml", "kernels/README.md"} < expected
    found = {str(f.relative_to(installed / "repa")) for f in (installed / "repa").rglob("*") if f.is_file()}
    assert found == expected
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"repa", "bin"}


def test_every_public_name_and_command_comes_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(installed)}
    found = json.loads(run(sys.executable, "-P", "-c", IMPORT, str(installed), env=env, cwd=tmp_path))
    assert found["rooms"] == [f"repa.{room}" for room in ROOMS]
    assert {"repa.trainer.CacheReader", "repa.pipeline.run_build", "repa.kernels.reference"} < set(found["names"])
    assert {name.rpartition(".")[0] for name in found["names"]} == set(found["rooms"])
    assert all(Path(file).is_relative_to(installed) for file in found["files"])
    scripts = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]["scripts"]
    assert found["commands"] == sorted(scripts) == sorted(path.name for path in (installed / "bin").iterdir())


def test_a_command_reads_its_tables_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(installed)}
    assert "* dinov2-vit-b " in run(str(installed / "bin/repa-cache"), "encoders", env=env, cwd=tmp_path)
