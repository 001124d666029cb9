"""repa-report as a command: table, JSON, the page's parts that need no browser, what is missing, what is refused."""

import base64
import io
import json
import re
import shlex

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from repa.trainer.commands.report import report_command
from repa.trainer.commands.train import resolve_flags
from repa.trainer.runs.settings import NOT_SETTINGS, used
from repa.trainer.studies import load
from repa.trainer.studies.compare import compare
from repa.trainer.studies.origin import about, equivalent_command
from repa.trainer.studies.pictures import picture, sample_sheet
from repa.trainer.studies.relations import Interval, relate

FIGURE = "frechet_hog-grid4_mean"


@pytest.fixture
def report(capsys):
    """Return a function that runs repa-report: (*arguments) -> (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        done = CliRunner().invoke(report_command, [*map(str, arguments)], catch_exceptions=False)
        return done.exit_code, done.stdout, done.stderr

    return run


def test_table_and_json_have_the_mean_over_seeds(report, trained_study):
    code, printed, _ = report(trained_study, "--json")
    assert code == 0
    found = json.loads(printed)
    values = {
        run.name: next(record[FIGURE] for record in run.evaluations if record["step"] == 6)
        for run in load(trained_study)
        if run.status == "finished"
    }
    for one in found["settings"]:
        seeds = [values[f"{one['name']}-seed{seed}"] for seed in range(2)]
        assert one[FIGURE] == pytest.approx(np.mean(seeds), rel=1e-12)
        assert one[f"{FIGURE}_spread"] == pytest.approx(np.std(seeds, ddof=1), rel=1e-9)
        assert one.get(f"{FIGURE}_biased", False) == (one["name"] == "irepa")
    assert [row["reason"] for row in found["left_out"]] == ["stopped at step 3 of 6"]
    code, text, _ = report(trained_study, "--table")
    assert code == 0
    lines = text.splitlines()
    assert lines[0] == found["facts"][0]
    assert "biased: the judge is a network that the run was aligned with" in text
    assert "irepa-seed2: stopped at step 3 of 6" in text
    (header,) = [line for line in lines if line.startswith("setting")]
    assert "Fréchet hog-grid4" in header
    assert "FID" not in text


def test_the_recorded_start_is_shown_and_its_command_is_the_process_s(trained_study):
    found = about(load(trained_study)[0])
    assert found["exact"]
    assert re.fullmatch(r"repa-cache \S+, torch \S+", found["versions"])
    assert found["machine"] == "cpu, 1 rank(s), 1 thread(s), fp32"
    assert set(found["fingerprints"]) >= {"latents/pixels", "features/hog-grid4"}
    assert found["command"]


def test_the_equivalent_command_resolves_to_the_run_s_settings(trained_study):
    for run in load(trained_study):
        words = shlex.split(equivalent_command(run.config))
        assert words[0] == "repa-train"
        flags = {"encoders": ()}
        sets = []
        for flag, value in zip(words[1::2], words[2::2], strict=True):
            if flag == "--set":
                sets.append(value)
            elif flag == "--encoder":
                flags["encoders"] += (value,)
            else:
                name = flag.removeprefix("--").replace("-", "_")
                flags[name] = int(value) if name == "steps" else value
        plain = json.loads(json.dumps(used(resolve_flags((), tuple(sets), flags).plain())))
        assert plain == {key: value for key, value in run.config.items() if key not in NOT_SETTINGS}


def test_samples_are_those_of_the_files_and_share_their_noise(trained_study):
    found = compare(load(trained_study))
    asked = []

    def real(labels):
        asked.extend(labels)
        return np.zeros((len(labels), 16, 16, 3), dtype=np.uint8)

    sheet = sample_sheet(found, real)
    assert [row.run for row in sheet.rows[1:]] == [f"{one.label}-seed0" for one in found.settings]
    for row in sheet.rows[1:]:
        (run,) = [run for run in load(trained_study) if run.name == row.run]
        images = np.load(run.samples[-1].path)["arr_0"]
        for image, uri in zip(images, row.pictures, strict=False):
            drawn = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
            np.testing.assert_array_equal(np.asarray(drawn), image)
    assert len(asked) == len(sheet.captions) == 10
    assert sheet.captions == [load(trained_study)[0].class_names[label] for label in asked]


def test_large_pictures_are_made_small():
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    drawn = Image.open(io.BytesIO(base64.b64decode(picture(image).partition(",")[2])))
    assert drawn.format == "JPEG"
    assert drawn.size == (128, 128)


def test_real_images_are_of_the_asked_classes(photographs):
    import zarr

    from repa.pipeline.analysis.gallery import images_by_label

    cache = zarr.open_group(photographs, mode="r")
    labels, moments = cache["label"][:], cache["latents/pixels/moments"][:, 0]
    pictures = ((moments[:, :3].astype(np.float64) + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    asked = [1, 0, 1, 1]
    found = images_by_label(str(photographs), asked)
    rows = [np.flatnonzero(labels == 1)[0], np.flatnonzero(labels == 0)[0], *np.flatnonzero(labels == 1)[1:3]]
    assert np.abs(found.astype(int) - pictures[rows].transpose(0, 2, 3, 1)).max() <= 1


def test_quality_goes_with_metrics_over_encoders_alone(make_run, tmp_path):
    encoders = {"clip-vit-L": (1.0, 10.0), "mae-vit-l": (2.0, 12.0), "dino-vit-b": (3.0, 11.0), "pe-vit-g": (9.0, 0.0)}
    for encoder, (_, value) in encoders.items():
        for gamma in (0.3, 0.6):
            evaluations = [{"step": 10, "num": 9, "frechet_pe-vit-g_mean": value + gamma}]
            settings = {"encoders": [encoder], "alignment.gamma": gamma}
            make_run(tmp_path / f"{encoder}{gamma}", evaluations=evaluations, **settings)
    metrics = {encoder: {"lds": Interval(value=x, low=x - 1, high=x + 1)} for encoder, (x, _) in encoders.items()}
    calls = []

    def correlate(names, quality_name, quality, values):
        calls.append((list(names), quality_name, quality.tolist(), values["lds"].tolist()))
        return []

    found = relate(compare(load(tmp_path)), metrics, correlate)
    assert len(found.panels["lds"]) == 8
    assert set(found.coefficients) == {"gamma 0.3", "gamma 0.6"}
    for gamma, (names, quality_name, quality, lds) in zip((0.3, 0.6), sorted(calls, key=lambda c: c[2]), strict=True):
        assert quality_name == "frechet_pe-vit-g_mean"
        assert dict(zip(names, quality, strict=True)) == {
            e: v + gamma for e, (_, v) in encoders.items() if e != "pe-vit-g"
        }
        assert lds == [encoders[name][0] for name in names]  # the judge's own run is left out
    assert "left out of the coefficients, judged by their own network: pe-vit-g" in found.notes


def test_the_step_at_which_quality_got_under_k_is_taken_from_the_line_between_evaluations(report, make_run, tmp_path):
    """E@k by hand: two seeds that get there, one of two that does, one from its first evaluation on, none."""
    name = "frechet_dinov2-vit-b_mean"
    for gamma, seeds in {
        0.6: [(30, 10), (40, 10)],  # at 5 + 5 * 10 / 20 and 5 + 5 * 20 / 30
        0.3: [(22, 12), (30, 21)],  # at 5 + 5 * 2 / 10
        0.1: [(20, 30)],
        0.0: [(19, 31)],
    }.items():
        for seed, values in enumerate(seeds):
            records = [{"step": step, "num": 9, name: value} for step, value in zip((5, 10), values, strict=True)]
            settings = {"encoders": ["dinov2-vit-b"], "alignment.gamma": gamma, "seed": seed}
            make_run(tmp_path / f"gamma{gamma}-{seed}", evaluations=records, **settings)
    code, printed, _ = report(tmp_path, "--json", "--under", "20", "--under", "5")
    assert code == 0
    found = json.loads(printed)
    rows = {row["alignment.gamma"]: row for row in found["settings"]}
    key = f"steps_to_{name}_20"
    both = [7.5, 5 + 5 * 20 / 30]
    assert rows[0.6][key] == pytest.approx(np.mean(both), rel=1e-12)
    assert rows[0.6][f"{key}_spread"] == pytest.approx(np.std(both, ddof=1), rel=1e-9)
    assert [rows[gamma][key] for gamma in (0.3, 0.1, 0.0)] == [None, None, 5]
    assert all(row[f"{key}_biased"] for row in found["settings"])  # judged by the network that they are aligned with
    assert [run[key] for run in found["runs"] if run["alignment.gamma"] == 0.3] == [6, None]
    code, text, _ = report(tmp_path, "--table", "--under", "20")
    assert "E@20" in text
    for cell in ("8 ± 1†", "6 (1 of 2 seeds)†", "not by 10†", "≤ 5†"):
        assert cell in text
    assert "E@k: the first step at which an evaluation is better than k" in text
    assert "E@20, Fréchet distance, dinov2-vit-b (mean tokens)" in [c["title"] for c in found["columns"]]

    precision = [{"step": s, "num": 9, "precision_x_mean": v} for s, v in ((2, 0.2), (4, 0.6))]
    make_run(tmp_path / "other" / "run", evaluations=precision)
    found = json.loads(report(tmp_path / "other", "--json", "--under", "0.5")[1])
    assert found["settings"][0]["steps_to_precision_x_mean_0.5"] == pytest.approx(3.5)  # over it: higher is better
    make_run(tmp_path / "bare" / "run", recipe="sit")
    assert "--under: no compared run was evaluated" in report(tmp_path / "bare", "--table", "--under", "3")[2]


def test_a_run_is_biased_where_the_judge_is_what_it_was_trained_on(make_run, tmp_path):
    records = [{"step": 10, "num": 9, "frechet_dinov2-vit-b_mean": 3.0}]
    for name in ("features/dinov2-vit-b-int8", "sd-vae-ft-mse"):
        make_run(tmp_path / name.replace("/", "-"), evaluations=records, recipe="sit", autoencoder=name)
    found = compare(load(tmp_path))
    biased = {one.runs[0].name: one.figures["frechet_dinov2-vit-b_mean"].biased for one in found.settings}
    assert biased == {"features-dinov2-vit-b-int8": True, "sd-vae-ft-mse": False}


def test_enlarged_maps_are_told_where_they_stand_beside_others(report, make_run, tmp_path):
    for value, encoder in enumerate(("clip-vit-L", "tiny-cnn", "mae-vit-l")):
        evaluations = [{"step": 10, "num": 9, "frechet_pe-vit-g_mean": float(value)}]
        make_run(tmp_path / "study" / encoder, evaluations=evaluations, encoders=[encoder])
    lines = ["encoder,gamma,class,metric,mean,low,high,num,reason"]
    for encoder, why in (("clip-vit-L", ""), ("tiny-cnn", "enlarged from 4 x 4"), ("mae-vit-l", "")):
        lines += [f"{encoder},,all,lds,0.5,0.4,0.6,9,{why}", f"{encoder},,all,knn20,0.5,0.4,0.6,9,"]
    (tmp_path / "study" / "metrics.csv").write_text("\n".join(lines) + "\n")
    code, _, error = report(tmp_path / "study")
    assert code == 0, error
    html = (tmp_path / "study" / "report.html").read_text()
    assert "tiny-cnn (enlarged from 4 x 4): neighbours are alike by construction" in html
    assert "clip-vit-L (enlarged" not in html
    assert "Squares: of maps that were enlarged" in html
    data = json.loads(re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', html, re.S)[1])
    marks = {
        panel["title"]: {point["encoder"]: point["enlarged"] for point in panel["points"]} for panel in data["panels"]
    }
    assert marks["LDS"] == {"clip-vit-L": "", "tiny-cnn": "enlarged from 4 x 4", "mae-vit-l": ""}
    assert set(marks["20-NN"].values()) == {""}


def test_a_page_of_bare_runs_says_what_is_missing(report, make_run, tmp_path):
    make_run(tmp_path / "study" / "one", recipe="sit")
    make_run(tmp_path / "study" / "two", recipe="sit", seed=1, done=0)
    code, printed, _ = report(tmp_path / "study")
    assert code == 0
    assert "No run was evaluated (--set evaluation.every=STEPS)" in printed
    html = (tmp_path / "study" / "report.html").read_text()
    for line in (
        "No metrics of the encoders are at hand",
        "No finished run has pictures: --set evaluation.every=STEPS draws some",
        "No run is aligned with an encoder.",
        "the run did not record its own",
        "stopped at step 0 of 10",
    ):
        assert line in html


def test_what_makes_no_sense_is_one_line(report, make_run, tmp_path):
    run = make_run(tmp_path / "run", evaluations=[{"step": 10, "num": 5, "fid": 2.0}])
    for arguments, line in (
        ((tmp_path / "nothing",), "no such folder"),
        ((run, "--quality", "fod"), "did you mean 'fid'?"),
        ((run, "--step", 3), "--step 3: no run was evaluated there; evaluated steps: 10"),
        ((run, "--table", "--json"), "choose one of them"),
        ((run, "--metrics", tmp_path / "none.csv", "--out", tmp_path / "x.html"), "none.csv: cannot be read"),
        ((run, "--out", run / "config.json" / "x.html"), "cannot be written"),
    ):
        code, _, error = report(*arguments)
        assert code in (1, 2)
        assert error.startswith("repa-report: ")
        assert error.count("\n") == 1
        assert line in error


def test_the_last_loss_on_held_out_samples_is_a_column(report, make_run, tmp_path):
    """With spread over seeds; no column where nothing is held out."""
    for seed, last in ((0, 0.5), (1, 0.7)):
        judged = {5: {"val_denoising_loss": 0.9}, 9: {"val_denoising_loss": last}}
        make_run(
            tmp_path / "study" / f"seed{seed}",
            metrics=lambda step, judged=judged: {"denoising_loss": 1.0 / step, **judged.get(step, {})},
            **{"seed": seed, "validation.fraction": 0.1},
        )
    (one,) = json.loads(report(tmp_path / "study", "--json")[1])["settings"]
    assert one["val_denoising_loss"] == pytest.approx(0.6)
    assert one["val_denoising_loss_spread"] == pytest.approx(np.std([0.5, 0.7], ddof=1))
    _, text, _ = report(tmp_path / "study", "--table")
    assert "Validation loss" in text
    make_run(tmp_path / "plain" / "seed0")
    assert "Validation loss" not in report(tmp_path / "plain", "--table")[1]
