"""Encoders of one's own: what is computed, what is digested, where it is run, and that a cache runs nothing."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from PIL import Image

from repa.cache_specs.errors import UsageError
from repa.cache_specs.tables import encoder_table, resolve_encoder
from repa.pipeline.models.encoders import load_encoder

from .own_networks import HELPER, TARGET, WIDTH, random_state, write_own

EARLY, LATE = "mine-grid4-stageearly", "mine-grid2-stagelate"


def pictures(num: int = 2, side: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (num, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def own_forward(images: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both maps, by sums over patches written out."""
    state = random_state(seed)
    mean, std = torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1), torch.tensor([0.5, 0.5, 0.25]).view(3, 1, 1)
    pixels = (images.float() / 255 - mean) / std

    def patches(x: torch.Tensor, size: int) -> torch.Tensor:
        return x.unfold(2, size, size).unfold(3, size, size)  # [B, C, h, w, size, size]

    early = torch.einsum("bchwij,ocij->bohw", patches(pixels, 4), state["early.weight"])
    early = (early + state["early.bias"].view(-1, 1, 1)).relu()
    late = torch.einsum("bchwij,ocij->bohw", patches(early, 2), state["late.weight"])
    return early, late + state["late.bias"].view(-1, 1, 1)


def load(request: str, resolution: int = 16) -> Any:
    resolved = resolve_encoder(request, resolution=resolution)
    return load_encoder(resolved.spec, code=resolved.code)


def helpers() -> list[Any]:
    """Return the tests' helper modules that are loaded, under whatever private name."""
    return [module for name, module in sys.modules.items() if name.startswith("_repa_own_") and name.endswith(".nets")]


def test_tokens_are_those_of_the_network_over_its_own_grid(tmp_path: Path) -> None:
    file = write_own(tmp_path)
    early, late = own_forward(pictures())
    for request, expected in ((f"{file}:grid=4:stage=early", early), (f"{file}:grid=2:stage=late", late)):
        tokens, cls_token = load(request)(pictures())
        torch.testing.assert_close(tokens, expected.flatten(2).mT, rtol=1e-4, atol=1e-4)
        assert cls_token is None
    # A larger map is made smaller as SAM's: bilinearly, pixel centres.
    shrunk = F.interpolate(early, size=(3, 3), mode="bilinear", align_corners=False)
    torch.testing.assert_close(
        load(f"{file}:grid=3:stage=early")(pictures())[0], shrunk.flatten(2).mT, rtol=1e-4, atol=1e-4
    )


def test_tokens_with_a_class_token_and_a_callable_that_is_no_module(tmp_path: Path) -> None:
    source = """
def make(width):
    def encode(pixels):
        tokens = pixels.unfold(2, 8, 8).unfold(3, 8, 8).mean((4, 5)).flatten(2).mT
        return __import__("torch").cat([tokens.mean(1, keepdim=True), tokens], 1)
    return encode
"""
    file = write_own(
        tmp_path, source=source, output=None, stages=None, width=3, prefix_tokens=1, cls_token=True, mean=None, std=None
    )
    encoder = load(f"{file}:grid=2")
    tokens, cls_token = encoder(pictures())
    expected = F.avg_pool2d(pictures().float() / 255, 8)
    torch.testing.assert_close(tokens, expected.flatten(2).mT)
    torch.testing.assert_close(cls_token, expected.mean((2, 3)))
    assert encoder.model is None
    assert encoder.weights == resolve_encoder(f"{file}:grid=2", resolution=16).code.digest  # type: ignore[union-attr]


