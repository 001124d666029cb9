"""repa-cache derive: parse, plan, run, report."""

from typing import TYPE_CHECKING, Any

import click

from ...cache_specs.derived import DEFAULT_SAMPLE
from ...cache_specs.schema import COMPRESSORS, TOKEN_DTYPES
from .progress import Progress
from .said import say

if TYPE_CHECKING:
    from ..deriving.derive import DerivePlan


@click.command()
@click.argument("cache", metavar="DIR|URL")
@click.option("--from", "source", required=True, metavar="COMPONENT", help="What it is made of: features/dinov2-vit-b.")
@click.option(
    "--with",
    "method",
    required=True,
    metavar="METHOD[:K]",
    help="How: pca:16, pca-scaled:16, purify-linear, standardise.",
)
@click.option("--dtype", type=click.Choice(TOKEN_DTYPES), default="float16", show_default=True, help="Of what is made.")
@click.option("--compressor", type=click.Choice(COMPRESSORS), default="none", show_default=True)
@click.option(
    "--sample", type=int, default=DEFAULT_SAMPLE, show_default=True, help="Images that are fitted to, of every class."
)
@click.option("--latents", metavar="NAME", help="Of purify-linear. [default: the only ones]")
@click.option("--dry-run", is_flag=True, help="Say what would be made, and what would refuse it; write nothing.")
def derive(dry_run: bool, **asked: Any) -> None:
    """Make a component from one that a cache holds.

    \b
    repa-cache derive caches/in1k --from features/dinov2-vit-b --with pca:16         # principal components
    repa-cache derive caches/in1k --from features/dinov2-vit-b --with purify-linear  # without what latents say
    repa-cache derive caches/in1k --from features/dinov2-vit-b --with standardise    # mean and std alone, fits/...

    Killed or stopped, the same command goes on where it was.
    """
    from ..deriving.derive import DeriveOptions, plan_derive, run_derive

    options = DeriveOptions(**asked)
    plan = plan_derive(options)
    if dry_run:
        _print_plan(plan)
        return
    with Progress("samples") as progress:
        made = run_derive(options, on_start=progress.start, on_progress=progress.advance, on_message=progress.say)
    if plan.component is None:
        say(f"fits/{plan.name}: {plan.request.label} of {made} images")
        return
    path = plan.component.path
    say(f"derived {made} samples; {path}: complete" if made else f"{options.cache}: {path} is there and complete")


def _print_plan(plan: "DerivePlan") -> None:
    from ...cache_specs.schema import describe
    from ...cache_specs.sizes import human_bytes

    if plan.component is None:
        say(f"fits/{plan.name}: {plan.request.label} of {plan.sources[0].spec.path}; nothing was written")
        return
    lines = describe(plan.component, plan.store.layout)
    say(f"{plan.component.path}: {plan.component.spec['model']}")
    for name, shape, size in lines:
        say(f"  {name:<13} {shape:<32} {human_bytes(size)}")
    say(f"{human_bytes(sum(size for _, _, size in lines))} in all; nothing was written")
