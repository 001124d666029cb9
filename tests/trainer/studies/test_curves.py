"""Thinning keeps means, extremes and the first steps; time is what the logs say that steps took."""

import itertools

import numpy as np
import pytest

from repa.trainer.studies import load
from repa.trainer.studies.curves import curve, seconds, speeds


def loss(step: int) -> dict[str, float]:
    return {"denoising_loss": float(np.sin(step) + 5 / step)} | ({"grad_norm": 0.5} if step % 10 == 0 else {})


def test_a_short_curve_is_kept_as_it_is(make_run, tmp_path):
    (run,) = load(make_run(tmp_path / "run", steps=30, metrics=loss))
    found = curve(run, "denoising_loss")
    assert found.most == 1
    assert found.step.tolist() == list(range(1, 31))
    assert found.mean.tolist() == run.metrics["denoising_loss"].tolist() == found.low.tolist() == found.high.tolist()
    assert curve(run, "grad_norm").step.tolist() == [10, 20, 30]
    assert curve(run, "alignment_loss") is None


def test_a_thinned_curve_has_every_step_in_one_point(make_run, tmp_path):
    (run,) = load(make_run(tmp_path / "run", steps=2000, metrics=loss))
    found = curve(run, "denoising_loss", points=60)
    assert len(found.step) <= 60
    values = run.metrics["denoising_loss"]
    # By hand: a point's steps are those nearer to it than to its neighbours' ends, so weights are recovered from steps.
    counts, first = [], 1
    for mean_step in found.step:
        last = round(2 * mean_step - first)
        counts.append(last - first + 1)
        first = last + 1
    assert sum(counts) == 2000
    assert max(counts) == found.most
    starts = np.cumsum([0, *counts])
    for place, (begin, end) in enumerate(itertools.pairwise(starts)):
        assert found.mean[place] == pytest.approx(values[begin:end].mean())
        assert found.low[place] == values[begin:end].min()
        assert found.high[place] == values[begin:end].max()
    assert (found.step < 20).sum() >= 5  # a log axis begins with something


def test_costs_are_weighted_by_time(make_run, tmp_path):
    def metrics(step: int) -> dict[str, float]:
        costs = {4: {"samples_per_s": 16.0, "data_wait": 0.5}, 6: {"samples_per_s": 4.0, "data_wait": 0.0}}
        return {"denoising_loss": 1.0} | costs.get(step, {})

    (run,) = load(make_run(tmp_path / "run", steps=6, metrics=metrics, batch_size=8))
    found = speeds(run)
    assert found["train_s"] == pytest.approx(4 * 8 / 16 + 2 * 8 / 4)
    assert found["samples_per_s"] == pytest.approx(48 / 6)
    assert found["data_wait"] == pytest.approx(0.5 * 2 / 6)
    assert "wall_s" not in found
    step, passed, is_wall = seconds(run)
    assert (step.tolist(), passed.tolist(), is_wall) == ([4, 6], [2.0, 6.0], False)


def test_wall_time_is_taken_where_it_is_logged_and_missing_figures_are_none(make_run, tmp_path):
    (timed,) = load(make_run(tmp_path / "timed", steps=3, metrics=lambda step: {"wall_s": 10.0 * step}))
    assert speeds(timed) == {"wall_s": 30.0}
    (bare,) = load(make_run(tmp_path / "bare", steps=3))
    assert speeds(bare) == {}
    assert len(seconds(bare)[0]) == 0
