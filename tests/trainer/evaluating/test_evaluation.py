"""Evaluation in a run: real and generated pictures encoded alike, each step once, nothing in the run changed."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import zarr
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from repa.cache_specs.errors import UsageError
from repa.trainer.evaluating import evaluation
from repa.trainer.evaluating.evaluation import pictures_of, write_record
from repa.trainer.evaluating.frechet import frechet_distance
from repa.trainer.evaluating.reference import Reference
from repa.trainer.models import jit
from repa.trainer.models.checkpoint import load_checkpoint
from repa.trainer.sampling import sample_file

FIGURES = ("frechet_hog-grid4_mean", "precision_hog-grid4_mean", "recall_hog-grid4_mean")
EVALUATE = ("evaluation.every=3", "evaluation.num=130", "evaluation.steps=2", "evaluation.batch_size=50")


def build(folder: Path, *options: str, num: int, seed: int) -> Path:
    """Return a cache of `num` small pictures with HOG tokens (E = 128), built by repa-cache."""
    from click.testing import CliRunner
    from PIL import Image

    from repa.pipeline.commands.cache import cli

    rng = np.random.default_rng(seed)
    for i in range(num):
        file = folder / "images" / f"class {i % 2}" / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    command = ["build", "--data", str(folder / "images"), "--cache", str(folder / "cache"), "--workers", "0"]
    command += ["--encoder", "hog:grid=4", "--resolution", "16", *options]
    assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
    return folder / "cache"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The cache that runs train on, of 140 pictures in pixel space."""
    return build(tmp_path_factory.mktemp("demo"), "--autoencoder", "pixels", num=140, seed=0)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    """A cache of 131 other pictures, two encoders' tokens and no latents."""
    folder = tmp_path_factory.mktemp("held_out")
    return build(folder, "--autoencoder", "none", "--encoder", "hog:grid=2", num=131, seed=1)


def settings(*assignments: str) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


def train(repa_train, cache: Path, out: Path, *assignments: str, steps: int = 6, more: tuple[str, ...] = ()):
    model = ("--model", "SiT-Ti/4", "--steps", str(steps))
    return repa_train(cache, out, *model, *settings("seed=3", *assignments), *more)


def evaluations(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]


def test_a_run_is_the_same_with_and_without_evaluation(demo, repa_train, tmp_path):
    plain = train(repa_train, demo, tmp_path / "plain")
    evaluated = train(repa_train, demo, tmp_path / "evaluated", *EVALUATE)
    assert evaluated.code == 0, evaluated.error
    assert plain.losses() == evaluated.losses()
    stored = [load_checkpoint(tmp_path / name / "checkpoints" / "0000006.pt") for name in ("plain", "evaluated")]
    for state in ("model", "ema"):
        for name, tensor in stored[0][state].items():
            assert tensor.equal(stored[1][state][name]), name

    records = evaluations(tmp_path / "evaluated")
    assert [record["step"] for record in records] == [3, 6]
    assert all(set(record) == {"step", "num", *FIGURES} for record in records)
    (line,) = [line for line in evaluated.output.splitlines() if line.startswith("evaluation at step 6")]
    assert "fid" not in line.lower()
    assert "no FID and no Inception score: Inception's weights are not at hand" in evaluated.output
    assert "fid" not in (tmp_path / "evaluated" / "evaluation.jsonl").read_text().lower()
    assert not (tmp_path / "plain" / "evaluation.jsonl").exists()
    board = EventAccumulator(str(tmp_path / "evaluated" / "tensorboard")).Reload()
    for name in FIGURES:
        shown = [(event.step, event.value) for event in board.Scalars(f"evaluation/{name}")]
        assert shown == [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in records]


def test_the_figures_are_those_of_the_npz_and_the_cache(demo, repa_train, tmp_path):
    outcome = train(repa_train, demo, tmp_path / "run", *EVALUATE, steps=3)
    assert outcome.code == 0, outcome.error
    (npz,) = (tmp_path / "run" / "evaluation").glob("*.npz")
    images = np.load(npz)["arr_0"]
    assert images.dtype == np.uint8
    assert images.shape == (130, 16, 16, 3)
    np.testing.assert_array_equal(np.concatenate(list(pictures_of(npz, 37))), images)

    # repa-cache itself encodes the generated pictures: the same encoder, precision and storage as the real ones.
    from click.testing import CliRunner
    from PIL import Image

    from repa.pipeline.commands.cache import cli

    for i, image in enumerate(images):
        (tmp_path / "generated").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "generated" / f"{i:03d}.png")
    options = ["--encoder", "hog:grid=4", "--autoencoder", "none", "--resolution", "16", "--workers", "0"]
    command = ["build", "--data", str(tmp_path / "generated"), "--cache", str(tmp_path / "cache"), *options]
    assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
    real, generated = (
        zarr.open_array(cache / "features" / "hog-grid4" / "channel_mean", mode="r")[:, 0]
        for cache in (demo, tmp_path / "cache")
    )
    (record,) = evaluations(tmp_path / "run")
    assert record["frechet_hog-grid4_mean"] == pytest.approx(frechet_distance(real, generated), rel=1e-6)
    assert record["num"] == 130


