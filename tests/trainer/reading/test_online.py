"""Encoders computed at each step: a cached run up to what storing rounds, resumed exactly, refused in a line."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from repa.cache_specs.tables import resolve_encoder
from repa.pipeline.images.decode import decode
from repa.pipeline.models.encoders import load_encoder
from repa.trainer.commands.borrowed import load_online
from repa.trainer.distributed import World
from repa.trainer.reading.prefetch import ReadAhead
from repa.trainer.runs.run import prepare
from repa.trainer.runs.settings import Layer, recipe_layer, resolve

CPU = torch.device("cpu")
NUM = 20


@dataclass(frozen=True, kw_only=True)
class Built:
    """A cache of HOG tokens, float16 and int8, in two views, and the images behind it; one of them is bad."""

    cache: Path
    images: Path


@pytest.fixture(scope="module")
def built(make_images, tmp_path_factory) -> Built:
    from click.testing import CliRunner

    from repa.pipeline.commands.cache import cli

    folder = tmp_path_factory.mktemp("online")
    files = make_images(folder / "images", num=NUM)
    files[7].write_bytes(b"no image")
    common = ["build", "--data", folder / "images", "--cache", folder / "cache", "--workers", "0", "--skip-bad"]
    common += ["--encoder", "hog:grid=4", "--resolution", "16", "--flip"]
    for more in (["--autoencoder", "pixels"], ["--dtype", "int8"]):
        done = CliRunner().invoke(cli, [str(word) for word in [*common, *more]], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    return Built(cache=folder / "cache", images=folder / "images")


@pytest.fixture
def train(built, repa_train, tmp_path):
    """Return a function that trains from the cache, or with `--online`: (name, *arguments) -> Outcome."""

    def run(name: str, *arguments: str, steps: int = 6):
        model = ("--model", "SiT-Ti/4", "--set", "latent_norm=channel", "--steps", str(steps))
        return repa_train(built.cache, tmp_path / name, *model, *arguments)

    return run


def online(built: Built, name: str = "hog:grid=4") -> tuple[str, ...]:
    return ("--online", name, "--data", str(built.images))


def test_the_only_difference_to_a_cached_run_is_what_storing_rounds(built, train):
    """The first step's denoising loss is equal to the bit: same weights, samples, views, noise, times, labels."""
    half, byte = (train(name, "--encoder", name) for name in ("hog-grid4", "hog-grid4-int8"))
    computed = train("computed", *online(built))
    assert computed.code == 0, computed.error
    assert "computed at every step" in computed.output
    assert "comparison" in computed.output
    first = computed.records[0]
    for cached, nearness in ((half, 1e-4), (byte, 1e-2)):
        assert cached.records[0]["denoising_loss"] == first["denoising_loss"]
        assert cached.records[0]["alignment_loss"] != first["alignment_loss"]
        for ours, theirs in zip(computed.losses(), cached.losses(), strict=True):
            assert theirs == pytest.approx(ours, rel=nearness, abs=nearness)  # an untrained cosine is near 0
    other = train("other", *online(built), "--set", "seed=1")
    assert other.records[0]["denoising_loss"] != first["denoising_loss"]


def test_tokens_are_the_encoders_own_of_the_images_as_decoded(built, tmp_path):
    """Rows, views and tokens of a batch, made again here from the files."""
    values = {"cache": str(built.cache), "out": str(tmp_path / "run"), "model": "SiT-Ti/4", "batch_size": 8}
    values |= {"encoders": ["hog:grid=4"], "online.data": str(built.images), "latent_norm": "channel"}
    config = resolve([recipe_layer("irepa", "SiT-Ti/4"), Layer(source="test", values=values)])
    run = prepare(config, World(rank=0, size=1, device=CPU), online=load_online)
    assert 7 not in run.reader.valid_rows
    assert len(run.reader.valid_rows) == NUM - 1
    with ReadAhead(run.batches, first=0, last=3, depth=1, device=CPU) as ahead:
        batch = ahead.next()
    ids = sorted(file.relative_to(built.images).as_posix() for file in built.images.rglob("*.png"))
    rows, views = batch.data.rows.tolist(), batch.draws["views"].tolist()
    assert set(views) == {0, 1}
    pictures = np.stack(
        [
            decode((built.images / ids[row]).read_bytes(), 16)[:, :: -1 if view else 1]
            for row, view in zip(rows, views, strict=True)
        ]
    )
    tokens, _ = load_encoder(resolve_encoder("hog:grid=4", resolution=16).spec)(
        torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
    )
    (features,) = batch.data.features
    torch.testing.assert_close(features.tokens, tokens.clone(), rtol=0, atol=0)
    torch.testing.assert_close(features.channel_mean, tokens.clone().mean(1))
    torch.testing.assert_close(features.channel_std, tokens.clone().std(1))
    assert not features.tokens.is_inference()
    torch.testing.assert_close(batch.data.moments.float(), torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1,
                               rtol=0, atol=1e-3)  # fmt: skip


def test_a_resume_goes_on_exactly_and_never_from_the_cache_instead(built, train):
    stop = ("--set", "alignment.stop_step=5")
    whole = train("whole", *online(built), *stop)
    assert [("alignment_loss" in record) for record in whole.records] == [True] * 5 + [False]
    assert train("parts", *online(built), *stop, steps=3).code == 0
    moved = built.images.rename(built.images.with_name("moved"))
    try:
        assert "class 0/" in train("parts", "--resume", "auto").error  # where the images were
        parts = train("parts", "--resume", "auto", "--data", str(moved))
    finally:
        moved.rename(built.images)
    assert parts.code == 0, parts.error
    assert parts.losses() == whole.losses()
    cached = train("parts", "--resume", "auto", "--set", "online.data=null", "--encoder", "hog-grid4", steps=9)
    assert cached.code == 2
    assert "encoders: stored ['hog:grid=4'], asked ['hog-grid4']" in cached.error


def test_another_image_under_the_name_is_refused(built, train):
    file = next(iter(sorted(built.images.rglob("*.png"))))
    before = file.read_bytes()
    try:
        file.write_bytes(before + b"\0")
        refused = train("changed", *online(built))
    finally:
        file.write_bytes(before)
    assert refused.code == 1
    assert f"{len(before) + 1} bytes now, and had {len(before)}" in refused.error
    assert refused.error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--online", "hog:grid=4"), "name their folder with --data"),
        (("--data", "images"), "add --online NAME"),
        (("--online", "hog:grid=4", "--data", "images", "--encoder", "hog-grid4"), "with one of the two"),
        (("--online", "hogg", "--data", "images"), "unknown encoder 'hogg'"),
        (("--online", "hog:grid=4", "--data", "nowhere"), "--data nowhere: class 0/000.png: cannot be read"),
        (("--online", "hog:grid=4", "--data", "images", "--stage", "here"), "leave one of them out"),
        (("--online", "hog:grid=4", "--data", "images", "--recipe", "sit"), "recipe sit reads no encoder"),
        (("--online", "hog:grid=4", "--data", "images", "--set", "online.weights=[x]"), "expected NAME=FILE"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_a_line(train, arguments, message):
    refused = train("refused", *arguments)
    assert refused.code in (1, 2)
    assert message in refused.error
    assert refused.error.count("\n") == 1
