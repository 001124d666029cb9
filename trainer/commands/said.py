"""How every line of the trainer's commands reaches the screen: what names of files hold is shown, never obeyed.

And what ends a command, in one voice: what click refuses is said in a line as what we refuse.
"""

import sys

import click

from ...cache_specs.errors import UsageError, expand_home, one_line_errors, printable


def run_command(command: click.Command, name: str, *, aborted: str) -> None:
    """Run a command of ours as `name`; `aborted` is said where Ctrl-C ends it."""
    with one_line_errors(name):
        try:
            expand_home()
            command(prog_name=name, standalone_mode=False)
        except click.UsageError as error:
            raise UsageError(f"{error.format_message().rstrip('.')}; see {name} --help") from error
        except (click.Abort, KeyboardInterrupt):
            say(f"{name}: {aborted}", err=True)
            sys.exit(130)


def say(text: str, *, err: bool = False) -> None:
    """Print lines, to the standard error if `err`."""
    click.echo("\n".join(map(printable, text.split("\n"))), err=err)