@pytest.mark.parametrize(
    ("recipe", "model", "sampler"),
    [("sra", "SiT-Ti/4", "euler2"), ("meanflow-irepa", "SiT-Ti/4", "euler1"), ("jit-irepa", "JiT-Ti/4", "heun2")],
)
def test_methods_are_judged_and_drawn_by_their_own_sampler(
    demo, repa_train, tmp_path, monkeypatch, recipe, model, sampler
):
    monkeypatch.setitem(jit.SIZES, "Ti", (2, 32, 2, 8, 1, 0.0))
    steps = sampler[-1]
    extra = ("evaluation.every=2", "evaluation.num=130", "grid.every=2", "grid.num=3")
    extra += (f"evaluation.steps={steps}", f"grid.steps={steps}")
    learn = settings("optimizer.learning_rate=1e-2", "optimizer.warmup_steps=0", "ema_decay=0")  # a fresh JiT is grey
    learn += settings("sra.teacher_depth=2") if recipe == "sra" else []
    common = ("--recipe", recipe, "--model", model, *learn)
    plain = train(repa_train, demo, tmp_path / "plain", steps=2, more=common)
    judged = train(repa_train, demo, tmp_path / "judged", *extra, steps=2, more=common)
    assert judged.code == 0, judged.error
    assert judged.losses() == plain.losses()
    (record,) = evaluations(tmp_path / "judged")
    assert all(np.isfinite(record[name]) for name in FIGURES)
    (npz,) = (tmp_path / "judged/evaluation").glob("*.npz")
    assert f"-{sampler}-" in npz.name
    assert np.load(npz)["arr_0"].std() > 1
    assert (tmp_path / "judged/samples/0000002.png").exists()


def test_every_judge_compares_with_the_images_of_its_own_cache(demo, held_out, repa_train, tmp_path):
    judges = "evaluation.encoders=[hog-grid2,hog-grid4]"
    assignments = (*EVALUATE, f"evaluation.cache={held_out}", judges)
    outcome = train(repa_train, demo, tmp_path / "run", *assignments, steps=3)
    assert outcome.code == 0, outcome.error
    (npz,) = (tmp_path / "run" / "evaluation").glob("*.npz")
    (record,) = evaluations(tmp_path / "run")
    assert set(record) == {"step", "num", *FIGURES, *(name.replace("grid4", "grid2") for name in FIGURES)}

    from repa.pipeline.models.vectors import load_vectors

    for name in ("hog-grid2", "hog-grid4"):
        real = zarr.open_array(held_out / "features" / name / "channel_mean", mode="r")[:, 0]
        component = Reference(held_out, autoencoder=None, encoder=name, pooling="mean", latents=False).component
        generated = load_vectors(component, "mean")(np.load(npz)["arr_0"])
        assert record[f"frechet_{name}_mean"] == pytest.approx(frechet_distance(real, generated), rel=1e-6)
    own = train(repa_train, demo, tmp_path / "own", *EVALUATE, steps=3)
    assert own.losses() == outcome.losses()
    assert evaluations(tmp_path / "own")[0]["frechet_hog-grid4_mean"] != record["frechet_hog-grid4_mean"]


def test_real_pictures_have_the_vectors_of_the_cache(demo):
    from repa.pipeline.analysis.features import open_encoders
    from repa.pipeline.analysis.pictures import images_of
    from repa.pipeline.models.vectors import load_vectors

    reference = Reference(demo, autoencoder=None, encoder=None, pooling="mean")
    rows = reference.some_rows(20, seed=0)
    assert len(rows) == 20
    assert rows.tolist() != list(range(20))
    store, (features,) = open_encoders(demo, [])
    encode = load_vectors(reference.component, "mean")
    np.testing.assert_array_equal(encode(images_of(store, features, rows)), reference.vectors(rows))