def test_an_installed_package_is_a_target_and_its_sources_are_digested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site/owned"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text("def make():\n    return lambda pixels: pixels[:, :, ::4, ::4]\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    fields = {"files": None, "options": None, "stages": None, "width": 3, "patch": 4, "mean": None, "std": None}
    file = write_own(tmp_path / "entry", **{"target": "owned.nets:make", **fields})
    resolved = resolve_encoder(f"{file}:grid=4", resolution=16)
    assert set(resolved.spec["files"]) == {"owned"}
    assert "owned" not in sys.modules
    torch.testing.assert_close(
        load(f"{file}:grid=4")(pictures())[0], (pictures()[:, :, ::4, ::4].float() / 255).flatten(2).mT
    )
    (package / "other.py").write_text("x = 1\n")
    assert resolve_encoder(f"{file}:grid=4", resolution=16).spec["files"] != resolved.spec["files"]
    with pytest.raises(UsageError, match="owned changed since the command began, or is another file on this machine"):
        load_encoder(resolved.spec, code=resolved.code)


def test_two_networks_with_helpers_of_one_name_do_not_mix(tmp_path: Path) -> None:
    twice = HELPER.replace("self.late(early)", "2 * self.late(early)")
    first, second = write_own(tmp_path / "a"), write_own(tmp_path / "b", helper=twice)
    one, two = (load(f"{file}:grid=2:stage=late")(pictures())[0] for file in (first, second))
    torch.testing.assert_close(two, 2 * one)
    assert "nets" not in sys.modules
    assert "own" not in sys.modules


@pytest.mark.parametrize(
    "statement",
    [
        "from .nets import Net",
        "import parts.nets as p; Net = p.Net",
        "from parts import nets; Net = nets.Net",
        "def Net(width):\n    from parts.nets import Net as late\n    return late(width)",
    ],
)
def test_helpers_are_imported_as_at_home(tmp_path: Path, statement: str) -> None:
    source = statement + TARGET.replace("import nets", "").replace("nets.Net", "Net")
    file = write_own(tmp_path, source=source, files=["nets.py", "weights.pth", "parts/nets.py"])
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/nets.py").write_text(HELPER)
    tokens = load(f"{file}:grid=2:stage=late")(pictures())[0]
    torch.testing.assert_close(tokens, own_forward(pictures())[1].flatten(2).mT, rtol=1e-4, atol=1e-4)


