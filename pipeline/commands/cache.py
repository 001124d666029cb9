"""repa-cache: info, verify, and the other commands put together.

Each command parses, calls one function, and reports. Modules that load torch, timm or ray are imported inside the
commands: `--help` answers at once.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from ...cache_specs.errors import CacheError, JobError, UsageError, expand_home, one_line_errors
from .bind import bind
from .build import build, weights_of
from .derive import derive
from .encoders import encoders
from .estimate import estimate
from .imports import import_command
from .metrics import COMMANDS, ENTRY
from .progress import Progress
from .push import push
from .reference import reference
from .said import JSON, say, say_json, say_report

MAX_LISTED = 20  # damaged files in the line that removes them; verify has named them all above it


@click.group(
    commands=(*COMMANDS, bind, build, derive, encoders, estimate, import_command, push, reference),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="repa-cache")
def cli() -> None:
    """Precompute autoencoder latents and frozen-encoder tokens once; train from them many times."""


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@cli.command()
@click.argument("cache", metavar="DIR|URL")
@JSON
def info(cache: str, as_json: bool) -> None:
    """Say what is in a cache: components, shapes, bytes, fingerprints, what is missing.

    \b
    repa-cache info caches/in1k
    repa-cache info caches/in1k --json | jq '.components[] | select(.complete | not) | .finish'
    """
    from ..checking.info import cache_record, info_lines

    record = cache_record(cache)
    if as_json:
        say_json(record)
    else:
        say_report(*info_lines(record))
    damaged = next((one["error"] for one in (*record["components"], *record["fits"]) if "error" in one), None)
    if damaged is not None:
        raise CacheError(damaged)


@cli.command()
@click.argument("cache", metavar="DIR|URL")
@click.option("--recompute", "num", type=int, metavar="K", help="Also encode K samples again from their images.")
@click.option("--data", metavar="PATH|demo", help="The images of --recompute.")
@click.option("--weights", multiple=True, metavar="NAME=FILE", help="Local weights for --recompute, as at the build.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="For --recompute. [default: cuda where there is one]"
)
@ENTRY
def verify(
    cache: str,
    num: int | None,
    data: str | None,
    weights: tuple[str, ...],
    device: str | None,
    entries: tuple[Path, ...],
) -> None:
    """Check every shard, chunk, checksum and value of a cache.

    \b
    repa-cache verify caches/in1k
    repa-cache verify caches/in1k --recompute 64 --data imagenet/train     # do the images still give this?
    """
    from ...cache_specs.sizes import human_bytes
    from ..checking.verify import verify as check

    if (num is None) != (data is None):
        raise UsageError("--recompute K encodes images again: it needs --data PATH, and --data is for it alone")
    with Progress("shards") as progress:
        report = check(cache, on_progress=progress.reach)
    for line in (*report.notes, *report.problems):
        say(line, err=True)
    if report.problems:
        damaged = list(report.damaged_files)
        remove = "aws s3 rm " if cache.startswith("s3://") else "rm "
        between = f"; {remove}" if cache.startswith("s3://") else " "
        files = between.join(shlex.quote(str(file)) for file in damaged[:MAX_LISTED])
        more = f" (and {len(damaged) - MAX_LISTED} more, which verify names then)" if len(damaged) > MAX_LISTED else ""
        way_out = f"delete the damaged files{more} and run the build again: {remove}{files}"
        way_out = way_out if files else "run the build again"
        raise JobError(f"{cache}: {len(report.problems)} problems in {report.num_shards} shards; {way_out}")
    say(f"{cache}: {report.num_shards} shards, {human_bytes(report.num_bytes)}: all there, checksums and values hold")
    if num is not None and data is not None:
        options = {"weights": weights_of(weights), "device": device or _default_device(), "entries": entries}
        _recompute(cache, num, data, options)


def _recompute(cache: str, num: int, data: str, options: dict[str, Any]) -> None:
    from ..checking.recompute import recompute
    from ..images.demo_data import source_of

    problems = []
    for agreement in recompute(cache, source_of(data), num=num, **options):
        problems += agreement.problems
        if agreement.left_out:
            say_report(f"{agreement.path}: not {agreement.done} again: {agreement.left_out}")
        if agreement.cosines:
            say_report(
                f"{agreement.path}: {agreement.num_samples} samples {agreement.done} again, cosine to what is stored: "
                f"mean {agreement.mean:.6f}, min {agreement.min:.6f}"
            )
    for problem in problems:
        say(problem, err=True)
    if problems:
        raise JobError(
            f"{cache}: {len(problems)} differences between the images in {data} and what is stored; put the old files "
            "back, or build a new cache"
        )


def main() -> None:
    """Run `repa-cache`."""
    with one_line_errors("repa-cache"):
        try:
            expand_home()
            cli(prog_name="repa-cache", standalone_mode=False)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(2)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "repa-cache"
            raise UsageError(f"{error.format_message().rstrip('.')}; see {command} --help") from error
        except click.exceptions.Exit as error:
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            say("stopped; the same command goes on where it was", err=True)
            sys.exit(130)
