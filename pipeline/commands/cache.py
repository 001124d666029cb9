"""repa-cache: build, import, info, verify, encoders. Each command parses, calls one function, and reports.

Modules that load torch, timm or ray are imported inside the commands: `--help` answers at once.
"""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...cache_specs.errors import JobError, UsageError, one_line_errors
from ...cache_specs.schema import COMPRESSORS, PRECISIONS, STORAGE_DTYPES
from .estimate import estimate
from .imports import import_command
from .metrics import COMMANDS

if TYPE_CHECKING:
    from ..building.build import BuildReport
    from ..building.plan import BuildOptions, BuildPlan
    from ..images.manifest import ImageSource, Manifest

MAX_LISTED = 20  # damaged files in the line that removes them; verify has named them all above it


@click.group(
    commands=(*COMMANDS, estimate, import_command),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="repa-cache")
def cli() -> None:
    """Precompute autoencoder latents and frozen-encoder tokens once; train from them many times."""


@cli.command()
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
    "--dtype", type=click.Choice(STORAGE_DTYPES), default="float16", show_default=True, help="Of patch tokens."
)
@click.option("--weights", multiple=True, metavar="NAME=FILE", help="Local weights (.safetensors, .pth) of a model.")
@click.option("--random-weights", is_flag=True, help="Untrained models, named so: to try the pipeline, never results.")
@click.option("--labels", metavar="FILE.csv", help="Lines of sample id,label; or 'folders' for five-digit classes.")
@click.option("--compressor", type=click.Choice(COMPRESSORS), default="none", show_default=True)
@click.option("--shard-samples", type=int, help="Samples a shard, fixed at creation. [default: 256]")
@click.option("--batch-size", type=int, default=32, show_default=True, help="Images a forward pass.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Of the forward.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
@click.option("--workers", type=int, help="Ray workers; 0 encodes in this process. [default: one a GPU, else 1]")
@click.option("--threads", type=int, help="CPU threads a worker. [default: this machine's cores / workers]")
@click.option("--address", metavar="ADDR", help="Ray cluster to join: auto, or host:port.")
@click.option("--skip-bad", is_flag=True, help="Leave unreadable images out instead of stopping short of them.")
@click.option("--dry-run", is_flag=True, help="Say what would be built; load and write nothing.")
def build(data: str, weights: tuple[str, ...], labels: str | None, dry_run: bool, **asked: Any) -> None:
    """Encode images into a cache, or add a component to one that is there.

    \b
    repa-cache build --data imagenet/train --cache caches/in1k --encoder dinov2 --flip
    repa-cache build --data imagenet/train --cache caches/in1k --encoder clip      # adds one

    Killed or stopped, the same command goes on where it was: finished ranges are kept.
    """
    from ..building.build import run_build
    from ..building.plan import BuildOptions, plan_build

    manifest = _manifest(data, labels)
    if manifest.left_out:
        click.echo(f"{manifest.where}: {manifest.left_out} files without an image ending are left out", err=True)
    options = BuildOptions(manifest=manifest, weights=_weights(weights), **asked)
    if dry_run:
        _print_plan(options, plan_build(options))
        return
    from tqdm import tqdm

    bar = tqdm(unit=" images", smoothing=0.1, disable=None)

    def start(done: int, total: int) -> None:
        bar.reset(total=total)
        bar.n = bar.last_print_n = bar.initial = done  # what was there before has no part in the rate
        bar.refresh()

    def advance(samples: int) -> None:
        bar.update(samples)

    def say(line: str) -> None:
        bar.write(line, file=sys.stderr)

    try:
        report = run_build(options, on_start=start, on_progress=advance, on_message=say)
    finally:
        bar.close()
    _print_report(options, report)


def _manifest(data: str, labels: str | None) -> "Manifest":
    if data == "demo":
        from ..images.demo_data import demo_manifest

        if labels is not None:
            raise UsageError("--data demo has its own labels; leave out --labels")
        return demo_manifest()
    from ..images.manifest import scan_folder

    return scan_folder(Path(data), labels)


def _source(data: str) -> "ImageSource":
    """Return where pictures are read from, without listing them."""
    from ..images.manifest import FolderSource

    return _manifest(data, None).source if data == "demo" else FolderSource(Path(data).absolute())


def _weights(pairs: tuple[str, ...]) -> dict[str, Path]:
    from ...cache_specs.tables import encoder_name

    files = {}
    for pair in pairs:
        name, separator, file = pair.partition("=")
        if not separator or not file:
            raise UsageError(f"--weights {pair}: expected NAME=FILE, as in --weights dinov2-vit-b=model.safetensors")
        files[encoder_name(name)] = Path(file).absolute()
    return files


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _print_plan(options: "BuildOptions", plan: "BuildPlan") -> None:
    from ...cache_specs.sizes import human_bytes
    from ..building.plan import describe

    layout = plan.layout
    click.echo(
        f"{options.cache}: {'an existing' if plan.exists else 'a new'} cache of {layout.num_samples} samples, "
        f"{len(layout.class_names)} classes, {layout.resolution} px, views {' + '.join(layout.views)}"
    )
    total = 0
    for request in plan.requests:
        component = request.component("")
        missing = len(plan.missing[component.path])
        click.echo(f"{component.path}: {missing} of {layout.num_ranges} ranges to encode")
        for name, shape, size in describe(component, layout):
            total += size
            click.echo(f"  {name:<13} {shape:<32} {human_bytes(size)}")
    click.echo(f"{human_bytes(total)} in all; nothing was written")


def _print_report(options: "BuildOptions", report: "BuildReport") -> None:
    if report.num_images:
        rate = report.num_images / max(report.seconds, 1e-9)
        click.echo(f"encoded {report.num_images} images in {report.seconds:.1f} s ({rate:.1f} images/s)")
    for path in report.completed:
        click.echo(f"{path}: complete")
        error = report.statistics[path].get("float16_error")
        if isinstance(error, float):
            advice = "; --dtype int8 would be nearer" if error > 0.01 else ""
            click.echo(f"  float16 moves a channel's mean by at most {error:.2g} of its std{advice}")
    if not report.num_images and not report.completed:
        click.echo(f"{options.cache}: everything asked for is there and complete")
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
        click.echo(f"{bad} bad images were left out (--skip-bad); training does not see them")


@cli.command()
@click.argument("cache", metavar="DIR|URL")
def info(cache: str) -> None:
    """Say what is in a cache: components, shapes, bytes, fingerprints, what is missing.

    \b
    repa-cache info caches/in1k
    """
    from ..checking.info import info_lines

    for line in info_lines(cache):
        click.echo(line)


@cli.command()
@click.argument("cache", metavar="DIR|URL")
@click.option("--recompute", "num", type=int, metavar="K", help="Also encode K samples again from their images.")
@click.option("--data", metavar="PATH|demo", help="The images of --recompute.")
@click.option("--weights", multiple=True, metavar="NAME=FILE", help="Local weights for --recompute, as at the build.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="For --recompute. [default: cuda where there is one]"
)
def verify(cache: str, num: int | None, data: str | None, weights: tuple[str, ...], device: str | None) -> None:
    """Check every shard, chunk, checksum and value of a cache.

    \b
    repa-cache verify caches/in1k
    repa-cache verify caches/in1k --recompute 64 --data imagenet/train     # do the images still give this?
    """
    from tqdm import tqdm

    from ...cache_specs.sizes import human_bytes
    from ..checking.verify import verify as check

    if (num is None) != (data is None):
        raise UsageError("--recompute K encodes images again: it needs --data PATH, and --data is for it alone")
    with tqdm(unit=" shards", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = check(cache, on_progress=progress)
    for problem in report.problems:
        click.echo(problem, err=True)
    if report.problems:
        damaged = list(report.damaged_files)
        remove = "aws s3 rm " if cache.startswith("s3://") else "rm "
        between = f"; {remove}" if cache.startswith("s3://") else " "
        files = between.join(shlex.quote(str(file)) for file in damaged[:MAX_LISTED])
        more = f" (and {len(damaged) - MAX_LISTED} more, which verify names then)" if len(damaged) > MAX_LISTED else ""
        way_out = f"delete the damaged files{more} and run the build again: {remove}{files}"
        way_out = way_out if files else "run the build again"
        raise JobError(f"{cache}: {len(report.problems)} problems in {report.num_shards} shards; {way_out}")
    click.echo(
        f"{cache}: {report.num_shards} shards, {human_bytes(report.num_bytes)}: all there, checksums and values hold"
    )
    if num is not None and data is not None:
        _recompute(cache, num, data, weights, device or _default_device())


def _recompute(cache: str, num: int, data: str, weights: tuple[str, ...], device: str) -> None:
    from ..checking.recompute import recompute

    problems = []
    for agreement in recompute(cache, _source(data), num=num, weights=_weights(weights), device=device):
        problems += agreement.problems
        if agreement.left_out:
            click.echo(f"{agreement.path}: not encoded again: {agreement.left_out}")
        if agreement.cosines:
            click.echo(
                f"{agreement.path}: {agreement.num_samples} samples encoded again, cosine to what is stored: "
                f"mean {agreement.mean:.6f}, min {agreement.min:.6f}"
            )
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        raise JobError(
            f"{cache}: {len(problems)} differences between the images in {data} and what is stored; put the old files "
            "back, or build a new cache"
        )


@cli.command()
def encoders() -> None:
    """Print the table of encoders: names, sizes, which tensor, licence, where the weights come from.

    \b
    repa-cache encoders
    """
    from ...cache_specs.tables import encoder_table_lines

    for line in encoder_table_lines():
        click.echo(line)


def main() -> None:
    """Run `repa-cache`."""
    with one_line_errors("repa-cache"):
        try:
            cli(standalone_mode=False)
        except click.UsageError as error:
            error.show()
            sys.exit(2)
        except click.exceptions.Exit as error:
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            click.echo("stopped; the same command goes on where it was", err=True)
            sys.exit(130)
