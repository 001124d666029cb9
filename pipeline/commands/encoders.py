"""repa-cache encoders: the table of encoders."""

import click

from .said import say


@click.command()
def encoders() -> None:
    """Print the table of encoders: names, sizes, which tensor, licence, where the weights come from.

    \b
    repa-cache encoders
    """
    from ...cache_specs.tables import encoder_table_lines

    for line in encoder_table_lines():
        say(line)
