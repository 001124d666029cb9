"""How every line of repa-cache reaches the screen: what names of files and classes hold is shown, never obeyed."""

import click

from ...cache_specs.errors import printable


def say(line: str, *, err: bool = False) -> None:
    """Print one line, to the standard error if `err`."""
    click.echo(printable(line), err=err)
