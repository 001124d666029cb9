"""Photographs -> cache -> training -> samples, and what only the whole can show.

One cache and one aligned run of a tiny SiT in pixel space, as `make demo` has them but smaller, serve every test here.
"""

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from repa.cache_specs.tables import resolve_encoder
from repa.kernels import cosine_alignment, reference
from repa.pipeline.building.build import run_build
from repa.pipeline.building.plan import BuildOptions
from repa.pipeline.checking.info import cache_record, info_lines
from repa.pipeline.checking.recompute import recompute
from repa.pipeline.checking.verify import verify
from repa.pipeline.images import demo_data
from repa.pipeline.images.decode import decode
from repa.pipeline.models.encoders import load_encoder
from repa.trainer import CacheReader, SiT, load_model
from repa.trainer.commands.features import features_command
from repa.trainer.commands.sample import sample_command
from repa.trainer.commands.train import train_command
from repa.trainer.diffusion.interpolant import Interpolant

CROPS = 48  # a photograph
RESOLUTION, GRID = 32, 4
NUM_CLASSES = len(demo_data.PHOTOGRAPHS)
GAMMA = 0.6
STEPS = 260
TRAIN = ["--model", "SiT-Ti/8", "--batch-size", "32", "--device", "cpu", "--set", "optimizer.learning_rate=2e-3"]
TRAIN += ["--set", "ema_decay=0.97", "--set", "latent_norm=channel"]


@dataclass(frozen=True, kw_only=True)
class House:
    """A cache of the demo's photographs and a run trained from it."""

    cache: Path
    run: Path
    manifest: demo_data.Manifest


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small ops on two threads wait for each other where the machine is busy, and take 40 times longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def house(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("house")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_data, "CROPS_PER_PHOTOGRAPH", CROPS)
        manifest = demo_data.demo_manifest()
    options = BuildOptions(
        manifest=manifest,
        cache=folder / "cache",
        encoders=(f"hog:grid={GRID}",),
        autoencoder="pixels",
        resolution=RESOLUTION,
        flip=True,
        shard_samples=64,
        workers=0,
        threads=1,
    )
    report = run_build(options, on_start=lambda done, total: None, on_progress=lambda samples: None)
    assert report.bad == {}
    assert len(report.completed) == 2
    assert verify(options.cache, on_progress=lambda done, total: None).problems == []
    train(options.cache, folder / "run", STEPS, "--recipe", "irepa")
    return House(cache=options.cache, run=folder / "run", manifest=manifest)


def train(cache: Path, out: Path, steps: int, *arguments: str) -> list[dict[str, float]]:
    """Run repa-train in this process; return its metrics, one record a step."""
    common = ["--cache", str(cache), "--out", str(out), "--steps", str(steps), *TRAIN, *arguments]
    train_command.main(common, standalone_mode=False)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    return records


def test_a_resumed_run_is_the_uninterrupted_one_and_recipes_share_all_but_the_alignment(house: House, tmp_path: Path):
    whole = train(house.cache, tmp_path / "whole", 12, "--recipe", "irepa")
    train(house.cache, tmp_path / "parts", 5, "--recipe", "irepa")
    parts = train(house.cache, tmp_path / "parts", 12, "--recipe", "irepa", "--resume", "auto")
    names = ("denoising_loss", "alignment_loss", "grad_norm")
    assert [[record[name] for name in names] for record in parts] == [[r[name] for name in names] for r in whole]

    plain = train(house.cache, tmp_path / "plain", 1, "--recipe", "sit")
    assert plain[0]["denoising_loss"] == whole[0]["denoising_loss"]  # same weights, order, noise and latent_norm


@dataclass(kw_only=True)
class Losses:
    """Per-image losses [B]."""

    denoising: Tensor
    alignment: Tensor


@torch.no_grad()
def losses_of(model: SiT, latents: Tensor, z: Tensor, tokens: Tensor, labels: Tensor, **statistics: Tensor) -> Losses:
    """Return the losses of a batch with one fixed noise and time, its tokens held against the projections z."""
    generator = torch.Generator().manual_seed(0)
    noise, t = torch.randn(latents.shape, generator=generator), torch.rand(len(latents), generator=generator)
    x_t, velocity = Interpolant().x_t_and_velocity(latents, noise, t)
    denoising = (model(x_t, t, labels) - velocity).square().mean(dim=(1, 2, 3))
    alignment = [
        cosine_alignment(
            z[i : i + 1],
            tokens[i : i + 1],
            gamma=GAMMA,
            **{name: value[i : i + 1] for name, value in statistics.items()},
        )
        for i in range(len(z))
    ]
    return Losses(denoising=denoising, alignment=torch.stack(alignment))


