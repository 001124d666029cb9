"""repa-cache import: parse, plan, run, report."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...cache_specs.errors import JobError
from ...cache_specs.schema import COMPRESSORS
from .progress import Progress
from .said import say, say_report

if TYPE_CHECKING:
    from ..importing.latents import ImportReport
    from ..importing.plan import ImportOptions, ImportPlan

LAYOUTS = ("repa", "edm2", "lightningdit", "arrow")
PIXEL_RANGES = {"-1,1": (-1.0, 1.0), "0,1": (0.0, 1.0)}
MAX_LISTED = 20  # samples that could not be used; the rest are counted


@click.command("import")
@click.option("--from", "layout", type=click.Choice(LAYOUTS), help="Whose layout. [default: what it looks like]")
@click.option("--data", type=click.Path(path_type=Path), required=True, metavar="PATH", help="The latents.")
@click.option("--cache", required=True, help="Where the cache is, or will be.")
@click.option("--autoencoder", required=True, metavar="NAME", help="What made them; of the table, or a name of yours.")
@click.option("--images", type=click.Path(path_type=Path), metavar="FOLDER", help="What they were made of, if apart.")
@click.option("--labels", type=click.Path(path_type=Path), metavar="FILE", help="arrow: a number a line, in row order.")
@click.option("--resolution", type=int, help="Of the images in pixels. [default: as the autoencoder's factor says]")
@click.option("--pixel-range", type=click.Choice(list(PIXEL_RANGES)), help="State what the autoencoder was fed.")
@click.option("--scaled-by", type=float, metavar="S", help="State what the latents were multiplied by; 1 for raw ones.")
@click.option("--log-variance", is_flag=True, help="The second half of the moments is log-variance: convert it.")
@click.option("--compressor", type=click.Choice(COMPRESSORS), default="none", show_default=True)
@click.option("--shard-samples", type=int, help="Samples a shard, fixed at creation. [default: 256]")
@click.option("--dry-run", is_flag=True, help="Look at the data and say what would be written; write nothing.")
def import_command(dry_run: bool, pixel_range: str | None, **asked: Any) -> None:
    """Bring precomputed latents into a cache: REPA's, EDM2's, LightningDiT's, or an Arrow data set's.

    \b
    repa-cache import --data REPA/data --cache caches/in1k --autoencoder sd-vae-ft-mse
    repa-cache build --data REPA/data/images --cache caches/in1k --encoder dinov2     # tokens to them

    What the numbers mean is checked before anything is written. Killed or stopped, the same command goes on where it
    was.
    """
    from ..importing.latents import run_import
    from ..importing.plan import ImportOptions, plan_import

    pixels = None if pixel_range is None else PIXEL_RANGES[pixel_range]
    options = ImportOptions(pixel_range=pixels, words=tuple(sys.argv[1:]), **asked)
    plan = plan_import(options)
    _print_plan(options, plan)
    if dry_run:
        say("nothing was written")
        return
    with Progress("samples") as progress:
        report = run_import(options, plan, on_start=progress.start, on_progress=progress.advance)
    _print_report(options, plan, report)


def _print_plan(options: "ImportOptions", plan: "ImportPlan") -> None:
    from ...cache_specs.schema import describe
    from ...cache_specs.sizes import human_bytes
    from ..importing.checks import numbers

    source, layout = plan.source, plan.layout
    what = "moments" if plan.reading.kind == "moments" else "sampled latents"
    images = f"images in {source.image_root}" if source.image_root else "no images"
    say_report(
        f"{options.data}: {layout.num_samples} samples in the layout {source.layout}, {what} "
        f"{list(plan.reading.shape[1:])}, {len(layout.class_names)} classes, {images}"
    )
    say_report(f"latents of {plan.look.num} of them: mean {numbers(plan.look.mean)}, std {numbers(plan.look.std)}")
    if plan.warning is not None:
        say(f"warning: {plan.warning}", err=True)
    say_report(f"{options.cache}: {plan.component.path}, {layout.resolution} px, views {' + '.join(layout.views)}")
    for name, shape, size in describe(plan.component, layout):
        say_report(f"  {name:<13} {shape:<32} {human_bytes(size)}")


def _print_report(options: "ImportOptions", plan: "ImportPlan", report: "ImportReport") -> None:
    manifest = plan.source.manifest
    for row in sorted(report.bad)[:MAX_LISTED]:
        say(f"bad latents: {manifest.sample_ids[row]}: {report.bad[row]}", err=True)
    if report.bad:
        raise JobError(
            f"{len(report.bad)} of {len(manifest)} samples could not be used (the first {MAX_LISTED} are listed "
            "above), so the ranges with them were not written and the cache is incomplete; mend them and run the same "
            "command again"
        )
    if report.statistics:
        say_report(f"imported {report.num_samples} samples; {plan.component.path}: complete")
    else:
        say_report(f"{options.cache}: {plan.component.path} is there and complete")
    if plan.source.image_root is None:
        say_report("without images no encoder's tokens can be added: train from it with --recipe sit")
