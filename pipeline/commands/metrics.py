"""repa-cache metrics, probe, cknna, correlate, show: what the cached tokens say about an encoder.

Each command parses, calls one function and reports; modules that load torch, scikit-learn or matplotlib are imported
inside it.
"""

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...cache_specs.errors import UsageError
from .progress import Progress
from .said import say

if TYPE_CHECKING:
    import numpy as np

    from ..analysis.features import Features
    from ..analysis.measure import Mask
    from ..store.store import CacheStore

DEFAULT_NUM = 10_000  # images: intervals of a per cent or two, minutes an encoder
MAX_CLASSES = 20  # printed; --csv has them all

_CACHE = click.argument("cache", metavar="DIR|URL")
_ENCODERS = click.option("--encoder", "encoders", multiple=True, metavar="E", help="Repeatable. [default: all]")
_NUM = click.option(
    "--num", type=int, default=DEFAULT_NUM, show_default=True, help="Images, drawn once for all encoders."
)
ENTRY = click.option(
    "--entry", "entries", multiple=True, type=click.Path(path_type=Path), metavar="FILE.yaml",
    help="File of a network of your own (loader: python), repeatable: a cache never causes an import.",
)  # fmt: skip
_CSV = click.option("--csv", "csv_file", type=click.Path(path_type=Path), metavar="FILE", help="Write every figure.")


@click.command()
@_CACHE
@_ENCODERS
@_NUM
@click.option("--gamma", type=float, default=0.6, show_default=True, help="Of the spatial normalisation.")
@click.option("--masks", type=click.Path(path_type=Path), metavar="DIR", help="Foreground PNGs by sample id, for SRSS.")
@_CSV
def metrics(
    cache: str, encoders: tuple[str, ...], num: int, gamma: float, masks: Path | None, csv_file: Path | None
) -> None:
    """Measure the spatial self-similarity of tokens: LDS, CDS, RMSC and, with masks, SRSS.

    \b
    repa-cache metrics caches/in1k --encoder dinov2 --encoder clip --csv metrics.csv

    Means over images with a 95 % bootstrap interval, as stored and normalised over space.
    """
    from ..analysis.features import choose_rows, labels_of, open_encoders
    from ..analysis.measure import class_table, measure, table, write_csv

    store, opened = open_encoders(cache, encoders)
    rows = choose_rows(opened, num)
    mask = None if masks is None else _mask_reader(store, masks)
    names = store.layout.class_names
    measured, labels = [], {}
    for encoder in opened:
        with Progress("images", of=encoder.name) as progress:
            progress.start(0, len(rows))
            found = measure(encoder, rows, gamma=gamma, mask=mask, on_progress=progress.advance)
        measured.append(found)
        labels[encoder.name] = labels_of(store, found.rows)
        say(_headline(encoder, found.rows, store))
        for line in table(found):
            say(line)
        if 1 < len(names) <= MAX_CLASSES:
            for line in class_table(found, labels[encoder.name], names):
                say(line)
        elif len(names) > MAX_CLASSES:
            say(f"  {len(names)} classes: --csv FILE has them")
    if csv_file is not None:
        write_csv(csv_file, measured, labels, names)
        say(f"every figure: {csv_file}")


def _headline(encoder: "Features", rows: "np.ndarray", store: "CacheStore") -> str:
    warning = "  UNTRAINED WEIGHTS: no result" if encoder.random_weights else ""
    mark = f", {encoder.enlarged}" if encoder.enlarged else ""
    return (
        f"{store.path}: features/{encoder.name}, {len(rows)} of {store.layout.num_samples} images, "
        f"{encoder.grid[0]} x {encoder.grid[1]} tokens of {encoder.width}{mark}{warning}"
    )


def _mask_reader(store: "CacheStore", folder: Path) -> "Mask":
    from ..analysis.masks import MaskFolder

    ids = store.read("sample_id", 0, store.layout.num_samples).tolist()
    masks = MaskFolder(folder, ids, store.layout.resolution)
    return lambda row, grid: masks.read(ids[row], grid)


