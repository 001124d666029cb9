"""Correlations against scipy, the joining of runs and metrics, and a word for everything that cannot be said."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from repa.cache_specs.errors import UsageError
from repa.pipeline.analysis.correlate import correlate, lines, pearson, spearman
from repa.pipeline.analysis.measure import write_rows
from repa.pipeline.analysis.results import Results, join

ENCODERS = ["clip", "dinov2", "dinov3", "mae", "moco", "pe", "pe-g", "siglip", "webssl"]


def make_results(num: int = 9, **metrics: Sequence[float]) -> Results:
    rng = np.random.default_rng(0)
    quality = np.round(rng.normal(20, 5, num), 1)
    columns = {"lds": 0.5 - quality / 60 + rng.normal(0, 0.03, num), "linear_probe": np.round(rng.random(num), 1)}
    columns |= {name: np.array(values, dtype=np.float64) for name, values in metrics.items()}
    return Results(names=ENCODERS[:num], quality_name="fid", quality=quality, metrics=columns)


def test_coefficients_are_scipys_ties_included() -> None:
    rng = np.random.default_rng(0)
    x, y = np.round(rng.normal(size=30), 0), np.round(rng.normal(size=30), 1)
    assert len(np.unique(x)) < 10
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert pearson(np.ones(5), y[:5]) is None


def test_every_metric_has_interval_and_leave_one_out() -> None:
    results = make_results()
    found = {one.metric: one for one in correlate(results)}
    assert list(found) == ["linear_probe", "lds", "cds", "srss", "rmsc"]
    x, y = results.metrics["lds"], results.quality
    one = found["lds"]
    assert one.pearson.value == pytest.approx(stats.pearsonr(x, y).statistic)
    assert one.spearman.value == pytest.approx(stats.spearmanr(x, y).statistic)
    bootstrap = stats.bootstrap(
        (x, y), lambda a, b: stats.pearsonr(a, b).statistic, paired=True, vectorized=False, method="percentile",
        n_resamples=1000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert one.pearson.low == pytest.approx(bootstrap.low, abs=0.02)
    assert one.pearson.high == pytest.approx(bootstrap.high, abs=0.02)
    for i in range(9):
        without = stats.pearsonr(np.delete(x, i), np.delete(y, i)).statistic
        assert one.pearson_without[i] == pytest.approx(without)
        ranks = stats.spearmanr(np.delete(x, i), np.delete(y, i)).statistic
        assert one.spearman_without[i] == pytest.approx(ranks)
    assert found["srss"].pearson.reason == "not measured"


def test_what_cannot_be_correlated_has_its_reason() -> None:
    nan = float("nan")
    results = make_results(5, rmsc=[1, 1, 1, 1, 1], cds=[1, 2, nan, nan, nan], srss=[1, 2, 3, nan, nan])
    found = {one.metric: one for one in correlate(results)}
    assert found["rmsc"].pearson.reason == "rmsc is the same for every encoder"
    assert found["cds"].pearson.reason == "measured for clip, dinov2 only"
    assert found["srss"].pearson.num == 3
    assert found["srss"].pearson_without == ()
    assert found["lds"].pearson.low is None
    assert found["lds"].pearson.reason == "5 encoders, too few for an interval"
    with pytest.raises(UsageError, match="needs 3 encoders with both metrics and fid; found 2: clip, dinov2"):
        correlate(make_results(2))


def write_results(file: Path) -> Results:
    results = make_results()
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["encoder", "lds", "linear_probe", "srss", "fid", "recall"])
        for i, name in enumerate(ENCODERS):
            lds, probe = results.metrics["lds"][i], results.metrics["linear_probe"][i]
            writer.writerow([name, lds, probe, "", results.quality[i], 0.5])
    return results


def test_the_command_draws_and_writes_tables(repa_cache: Callable[..., Any], tmp_path: Path) -> None:
    expected = write_results(tmp_path / "results.csv")
    out = tmp_path / "figure.png"
    outcome = repa_cache("correlate", tmp_path / "results.csv", "--quality", "fid", "--out", out)
    assert outcome.code == 0, outcome.err
    assert "srss          left out: not measured" in outcome.out
    with Image.open(out) as picture:
        assert picture.width > 4 * picture.height  # one panel a metric, side by side
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    with (tmp_path / "figure.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert not any("nan" in value.lower() for row in rows for value in row.values())
    lds = next(row for row in rows if (row["metric"], row["coefficient"], row["left_out"]) == ("lds", "pearson", ""))
    assert float(lds["value"]) == pytest.approx(pearson(expected.metrics["lds"], expected.quality))
    assert len([row for row in rows if row["metric"] == "lds" and row["left_out"]]) == 18
    with (tmp_path / "figure.joined.csv").open(newline="") as stream:
        assert [row["encoder"] for row in csv.DictReader(stream)] == ENCODERS


def make_run(folder: Path, encoders: list[str], frechet: float, *, step: int = 100, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"encoders": encoders, **config}))
    records = [
        {"step": 50, "num": 64, "frechet_hog_mean": 99.0},
        {"step": step, "num": 64, "frechet_hog_mean": frechet},
    ]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def write_metrics(file: Path, encoders: Sequence[str]) -> Path:
    rows = [[name, "", "all", "lds", str(0.1 * i), "", "", "9", ""] for i, name in enumerate(encoders)]
    rows += [[name, "0.6", "all", "lds", "7", "", "", "9", ""] for name in encoders]  # normalised: not correlated
    rows += [[name, "", "cats", "lds", "8", "", "", "9", ""] for name in encoders]
    write_rows(file, [*rows, [encoders[0], "", "all", "srss", "", "", "", "0", "no --masks"]])
    return file


def test_runs_are_joined_with_metrics_by_encoder(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"r{i}", [name], 10.0 * i) for i, name in enumerate(["a", "b", "c"])]
    runs += [make_run(tmp_path / "again", ["b"], 20.0), make_run(tmp_path / "plain", [], 5.0)]
    runs.append(make_run(tmp_path / "unmeasured", ["z"], 5.0))
    found = join(runs, [write_metrics(tmp_path / "m.csv", ["a", "b", "c", "d"])], None)
    assert found.names == ["a", "b", "c"]
    assert found.quality_name == "frechet_hog_mean"
    np.testing.assert_allclose(found.quality, [0, 15, 20])
    np.testing.assert_allclose(found.metrics["lds"], [0, 0.1, 0.2])
    assert sorted(found.notes) == [
        "b: the mean of 2 runs",
        f"left out: {tmp_path / 'plain'} is aligned with no encoder, not one",
        "left out: z has no metrics",
    ]


def test_runs_are_averaged_over_their_seed_alone(tmp_path: Path) -> None:
    metrics = [write_metrics(tmp_path / "m.csv", ["a", "b", "c"])]
    runs = [
        make_run(tmp_path / f"r{seed}", ["a"], 10.0 * seed, seed=seed, out=f"r{seed}", alignment={"gamma": 0.6})
        for seed in range(3)
    ]
    assert join(runs, metrics, None).quality.tolist() == [10.0]
    other = make_run(tmp_path / "other", ["a"], 99.0, seed=0, alignment={"gamma": 0.8})
    with pytest.raises(
        UsageError, match=r"r0 and .*other differ in alignment.gamma: 0.6 and 0.8. Runs .* --group-by align"
    ):
        join([*runs, other], metrics, None)
    across = make_run(tmp_path / "across", ["b"], 5.0, alignment={"gamma": 0.8})
    assert "runs of different encoders differ in alignment.gamma, too" in join([*runs, across], metrics, None).notes


def test_runs_that_differ_in_a_setting_are_a_table_for_each_of_its_values(
    repa_cache: Callable[..., Any], tmp_path: Path
) -> None:
    metrics = write_metrics(tmp_path / "m.csv", ["a", "b", "c"])
    runs = [
        make_run(tmp_path / f"{name}{gamma}{seed}", [name], quality, seed=seed, alignment={"gamma": gamma})
        for name, at in (("a", (1, 9)), ("b", (2, 8)), ("c", (4, 5)))
        for gamma, quality in zip((0.6, 0.8), map(float, at), strict=True)
        for seed in (0, 1)
    ]
    alone = make_run(tmp_path / "alone", ["a"], 1.0, alignment={"gamma": 0.0, "coeff": 1})
    common = ("correlate", *runs, alone, "--metrics", metrics, "--out", tmp_path / "f.png")
    refused = repa_cache(*common)
    assert (refused.code, "add --group-by alignment.gamma for a table a value" in refused.err) == (2, True)
    done = repa_cache(*common, "--group-by", "gamma")
    assert done.code == 0, done.err
    assert "alignment.gamma 0.0:\n  left out: a correlation needs 3 encoders" in done.out
    for gamma, quality in ((0.6, [1, 2, 4]), (0.8, [9, 8, 5])):
        with (tmp_path / f"f-alignment.gamma-{gamma}.joined.csv").open(newline="") as stream:
            assert [float(row["frechet_hog_mean"]) for row in csv.DictReader(stream)] == quality
        coefficient = stats.pearsonr([0, 0.1, 0.2], quality).statistic
        assert f"{coefficient:.4f}" in done.out.split(f"alignment.gamma {gamma}:")[1].split("alignment.gamma")[0]
    for key, words in (
        ("gama", "no setting of runs; did you mean"),
        ("alignment.coeff", "nothing could be correlated"),
    ):
        wrong = repa_cache(*common, "--group-by", key)
        assert (wrong.code, words in wrong.err) == (2, True), wrong.err
    assert repa_cache(*common, "--group-by", "alignment.gamma", "--group-by", "seed").code == 0


def test_columns_stay_apart_without_an_interval() -> None:
    results = make_results(5)
    found = correlate(results)
    said = list(lines(found, results))
    row = next(line for line in said if line.startswith("  lds"))
    assert said[1].index("Spearman") == row.index(str(found[1].spearman), row.index(")"))
    assert ")  0." in row or ")  -0." in row


def test_sources_that_cannot_be_joined_are_refused(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, [name], 1.0) for name in "ab"]
    metrics = write_metrics(tmp_path / "m.csv", ["a", "b"])
    later = make_run(tmp_path / "later", ["c"], 1.0, step=200)
    with pytest.raises(UsageError, match=r"at step 100 with 64 samples, .*later at step 200 .*cannot be compared"):
        join([*runs, later], [metrics], None)
    with pytest.raises(UsageError, match=r"add --metrics FILE.csv"):
        join(runs, [], None)
    with pytest.raises(UsageError, match=r"--quality fid: 2 runs has no such figure; .*frechet_hog_mean"):
        join(runs, [metrics], "fid")
    with pytest.raises(UsageError, match=r"nowhere: no config.json; expected the folder of a run with evaluations"):
        join([tmp_path / "nowhere", runs[0]], [metrics], None)
    with pytest.raises(UsageError, match=r"no encoder with both .*quality is known for a, b, metrics for x"):
        join(runs, [write_metrics(tmp_path / "x.csv", ["x"])], None)
    write_results(tmp_path / "results.csv")
    with pytest.raises(UsageError, match="expected what repa-cache metrics --csv writes"):
        join(runs, [tmp_path / "results.csv"], None)
    (runs[0] / "evaluation.jsonl").write_text("{")
    with pytest.raises(UsageError, match="is damaged"):
        join(runs, [metrics], None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("encoder,lds,fid\na,1,2\na,1,3\n", "encoder a has two lines"),
        ("encoder,lds,fid\na,nan,2\n", "a: lds is 'nan'; expected a number"),
        ("name,lds,fid\na,1,2\n", r"columns are \['name', 'lds', 'fid'\]; expected encoder"),
        ("encoder,lds,fid,is\na,1,2,3\n", "which figure is to be explained\\? Choose with --quality: fid, is"),
    ],
)
def test_a_bad_results_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(UsageError, match=words):
        join([tmp_path / "r.csv"], [], None)