def test_a_resumed_run_has_each_evaluation_once(demo, repa_train, tmp_path):
    whole = train(repa_train, demo, tmp_path / "whole", *EVALUATE)
    train(repa_train, demo, tmp_path / "run", *EVALUATE, "save_every=2", steps=4)
    file = tmp_path / "run" / "evaluation.jsonl"
    file.write_text(file.read_text() + json.dumps({"step": 6, "num": 130}) + "\n")  # of a run killed before its save
    outcome = train(repa_train, demo, tmp_path / "run", *EVALUATE, more=("--resume", "auto"))
    assert outcome.code == 0, outcome.error
    assert outcome.losses() == whole.losses()
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")


@pytest.mark.parametrize("during", ["draw_samples", "pictures_of"])
def test_sigterm_ends_an_evaluation_and_a_resume_goes_on_with_it(demo, repa_train, tmp_path, monkeypatch, during):
    """The step is saved before it is evaluated; what was drawn is not drawn again."""
    calls = []

    def watch(module, name):
        work = getattr(module, name)

        def watched(*args, **kwargs):
            calls.append(name)
            if name == during and calls.count("draw_samples") >= 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return work(*args, **kwargs)

        return watched

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        for module, name in ((sample_file, "draw_samples"), (evaluation, "pictures_of")):
            patch.setattr(module, name, watch(module, name))
        ended = train(repa_train, demo, out, *EVALUATE)
    assert ended.code == 0, ended.error
    assert "evaluation at step 3 stopped; --resume auto goes on with it" in ended.output
    assert calls == (["draw_samples"] * 2 if during == "draw_samples" else ["draw_samples"] * 3 + ["pictures_of"])
    assert not (out / "evaluation.jsonl").exists()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["0000003.pt"]

    draw = sample_file.draw_samples
    monkeypatch.setattr(sample_file, "draw_samples", lambda *a, **k: calls.append("draw_samples") or draw(*a, **k))
    rest = train(repa_train, demo, out, *EVALUATE, more=("--resume", "auto"))
    assert rest.code == 0, rest.error
    assert calls.count("draw_samples") == 2 * 3
    whole = train(repa_train, demo, tmp_path / "whole", *EVALUATE)
    assert rest.losses() == whole.losses()
    assert evaluations(out) == evaluations(tmp_path / "whole")


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (("evaluation.num=128",), "evaluation.num in the space of hog-grid4: 128 for features of 128 channels."),
        (("evaluation.num_real=100",), "real images in"),
        (("evaluation.pooling=cls",), "has no class token; compare mean-pooled tokens"),
        (("evaluation.encoders=dino",), "holds no encoder 'dino'"),
        (("evaluation.encoder_weights=x.pth",), "hog has no weights"),
        (("evaluation.encoder_weights=[a=x.pth,b=y.pth]",), "'a=x.pth' is of no judge; expected NAME=FILE, NAME one"),
        (("evaluation.encoders=[hog-grid4,hog-grid4]",), "evaluation.encoders names one twice"),
        (("evaluation.inception_weights=no.pth",), "evaluation.inception_weights=no.pth: no such file"),
        (("evaluation.neighbours=0",), "evaluation.neighbours is 0; expected 1 or more"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_refused_before_the_first_step(
    demo, repa_train, tmp_path, assignments, words
):
    outcome = train(repa_train, demo, tmp_path / "run", *EVALUATE, *assignments)
    assert outcome.code == 2
    assert words in outcome.error
    assert train(repa_train, demo, tmp_path / "run", *EVALUATE, *assignments, more=("--dry-run",)).code == 2
    assert not (tmp_path / "run").exists()


def test_a_cache_of_judges_that_is_none_is_refused(demo, repa_train, tmp_path):
    outcome = train(repa_train, demo, tmp_path / "run", *EVALUATE, f"evaluation.cache={tmp_path / 'nowhere'}")
    assert outcome.code == 1
    assert "nowhere: no cache here" in outcome.error
    assert not (tmp_path / "run").exists()


def test_class_tokens_are_read_as_stored(make_cache):
    written = make_cache(encoders={"toy": "int8"}, invalid={"features/toy-int8": [2]})
    reference = Reference(written.path, autoencoder=None, encoder="toy-int8", pooling="cls")
    assert reference.space == "toy-int8_cls"
    assert 2 not in reference.valid_rows
    rows = reference.some_rows(100, seed=0)
    np.testing.assert_array_equal(reference.vectors(rows), written.arrays["features/toy-int8/cls_token"][rows, 0])


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "evaluation.jsonl").write_text('{"step": 3\n')
    with pytest.raises(UsageError, match=r"evaluation\.jsonl is damaged"):
        write_record(tmp_path / "evaluation.jsonl", {"step": 6})
