"""How every line of the trainer's commands reaches the screen: what names of files hold is shown, never obeyed."""

import click

from ...cache_specs.errors import printable


def say(text: str, *, err: bool = False) -> None:
    """Print lines, to the standard error if `err`."""
    click.echo("\n".join(map(printable, text.split("\n"))), err=err)
