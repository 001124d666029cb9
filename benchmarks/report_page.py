"""Time how long the report of a large study takes to write and to open, and say how large it is.

    python benchmarks/report_page.py          # 100 runs of 10,000 logged steps; appends to results/report_page.jsonl

Runs are written by hand: 25 settings with 4 seeds, every step with two losses and a gradient norm, rates at each log,
ten evaluations. The page is opened in headless Chromium several times, each in a new browser with an empty profile,
at 1280 x 900. Opened is from asking for the page until it has loaded and two frames were drawn; drawn is until the
curves of all runs stand there, once scrolled to. Both are wall time, of a browser that has started.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from chromium import Chromium, found_program
from click.testing import CliRunner
from conditions import append_line, conditions

from repa.trainer.commands.report import report_command
from repa.trainer.runs.settings import Layer, recipe_layer, resolve

OPEN_BAR_S, SIZE_BAR = 2.0, 20_000_000
PAINTED = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"


def write_runs(study: Path, *, runs: int, steps: int) -> None:
    """Write runs as repa-train leaves them, of a quarter as many settings."""
    random = np.random.default_rng(0)
    step = np.arange(1, steps + 1)
    for number in range(runs):
        setting, seed = divmod(number, 4)
        folder = study / f"run{number:03d}"
        values = {"cache": "caches/in1k", "out": str(folder), "model": "SiT-B/2", "steps": steps, "seed": seed}
        values |= {
            "alignment.gamma": round(0.02 * setting, 2),
            "encoders": ["dinov2-vit-b"],
            "evaluation.every": steps // 10,
        }
        config = resolve([recipe_layer("irepa", "SiT-B/2"), Layer(source="benchmarks", values=values)]).plain()
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        losses = 0.5 + step**-0.5 + 0.01 * random.standard_normal(steps)
        lines = []
        for i in range(steps):
            line = {
                "step": i + 1,
                "denoising_loss": losses[i],
                "alignment_loss": -losses[i],
                "grad_norm": 0.3 * losses[i],
            }
            if (i + 1) % 50 == 0:
                line |= {"wall_s": 0.2 * i, "samples_per_s": 1280.0, "read_gb_per_s": 0.5, "data_wait": 0.001}
            lines.append(json.dumps(line))
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        records = [
            {"step": k * steps // 10, "num": 5000, "frechet_dinov3-vit-b_mean": 200 / k + setting + random.random()}
            for k in range(1, 11)
        ]
        (folder / "evaluation.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records), encoding="utf-8")


def open_page(program: str, page: Path, profile: Path, *, runs: int) -> tuple[float, float]:
    """Return the seconds until the page is open, and until all curves are drawn."""
    with Chromium(program, profile) as browser:
        browser.look(width=1280)
        start = time.perf_counter()
        browser.open(page)
        browser.evaluate(PAINTED)
        opened = time.perf_counter() - start
        browser.evaluate("document.getElementById('curves').scrollIntoView()")
        browser.wait(f"document.querySelectorAll('#curve .scatterlayer .trace').length === {runs}")
        browser.evaluate(PAINTED)
        drawn = time.perf_counter() - start
        assert browser.console == [], browser.console
    return opened, drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="append the line here instead of to results/report_page.jsonl")
    options = parser.parse_args()
    program = found_program()
    if program is None:
        parser.error("no Chromium here (apt-get install chromium)")
    with tempfile.TemporaryDirectory() as folder:
        study, page = Path(folder) / "study", Path(folder) / "report.html"
        write_runs(study, runs=options.runs, steps=options.steps)
        start = time.perf_counter()
        done = CliRunner().invoke(report_command, [str(study), "--out", str(page)], catch_exceptions=False)
        written_s = time.perf_counter() - start
        assert done.exit_code == 0, done.output
        times = [
            open_page(program, page, Path(folder) / f"profile{number}", runs=options.runs)
            for number in range(options.rounds)
        ]
        opened, drawn = zip(*times, strict=True)
        line = {
            "benchmark": "report_page",
            "runs": options.runs,
            "steps": options.steps,
            "page_bytes": page.stat().st_size,
            "written_s": round(written_s, 2),
            "opened_s": {"median": statistics.median(opened), "least": min(opened), "most": max(opened)},
            "drawn_s": {"median": statistics.median(drawn), "least": min(drawn), "most": max(drawn)},
            "holds": statistics.median(opened) < OPEN_BAR_S and page.stat().st_size < SIZE_BAR,
        }
    print(json.dumps(line))
    line |= conditions(packages=("plotly",))
    append_line("report_page", line, options.out)


if __name__ == "__main__":
    main()
