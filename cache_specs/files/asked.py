"""The command that began a component, kept beside its half-written shards until it is whole: the one that finishes it.

A cache knows what a component is made of, and not where its images, weights or the files of one's own network lie.
This does; it is no part of the cache, and gone with its last range.
"""

import contextlib
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from .outside import MOST_SETTINGS_BYTES, parse_json, read_file
from .whole_file import write_whole

SUFFIX = ".asked"


def remember(partial: Path, component: str, words: Sequence[str]) -> None:
    """Keep the arguments of the `repa-cache` that builds `component`; where that cannot be done, there is no need."""
    with contextlib.suppress(OSError):
        write_whole(_file(partial, component), json.dumps({"cwd": os.getcwd(), "words": list(words)}).encode())


def forget(partial: Path, component: str) -> None:
    """Forget the command of a component that is whole, or gone."""
    with contextlib.suppress(OSError):
        _file(partial, component).unlink()


def asked(partial: Path, component: str) -> str | None:
    """Return the command that began a component, to be typed in this folder; None where nobody knows it."""
    try:
        kept = parse_json(read_file(_file(partial, component), most=MOST_SETTINGS_BYTES))
        folder, words = kept["cwd"], kept["words"]
        command = shlex.join(["repa-cache", *words])  # whatever lies there: nothing but a repa-cache comes of it
        return command if folder == os.getcwd() else f"cd {shlex.quote(folder)} && {command}"
    except (OSError, ValueError, LookupError, TypeError):
        return None


def forget_all(partial: Path) -> None:
    """Forget what was asked of a cache that is begun anew."""
    with contextlib.suppress(OSError):
        for file in partial.glob(f"*{SUFFIX}"):
            file.unlink()


def _file(partial: Path, component: str) -> Path:
    return partial / (component.replace("/", ".") + SUFFIX)
