"""The checkpoint that `repa-sample` and `repa-cknna` are given: its options, how it is opened, what is said of it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...cache_specs.errors import UsageError
from .said import say

if TYPE_CHECKING:
    from ..models.pretrained import TrainedModel


def checkpoint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command its RUN|CHECKPOINT, and which of its weights are taken, in which convention."""
    for option in (
        click.option(
            "--checkpoint-convention",
            "convention",
            type=click.Choice(["sit", "repa"]),
            help="Of a published file: t = 1 is data, as in SiT's own code, or t = 0. [default: what it tells]",
        ),
        click.option(
            "--weights", default="ema", show_default=True, metavar="ema|model|ema:DECAY", help="Which weights."
        ),
        click.argument("checkpoint", metavar="RUN|CHECKPOINT", type=click.Path(path_type=Path)),
    ):
        command = option(command)
    return command


def open_checkpoint(checkpoint: Path, options: dict[str, Any], *, shown: bool = True) -> "TrainedModel":
    """Return the model that a command is asked about; say on stderr what was assumed of it."""
    from ..models.pretrained import open_model

    check_name(checkpoint)
    trained = open_model(checkpoint, weights=options["weights"], convention=options["convention"])
    if shown:
        for line in trained.assumed:
            say(f"{trained.path}: {line}", err=True)
    return trained


def check_name(path: Path) -> None:
    """Raise UsageError for a name that cannot be printed, nor stored as JSON."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{str(path)!r}: a name that is not UTF-8; rename it, or choose another") from None
