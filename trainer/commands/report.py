"""`repa-report`: a study's runs as a page, a table or JSON. torch is imported when it runs, not for its help."""

import datetime
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...cache_specs.errors import UsageError, one_line_errors
from .said import run_command, say
from .train import CONTEXT

if TYPE_CHECKING:
    from ..studies.compare import Comparison
    from ..studies.records import RunRecord, Study
    from ..studies.relations import Relations

PICTURES = 8  # in which it is shown what encoders see
METRICS_FILES = ("metrics.csv", "probe.csv")  # of a study's folder, read where --metrics names none


@click.command(context_settings=CONTEXT)
@click.argument("folders", nargs=-1, required=True, metavar="STUDY|RUNS...", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE.html", help="[default: STUDY/report.html]")
@click.option("--table", is_flag=True, help="Print the table instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON, for programs, instead.")
@click.option("--quality", metavar="NAME", help="Figure to order by. [default: the one of the most runs]")
@click.option("--under", type=float, multiple=True, metavar="K", help="Add E@K: the step at which quality is under K.")
@click.option("--step", type=int, help="Evaluated step at which runs are compared. [default: the last of most runs]")
@click.option(
    "--metrics", "metrics_files", multiple=True, type=click.Path(path_type=Path), metavar="FILE.csv",
    help="Of repa-cache metrics or probe, repeatable. [default: STUDY/metrics.csv and STUDY/probe.csv]",
)  # fmt: skip
@click.option("--cache", metavar="DIR|URL", help="For real images and what encoders see. [default: the runs' own]")
@click.option("--data", metavar="PATH|demo", help="The images. [default: the cache's latents, decoded]")
@click.option("--autoencoder-weights", type=click.Path(path_type=Path), help="Local weights of the decoder.")
@click.option("--gamma", type=float, default=0.6, show_default=True, help="Of what encoders see, normalised.")
def report_command(folders: tuple[Path, ...], table: bool, as_json: bool, **options: Any) -> None:
    """Compare the runs of a study, those started by hand too: one HTML file, a table, or JSON.

    \b
    repa-report studies/encoders --out report.html
    repa-report runs/irepa-dinov2 runs/irepa-clip runs/sit --table

    Seeds are averaged, runs that are not finished or were evaluated otherwise stand apart, and nothing is changed.
    """
    with one_line_errors("repa-report"):
        if table and as_json:
            raise UsageError("--table and --json print two forms of one table; choose one of them")
        _report(folders, table=table, as_json=as_json, **options)


def _report(folders: tuple[Path, ...], *, table: bool, as_json: bool, out: Path | None, **options: Any) -> None:
    from ..studies.compare import compare
    from ..studies.origin import mixed
    from ..studies.records import load
    from ..studies.table import as_json as plain
    from ..studies.table import as_text, make_table

    study = load(*folders)
    found = compare(study, quality=options["quality"], step=options["step"])
    found.notes += mixed([run for one in found.settings for run in one.runs])
    made = make_table(found, under=options["under"])
    if as_json:
        say(json.dumps(plain(made), indent=1))
    elif table:
        width = shutil.get_terminal_size((120, 24)).columns
        for line in as_text(made, width=width):
            say(line)
    else:
        from ..studies.page import render, write_page

        out = out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
        relations, why = _relations(found, folders, options["metrics_files"])
        run = next((run for one in found.settings for run in one.runs), study[0])
        html = render(
            found,
            made,
            relations=relations,
            relations_missing=why,
            samples=_samples(found, run, options),
            made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            command=shlex.join(["repa-report", *sys.argv[1:]]),
            **_components(study, run, options),
        )
        write_page(out, html)
        say(made.facts[0])
        say(f"{out}: {len(study)} runs, {len(html) / 1e6:.1f} MB")


def _relations(
    found: "Comparison", folders: tuple[Path, ...], files: tuple[Path, ...]
) -> tuple["Relations | None", str]:
    """Return quality against encoder metrics, or why there is nothing to show."""
    from ..studies.relations import relate
    from .borrowed import correlate_quality, encoder_metrics

    files = files or tuple(file for folder in folders for name in METRICS_FILES if (file := folder / name).exists())
    folder = folders[0]
    if not files:
        return None, (
            f"No metrics of the encoders are at hand. Give these, then this report again: repa-cache metrics CACHE "
            f"--csv {folder / METRICS_FILES[0]}; repa-cache probe CACHE --csv {folder / METRICS_FILES[1]}"
        )
    if found.quality is None:
        return None, "There is no quality to compare with: no finished run was evaluated."
    relations = relate(found, encoder_metrics(files), correlate_quality)
    return relations, "No compared run is aligned with exactly one encoder that was measured."


def _source(run: "RunRecord", options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the cache to show pictures of, and how they are had: `images_of`'s data, autoencoder, weights."""
    settings = run.settings
    weights = options["autoencoder_weights"] or settings.get("evaluation.autoencoder_weights")
    source = {
        "data": options["data"],
        "autoencoder": settings.get("autoencoder"),
        "weights": None if weights is None else Path(weights),
    }
    return options["cache"] or str(settings.get("cache")), source


def _samples(found: "Comparison", run: "RunRecord", options: dict[str, Any]) -> Any:
    from ..studies.pictures import sample_sheet
    from .borrowed import real_images

    cache, source = _source(run, options)
    return sample_sheet(found, real_images(cache, **source))


def _components(study: "Study", run: "RunRecord", options: dict[str, Any]) -> dict[str, Any]:
    """Return what the encoders that runs are aligned with see, for `render`."""
    from ...cache_specs.errors import RepaError
    from ..studies.pictures import component_map, picture
    from .borrowed import component_pictures

    cache, source = _source(run, options)
    encoders = list(dict.fromkeys(name for one in study for name in one.config.get("encoders") or ()))
    if not encoders:
        return {"components": None, "components_missing": "No run is aligned with an encoder."}
    try:
        images, ids, maps, notes = component_pictures(cache, encoders, PICTURES, gamma=options["gamma"], **source)
    except RepaError as error:
        return {"components": None, "components_missing": f"{error}. Name the cache with --cache."}
    shown = {
        "images": None if images is None else [picture(image) for image in images],
        "captions": ids,
        "encoders": [
            (
                name,
                [
                    (words, [component_map(one) for one in colours])
                    for words, colours in zip(("as stored", "normalised"), both, strict=True)
                ],
            )
            for name, both in maps.items()
        ],
        "notes": notes,
        "gamma": f"{options['gamma']:g}",
    }
    return {"components": shown, "components_missing": ""}


def report() -> None:
    """Entry point of repa-report."""
    run_command(report_command, "repa-report", aborted="stopped")


if __name__ == "__main__":
    report()
