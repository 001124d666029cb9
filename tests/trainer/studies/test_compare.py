"""What is one setting, what differs, what may be compared, and what is said of it."""

import math
import statistics

import pytest

from repa.cache_specs.errors import UsageError
from repa.trainer.studies import load
from repa.trainer.studies.compare import compare, short_labels
from repa.trainer.studies.figures import describe, network_of
from repa.trainer.studies.verdict import facts, plus_minus, seed_spread

SPACE = "frechet_dinov2-vit-b_mean"


def judged(value, *, step=10, num=100, **more):
    return [{"step": step, "num": num, SPACE: value, **more}]


@pytest.fixture
def study(make_run, tmp_path):
    """Two gammas of one encoder with three seeds, and a baseline with two."""
    for seed, (low, high) in enumerate([(10.0, 14.0), (11.0, 15.0), (12.0, 16.0)]):
        for gamma, value in ((0.6, low), (0.0, high)):
            run = tmp_path / f"gamma{gamma}-{seed}"
            values = {"encoders": ["clip-vit-L"], "alignment.gamma": gamma, "seed": seed, "log_every": 1 + seed}
            make_run(run, evaluations=judged(value), **values)
    for seed, value in enumerate([20.0, 22.0]):
        make_run(tmp_path / f"sit-{seed}", recipe="sit", evaluations=judged(value), seed=seed)
    return tmp_path


def test_seeds_are_averaged_and_settings_told_apart(study):
    found = compare(load(study))
    assert [one.label for one in found.settings] == ["irepa · gamma 0.6", "irepa · gamma 0", "sit"]
    best = found.settings[0].figures[SPACE]
    assert best.mean == statistics.mean([10, 11, 12])
    assert best.spread == statistics.stdev([10, 11, 12])
    assert found.keys == ("recipe", "encoders", "alignment.gamma", "alignment.projector")
    (said, *more) = facts(found)
    assert said.startswith("8 runs of 3 settings that differ in recipe, encoder")
    assert "2 to 3 seeds each" in said
    assert "Lowest Fréchet distance, dinov2-vit-b (mean tokens) at step 10: irepa · gamma 0.6 with 11.0 ± 1.0" in said
    assert "4.0 (27 %) below the next, irepa · gamma 0 with 15.0 ± 1.0 (3 seeds): 4.0 times the seed spread" in said
    assert more == [
        "irepa · gamma 0.6 is 10 (48 %) below training without alignment, sit with 21.0 ± 1.4 (2 seeds): 8.7 times the "
        "seed spread of 1.2. With so few seeds the spread itself is rough."
    ]


def test_a_difference_below_the_seed_spread_names_no_winner(make_run, tmp_path):
    for seed, (a, b) in enumerate([(10.0, 10.5), (14.0, 14.5), (12.0, 12.5)]):
        make_run(tmp_path / f"a{seed}", evaluations=judged(a), seed=seed, **{"alignment.gamma": 0.6})
        make_run(tmp_path / f"b{seed}", evaluations=judged(b), seed=seed, **{"alignment.gamma": 0.3})
    (said,) = facts(compare(load(tmp_path)))
    assert "less than the seed spread of 2.0, so no winner can be named" in said


def test_without_repeated_seeds_nothing_is_concluded(make_run, tmp_path):
    for gamma, value in ((0.6, 10.0), (0.3, 12.0)):
        make_run(tmp_path / f"g{gamma}", evaluations=judged(value), **{"alignment.gamma": gamma})
    (said,) = facts(compare(load(tmp_path)))
    assert "No seed was repeated, so these runs cannot say whether that is more than chance." in said


