"""Who may import whom, who alone may import what is heavy, and that asking for help loads none of it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
ROOMS = ("cache_specs", "kernels", "pipeline", "trainer")
MODULES = [file.relative_to(HOUSE) for room in ROOMS for file in sorted((HOUSE / room).rglob("*.py"))]

ARROWS: dict[str, set[str]] = {
    "cache_specs": set(),
    "kernels": set(),
    "pipeline": {"cache_specs"},
    "trainer": {"cache_specs", "kernels"},
}
# Each heavy import has its owners; numpy, torch and zarr are used throughout.
OWNERS = {
    "ray": {"pipeline/ray_pool.py"},
    "timm": {"pipeline/timm_models.py"},
    "transformers": {"pipeline/transformers_models.py"},
    "diffusers": {"pipeline/autoencoders.py"},
    "skimage": {"pipeline/demo_data.py"},
    "sklearn": {"pipeline/probe.py"},
    "matplotlib": {"pipeline/figures.py"},
    "pyarrow": {"pipeline/import_arrow.py"},
    "torch_fidelity": {"pipeline/inception.py"},
    "obstore": {"cache_specs/object_store.py"},
    "tensorstore": {"trainer/library_array.py"},
}
LAZY = {*OWNERS, "tensorboard", "tqdm"}


def imports(module: Path) -> Iterator[tuple[str, bool]]:
    """Yield what a module imports, by full name (`repa.kernels.reference`), and whether loading it does so."""
    tree = ast.parse((HOUSE / module).read_text())
    for node, on_load in _walk(tree, on_load=True):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, on_load
        elif isinstance(node, ast.ImportFrom):
            parent = ("repa", *module.parts[:-1])[: len(module.parts) + 1 - node.level] if node.level else ()
            base = ".".join([*parent, *([node.module] if node.module else [])])
            yield base, on_load
            for alias in node.names:
                yield f"{base}.{alias.name}", on_load


def _walk(node: ast.AST, *, on_load: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, on_load
        within = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        yield from _walk(child, on_load=on_load and not within and not typing_only)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_down_only(module: Path) -> None:
    room = module.parts[0]
    for name, on_load in imports(module):
        first, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if first == "repa" and target in ROOMS and target != room:
            borrowed = str(module) == "trainer/borrowed.py" and target == "pipeline" and not on_load
            assert target in ARROWS[room] or borrowed, f"{module} imports {name}"
        if room == "cache_specs":
            assert first not in ("torch", *(LAZY - {"obstore"})), f"{module} imports {name}"
        if first in LAZY:
            assert not on_load, f"{module} imports {name} when it is loaded"
            assert str(module) in OWNERS.get(first, {str(module)}), f"{module} imports {name}"
        if room in ("trainer", "kernels"):
            assert first not in (OWNERS.keys() - {"tensorstore"}), f"{module} imports {name}"


def test_the_walk_sees_imports_of_every_kind() -> None:
    assert ("repa.cache_specs.errors", True) in imports(Path("pipeline/ray_pool.py"))
    assert ("ray", False) in imports(Path("pipeline/ray_pool.py"))
    assert ("repa.pipeline.plan.BuildOptions", False) in imports(Path("pipeline/cli.py"))


WITHOUT = (
    "import sys; from repa.pipeline.cli import main\ntry:\n  main()\nfinally:\n  print(*sys.modules, file=sys.stderr)"
)


@pytest.mark.parametrize(
    "arguments", ["--help", "build --help", "import --help", "info --help", "verify --help", "encoders"]
)
def test_asking_for_help_loads_nothing_heavy(arguments: str) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT, *arguments.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert "repa" in loaded
    assert not loaded & {"torch", "ray", "timm", "diffusers", "zarr", "skimage", "transformers"}
    if "help" in arguments:
        assert "repa-cache" in done.stdout or "Usage" in done.stdout
    else:
        assert "* dinov2-vit-b " in done.stdout


def test_a_dry_run_and_info_need_neither_ray_nor_models(tmp_path: Path) -> None:
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/1.png").write_bytes(b"never opened")
    build = f"build --data {tmp_path}/images --cache {tmp_path}/cache --encoder dinov2 --dtype int8 --dry-run"
    done = subprocess.run([sys.executable, "-c", WITHOUT, *build.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {name.partition(".")[0] for name in done.stderr.split()} & {"ray", "timm", "diffusers", "skimage"}
    assert "features/dinov2-vit-b-int8: 1 of 1 ranges to encode" in done.stdout
    assert "int8 [1, 1, 256, 768]" in done.stdout
    assert "nothing was written" in done.stdout
    assert not (tmp_path / "cache").exists()
