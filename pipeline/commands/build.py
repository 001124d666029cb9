"""repa-cache build: parse, plan, build, report."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...cache_specs.errors import JobError, UsageError
from ...cache_specs.schema import COMPRESSORS, PRECISIONS, STORAGE_DTYPES, describe
from .progress import Progress
from .said import folded, say, say_report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..building.build import BuildReport
    from ..building.plan import BuildOptions, BuildPlan
    from ..building.request import ModelRequest
    from ..images.manifest import KnownSamples, Manifest


@click.command()
@click.option("--data", required=True, metavar="PATH|demo", help="Folder of images, or the demo's photographs.")
@click.option(
    "--cache", required=True, metavar="DIR|URL", help="Where it is, or will be: a folder, s3://bucket/prefix."
)
@click.option("--encoder", "encoders", multiple=True, metavar="NAME", help="Encoder, repeatable: dinov2, hog:grid=8.")
@click.option(
    "--autoencoder", metavar="NAME", help="Autoencoder, or none. [default: sd-vae-ft-mse if it has no latents]"
)
@click.option("--resolution", type=int, help="Side of the centre crop in pixels. [default: 256]")
@click.option("--flip/--no-flip", default=None, help="Store the horizontal mirror as a second view.")
@click.option(
    "--dtype",
    type=click.Choice(STORAGE_DTYPES),
    default="float16",
    show_default=True,
    help="Of patch tokens, float16 or int8; uint8: of --autoencoder pixels.",
)
@click.option("--weights", multiple=True, metavar="NAME=FILE", help="Local weights (.safetensors, .pth) of a model.")
@click.option("--random-weights", is_flag=True, help="Untrained models, named so: to try the pipeline, never results.")
@click.option("--labels", metavar="FILE.csv", help="Lines of sample id,label; or 'folders' for five-digit classes.")
@click.option("--allow-empty", is_flag=True, help="Let a class folder without images keep its number.")
@click.option("--compressor", type=click.Choice(COMPRESSORS), default="none", show_default=True)
@click.option("--shard-samples", type=int, help="Samples a shard, fixed at creation. [default: 256]")
@click.option("--batch-size", type=int, help="Images a forward pass. [default: 32; on a GPU by its memory]")
@click.option(
    "--precision",
    type=click.Choice(("auto", *PRECISIONS)),
    default="auto",
    show_default=True,
    help="Of the forward. auto: as begun; new on a GPU bf16 (maps, latents tf32), on a CPU fp32.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
@click.option("--workers", type=int, help="Ray workers; 0: none, this process. [default: 0, or one a GPU of several]")
@click.option("--threads", type=int, help="CPU threads a worker. [default: cores / workers; with a GPU 4]")
@click.option("--address", metavar="ADDR", help="Ray cluster to join: auto, or host:port.")
@click.option("--skip-bad", is_flag=True, help="Leave unreadable images out instead of stopping short of them.")
@click.option("--dry-run", is_flag=True, help="Say what would be built, and what would refuse it; write nothing.")
def build(
    data: str, weights: tuple[str, ...], labels: str | None, allow_empty: bool, dry_run: bool, **asked: Any
) -> None:
    """Encode images into a cache, or add a component to one that is there.

    \b
    repa-cache build --data imagenet/train --cache caches/in1k --encoder dinov2 --flip
    repa-cache build --data imagenet/train --cache caches/in1k --encoder clip      # adds one

    Killed or stopped, the same command goes on where it was: finished ranges are kept.
    """
    from ..building.build import run_build
    from ..building.plan import BuildOptions, plan_build
    from ..store.store import known_samples

    manifest = manifest_of(data, labels, allow_empty=allow_empty, known=known_samples(asked["cache"]))
    if manifest.left_out:
        say(f"{manifest.where}: {manifest.left_out} files without an image ending are left out", err=True)
    if manifest.further:
        say(
            f"{manifest.where}: {manifest.further} further images are not in {asked['cache']}, which keeps its own; "
            "for all of them name another --cache",
            err=True,
        )
    options = BuildOptions(manifest=manifest, weights=weights_of(weights), words=tuple(sys.argv[1:]), **asked)
    if dry_run:
        plan = plan_build(options)
        _check_own(plan)
        _print_plan(options, plan)
        return
    with Progress("images") as progress:
        report = run_build(
            options,
            on_plan=lambda plan: progress.say("\n".join(_plan_lines(plan, manifest)), err=False),
            on_start=progress.start,
            on_progress=progress.advance,
            on_message=progress.say,
        )
    _print_report(options, report)


def manifest_of(
    data: str, labels: str | None, *, allow_empty: bool = False, known: "KnownSamples | None" = None
) -> "Manifest":
    """Return the images and labels that `--data` and `--labels` name."""
    if data == "demo":
        from ..images.demo_data import demo_manifest

        if labels is not None:
            raise UsageError("--data demo has its own labels; leave out --labels")
        return demo_manifest()
    from ..images.manifest import scan_folder

    return scan_folder(Path(data), labels, allow_empty=allow_empty, known=known)


def weights_of(pairs: tuple[str, ...]) -> dict[str, Path]:
    """Return the files of `--weights NAME=FILE` by the table's name."""
    from ...cache_specs.tables import as_known, autoencoder_table, encoder_name

    files = {}
    for pair in pairs:
        name, separator, file = pair.partition("=")
        if not separator or not file:
            raise UsageError(f"--weights {pair}: expected NAME=FILE, as in --weights dinov2-vit-b=model.safetensors")
        name = Path(name).stem if name.endswith((".yaml", ".yml")) else name  # a file of one's own
        files[as_known(encoder_name(name), autoencoder_table())] = Path(file).absolute()
    return files


