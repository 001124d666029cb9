"""The timing of the step in small: that all three sources feed the same step, and what its line says."""

import argparse
import json
from pathlib import Path

import pytest
import step
import torch
from synthetic_cache import make_cache

from repa.cache_specs.tables import ResolvedModel, resolve_encoder
from repa.trainer.reading.prefetch import map_tensors

MODEL, ENCODER = "SiT-Ti/2", "dinov2-vit-s"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("step") / "cache", num_samples=8, grid=16, width=384, cls_token=True)


@pytest.fixture(scope="module")
def encoder() -> ResolvedModel:
    return resolve_encoder(ENCODER, resolution=step.RESOLUTION, random_weights=True)


@pytest.fixture(scope="module")
def options() -> argparse.Namespace:
    return step.parse(["--batch-size", "2", "--rounds", "3", "--online-rounds", "1", "--device", "cpu"])


def test_a_step_on_tensors_in_memory_is_the_step_from_the_cache(cache: Path, options: argparse.Namespace) -> None:
    steps, same = (step.Steps(MODEL, cache, options) for _ in range(2))
    in_memory = steps.in_memory()
    with same.read_ahead() as ahead:
        for _ in range(2):
            steps.take(in_memory, 1)
            same.take(ahead, 1)
            assert torch.equal(steps.losses, same.losses)
    assert same.losses.isfinite().all()


@pytest.mark.parametrize("recipe", ["irepa", "reg"])
def test_the_encoder_online_gives_what_a_cache_holds(
    cache: Path, encoder: ResolvedModel, options: argparse.Namespace, recipe: str
) -> None:
    steps = step.Steps(MODEL, cache, argparse.Namespace(**vars(options) | {"recipe": recipe}))
    in_memory = steps.in_memory()
    online = step.Online(in_memory, encoder, steps.run, images=2)
    batch = online.next()
    with steps.read_ahead() as ahead:
        cached = map_tensors(ahead.next(), torch.clone)
    assert torch.equal(batch.data.moments, cached.data.moments)
    (features,), (expected,) = batch.data.features, cached.data.features
    assert features.tensors().keys() == expected.tensors().keys()
    assert ("cls_token" in features.tensors()) == (recipe == "reg")
    for name, tensor in features.tensors().items():
        other = expected.tensors()[name]
        assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype), name
    tokens = features.tokens.double()
    assert torch.allclose(features.channel_mean.double(), tokens.mean(1), atol=1e-3)
    assert torch.allclose(features.channel_std.double(), tokens.std(1, unbiased=True), atol=1e-3)
    assert not torch.equal(tokens[0], tokens[1])
    steps.take(online, 1)
    assert steps.losses.isfinite().all()


def test_a_line_in_small(cache: Path, encoder: ResolvedModel, options: argparse.Namespace) -> None:
    line = json.loads(json.dumps(step.measure(MODEL, encoder, cache, options)))
    assert line["rounds"] == {"cached": 3, "in_memory": 3, "online": 1}
    assert line["steps_per_s"].keys() == {"cached", "in_memory", "online"}
    for estimate in (line["lost_to_data"], line["speedup"]):
        assert estimate["low"] <= estimate["median"] <= estimate["high"]
    assert line["holds"] == (line["lost_to_data"]["median"] <= 0.03)
    assert line["data_wait"] >= 0
    # 1 + GMAC of a ViT-S over 3 x GMAC of SiT-Ti/2, 6 blocks of width 128 on 256 tokens, and of a 3 x 3 convolution
    trained = 6 * (12 * 128**2 * 256 + 2 * 256**2 * 128) * 1e-9 + 256 * (9 * 128 + 1) * 384 * 1e-9
    assert line["predicted_speedup"] == pytest.approx(1 + encoder.entry.gmac / (3 * trained), abs=1e-3)
    line["peak_memory"] = {name: {"host_bytes": 2**30, "device_bytes": None} for name in ("cached", "online")}
    assert f"{MODEL}, {ENCODER}, batches of 2 on cpu" in step.text(line)


@pytest.mark.parametrize("source", ["cached", "online"])
def test_peak_memory_is_of_this_process(
    source: str, cache: Path, encoder: ResolvedModel, options: argparse.Namespace
) -> None:
    found = step.peak_memory(source, MODEL, encoder, argparse.Namespace(**{**vars(options), "cache": cache}))
    assert found["device_bytes"] is None
    assert 100 * 2**20 < found["host_bytes"] < 16 * 2**30
