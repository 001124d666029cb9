"""repa-cache metrics, probe, cknna, correlate, show: what the cached tokens say about an encoder.

Each command parses, calls one function and reports; modules that load torch, scikit-learn or matplotlib are imported
inside it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import numpy as np

    from .features import Features
    from .measure import Mask
    from .store import CacheStore

DEFAULT_NUM = 10_000  # images: intervals of a per cent or two, minutes an encoder
MAX_CLASSES = 20  # printed; --csv has them all

_CACHE = click.argument("cache", type=click.Path(path_type=Path))
_ENCODERS = click.option("--encoder", "encoders", multiple=True, metavar="E", help="Repeatable. [default: all]")
_NUM = click.option(
    "--num", type=int, default=DEFAULT_NUM, show_default=True, help="Images, drawn once for all encoders."
)
_CSV = click.option("--csv", "csv_file", type=click.Path(path_type=Path), metavar="FILE", help="Write every figure.")


@click.command()
@_CACHE
@_ENCODERS
@_NUM
@click.option("--gamma", type=float, default=0.6, show_default=True, help="Of the spatial normalisation.")
@click.option("--masks", type=click.Path(path_type=Path), metavar="DIR", help="Foreground PNGs by sample id, for SRSS.")
@_CSV
def metrics(
    cache: Path, encoders: tuple[str, ...], num: int, gamma: float, masks: Path | None, csv_file: Path | None
) -> None:
    """Measure the spatial self-similarity of tokens: LDS, CDS, RMSC and, with masks, SRSS.

    \b
    repa-cache metrics caches/in1k --encoder dinov2 --encoder clip --csv metrics.csv

    Means over images with a 95 % bootstrap interval, as stored and normalised over space.
    """
    from tqdm import tqdm

    from .features import choose_rows, labels_of, open_encoders
    from .measure import class_table, measure, table, write_csv

    store, opened = open_encoders(cache, encoders)
    rows = choose_rows(opened, num)
    mask = None if masks is None else _mask_reader(store, masks)
    names = store.layout.class_names
    measured, labels = [], {}
    for encoder in opened:
        with tqdm(total=len(rows), unit=" images", desc=encoder.name, disable=None) as bar:
            found = measure(encoder, rows, gamma=gamma, mask=mask, on_progress=bar.update)
        measured.append(found)
        labels[encoder.name] = labels_of(store, found.rows)
        click.echo(_headline(encoder, found.rows, store))
        for line in table(found):
            click.echo(line)
        if 1 < len(names) <= MAX_CLASSES:
            for line in class_table(found, labels[encoder.name], names):
                click.echo(line)
        elif len(names) > MAX_CLASSES:
            click.echo(f"  {len(names)} classes: --csv FILE has them")
    if csv_file is not None:
        write_csv(csv_file, measured, labels, names)
        click.echo(f"every figure: {csv_file}")


def _headline(encoder: "Features", rows: "np.ndarray", store: "CacheStore") -> str:
    warning = "  UNTRAINED WEIGHTS: no result" if encoder.random_weights else ""
    return (
        f"{store.path}: features/{encoder.name}, {len(rows)} of {store.layout.num_samples} images, "
        f"{encoder.grid[0]} x {encoder.grid[1]} tokens of {encoder.width}{warning}"
    )


def _mask_reader(store: "CacheStore", folder: Path) -> "Mask":
    from .masks import MaskFolder

    ids = store.read("sample_id", 0, store.layout.num_samples).tolist()
    masks = MaskFolder(folder, ids, store.layout.resolution)
    return lambda row, grid: masks.read(ids[row], grid)


COMMANDS: tuple[click.Command, ...] = (metrics,)