def _check_own(plan: "BuildPlan") -> None:
    """Raise `UsageError` where an entry of the user's own is not what its model gives; the tables' rows are known."""
    from ...cache_specs.tables import autoencoder_table, encoder_table

    own = [request for request in plan.requests if request.spec["entry"] not in encoder_table() | autoencoder_table()]
    if own:
        from ...cache_specs.derived import network_spec
        from ..models.shapes import check_shapes

        for request in own:
            check_shapes(network_spec(request.spec), request.code)


def _plan_lines(plan: "BuildPlan", manifest: "Manifest") -> "Iterator[str]":
    """Yield, folded, what is best known before hours of encoding: what the classes are, and which models fit."""
    from ..building.grids import fit_lines
    from ..images.manifest import class_lines

    for line in (*class_lines(manifest), *fit_lines(plan.requests, plan.latents)):
        yield from folded(line)


def _print_plan(options: "BuildOptions", plan: "BuildPlan") -> None:
    from ...cache_specs.sizes import human_bytes

    layout = plan.layout
    say_report(
        f"{options.cache}: {'an existing' if plan.exists else 'a new'} cache of {layout.num_samples} samples, "
        f"{len(layout.class_names)} classes, {layout.resolution} px, views {' + '.join(layout.views)}"
    )
    total = 0
    for request in plan.requests:
        missing, precision = plan.missing[request.path], _precision(request, options.known_device)
        say_report(f"{request.path}: {len(missing)} of {layout.num_ranges} ranges to encode, {precision}")
        component = request.on(options.known_device or "cuda").component("")
        for name, shape, size in describe(component, layout):
            total += size
            say_report(f"  {name:<13} {shape:<32} {human_bytes(size)}")
    say_report(*_plan_lines(plan, options.manifest))
    say_report(f"{human_bytes(total)} in all; nothing was written")


def _precision(request: "ModelRequest", device: str | None) -> str:
    """Say in what a component will be encoded, or what that depends on."""
    on_gpu, on_cpu = request.on("cuda").precision, request.on("cpu").precision
    if device is not None or on_gpu == on_cpu:
        return on_cpu if device == "cpu" else on_gpu
    return f"{on_gpu} if the cluster has a GPU, else {on_cpu}"


def _print_report(options: "BuildOptions", report: "BuildReport") -> None:
    if report.num_images:
        rate = report.num_images / max(report.seconds, 1e-9)
        say_report(f"encoded {report.num_images} images in {report.seconds:.1f} s ({rate:.1f} images/s)")
    for path in report.completed:
        say_report(f"{path}: complete")
        error = report.statistics[path].get("float16_error")
        if isinstance(error, float):
            advice = "; --dtype int8 would be nearer" if error > 0.01 else ""
            say_report(f"  float16 moves a channel's mean by at most {error:.2g} of its std{advice}")
    if not report.num_images and not report.completed:
        say(f"{options.cache}: everything asked for is there and complete")
    bad, passing = len(report.unusable), len(report.passing)
    if passing:
        raise JobError(
            f"{passing} images could not be read (listed above) for a reason of the disk, the network or the memory, "
            "not of the file, so the ranges with them were not written; see to it and run the same command again"
        )
    if bad and not options.skip_bad:
        raise JobError(
            f"{bad} of {len(options.manifest)} images could not be used (listed above), so the ranges with them "
            "were not written and the cache is incomplete; mend the files and run the same command again, "
            "or add --skip-bad to leave them out"
        )
    if bad:
        say_report(f"{bad} bad images were left out (--skip-bad); training does not see them")
