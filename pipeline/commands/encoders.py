"""repa-cache encoders: the table of encoders, and whether an entry of one's own is one."""

from pathlib import Path

import click

from ...cache_specs.errors import UsageError
from .said import say


@click.command()
@click.option("--check", type=click.Path(path_type=Path), metavar="FILE.yaml", help="Look at an entry of your own.")
def encoders(check: Path | None) -> None:
    """Print the table of encoders: names, sizes, which tensor, licence, where the weights come from.

    \b
    repa-cache encoders
    repa-cache encoders --check my.yaml      # what is missing or wrong in an entry of your own

    An entry (of an autoencoder too) is checked field by field; then a library's model is made without weights, for its
    shapes, and a network of Python is loaded and run on made-up pictures.
    """
    if check is not None:
        _check(check)
        return
    from ...cache_specs.tables import encoder_table_lines

    for line in encoder_table_lines():
        say(line)


def _check(file: Path) -> None:
    from ..checking.own_entry import check_file, field_problems

    found = field_problems(file)
    for problem in found:
        say(f"{file}: {problem}", err=True)
    if found:
        fields = "1 field is" if len(found) == 1 else f"{len(found)} fields are"
        raise UsageError(f"{file}: {fields} not as expected; cache_specs/ENCODERS.md explains them")
    for line in check_file(file):
        say(line)
