"""Every setting of a run: key, default, what is allowed, what it means, read off the dataclasses that define them.

The meaning is the comment behind a field: one source for `repa-train --settings`, the page SETTINGS.md and readers of
the code.
"""

import inspect
import io
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal

from .config import MAY_CHANGE, Bytes, RunConfig

FOLDED = 48  # columns of a meaning


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One key of a configuration; `default` and `allowed` as they are written in YAML."""

    key: str
    default: str
    allowed: str
    meaning: str
    may_change: bool  # at a resume


def catalogue() -> list[Setting]:
    """Return every setting, in the order of the dataclasses."""
    return list(_settings(RunConfig, ""))


def as_text() -> str:
    """Return the settings as lines of at most 120 columns; those that a resume may change are marked."""
    rows = catalogue()
    keys, defaults, allowed = (max(len(getattr(row, name)) for row in rows) for name in ("key", "default", "allowed"))
    lines = []
    for row in rows:
        first, *rest = textwrap.wrap(row.meaning, FOLDED) or [""]
        mark = "*" if row.may_change else " "
        lines.append(f"{mark} {row.key:{keys}}  {row.default:{defaults}}  {row.allowed:{allowed}}  {first}".rstrip())
        lines += [f"{'':{keys + defaults + allowed + 8}}{line}" for line in rest]
    head = f"  {'setting':{keys}}  {'default':{defaults}}  {'allowed':{allowed}}  meaning (* may change at a resume)"
    return "\n".join([head, *lines])


def _settings(cls: type, prefix: str) -> Iterator[Setting]:
    hints, comments = typing.get_type_hints(cls), _comments(cls)
    for item in fields(cls):
        key, hint = f"{prefix}{item.name}", hints[item.name]
        if is_dataclass(hint):
            yield from _settings(typing.cast(type, hint), f"{key}.")
            continue
        yield Setting(
            key=key,
            default=_default(item),
            allowed=_allowed(hint),
            meaning=comments.get(item.name, ""),
            may_change=key in MAY_CHANGE,
        )


def _comments(cls: type) -> dict[str, str]:
    """Return the comment at the end of each field's line."""
    source = textwrap.dedent(inspect.getsource(cls))
    found: dict[str, str] = {}
    names = {item.name for item in fields(cls)}
    name = None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.start[1] == 4 and token.string in names:
            name = token.string
        elif token.type == tokenize.COMMENT and name is not None:
            found[name] = token.string.lstrip("# ").strip()
        elif token.type in (tokenize.NEWLINE, tokenize.NL):
            name = None
    return found


def _default(item: "Field[Any]") -> str:
    if item.default is MISSING:
        return "(required)" if item.default_factory is MISSING else "..."
    value = item.default
    if isinstance(value, tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return _plain(value)


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _allowed(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(map(_plain, arguments))
    if origin is types.UnionType:
        return " | ".join("null" if part is types.NoneType else _allowed(part) for part in arguments)
    if origin is tuple:
        return f"{_allowed(arguments[0])}, ..."
    if hint is Bytes:
        return "size, as 512MB"
    return {int: "integer", float: "number", str: "text", bool: "true | false"}[hint]
