"""Settings: which source wins, what is refused and with which words, what a resume may change."""

import json
import os

import pytest

from repa.cache_specs.errors import UsageError
from repa.trainer.models.jit import SIZES as JIT_SIZES
from repa.trainer.models.sit import SIZES
from repa.trainer.runs.config import MAY_CHANGE
from repa.trainer.runs.settings import (
    Layer,
    differences,
    file_layer,
    flatten,
    known_recipes,
    recipe_layer,
    resolve,
    set_layer,
)

FLAGS = Layer(source="flags", values={"cache": "c", "out": "o", "model": "SiT-B/2"})


def test_later_sources_win(tmp_path):
    file = tmp_path / "demo.yaml"
    file.write_text("optimizer:\n  learning_rate: 2e-4\nalignment.gamma: 0.3\nbatch_size: 64\nsteps: 9\n")
    layers = [recipe_layer("irepa", "SiT-B/2"), file_layer(file), set_layer(["batch_size=32", "steps=10"])]
    config = resolve([*layers, FLAGS, Layer(source="flags", values={"steps": 11})])
    assert config.alignment.projector == "conv"
    assert config.alignment.gamma == 0.3
    assert config.optimizer.learning_rate == 2e-4
    assert config.batch_size == 32
    assert config.steps == 11
    assert config.ema_decay == (0.9999,)


# facts of the publications, written out again: (projector, kernel, gamma, coefficient, depth for B, depth for XL)
@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("repa", ("mlp", None, None, 0.5, 4, 8)),
        ("irepa", ("conv", 3, 0.6, 1.0, 4, 8)),
        ("irepa-release", ("conv", 1, 0.6, 1.0, 4, 8)),
    ],
)
def test_recipes_are_the_published_ones(recipe, expected):
    base, large = (resolve([recipe_layer(recipe, model), FLAGS]).alignment for model in ("SiT-B/2", "SiT-XL/2"))
    kernel = base.kernel_size if base.projector == "conv" else None
    assert (base.projector, kernel, base.gamma, base.proj_coeff, base.encoder_depth, large.encoder_depth) == expected
    assert base.hidden_dim == 2048


def test_defaults_are_the_published_ones():
    config = resolve([recipe_layer("sit", "SiT-B/2"), FLAGS])
    assert config.alignment.projector == "none"
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2) == (1e-4, 0.9, 0.999)
    assert (optimizer.eps, optimizer.weight_decay, optimizer.clip) == (1e-8, 0.0, 1.0)
    assert {optimizer.rate(step) for step in (0, 1, 399_999)} == {1e-4}
    assert (config.batch_size, config.ema_decay, config.label_dropout, config.steps) == (256, (0.9999,), 0.1, 400_000)
    assert (config.interpolant.path, config.interpolant.time_distribution) == ("linear", "uniform")


def test_every_recipe_resolves_for_every_size():
    for recipe in known_recipes():
        family, sizes = ("JiT", JIT_SIZES) if recipe.startswith("jit") else ("SiT", SIZES)
        for size, (depth, *_) in sizes.items():
            config = resolve([recipe_layer(recipe, f"{family}-{size}/2"), FLAGS])
            assert config.recipe == recipe
            assert config.alignment.projector == "none" or config.alignment.encoder_depth <= depth


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            set_layer(["optimizer.learning_rat=1"]),
            "unknown key 'optimizer.learning_rat'; did you mean 'optimizer.learn",
        ),
        (set_layer(["steps=many"]), "--set: steps is 'many'; expected int"),
        (set_layer(["steps=1.5"]), "--set: steps is 1.5; expected int"),
        (set_layer(["compile=1"]), "compile is 1; Known: auto, false, true"),
        (set_layer(["steps=0"]), "steps is 0; expected 1 or more"),
        (set_layer(["accumulation=3"]), "batch_size 256 is not a multiple of accumulation 3"),
        (set_layer(["precision=fp16"]), "precision is fp16: .* underflows .* Train with bf16 or fp32"),
        (set_layer(["precision=bf17"]), "precision is 'bf17'; did you mean 'bf16'"),
        (set_layer(["alignment.projector=convv"]), "alignment.projector is 'convv'; did you mean 'conv'"),
        (set_layer(["interpolant.path=cosin"]), "interpolant.path is 'cosin'; did you mean 'cosine'"),
        (set_layer(["alignment.gamma=1.5"]), "alignment.gamma is 1.5; expected 0 to 1"),
        (set_layer(["alignment.proj_coeff=0"]), "alignment.projector=none"),
        (set_layer(["alignment.kernel_size=2"]), "expected an odd number"),
        (set_layer(["optimizer.learning_rate=.nan"]), "optimizer.learning_rate is nan"),
        (set_layer(['stage=""']), "stage is empty; name a local folder"),
        (set_layer(["label_dropout=2"]), "label_dropout is 2.0; expected 0 to 1"),
        (set_layer(["ema_decay=1"]), "ema_decay is 1.0"),
    ],
)
def test_bad_settings_are_refused_in_one_line(layer, message):
    with pytest.raises(UsageError, match=message) as caught:
        resolve([recipe_layer("irepa", "SiT-B/2"), FLAGS, layer])
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named():
    with pytest.raises(UsageError, match="not set: cache, out, model"):
        resolve([recipe_layer("sit", "SiT-B/2")])


