"""The page in a real browser: it renders, sorts, filters, exports, copies and prints, and asks no network for anything.

Skipped, and said to be, where no Chromium is installed.
"""

import csv
import io
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from repa.trainer.commands.report import report_command

LONG = "a-run-whose-name-is-longer-than-any-screen-" * 5
HOSTILE = "</script><img src=x onerror=console.log(1)>"[:60].replace("/", "_")


def write_report(*arguments: object) -> str:
    done = CliRunner().invoke(report_command, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def page(trained_study, photographs, tmp_path_factory) -> Path:
    """The report of the trained study, with metrics of its one encoder."""
    from repa.pipeline.commands.cache import cli

    file = tmp_path_factory.mktemp("page") / "report.html"
    csvs = [file.with_name(name) for name in ("metrics.csv", "probe.csv")]
    for command, out in zip(("metrics", "probe"), csvs, strict=True):
        done = CliRunner().invoke(cli, [command, str(photographs), "--num", "60", "--csv", str(out)])
        assert done.exit_code == 0, done.output
    write_report(trained_study, "--out", file, "--metrics", csvs[0], "--metrics", csvs[1])
    return file


def show_everything(browser) -> None:
    """Bring every chart into view, so that it is drawn."""
    for section in ("curves", "encoders", "samples", "components", "origin"):
        browser.evaluate(f"document.getElementById('{section}').scrollIntoView()")
    browser.evaluate("document.getElementById('curves').scrollIntoView()")


def table(browser, column: int = 0) -> list[str]:
    rows = "[...[...document.querySelectorAll('#table tbody')].find((body) => !body.hidden).rows]"
    return browser.evaluate(f"{rows}.filter((row) => !row.hidden).map((row) => row.cells[{column}].textContent)")


def click(browser, selector: str) -> None:
    browser.evaluate(f"document.querySelector({json.dumps(selector)}).click()")


def test_everything_is_drawn_without_a_word_or_a_request(browser, page):
    browser.look(width=1280)
    browser.open(page)
    show_everything(browser)
    browser.wait("document.querySelectorAll('#curve .scatterlayer .trace').length === 10")  # 5 runs, smoothed over raw
    browser.wait("document.querySelectorAll('#quality .scatterlayer .trace').length === 5")
    browser.wait("document.querySelectorAll('#panels .main-svg').length > 0")
    assert browser.evaluate("document.querySelector('.facts').textContent").startswith("4 runs of 2 settings")
    assert set(table(browser)) == {"irepa", "sit"}
    strips = browser.evaluate("[...document.querySelectorAll('#samples .strip .row-name')].map((s) => s.title)")
    assert strips[1] == "real images of these classes"
    assert set(strips[2:]) == {"irepa", "sit"}
    loaded = browser.evaluate(
        "(async () => { const all = [...document.images]; for (const one of all) one.loading = 'eager';"
        "await Promise.all(all.map((one) => one.decode())); return all.map((one) => one.naturalWidth); })()"
    )
    assert len(loaded) == 3 * 10 + 3 * 8
    assert set(loaded) == {16, 4}
    assert browser.console == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.absolute().as_uri()]


def test_columns_sort_by_value_and_rows_are_filtered_with_the_curves(browser, page):
    browser.look(width=1280)
    browser.open(page)
    names = browser.evaluate("[...document.querySelectorAll('#table thead th')].map((th) => th.dataset.key ?? '')")
    place = names.index("frechet_hog-grid4_mean")
    click(browser, f"#table thead th:nth-child({place + 1}) button")
    up, upwards = table(browser, place), table(browser)
    click(browser, f"#table thead th:nth-child({place + 1}) button")
    assert table(browser) == upwards[::-1]
    assert browser.evaluate("document.querySelector('#table thead [aria-sort=descending]').dataset.key") == names[place]
    figures = [float(text.partition(" ")[0]) for text in up]
    assert figures == sorted(figures)
    assert sum("†" in text for text in up) == 1  # irepa, judged by its own target

    click(browser, "#each")
    assert sorted(table(browser)) == ["irepa-seed0", "irepa-seed1", "sit-seed0", "sit-seed1"]
    browser.evaluate("document.getElementById('filter').value = 'SIT seed1'")
    browser.evaluate("document.getElementById('filter').dispatchEvent(new Event('input'))")
    assert table(browser) == ["sit-seed1"]
    show_everything(browser)
    browser.wait("document.querySelectorAll('#quality .scatterlayer .trace').length === 1")
    assert browser.evaluate("document.getElementById('shown').textContent") == "1 of 5 runs"
    rows = list(csv.DictReader(io.StringIO(browser.evaluate("report.csv()"))))
    assert [row["run"] for row in rows] == ["sit-seed1"]


