"""In which precision a component is encoded: what is there wins, else the workers' device decides, and it is stored."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from repa.cache_specs.schema import FEATURES, LATENTS
from repa.pipeline.building.request import AUTO, ModelRequest
from repa.pipeline.store.store import CacheStore

NETWORK = """
import torch

def net():
    return torch.nn.Conv2d(3, 6, 4, stride=4)
"""
ENTRY = """
loader: python
target: net.py:net
width: 6
patch: 4
output: map
input_size: 16
mean: [0.5, 0.5, 0.5]
std: [0.5, 0.5, 0.5]
interpolation: bicubic
antialias: true
licence: mit
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    """Return an encoder request of a network that computes, unlike HOG, in any precision."""
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "net.yaml").write_text(ENTRY)
    return f"{tmp_path}/net.yaml:grid=4"


def request(kind: str, loader: str, output: str, precision: str = AUTO) -> ModelRequest:
    spec = {"loader": loader, "output": output}
    return ModelRequest(kind=kind, name="x", spec=spec, dtype="float16", precision=precision, compressor="none")


@pytest.mark.parametrize(
    ("kind", "loader", "output", "device", "expected"),
    [
        (FEATURES, "timm", "tokens", "cpu", "fp32"),
        (FEATURES, "timm", "tokens", "cuda", "bf16"),
        (FEATURES, "timm", "map", "cuda", "tf32"),
        (FEATURES, "builtin", "tokens", "cuda", "fp32"),
        (LATENTS, "diffusers", "", "cpu", "fp32"),
        (LATENTS, "diffusers", "", "cuda:1", "tf32"),
        (LATENTS, "builtin", "", "cuda", "fp32"),
    ],
)
def test_the_device_decides_what_nobody_named(kind: str, loader: str, output: str, device: str, expected: str) -> None:
    assert request(kind, loader, output).on(device).precision == expected
    assert request(kind, loader, output, "bf16").on(device).precision == "bf16"


def test_what_is_encoded_wins_and_a_beginning_without_a_range_binds_nobody(
    images: Path, tmp_path: Path, build: Callable[..., Any], tree: Callable[[Path], dict[str, bytes]], own: str
) -> None:
    cache, path = tmp_path / "cache", "features/net-grid4"
    for name in ("one", "two"):
        assert build(images, tmp_path / name, "--encoder", own, "--precision", "bf16").code == 0
    component = CacheStore.open(tmp_path / "one").component(path)
    assert component is not None
    assert component.precision == "bf16"
    # A range is lost, and its build goes on without being told: in bf16.
    (tmp_path / "two" / path / "valid/c.0").unlink()
    dry = build(images, tmp_path / "two", "--encoder", own, "--dry-run")
    assert f"{path}: 1 of 2 ranges to encode, bf16" in dry.out, dry
    assert build(images, tmp_path / "two", "--encoder", own).code == 0
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    named = build(images, tmp_path / "two", "--encoder", own, "--precision", "fp32")
    assert (named.code, "precision: found bf16, asked fp32" in named.err) == (1, True)
    # Begun in bf16 with not one image that can be read.
    good = {file: file.read_bytes() for file in images.rglob("*.png")}
    for file in good:
        file.write_text("not a picture")
    assert build(images, cache, "--encoder", own, "--precision", "bf16").code == 1
    for file, data in good.items():
        file.write_bytes(data)
    assert build(images, cache, "--encoder", own).code == 0
    found = CacheStore.open(cache).component(path)
    assert found is not None
    assert found.precision == "fp32"


def test_a_dry_run_says_what_it_knows_of_the_device(
    images: Path, tmp_path: Path, build: Callable[..., Any], own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def precision(*options: str) -> str:
        outcome = build(images, tmp_path / "cache", "--encoder", own, "--dry-run", *options)
        (said,) = re.findall(
            r"features/net-grid4: 2 of 2 ranges to encode, (.*?)\n  patch_tokens", outcome.out, re.DOTALL
        )
        return " ".join(said.split())  # the lines are folded

    assert precision() == precision("--device", "cpu") == "fp32"
    cluster = ("--workers", "2", "--address", "10.0.0.1:6379")
    assert precision(*cluster) == "tf32 if the cluster has a GPU, else fp32"
    assert precision(*cluster, "--device", "cuda") == "tf32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert precision() == "tf32"


def test_tf32_is_no_precision_of_a_cpu(images: Path, tmp_path: Path, build: Callable[..., Any]) -> None:
    for more in ([], ["--dry-run"]):
        outcome = build(images, tmp_path / "cache", "--precision", "tf32", "--device", "cpu", *more)
        assert (outcome.code, "precision is tf32, which CPUs lack" in outcome.err) == (2, True), outcome
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("lost", [(), ("valid/c.0",)])
def test_a_lost_record_is_written_anew_in_the_precision_of_its_shards(
    images: Path,
    tmp_path: Path,
    build: Callable[..., Any],
    tree: Callable[[Path], dict[str, bytes]],
    own: str,
    lost: tuple[str, ...],
) -> None:
    cache = tmp_path / "cache"
    assert build(images, cache, "--encoder", own, "--encoder", f"{own}:pca=2", "--precision", "bf16").code == 0
    whole = tree(cache)
    for path in ("net-grid4", "net-grid4-pca2"):
        for name in ("zarr.json", *lost):
            (cache / "features" / path / name).unlink()
    kept = sorted((cache / "features").glob("net*/patch_tokens/c.1.*"))
    inodes = [file.stat().st_ino for file in kept]
    assert len(kept) == 2
    outcome = build(images, cache, "--encoder", own, "--encoder", f"{own}:pca=2")
    assert outcome.code == 0, outcome.err
    assert tree(cache) == whole
    assert [file.stat().st_ino for file in kept] == inodes  # not encoded again


def test_latents_of_which_nothing_is_encoded_have_no_precision_yet(
    images: Path, tmp_path: Path, build: Callable[..., Any], repa_cache: Callable[..., Any]
) -> None:
    cache = tmp_path / "cache"
    good = {file: file.read_bytes() for file in images.rglob("*.png")}
    for file in good:
        file.write_text("not a picture")
    assert build(images, cache, "--precision", "bf16").code == 1
    for file, data in good.items():
        file.write_bytes(data)
    (cache / "latents/pixels/valid/zarr.json.partial").touch()  # as a kill leaves it
    go_on = ("build", "--data", images, "--cache", cache, "--workers", 0)
    tf32 = repa_cache(*go_on, "--precision", "tf32", "--device", "cpu")
    assert (tf32.code, "latents/pixels: its precision is tf32" in tf32.err) == (2, True), tf32
    assert repa_cache(*go_on).code == 0
    found = CacheStore.open(cache).component("latents/pixels")
    assert found is not None
    assert found.precision == "fp32"
    assert "--precision fp32" in found.build_command(cache)  # which a GPU would not choose