def test_recipe_errors_name_the_nearest():
    with pytest.raises(UsageError, match="unknown recipe 'irep'; did you mean 'irepa'"):
        recipe_layer("irep", "SiT-B/2")
    with pytest.raises(UsageError, match="recipe sit reads no encoder"):
        resolve([recipe_layer("sit", "SiT-B/2"), FLAGS, set_layer(["encoders=[hog]"])])


@pytest.mark.parametrize(
    "text",
    ["- a\n- b\n", "a: [", "\xff", "steps: 2020-13-45", "steps: " + "9" * 6000, "a: &a [*a]", "[" * 9999],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "bad.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"bad\.yaml"):
        file_layer(tmp_path / "bad.yaml")
    with pytest.raises(UsageError, match="No such file"):
        file_layer(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="expected key=value"):
        set_layer(["steps"])


def test_a_file_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(UsageError, match=r"config\.yaml: it is a FIFO, not a file"):
        file_layer(tmp_path / "config.yaml")


@pytest.mark.parametrize("value", ["&a [*a]", "2020-13-45", "0x" + "f" * 5000, "{" * 9999])
def test_values_that_are_not_yaml_are_one_short_line(value):
    with pytest.raises(UsageError, match="the value is not YAML") as refused:
        set_layer([f"steps={value}"])
    assert len(str(refused.value)) < 600


def test_values_are_read_by_the_field_type():
    # YAML 1.1 takes 1e-3 for text and 1 for an integer; both are floats here.
    layer = set_layer(["optimizer.learning_rate=1e-3", "alignment.gamma=null", "optimizer.clip=1", "encoders=hog"])
    config = resolve([recipe_layer("irepa", "SiT-B/2"), FLAGS, layer])
    assert config.optimizer.learning_rate == 1e-3
    assert config.alignment.gamma is None
    assert isinstance(config.optimizer.clip, float)
    assert config.encoders == ("hog",)


def test_the_plain_form_survives_json_and_resolves_to_itself():
    config = resolve([recipe_layer("irepa", "SiT-B/2"), FLAGS, set_layer(["encoders=[hog, dino]"])])
    plain = json.loads(json.dumps(config.plain()))
    assert resolve([Layer(source="stored", values=flatten(plain))]) == config


def test_a_resume_may_change_only_what_it_may():
    def plain(*assignments: str) -> dict:
        return resolve([recipe_layer("irepa", "SiT-B/2"), FLAGS, set_layer(assignments)]).plain()

    changed = ("steps=7", "log_every=1", "save_every=2", "keep_last=9", "prefetch_bytes=8MB", "out=p", "grid.every=5")
    allowed = plain(*changed)
    assert differences(plain(), allowed) == []
    assert differences(plain(), plain("optimizer.learning_rate=0.5", "seed=3", "steps=7")) == [
        "optimizer.learning_rate: stored 0.0001, asked 0.5",
        "seed: stored 0, asked 3",
    ]
    assert set(flatten(plain())) >= MAY_CHANGE
