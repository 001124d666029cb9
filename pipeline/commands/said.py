"""How every line of repa-cache reaches the screen: what names of files and classes hold is shown, never obeyed."""

import json
import re
import shlex
import textwrap
from typing import Any

import click

from ...cache_specs.errors import printable

WIDTH = 80  # columns, on a terminal and in a file
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object instead, for programs.")


def say(line: str, *, err: bool = False) -> None:
    """Print one line, to the standard error if `err`."""
    click.echo(printable(line), err=err)


def say_report(*lines: str) -> None:
    """Print lines of a report, folded. Problems and errors are not: a line each, for `grep`."""
    for line in lines:
        for part in folded(line):
            say(part)


def say_json(record: Any) -> None:
    """Print what `--json` gives to programs: one object, in ASCII; NaN and infinity are none of JSON's."""
    click.echo(json.dumps(record, indent=1, allow_nan=False))


def folded(line: str) -> list[str]:
    """Return `line` in lines of at most 80 columns, where its words allow; a command in lines that a shell takes."""
    indent = line[: len(line) - len(line.lstrip())]
    command = re.fullmatch("(cd .+ && )?(repa-.+)", line.strip())
    if command:
        return _folded_command(command[2], indent, before=command[1] or "")
    return textwrap.wrap(
        line, WIDTH, subsequent_indent=indent + "  ", break_long_words=False, break_on_hyphens=False
    ) or [""]


def _folded_command(command: str, indent: str, *, before: str) -> list[str]:
    """Cut a command before its options."""
    parts: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word.startswith("--"):
            parts.append([])
        parts[-1].append(word)
    lines = [indent + before]
    for part in map(shlex.join, parts):
        if lines[-1].strip() and len(lines[-1]) + len(part) + 2 > WIDTH:
            lines[-1] += "\\"
            lines.append(f"{indent}  ")
        lines[-1] += f"{part} "
    lines[-1] = lines[-1].rstrip()
    return lines
