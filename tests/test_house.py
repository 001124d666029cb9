"""Who may import whom, who alone may import what is heavy, and that asking for help loads none of it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
ROOMS = ("cache_specs", "kernels", "pipeline", "trainer")
MODULES = [file.relative_to(HOUSE) for room in ROOMS for file in sorted((HOUSE / room).rglob("*.py"))]

# ARCHITECTURE.md draws the house: a room with the rooms it may import, then its wings, each of which may import those
# before it: `    trainer   -> cache_specs, kernels   what it is for` and `      trainer/rows   what it is for`.
DRAWING = (HOUSE / "ARCHITECTURE.md").read_text()
ARROWS = {
    room: set((allowed or "").replace(",", " ").split())
    for room, allowed in re.findall(r"^    (\w+)(?: +-> ((?:\w+, )*\w+))?   ", DRAWING, flags=re.M)
}
WINGS = re.findall(r"^      (\w+/\w+)(?:\.py)?   ", DRAWING, flags=re.M)
TESTED = ("tests", "benchmarks")
MOST_FILES, MOST_LOOSE, MOST_LINES, MOST_TEST_LINES = 16, 5, 300, 400

# Each heavy import has its owners; numpy, torch and zarr are used throughout.
OWNERS = {
    "ray": {"pipeline/building/ray_pool.py", "pipeline/building/ray_session.py"},
    "timm": {"pipeline/models/timm_models.py"},
    "transformers": {"pipeline/models/transformers_models.py"},
    "diffusers": {"pipeline/models/autoencoders.py"},
    "skimage": {"pipeline/images/demo_data.py"},
    "sklearn": {"pipeline/analysis/probe.py"},
    "matplotlib": {"pipeline/analysis/figures.py"},
    "pyarrow": {"pipeline/importing/arrow.py"},
    "torch_fidelity": {"pipeline/models/inception.py"},
    "obstore": {"cache_specs/remote/object_store.py"},
    "huggingface_hub": {"cache_specs/remote/hub.py", "pipeline/checking/push.py", "pipeline/models/weights.py"},
    "tensorstore": {"trainer/rows/library_array.py"},
    "plotly": {"trainer/studies/page.py"},
    "jinja2": {"trainer/studies/page.py"},
    "markupsafe": {"trainer/studies/page.py"},
    "wandb": {"trainer/runs/loggers.py"},
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


def wing_of(name: str) -> str:
    """Return "trainer/rows" of "repa.trainer.rows.shards", "kernels" of a room without wings."""
    parts = name.split(".")[1:]
    wing = "/".join(parts[:2])
    return wing if wing in WINGS else parts[0]


def test_the_drawing_shows_every_room_and_wing() -> None:
    assert set(ARROWS) == set(ROOMS)
    folders = {str(file.parent.relative_to(HOUSE)) for room in ROOMS for file in (HOUSE / room).rglob("*.py")}
    loose = {wing for wing in WINGS if not (HOUSE / wing).is_dir()}
    assert folders == set(ROOMS) | (set(WINGS) - loose)
    for room in ("pipeline", "trainer"):
        named = {f"{room}/{file.stem}" for file in (HOUSE / room).glob("*.py")} - {f"{room}/__init__"}
        assert named == {wing for wing in loose if wing.startswith(room)}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_down_only(module: Path) -> None:
    room = module.parts[0]
    here = wing_of(".".join(["repa", *module.with_suffix("").parts]))
    for name, on_load in imports(module):
        first, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if first == "repa" and target in ROOMS:
            if target != room:
                borrowed = str(module) == "trainer/commands/borrowed.py" and target == "pipeline" and not on_load
                assert target in ARROWS[room] or borrowed, f"{module} imports {name}"
            elif here in WINGS:
                there = wing_of(name)
                assert there in WINGS, f"{module} imports the face of its own room"
                assert WINGS.index(there) <= WINGS.index(here), f"{module} imports {name}, of a wing after its own"
        if room == "cache_specs":
            assert first not in ("torch", *(LAZY - {"obstore", "huggingface_hub"})), f"{module} imports {name}"
        if first in LAZY:
            assert not on_load, f"{module} imports {name} when it is loaded"
            assert str(module) in OWNERS.get(first, {str(module)}), f"{module} imports {name}"
        if room in ("trainer", "kernels"):
            theirs = {library for library, owners in OWNERS.items() if any(owner.startswith(room) for owner in owners)}
            assert first not in OWNERS.keys() - theirs, f"{module} imports {name}"


def test_no_module_is_imported_by_one_that_it_imports() -> None:
    names = {".".join(["repa", *module.with_suffix("").parts]).removesuffix(".__init__") for module in MODULES}
    arrows = {
        ".".join(["repa", *module.with_suffix("").parts]): {name for name, _ in imports(module) if name in names}
        for module in MODULES
        if module.name != "__init__.py"
    }
    while arrows:  # take away what imports nothing that is left, until nothing is: what stays goes in circles
        free = {name for name, targets in arrows.items() if not targets & arrows.keys()}
        assert free, f"these import each other: {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in free}


def test_folders_and_files_stay_small() -> None:
    for folder in {(HOUSE / module).parent for module in MODULES}:
        modules = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
        most = MOST_LOOSE if folder.name in ("pipeline", "trainer") else MOST_FILES
        assert len(modules) <= most, f"{folder.name} holds {len(modules)} modules; make a wing of some"
    long = {
        str(file.relative_to(HOUSE)): lines
        for folder, most in [*((room, MOST_LINES) for room in ROOMS), *((f, MOST_TEST_LINES) for f in TESTED)]
        for file in (HOUSE / folder).rglob("*.py")
        if (lines := len(file.read_text().splitlines())) > most
    }
    assert not long, "split these by what they are about"


def test_the_walk_sees_imports_of_every_kind() -> None:
    assert ("repa.cache_specs.errors", True) in imports(Path("pipeline/building/ray_pool.py"))
    assert ("ray", False) in imports(Path("pipeline/building/ray_pool.py"))
    assert ("repa.pipeline.building.plan.BuildOptions", False) in imports(Path("pipeline/commands/build.py"))


WITHOUT = """
import sys
from repa.pipeline.commands.cache import main
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


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