def test_the_csv_has_the_numbers_of_the_json(browser, page, trained_study):
    printed = json.loads(write_report(trained_study, "--json"))
    browser.open(page)
    rows = {row["setting"]: row for row in csv.DictReader(io.StringIO(browser.evaluate("report.csv()")))}
    assert set(rows) == {"irepa", "sit"}
    for one in printed["settings"]:
        row = rows[one["name"]]
        for name in ("frechet_hog-grid4_mean", "precision_hog-grid4_mean", "recall_hog-grid4_mean"):
            assert float(row[name]) == one[name]
            assert float(row[f"{name}_spread"]) == one[f"{name}_spread"]
            assert row[f"{name}_biased"] == str(int(one["name"] == "irepa"))
        assert float(row["samples_per_s"]) == one["samples_per_s"]


def test_chips_switch_runs_off_and_keys_do_what_clicks_do(browser, page):
    browser.look(width=1280)
    browser.open(page)
    browser.evaluate("document.querySelector('[data-chips] button[data-key=recipe]').focus()")
    assert browser.evaluate("document.activeElement.textContent") == "irepa"
    browser.press(" ", code=32, text=" ")
    assert browser.evaluate("document.activeElement.getAttribute('aria-pressed')") == "false"
    assert table(browser) == ["sit"]
    assert browser.evaluate("document.querySelectorAll('#left-out tbody tr:not([hidden])').length") == 0
    browser.press("Enter", code=13, text="\r")
    assert set(table(browser)) == {"irepa", "sit"}
    browser.evaluate("document.querySelector('.skip').focus()")
    reached: list[str] = []
    while "SUMMARY" not in reached and len(reached) < 200:
        browser.press("Tab", code=9)
        reached.append(browser.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"theme", "filter", "each", "csv", "metric", "axis", "smooth", "SUMMARY"} <= set(reached)


def test_axes_smoothing_and_extremes_are_said(browser, page):
    browser.look(width=1280)
    browser.open(page)
    show_everything(browser)
    browser.wait("document.querySelectorAll('#curve .scatterlayer .trace').length === 10")
    assert "Smoothed: exponential mean with weight 0.80, the curve itself pale behind it." in browser.evaluate(
        "document.getElementById('curve-words').textContent"
    )
    for control, value, title in (("axis", "samples", "samples"), ("axis", "time", "wall time [s]")):
        browser.evaluate(f"document.getElementById('{control}').value = '{value}'")
        browser.evaluate(f"document.getElementById('{control}').dispatchEvent(new Event('input'))")
        assert browser.evaluate("document.querySelector('#curve .xtitle').textContent") == title
    assert browser.evaluate("document.getElementById('curve').data.at(-1).x.at(-1)") > 0
    browser.evaluate("document.getElementById('axis').value = 'samples'")
    browser.evaluate("document.getElementById('smooth').value = 0")
    browser.evaluate("document.getElementById('smooth').dispatchEvent(new Event('input'))")
    drawn = browser.evaluate("document.getElementById('curve').data.map(({x, y, name}) => ({x, y, name}))")
    assert len(drawn) == 5
    assert drawn[0]["x"] == [8, 16, 24, 32, 40, 48]
    browser.evaluate("document.getElementById('logx').click()")
    assert browser.evaluate("document.getElementById('curve').layout.xaxis.type") == "log"