def test_the_digest_holds_every_byte_and_no_place(tmp_path: Path) -> None:
    file = write_own(tmp_path / "a")
    spec = resolve_encoder(f"{file}:grid=2:stage=late", resolution=16).spec
    assert set(spec["files"]) == {"own.py", "nets.py", "weights.pth"}
    assert str(tmp_path) not in json.dumps(spec)
    moved = resolve_encoder(f"{write_own(tmp_path / 'b')}:grid=2:stage=late", resolution=16).spec
    assert moved == spec
    for name in spec["files"]:
        other = write_own(tmp_path / f"c-{name}")
        with (other.parent / name).open("ab") as changed:
            changed.write(b"\n")
        found = resolve_encoder(f"{other}:grid=2:stage=late", resolution=16).spec
        assert {key for key in spec["files"] if found["files"][key] != spec["files"][key]} == {name}
    outside = write_own(tmp_path / "d", files=["nets.py", "../a/weights.pth"])
    assert resolve_encoder(f"{outside}:grid=2:stage=late", resolution=16).spec["files"] == spec["files"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for index in range(6):
        folder = tmp_path / f"images/{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "images"


def requests(file: Path) -> list[str]:
    return ["--encoder", f"{file}:grid=4:stage=early", "--encoder", f"{file}:grid=2:stage=late"]


def test_stages_of_one_build_share_a_forward_and_each_is_what_it_is_alone(
    tmp_path: Path, images: Path, build: Callable[..., Any], tree: Callable[[Path], dict[str, bytes]]
) -> None:
    file = write_own(tmp_path / "own")
    asked = requests(file)
    assert build(images, tmp_path / "both", *asked).code == 0
    (helper,) = (module for module in helpers() if str(tmp_path) in module.__file__)
    num_forwards, before = len(helper.CALLS), list(helper.CALLS)
    for part in (asked[:2], asked[2:]):
        assert build(images, tmp_path / "alone", *part, "--autoencoder", "none").code == 0
    assert len(helper.CALLS) - num_forwards > num_forwards
    # 6 images in batches of 3, 1 of a shard of 4 each: 3, 1, 2; two views.
    assert before[-6:] == [3, 3, 1, 1, 2, 2]
    both, alone = tree(tmp_path / "both/features"), tree(tmp_path / "alone/features")
    for name in (EARLY, LATE):
        assert {k: v for k, v in both.items() if k.startswith(name)} == {
            k: v for k, v in alone.items() if k.startswith(name)
        }
    stored = zarr.open_group(tmp_path / f"both/features/{LATE}", mode="r")
    assert (stored["patch_tokens"].shape, stored.attrs["spec"]["native_grid"]) == ((6, 2, 4, WIDTH), [2, 2])


def test_sources_travel_to_rays_workers(
    tmp_path: Path, images: Path, build: Callable[..., Any], tree: Callable[[Path], dict[str, bytes]]
) -> None:
    file = write_own(tmp_path / "own")
    assert build(images, tmp_path / "here", *requests(file), "--threads", 1).code == 0
    done = build(images, tmp_path / "ray", *requests(file), "--threads", 1, "--workers", 1, "--device", "cpu")
    assert done.code == 0, done.err
    assert tree(tmp_path / "here") == tree(tmp_path / "ray")
    broken = write_own(tmp_path / "broken", source="import torch\nimport absent\n")
    done = build(images, tmp_path / "broken-cache", *requests(broken))
    assert done.code == 2
    assert "own.py:make cannot be imported (ModuleNotFoundError: No module named 'absent'" in done.err
    assert "Traceback" not in done.err


def test_a_cache_never_causes_an_import(
    tmp_path: Path, images: Path, repa_cache: Callable[..., Any], build: Callable[..., Any]
) -> None:
    marker = tmp_path / "imported"
    source = TARGET + f"\nPath({str(marker)!r}).touch()\n"
    file = write_own(tmp_path / "own", source=source)
    cache = tmp_path / "cache"
    assert build(images, cache, *requests(file)).code == 0
    marker.unlink()
    for name in [name for name in sys.modules if name.startswith("_repa_own_")]:
        del sys.modules[name]
    recompute = ["verify", cache, "--recompute", 3, "--data", images, "--device", "cpu"]
    as_asked = ["metrics", cache, "--encoder", "mine:grid=2:stage=late"]
    for command in (["info", cache], ["verify", cache], ["metrics", cache], as_asked, recompute):
        done = repa_cache(*command)
        assert done.code == 0, done.err
    assert not marker.exists()
    assert (
        f"features/{LATE}: not encoded again: is of a network of your own; give its file, --entry mine.yaml"
        in done.unfolded
    )
    done = repa_cache(*recompute, "--entry", file)
    assert f"features/{LATE}: 3 samples encoded again, cosine to what is stored: mean 1.0" in done.unfolded
    assert marker.exists()
    (file.parent / "nets.py").write_text(HELPER + "# changed\n")
    done = repa_cache(*recompute, "--entry", file)
    assert done.code == 0
    assert (
        f"features/{LATE}: not encoded again: nets.py of {file} is not the one that it was built with" in done.unfolded
    )
    done = build(images, cache, *requests(file))
    assert done.code == 1
    assert "spec.files.nets.py: found" in done.err


def test_an_unfinished_component_says_which_file_finishes_it(
    tmp_path: Path, images: Path, repa_cache: Callable[..., Any], build: Callable[..., Any]
) -> None:
    file = write_own(tmp_path / "own")
    assert build(images, tmp_path / "cache", *requests(file)).code == 0
    next((tmp_path / f"cache/features/{LATE}/valid/c").parent.glob("c.0*")).unlink()
    assert "--encoder mine.yaml:grid=2:stage=late --autoencoder none" in repa_cache("info", tmp_path / "cache").unfolded
    assert build(images, tmp_path / "cache", *requests(file)).code == 0
    assert "INCOMPLETE" not in repa_cache("info", tmp_path / "cache").out


def test_the_table_has_no_network_of_anyones_own() -> None:
    assert all(entry.folder is None and entry.loader != "python" for entry in encoder_table().values())
