"""The estimate: bytes are those of a build, GMAC those of the published models, and a budget is filled in order."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from repa.cache_specs.errors import UsageError
from repa.cache_specs.schema import component_arrays
from repa.cache_specs.tables import resolve_autoencoder, resolve_encoder
from repa.pipeline.checking import bounds, throughput
from repa.pipeline.checking.bounds import Machine, bound_line
from repa.pipeline.checking.estimate import (
    SIT_SIZES,
    ModelCost,
    array_bytes,
    choose_dtypes,
    component_bytes,
    model_costs,
    planned_layout,
    sit_gmac,
    speedup,
)
from repa.pipeline.store.shards import ShardWriter
from repa.pipeline.store.store import CacheStore
from repa.trainer.models.sit import sit_config


@pytest.mark.parametrize("dtype", ["float16", "int8", "uint8"])
def test_bytes_are_those_of_the_files_of_a_build(
    tmp_path: Path, make_images: Callable[..., Any], build: Callable[..., Any], dtype: str
) -> None:
    make_images(tmp_path / "images", num=7)
    done = build(tmp_path / "images", tmp_path / "c", "--dtype", dtype)
    assert done.code == 0, done.err
    store = CacheStore.open(tmp_path / "c")
    for path in store.components():
        component = store.component(path)
        assert component is not None
        expected = 0
        for array in component.arrays(store.layout):
            files = sum(file.stat().st_size for file in (tmp_path / "c" / path / array.name).glob("c.*"))
            assert array_bytes(array) == files, array.name
            expected += files
        expected += sum(file.stat().st_size for file in (tmp_path / "c" / path / "shard_checksums").glob("c.*"))
        resolve = resolve_encoder if component.kind == "features" else resolve_autoencoder
        request = "hog:grid=4" if component.kind == "features" else "pixels"
        found = component_bytes(component.kind, resolve(request, resolution=16), store.layout)
        assert found[component.dtype] == expected


def test_sizes_of_sit_are_the_trainers_and_gmac_the_published() -> None:
    for size, (depth, width) in SIT_SIZES.items():
        config = sit_config(f"SiT-{size}/2", input_size=32, in_channels=4, num_classes=1000)
        assert (config.depth, config.hidden_size) == (depth, width)
    found = [sit_gmac(f"SiT-{size}/2", latent_size=32) for size in ("B", "L", "XL")]
    assert found == pytest.approx([22.95, 80.53, 118.38], abs=0.01)
    assert sit_gmac("SiT-B/4", latent_size=32) < sit_gmac("SiT-B/2", latent_size=32) / 4
    # With one ViT-B, and the SD VAE's encoder beside it
    assert speedup(found[0], [23.16]) == pytest.approx(1.34, abs=0.005)
    assert speedup(found[0], [23.16, 136.36]) == pytest.approx(3.32, abs=0.005)


@pytest.mark.parametrize("name", ["SiT-Q/2", "DiT-B/2", "SiT-B", "SiT-B/0", "SiT-B/3"])
def test_a_model_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="SiT-B"):
        sit_gmac(name, latent_size=32)


def cost(name: str, float16: int, int8: int) -> ModelCost:
    sizes = {"float16": float16, "int8": int8}
    return ModelCost(kind="features", name=name, num_bytes=sizes, gmac=1.0, images_per_s=None, measured=False)


def test_a_budget_takes_what_fits_in_the_order_asked() -> None:
    models = [cost("a", 100, 50), cost("b", 200, 100), cost("c", 40, 20)]
    assert choose_dtypes(models, 340) == {"a": "float16", "b": "float16", "c": "float16"}
    assert choose_dtypes(models, 339) == {"a": "float16", "b": "float16", "c": "int8"}
    assert choose_dtypes(models, 240) == {"a": "float16", "b": "int8", "c": "float16"}
    assert choose_dtypes(models, 239) == {"a": "float16", "b": "int8", "c": "int8"}
    assert choose_dtypes(models, 170) == {"a": "int8", "b": "int8", "c": "int8"}
    assert choose_dtypes(models, 149) == {"a": "float16", "b": None, "c": "float16"}
    assert choose_dtypes(models, 10) == {"a": None, "b": None, "c": None}


def test_a_model_that_was_not_measured_is_scaled_from_its_kind() -> None:
    names = ("dinov2-vit-s", "dinov2-vit-b", "dinov2-vit-g")
    models = [("features", resolve_encoder(name, resolution=256)) for name in names]
    models.insert(0, ("latents", resolve_autoencoder("sd-vae-ft-mse", resolution=256)))
    layout = planned_layout(num_images=1000, resolution=256, flip=True)
    costs = model_costs(models, layout, {"dinov2-vit-s": 100.0, "dinov2-vit-b": 30.0})
    assert [cost.measured for cost in costs] == [False, True, True, False]
    assert costs[0].images_per_s is None
    assert costs[3].images_per_s == pytest.approx(30 * 23.16 / 299.39)
    assert costs[2].hours(36 * 3000) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("decode", "write", "rates", "said"),
    [
        (100.0, 1e9, (50.0, 10.0), "models: 4.17 images/s, 0.1 hours (decoding 300,"),
        (1.0, 1e9, (50.0, 10.0), "decoding: 3 images/s, 0.1 hours (models 4.17,"),
        (100.0, 1e4, (50.0, 10.0), "writing: 2.5 images/s, 0.1 hours (models 4.17,"),
        (100.0, 1e6, (50.0, None), "writing: 250 images/s, 0.0 hours (decoding 300"),
    ],
)
def test_a_build_is_bound_by_the_slowest_of_three(
    decode: float, write: float, rates: tuple[float | None, ...], said: str
) -> None:
    layout = planned_layout(num_images=1000, resolution=256, flip=True)
    costs = [replace(cost("a", 4_000_000, 1), images_per_s=rates[0])]
    costs.append(replace(cost("b", 1_000_000, 1), images_per_s=rates[1]))
    line = bound_line(bounds.bounds(costs, layout, Machine(cores=3, decode=decode, write=write)), 1000)
    assert line.startswith(f"a build here is bound by {said}"), line


def test_what_a_machine_decodes_and_writes_is_measured_with_the_builds_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "PROBE_SECONDS", 0.01)
    written: list[int] = []
    append = ShardWriter.append
    monkeypatch.setattr(ShardWriter, "append", lambda self, rows: (written.append(rows.nbytes), append(self, rows)))
    model = resolve_encoder("hog:grid=4", resolution=32)
    for num_images in (1, 1000):
        layout = planned_layout(num_images=num_images, resolution=32, flip=True)
        for array in component_arrays("features", model.spec, "float16", layout):
            if array.dtype.startswith("float"):
                assert bounds.write_rate(array, tmp_path) > 0
    assert 0 < sum(written) < 2**27
    assert list(tmp_path.iterdir()) == []
    assert bounds.decode_rate(32) > 0


def test_the_command_measures_and_says_all_of_it(
    repa_cache: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "PROBE_SECONDS", 0.01)
    arguments = ["estimate", "--encoder", "hog:grid=4", "--autoencoder", "pixels", "--resolution", "32"]
    done = repa_cache(*arguments, "--images", 1000, "--model", "SiT-S/2", "--budget", "40MB", "--device", "cpu")
    assert done.code == 0, done.err
    assert "features/hog-grid4" in done.out
    assert "40.0 MB holds latents, hog-grid4 float16" in done.out
    assert "SiT-S/2" in done.out
    assert "scaled" not in done.out
    assert "a build here is bound by" in done.out
    done = repa_cache("estimate", "--encoder", "dinov2", "--images", 1281167, "--no-probe", "--model", "SiT-B/2")
    assert "514.0 GB" in done.out
    assert "1.34 times as fast as with the encoders online\n  3.32 times as fast as with the autoencoder" in done.out
    assert repa_cache("estimate", "--autoencoder", "none", "--images", 5).code == 2
    assert repa_cache("estimate", "--encoder", "dinov2", "--images", 0, "--no-probe").code == 2
