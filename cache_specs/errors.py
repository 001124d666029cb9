"""Errors that a user can act on, and the one place that turns them into one line and an exit code.

Each has two parents, ours and the builtin that a library user would catch. A message says where, what was found,
what was expected and the next step.
"""

import contextlib
import difflib
import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


class RepaError(Exception):
    """Anything that a user can mend; the command line prints it as one line."""

    exit_code = 1


class UsageError(RepaError, ValueError):
    """The request makes no sense as written (exit code 2)."""

    exit_code = 2


class CacheError(RepaError, RuntimeError):
    """What is on disk is damaged, incomplete, or belongs to other data."""


class JobError(RepaError, RuntimeError):
    """The job ran and could not finish everything."""


MAX_LISTED = 40  # known names in one line of an error: a run's settings, not every encoder

# Control characters, what turns the direction of writing, separators of lines, and bytes that were no UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MAX_REASON = 300  # characters of what a library says
_commands = 0  # of ours under way in this process: messages name their flags


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant: `did you mean 'x'? Known: a, b, x`; of many, the nearest few."""
    names = sorted(known)
    name = name[:100]  # what is likened to each costs the product of the lengths
    folded = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    hint = f"did you mean {folded[close[0]]!r}? " if close else ""
    if len(names) <= MAX_LISTED:
        return f"{hint}Known: {', '.join(names) if names else '(none)'}"
    shown = difflib.get_close_matches(name, names, n=6, cutoff=0) or names[:6]
    return f"{hint}Known: {', '.join(shown)}, ... ({len(names)} in all)"


def option(flag: str, python: str | None = None) -> str:
    """Return how whoever reads a message gives a setting: by a flag in our commands, by an argument from Python.

    By default the argument is called as the flag is: `--encoder` or `encoder=`, `--encoder NAME` or `encoder='NAME'`.
    """
    if _commands:
        return flag
    name, _, value = flag.removeprefix("--").partition(" ")
    return f"{name.replace('-', '_')}={repr(value) if value else ''}" if python is None else python


def reason(error: BaseException) -> str:
    """Return what an exception says, on one line and not without end; its class where it says nothing."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split())[:MAX_REASON] or type(error).__name__


def at_least(name: str, value: int, least: int) -> None:
    """Raise UsageError unless the setting `name` is `least` or more."""
    if value < least:
        raise UsageError(f"{name} is {value}; expected {least} or more")


def printable(text: str) -> str:
    """Return `text` with what a terminal would obey, or could not print, escaped: names of files may hold anything."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise `UsageError` for an empty argument: as a path it would name the working folder."""
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if argument == "" or (option.startswith("--") and equals and not value):
            before = option or (arguments[place - 1] if place else "the first argument")
            raise UsageError(
                f"{before}: an empty value follows, as of a variable that is not set; give one, or leave it out"
            )


def with_home(text: str) -> str:
    """Return `text` with a `~/` at its start, or after the `=` of `--out=~/x`, as the home folder: shells leave it."""
    return re.sub("(^|=)~(?=/)", lambda match: match[1] + os.path.expanduser("~"), text, count=1)


@contextlib.contextmanager
def writing(path: Path, *, then: str) -> Iterator[None]:
    """Turn an OSError into a JobError that says what could not be written, and what to do: mend it, `then` this."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "Make room" if full else "See that it can be written"
        raise JobError(f"{path} cannot be written ({error.strerror or error}). {remedy}, then {then}") from error


def expand_home() -> None:
    """Write the home folder into this command's arguments; before they are parsed."""
    sys.argv[1:] = map(with_home, sys.argv[1:])


@contextlib.contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Print a `RepaError` as one line on stderr and exit with its code; leave every other error its traceback."""
    global _commands
    _commands += 1
    try:
        check_arguments(sys.argv[1:])
        yield
    except RepaError as error:
        text = printable(" ".join(str(error).split("\n")))
        print(f"{command}: {text}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    finally:
        _commands -= 1