@click.command()
@_CACHE
@click.option("--encoder", required=True, metavar="E")
@click.option("--samples", type=int, default=6, show_default=True, help="How many, spread over the classes.")
@click.option("--gamma", type=float, default=0.6, show_default=True, help="Of the spatial normalisation.")
@click.option("--data", metavar="PATH|demo", help="The images. [default: the cache's latents, decoded]")
@click.option("--autoencoder", metavar="NAME", help="Latents to decode. [default: the only ones in the cache]")
@click.option("--weights", type=click.Path(path_type=Path), metavar="FILE", help="The autoencoder's, if not published.")
@ENTRY
@click.option("--out", type=click.Path(path_type=Path), default="show.png", show_default=True, metavar="FILE")
def show(cache: str, encoder: str, samples: int, gamma: float, out: Path, **pictures: Any) -> None:
    """Draw what an encoder sees: principal components, and likeness to three anchor tokens.

    \b
    repa-cache show caches/in1k --encoder dinov2 --samples 6 --out show.png
    """
    from ..analysis.features import open_encoders, sample_id
    from ..analysis.pictures import images_of, spread_rows
    from ..analysis.show import Panel, draw

    store, (features,) = open_encoders(cache, [encoder])
    rows = spread_rows(store, features, samples)
    images = images_of(store, features, rows, **pictures)
    panels = [
        Panel(image=images[batch_row], stored=stored, normalized=normalized, grid=features.grid, title=title)
        for batch_row, (stored, normalized, title) in enumerate(
            (stored, normalized, sample_id(store, int(row)))
            for batch in features.batches(rows)
            for stored, normalized, row in zip(batch.tokens, batch.normalized(gamma), batch.rows, strict=True)
        )
    ]
    warning = " (UNTRAINED)" if features.random_weights else ""
    warning += f" ({features.enlarged})" if features.enlarged else ""
    draw(panels, out, title=f"{features.name}{warning}", gamma=gamma)
    say(f"{out}: {len(rows)} samples of {cache}, features/{features.name}{warning}")


@click.command()
@_CACHE
@_ENCODERS
@_NUM
@click.option("--folds", type=int, default=5, show_default=True, help="Of the cross-validation.")
@click.option("--neighbours", type=int, default=20, show_default=True, help="k of k-NN.")
@_CSV
def probe(cache: str, encoders: tuple[str, ...], num: int, folds: int, neighbours: int, csv_file: Path | None) -> None:
    """Measure how well features tell classes apart: linear probe and k-NN, cross-validated.

    \b
    repa-cache probe caches/in1k --encoder dinov2 --csv probe.csv

    On mean-pooled patch tokens and on the class token; accuracy with its standard deviation over folds.
    """
    from ..analysis.features import choose_rows, labels_of, open_encoders
    from ..analysis.measure import ALL_CLASSES, csv_row, write_rows
    from ..analysis.probe import accuracies, probeable

    store, opened = open_encoders(cache, encoders)
    rows = choose_rows(opened, num)
    usable = probeable(rows, labels_of(store, rows), store.layout.class_names, folds)
    for words in usable.left_out:
        say(f"left out, fewer images than {folds} folds: {words}", err=True)
    figures = []
    for encoder in opened:
        say(_headline(encoder, usable.rows, store))
        kinds = {"mean-pooled": encoder.pooled} | ({"cls": encoder.cls} if encoder.has_cls else {})
        for kind, read in kinds.items():
            features = read(usable.rows)
            for found in accuracies(features, usable.labels, name=kind, folds=folds, neighbours=neighbours):
                words = f"  ({found.words})" if found.words else ""
                say(f"  {found.classifier:<13}{kind:<12}{found.mean:.4f} +- {found.spread:.4f}{words}")
                figures.append(csv_row(encoder.name, "", ALL_CLASSES, found.metric, found.estimate()))
        if "cls" not in kinds:
            say("  cls: the encoder has none")
        say(f"  always the largest class: {usable.most_frequent:.4f}")
    if csv_file is not None:
        write_rows(csv_file, figures)
        say(f"every figure: {csv_file}")


