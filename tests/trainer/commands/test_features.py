"""repa-features as a user meets it: a run's tokens beside the encoders', trained from, killed, refused, scanned."""

import csv
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import CacheError, UsageError
from repa.cache_specs.schema import ComponentSpec
from repa.pipeline.models.vectors import load_vectors
from repa.trainer.commands.borrowed import token_components
from repa.trainer.commands.features import features_command
from repa.trainer.models.layer_tokens import LayerTokens
from repa.trainer.models.pretrained import open_model
from repa.trainer.reading.reader import CacheReader

NAME = "run-s2-b1-t0.2"
STORE = ["--layer", "1", "--t", "0.2", "--batch-size", "2"]


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def repa_features(small_sit: None, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Return a function that runs repa-features in this process: (run, cache, *arguments) -> Outcome."""

    def run(checkpoint: Path, cache: Path, *arguments: str) -> Outcome:
        capsys.readouterr()
        code = 0
        try:
            common = [str(checkpoint), "--cache", str(cache), "--device", "cpu"]
            features_command.main([*common, *arguments], standalone_mode=False)
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        said = capsys.readouterr()
        return Outcome(code, said.out, said.err)

    return run


@pytest.fixture(scope="module")
def written(make_cache):
    """A cache of which one image could not be used."""
    return make_cache(latents="mean_std", invalid={"latents/toy-ae": [6]})


@pytest.fixture
def cache(written, tmp_path: Path) -> Path:
    """A copy of the cache, to write into."""
    return Path(shutil.copytree(written.path, tmp_path / "cache"))


@pytest.fixture
def run(cache: Path, repa_train, tmp_path: Path) -> Path:
    assert repa_train(cache, tmp_path / "run", "--steps", "2", "--recipe", "sit").code == 0
    return tmp_path / "run"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_tokens_are_a_component_that_another_model_is_aligned_with(cache, run, repa_features, repa_train, tmp_path):
    done = repa_features(run, cache, *STORE)
    assert done.code == 0, done.err
    assert f"features/{NAME}: 23 samples written, 4 x 4 tokens of 32, SiT-Ti/2 after block 1 at t 0.2" in done.out

    reader = CacheReader(cache, encoder=NAME)
    batch = reader.rows(np.array([0, 21, 7]), np.array([1, 0, 1]))
    trained = open_model(run)
    latents = trained.latents(None)
    source = CacheReader(cache, encoder=())
    tokens = LayerTokens(trained.model, source, t=0.2, norm=latents.norm, interpolant=trained.interpolant)
    expected = torch.cat([tokens.read(np.array([row]), view, [1])[1] for row, view in ((0, 1), (21, 0), (7, 1))])
    torch.testing.assert_close(batch.features[0].tokens.float(), expected, rtol=2**-10, atol=1e-4)
    torch.testing.assert_close(batch.features[0].channel_mean, expected.mean(1), rtol=1e-4, atol=1e-5)
    assert reader.valid_rows.tolist() == [row for row in range(23) if row != 6]
    assert not reader.rows(np.array([6])).features[0].tokens.any()

    aligned = repa_train(cache, tmp_path / "next", "--steps", "2", "--encoder", NAME)
    assert aligned.code == 0, aligned.error
    assert [record["step"] for record in aligned.records if np.isfinite(record["alignment_loss"])] == [1, 2]

    again = repa_features(run, cache, *STORE, "--verify")
    assert "--verify takes block and time from what is stored" in again.err
    verified = repa_features(run, cache, "--verify", "--num", "5")
    assert verified.code == 0, verified.err
    assert f"features/{NAME}: 5 samples derived again, cosine to what is stored: mean 1.0000" in verified.out
    assert "all there" in repa_features(run, cache, *STORE).out


def test_killed_anywhere_it_leaves_the_same_bytes(cache, run, repa_features, monkeypatch, tmp_path):
    whole = Path(shutil.copytree(cache, tmp_path / "whole"))
    assert repa_features(run, whole, *STORE, "--dtype", "int8").code == 0
    calls, every_view = [], LayerTokens.every_view

    def dies(self: LayerTokens, rows: np.ndarray, depth: int) -> torch.Tensor:
        calls.append(rows.tolist())
        if len(calls) in (2, 8):  # amid the first range, and later amid another
            raise KeyboardInterrupt
        return every_view(self, rows, depth)

    monkeypatch.setattr(LayerTokens, "every_view", dies)
    for _ in range(2):
        stopped = repa_features(run, cache, *STORE, "--dtype", "int8")
        assert (stopped.code, stopped.err) == (130, "stopped; the same command goes on where it was\n")
        assert "complete" not in (cache / "features" / f"{NAME}-int8" / "zarr.json").read_text()
    assert repa_features(run, cache, *STORE, "--dtype", "int8").code == 0
    assert calls[0] == calls[2] == [0, 1]
    assert tree(cache / "features" / f"{NAME}-int8") == tree(whole / "features" / f"{NAME}-int8")


def test_other_weights_other_settings_and_other_latents_are_told_apart(
    cache, run, repa_features, repa_train, make_cache, change_attributes, tmp_path
):
    assert repa_features(run, cache, *STORE).code == 0
    seed = repa_features(run, cache, *STORE, "--seed", "1")
    assert (seed.code, "spec.tokens.seed: found 0, asked 1" in seed.err) == (1, True)
    assert repa_features(run, cache, *STORE, "--seed", "1", "--name", "other").code == 0
    model = repa_features(run, cache, *STORE, "--weights", "model", "--name", NAME)
    assert (model.code, "weights: found sha256:" in model.err) == (1, True)
    assert [component.name for component in token_components(str(cache))] == ["other", NAME]

    assert repa_train(cache, run, "--steps", "3", "--recipe", "sit", "--resume", "auto").code == 0
    gone_on = repa_features(run, cache, "--verify")
    assert gone_on.code == 2
    assert f"it holds other, {NAME}. Name the checkpoint that they are of" in gone_on.err

    others = make_cache(latents="mean_std", seed=1).path
    elsewhere = repa_features(run, others, *STORE)
    assert elsewhere.code == 0
    assert f"was trained on other images than those of {others}, on the same latents" in elsewhere.err
    another = repa_features(run, make_cache(latents="mean_std", size=4).path, *STORE)
    assert another.code == 2
    assert "latents/toy-ae are not those that" in another.err
    assert "latent_size is [4, 4], the model's [8, 8]" in another.err
    (component, *_) = token_components(str(cache))
    with pytest.raises(UsageError, match=r"tokens of a trained SiT-Ti/2, of noised latents: no picture can be encoded"):
        load_vectors(component, "mean")


@pytest.mark.parametrize("change", [{"t": "now"}, {"block": 0}, {"from": 3}, {"seed": -1}, None])
def test_a_record_that_says_otherwise_is_one_line(written, change):
    spec = {"entry": "repa-features", "loader": "repa-features", "model": "m", "width": 4, "grid": [2, 2]}
    spec |= {"cls_token": False, "random_weights": False}
    tokens = {"from": "latents/x", "fingerprint": "0", "average": "ema", "block": 1, "t": 0.2, "seed": 0}
    component = ComponentSpec(kind="features", name="x", spec={**spec, "tokens": tokens}, weights="sha256:0")
    whole = component.attributes(written.layout)
    assert ComponentSpec.from_attributes(whole, "x").tokens == tokens
    spec |= {} if change is None else {"tokens": tokens | change}
    with pytest.raises(CacheError, match="x: damaged attributes of the component"):
        ComponentSpec.from_attributes({**whole, "spec": spec}, "x")


def test_a_scan_measures_and_stores_nothing(cache, run, repa_features):
    before = tree(cache)
    done = repa_features(run, cache, "--scan", "--t", "0.2", "--t", "0", "--neighbours", "3", "--folds", "2")
    assert done.code == 0, done.err
    assert tree(cache) == before
    figure = run / "scan" / "0000002-ema.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    lines = list(csv.DictReader(figure.with_suffix(".csv").read_text().splitlines()))
    names = [f"run-s2-b{block}-t{t}" for t in ("0", "0.2") for block in range(3)]
    assert [line["encoder"] for line in lines[::3]] == names
    assert {line["metric"] for line in lines} == {"linear_probe", "knn3", "lds"}
    assert all(line["mean"] for line in lines)
    assert "highest linear_probe: block" in done.out

    # What it says of a place is what repa-cache metrics and probe say of the component.
    from repa.pipeline.analysis.features import choose_rows, open_encoders
    from repa.pipeline.analysis.measure import estimate, measure

    assert repa_features(run, cache, "--layer", "2", "--t", "0.2").code == 0
    _, (encoder,) = open_encoders(cache, ["run-s2-b2-t0.2"])
    measured = estimate(measure(encoder, choose_rows([encoder], None), gamma=0.6), None, "lds")
    (stored,) = (line for line in lines if line["encoder"] == "run-s2-b2-t0.2" and line["metric"] == "lds")
    assert float(stored["mean"]) == pytest.approx(measured.value, abs=1e-4)


def test_a_scan_of_one_class_has_no_probe(make_cache, repa_train, repa_features, tmp_path):
    cache = make_cache(num_classes=1).path
    assert repa_train(cache, tmp_path / "run", "--steps", "1", "--recipe", "sit").code == 0
    done = repa_features(tmp_path / "run", cache, "--scan", "--layer", "2", "--t", "0.2")
    assert done.code == 0, done.err
    assert "left out of the probe: probing needs two classes" in done.err
    assert "highest lds: block 2 at t 0.2" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "3"], "depth 3: SiT-Ti/2 has blocks 1 to 2"),
        (["--layer", "0"], "depth 0: SiT-Ti/2 has blocks 1 to 2"),
        (["--t", "1.5"], "t is 1.5; expected 0 (data) to 1 (noise)"),
        (["--scan", "--t", "2"], "t is 2.0; expected 0 (data) to 1 (noise)"),
        (["--layer", "1", "--layer", "2"], "a component has one --layer and one --t; --scan measures several"),
        (["--scan", "--verify"], "give one of them"),
        (["--num", "5"], "--num is of --scan and --verify"),
        (["--batch-size", "0"], "--batch-size 0: expected 1 or more"),
        (["--scan", "--folds", "1"], "--folds 1: expected 2 or more"),
        (["--name", "a/b"], "--name 'a/b': expected letters"),
        (["--name", "dinov2-vit-b"], "that is an encoder of the table"),
        (["--verify"], "derive them first"),
        (["--weights", "ema:0.5"], "--weights ema:0.5 names none"),
        (["--autoencoder", "pixels"], "says itself whose latents it draws"),
    ],
)
def test_what_cannot_be_is_one_line(cache, run, repa_features, arguments, message):
    before = tree(cache)
    done = repa_features(run, cache, *arguments)
    assert (done.code, message in done.err, len(done.err.splitlines())) == (2, True, 1), done.err
    assert tree(cache) == before


@pytest.mark.parametrize("recipe", ["meanflow", "sra", "reg", "jit"])
def test_runs_of_other_methods(make_cache, repa_train, repa_features, tmp_path, recipe):
    options = {"sra": ["--set", "sra.teacher_depth=2"], "jit": ["--model", "JiT-Ti/2"]}.get(recipe, [])
    cache = make_cache().path
    trained = repa_train(cache, tmp_path / "run", "--steps", "1", "--recipe", recipe, *options)
    assert trained.code == 0, trained.error
    done = repa_features(tmp_path / "run", cache, *STORE)
    if recipe == "reg":
        assert (done.code, len(done.err.splitlines())) == (2, 1)
        assert "takes an encoder's class token beside the latents (REG)" in done.err
    else:
        assert done.code == 0, done.err
        assert CacheReader(cache, encoder="run-s1-b1-t0.2").features[0].grid == (4, 4)