def test_commands_and_configs_are_copied_whole(browser, page, trained_study):
    browser.open(page)
    details = "[...document.querySelectorAll('details.run')].find((one) => one.textContent.includes('sit-seed1'))"
    pres = browser.evaluate(f"[...{details}.querySelectorAll('pre')].map((pre) => pre.textContent)")
    config = json.loads((trained_study / "sit-seed1" / "config.json").read_text())
    shown = json.loads(pres[2])
    assert "class_names" not in shown["resolved"]
    shown["resolved"]["class_names"] = config["resolved"]["class_names"]
    assert shown == config
    assert "latents/pixels" in pres[1]
    assert re.search(r"\b[0-9a-f]{64}\b", pres[1])
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.evaluate(f"{details}.open = true, {details}.querySelectorAll('[data-copy]')[2].click()")
    browser.wait(f"{details}.querySelectorAll('[data-copy]')[2].textContent === 'Copied'")
    assert browser.console == []


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (360, False)])
def test_dark_and_small_screens(browser, page, width, dark):
    browser.look(width=width, dark=dark)
    browser.open(page)
    show_everything(browser)
    browser.wait("document.querySelectorAll('#curve .main-svg').length > 0")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width  # nothing but tables scrolls sideways
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 3 * 64) == dark
    tick = browser.evaluate("getComputedStyle(document.querySelector('#curve .xtick text')).fill")
    assert (sum(map(int, re.findall(r"\d+", tick))) > 3 * 128) == dark
    click(browser, "#theme")
    browser.wait(f"getComputedStyle(document.querySelector('#curve .xtick text')).fill !== '{tick}'")
    assert browser.console == []


def test_it_prints(browser, page):
    browser.look(width=1280, dark=True)
    browser.open(page)  # charts are not in view yet: printing draws them
    pdf = browser.paper()
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 2
    assert browser.evaluate("document.querySelectorAll('#curve .scatterlayer .trace').length") == 10
    assert browser.evaluate("document.documentElement.dataset.theme") == "dark"
    assert browser.console == []


def test_long_and_hostile_names_stay_text(browser, make_run, tmp_path):
    record = {"step": 10, "num": 9, "frechet_x_mean": 1.0}
    for seed, name in enumerate((LONG, HOSTILE)):
        make_run(tmp_path / "study" / name, evaluations=[record], autoencoder=f"<i>{name}", seed=seed)
    write_report(tmp_path / "study", "--out", tmp_path / "report.html")
    browser.look(width=360)
    browser.open(tmp_path / "report.html")
    show_everything(browser)
    browser.wait("document.querySelectorAll('#curve .main-svg').length > 0")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360
    click(browser, "#each")
    click(browser, "#each")
    assert browser.evaluate("document.querySelectorAll('main i:not(.legend i), main img').length") == 0
    assert browser.evaluate("document.querySelectorAll('#origin summary .name')[0].textContent") in (LONG, HOSTILE)
    assert browser.console == []


def test_a_study_of_hundred_runs_is_thinned_and_says_so(browser, make_run, tmp_path):
    def metrics(step: int) -> dict[str, float]:
        return {"denoising_loss": 1 / step, "grad_norm": 0.1} | ({"samples_per_s": 9.0} if step % 50 == 0 else {})

    first = make_run(tmp_path / "study" / "run0", steps=1000, metrics=metrics)
    lines = (first / "metrics.jsonl").read_bytes()
    for seed in range(1, 100):
        run = make_run(tmp_path / "study" / f"run{seed}", steps=1000, done=0, seed=seed)
        (run / "metrics.jsonl").write_bytes(lines)
    write_report(tmp_path / "study", "--out", tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 20e6
    browser.look(width=1280)
    browser.open(tmp_path / "report.html")
    show_everything(browser)
    browser.wait("document.querySelectorAll('#curve .scatterlayer .trace').length === 100")
    assert "Thinned when this page was written: a curve has at most 300 points" in browser.evaluate(
        "document.getElementById('curves').textContent"
    )
    assert browser.evaluate("document.getElementById('curve').data[0].y.length") <= 300
    assert browser.console == []