@click.command()
@_CACHE
@click.option("--encoder", "encoders", multiple=True, metavar="E", help="Two or more. [default: all]")
@_NUM
@click.option("--k", type=int, default=10, show_default=True, help="Neighbours.")
def cknna(cache: str, encoders: tuple[str, ...], num: int, k: int) -> None:
    """Measure whether encoders agree on who is near whom (CKNNA, mean-pooled tokens).

    \b
    repa-cache cknna caches/in1k --encoder dinov2 --encoder clip

    Between a trained SiT's layer and an encoder: repa-cknna.
    """
    import torch

    from ..analysis.cknna import cknna as align
    from ..analysis.features import choose_rows, open_encoders

    store, opened = open_encoders(cache, encoders)
    if len(opened) < 2:
        raise UsageError(f"{cache}: CKNNA is between two encoders; found only {opened[0].name}")
    rows = choose_rows(opened, num)
    pooled = [torch.from_numpy(encoder.pooled(rows)) for encoder in opened]
    say(f"{store.path}: CKNNA with k = {k} on {len(rows)} images")
    for i, j in itertools.combinations(range(len(opened)), 2):
        words = "  UNTRAINED WEIGHTS: no result" if opened[i].random_weights or opened[j].random_weights else ""
        say(f"  {opened[i].name} and {opened[j].name}: {align(pooled[i], pooled[j], k):.4f}{words}")


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="RESULTS.csv | RUNS...")
@click.option(
    "--metrics", "metrics_files", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
    help="CSV of repa-cache metrics or probe, repeatable: what is joined with RUNS.",
)  # fmt: skip
@click.option("--quality", metavar="NAME", help="Figure to explain. [default: the only one]")
@click.option(
    "--group-by", "keys", multiple=True, metavar="KEY",
    help="Setting in which RUNS differ, repeatable: a table and a figure for each of its values.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default="correlate.png", show_default=True, metavar="FILE.png")
def correlate(
    sources: tuple[str, ...], metrics_files: tuple[Path, ...], quality: str | None, keys: tuple[str, ...], out: Path
) -> None:
    """Correlate encoder metrics with the quality of the runs trained on them.

    \b
    repa-cache correlate runs/dinov2 runs/clip runs/mae --metrics metrics.csv --metrics probe.csv
    repa-cache correlate runs/* --metrics metrics.csv --group-by alignment.gamma
    repa-cache correlate results.csv --quality fid

    RESULTS.csv has a line an encoder: encoder, its metrics, and quality figures. RUNS are folders with evaluations;
    those of one encoder are averaged where they differ in their seed alone.
    Writes the figure, and beside it a CSV of the correlations and one of what was joined.
    """
    from ..analysis.run_results import grouped

    paths = [Path(source) for source in sources]
    if not keys:
        _correlate(paths, metrics_files, quality, out)
        return
    if any(path.is_file() for path in paths):
        raise UsageError("--group-by is for RUNS: a results file has a line an encoder")
    groups, refused = grouped(paths, keys), []
    for label, runs in groups.items():
        say(f"{label}:")
        suffix = re.sub(r"[^\w.=-]+", "-", label)
        try:
            _correlate(runs, metrics_files, quality, out.with_stem(f"{out.stem}-{suffix}"))
        except UsageError as error:
            refused.append(error)
            say(f"  left out: {error}")
    if len(refused) == len(groups):
        raise UsageError(f"nothing could be correlated by {', '.join(keys)}: {refused[0]}")


def _correlate(sources: list[Path], metrics_files: tuple[Path, ...], quality: str | None, out: Path) -> None:
    from ..analysis.correlate import correlate as compute
    from ..analysis.correlate import figure, lines, write_tables
    from ..analysis.results import join

    results = join(sources, metrics_files, quality)
    for note in results.notes:
        say(note, err=True)
    found = compute(results)
    for line in lines(found, results):
        say(line)
    figure(found, results, out)
    tables = write_tables(found, results, out)
    say(f"{out}; {', '.join(map(str, tables))}")


COMMANDS: tuple[click.Command, ...] = (metrics, probe, cknna, correlate, show)