def test_training_from_the_cache_is_training_online(house: House):
    """Both losses from cached rows equal those of freshly decoded and encoded images; other rows are far off.

    z is what a projector well on its way gives, the online target and as much noise again: a run this short aligns
    with what all images share, and would not tell one from another.
    """
    reader = CacheReader(house.cache)
    rows = np.random.default_rng(0).permutation(reader.num_samples)[:48]
    flipped = np.arange(len(rows)) % 2
    latents = json.loads((house.run / "config.json").read_text())["resolved"]["latents"]
    scale, bias = (torch.tensor(latents[name]).view(-1, 1, 1) for name in ("scale", "bias"))
    model = load_model(house.run)

    def cached(indices: np.ndarray, views: np.ndarray) -> Losses:
        batch = reader.rows(indices, views)
        features = batch.features[0]
        x = (batch.moments.float() - bias) * scale
        return losses_of(
            model,
            x,
            z,
            features.tokens,
            labels,
            channel_mean=features.channel_mean,
            channel_std=features.channel_std,
        )

    labels = torch.from_numpy(house.manifest.labels[rows]).long()
    ids = house.manifest.sample_ids[rows].tolist()
    images = torch.stack(
        [torch.tensor(decode(house.manifest.source.read(name), RESOLUTION)).permute(2, 0, 1) for name in ids]
    )
    images = torch.where(torch.from_numpy(flipped == 1).view(-1, 1, 1, 1), images.flip(-1), images)
    tokens, _ = load_encoder(resolve_encoder(f"hog:grid={GRID}", resolution=RESOLUTION).spec)(images)
    tokens = tokens.clone()
    target = reference.target_features(tokens, gamma=GAMMA)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    z = target + noise * target.square().mean(dim=2, keepdim=True).sqrt()
    online = losses_of(model, (images.float() / 127.5 - 1 - bias) * scale, z, tokens, labels)

    def errors(found: Losses) -> tuple[float, float]:
        relative = (found.denoising - online.denoising).abs() / online.denoising
        return relative.mean().item(), (found.alignment - online.alignment).abs().mean().item()

    denoising_error, alignment_error = errors(cached(rows, flipped))
    assert denoising_error < 1e-3
    assert alignment_error < 1e-3
    for other in (cached((rows + 1) % reader.num_samples, flipped), cached(rows, 1 - flipped)):
        denoising_error, alignment_error = errors(other)
        assert denoising_error > 1e-2
        assert alignment_error > 1e-2


def described(pictures: np.ndarray) -> np.ndarray:
    """Return mean colour and gradient energy of pictures [B,H,W,3] uint8, [B,4]."""
    pixels = pictures.astype(np.float64) / 255
    grey = pixels.mean(axis=3)
    energy = np.abs(np.diff(grey, axis=1)).mean(axis=(1, 2)) + np.abs(np.diff(grey, axis=2)).mean(axis=(1, 2))
    return np.concatenate([pixels.mean(axis=(1, 2)), np.log(energy[:, None] + 1e-3) / 4], axis=1)


@pytest.fixture
def share_recognised(house: House) -> Callable[[np.ndarray, np.ndarray], float]:
    """Return the share of pictures whose nearest class mean, among the real crops, is that of their own label."""
    reader = CacheReader(house.cache, encoder=())
    moments = reader.rows(np.arange(reader.num_samples)).moments.float().permute(0, 2, 3, 1)
    real = described(((moments + 1) * 127.5).round().to(torch.uint8).numpy())
    means = np.stack([real[reader.labels == label].mean(axis=0) for label in range(NUM_CLASSES)])

    def share(pictures: np.ndarray, labels: np.ndarray) -> float:
        distances = np.linalg.norm(described(pictures)[:, None] - means, axis=2)
        return float((distances.argmin(axis=1) == labels).mean())

    return share


def test_samples_are_more_than_noise(house: House, tmp_path: Path, share_recognised: Callable[..., float]):
    """At least three times as many samples as by chance look like their own class; an untrained model's do not."""
    num = 8 * NUM_CLASSES
    labels = np.arange(num) % NUM_CLASSES

    def sampled(run: Path) -> np.ndarray:
        out = tmp_path / f"{run.name}.npz"
        arguments = [str(run), "--num", str(num), "--labels", "balanced", "--steps", "20", "--cfg-scale", "1.5"]
        sample_command.main([*arguments, "--out", str(out), "--device", "cpu"], standalone_mode=False)
        pictures = np.load(out)["arr_0"]
        assert pictures.shape == (num, RESOLUTION, RESOLUTION, 3)
        assert pictures.dtype == np.uint8
        return pictures

    train(house.cache, tmp_path / "untrained", 1, "--recipe", "irepa", "--set", "optimizer.learning_rate=1e-12")
    trained, untrained = (share_recognised(sampled(run), labels) for run in (house.run, tmp_path / "untrained"))
    print(f"recognised: trained {trained:.2f}, untrained {untrained:.2f}, chance {1 / NUM_CLASSES:.2f}")
    assert trained >= 3 / NUM_CLASSES
    assert untrained < 3 / NUM_CLASSES


def test_the_runs_own_tokens_are_a_component_that_is_verified(house: House, tmp_path: Path):
    cache = Path(shutil.copytree(house.cache, tmp_path / "cache"))
    features_command.main([str(house.run), "--cache", str(cache), "--layer", "3", "--t", "0.2"], standalone_mode=False)
    path = f"features/run-s{STEPS}-b3-t0.2"
    assert verify(cache, on_progress=lambda done, total: None).problems == []
    agreements = {one.path: one for one in recompute(cache, house.manifest.source, num=4, weights={})}
    assert [one.path for one in agreements.values() if one.left_out] == [path]
    assert "only repa-features RUN --cache CACHE --verify derives again" in (agreements[path].left_out or "")
    lines = list(info_lines(cache_record(cache)))
    assert "  tokens after block 3 at t 0.2, null label, of latents/pixels" in lines

    shutil.rmtree(cache / path / "valid")
    lines = list(info_lines(cache_record(cache)))
    command = f"repa-features RUN --cache {cache} --layer 3 --t 0.2 --name run-s{STEPS}-b3-t0.2"
    assert lines[lines.index("  finish it:") + 1] == f"    {command}"
    words = shlex.split(command)[2:]
    features_command.main([str(house.run), *words], standalone_mode=False)
    assert verify(cache, on_progress=lambda done, total: None).problems == []