def test_only_runs_evaluated_alike_are_compared(make_run, tmp_path):
    for seed in range(2):
        make_run(tmp_path / f"alike{seed}", evaluations=judged(10.0 + seed), seed=seed)
    make_run(tmp_path / "fewer", evaluations=judged(1.0, num=50), seed=2)
    make_run(tmp_path / "sampler", evaluations=judged(2.0), seed=3, **{"evaluation.steps": 9})
    make_run(tmp_path / "early", evaluations=judged(3.0, step=5), seed=4)
    make_run(tmp_path / "never", seed=5)
    make_run(tmp_path / "half", evaluations=judged(4.0, step=5), done=7, seed=6)
    make_run(tmp_path / "again", evaluations=judged(10.0), seed=0)
    found = compare(load(tmp_path))
    (one,) = found.settings
    assert one.figures[SPACE].values == (10.0, 11.0)
    assert {run.name: reason for run, reason in found.left_out} == {
        "fewer": "evaluated otherwise: num 50, not 100",
        "sampler": "evaluated otherwise: steps 9, not 50",
        "early": "not evaluated at step 10 (last at step 5)",
        "never": "not evaluated at step 10 (never evaluated)",
        "half": "stopped at step 7 of 10",
        "alike0": "the same settings and seed as again",
    }
    assert compare(load(tmp_path), step=5).settings[0].runs[0].name == "early"
    with pytest.raises(UsageError, match="--step 7: no run was evaluated there; evaluated steps: 5, 10"):
        compare(load(tmp_path), step=7)


def test_spaces_are_never_ranked_together_and_their_own_targets_are_marked(make_run, tmp_path):
    for seed in range(2):
        for encoder, value in (("dinov2-vit-b-grid16-int8", 5.0), ("clip-vit-L", 9.0)):
            run = tmp_path / f"{encoder}-{seed}"
            make_run(run, evaluations=judged(value + seed), encoders=[encoder], seed=seed)
        other = [{"step": 10, "num": 100, "frechet_mae-vit-l_mean": 0.1}]
        make_run(tmp_path / f"other-{seed}", evaluations=other, encoders=["mae-vit-l"], seed=seed)
    found = compare(load(tmp_path))
    assert found.quality.name == SPACE
    assert [one.label for one in found.ranked] == ["dinov2-vit-b-grid16-int8", "clip-vit-L"]
    assert [one.figures[SPACE].biased for one in found.ranked] == [True, False]
    said = " ".join(facts(found))
    assert "Biased: 1 setting is judged by the network that it was aligned with (dinov2-vit-b)." in said
    assert "so not ranked: mae-vit-l." in said
    with pytest.raises(UsageError, match="did you mean 'frechet_mae-vit-l_mean'"):
        compare(load(tmp_path), quality="frechet_mae-vit-l")


def test_names_of_figures_and_networks():
    assert describe("fid").title == "FID (torch-fidelity)"
    assert "FID" not in describe(SPACE).title
    assert describe("precision_hog_mean").better == "higher"
    assert describe("something_new").better is None
    assert network_of("dinov2-vit-b-grid8-layers8-11-int8:layer=8") == "dinov2-vit-b"
    assert network_of("siglip2-vit-b@irepa-random") == "siglip2-vit-b"
    assert not describe(SPACE).biased_for(["dinov2reg-vit-b"])
    assert describe(SPACE).biased_for(["clip-vit-L", "dinov2-vit-b"])


def test_labels_differ_where_settings_do():
    values = [("sit", None, 1), ("irepa", 0.3, 1), ("irepa", 0.6, 1), ("irepa", 0.6, 2)]
    labels = short_labels(values, ("recipe", "alignment.gamma", "steps"))
    assert labels == ["sit", "irepa · gamma 0.3", "irepa · gamma 0.6 · steps 1", "irepa · gamma 0.6 · steps 2"]


def test_the_pooled_spread_is_that_of_the_text_books(study):
    ranked = compare(load(study)).ranked
    figures = [one.figures[SPACE] for one in ranked]
    pooled, _ = seed_spread(figures, figures)
    assert pooled == pytest.approx(math.sqrt((2 * 1.0 + 2 * 1.0 + 1 * 2.0) / 5))
    assert plus_minus(figures[0]) == "11.0 ± 1.0"
