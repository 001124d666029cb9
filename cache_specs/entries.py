"""Rows of the tables and users' own files become entries: what each field may be, and the code behind `loader: python`.

A user's own encoder or autoencoder is a YAML file with the fields of a table's row, flat; ENCODERS.md explains them.
Sources of a network of one's own are read once, where the request is read, and travel with it: what a worker runs is
what was digested. Its other files (weights) stay where they are and must be seen by every node under the same path;
their bytes are compared there. Nothing is imported here, and a cache holds names and digests alone: whoever wants to
run the code again brings it.
"""

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .errors import UsageError, nearest, reason
from .files.outside import MOST_SETTINGS_BYTES, parse_yaml, read_text
from .fingerprint import digest

ENDINGS = (".yaml", ".yml")
SOURCE = ".py"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a field may be: `holds` of the value, `words` for "expected ..."."""

    holds: Callable[[Any], bool]
    words: str


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _numbers(value: Any, num: int) -> bool:
    return isinstance(value, tuple | list) and len(value) == num and all(map(_number, value))


def one_of(*known: object) -> Rule:
    """Return the rule of a field with a few known values."""
    return Rule(holds=lambda value: value in known, words=f"one of {known}")


def optional(rule: Rule) -> Rule:
    """Return the rule of a field that may be left out."""
    return Rule(holds=lambda value: value is None or rule.holds(value), words=rule.words)


WHOLE = Rule(holds=lambda value: _whole(value, 1), words="a whole number from 1")
COUNT = Rule(holds=lambda value: _whole(value, 0), words="a whole number from 0")
FLAG = Rule(holds=lambda value: isinstance(value, bool), words="true or false")
NUMBER = Rule(holds=_number, words="a number")
TEXT = Rule(holds=lambda value: isinstance(value, str) and bool(value), words="a text")
THREE = Rule(holds=lambda value: _numbers(value, 3), words="three numbers, red, green and blue")
RANGE = Rule(holds=lambda value: _numbers(value, 2) and value[0] < value[1], words="two numbers, as in [0, 1]")
KEYWORDS = Rule(
    holds=lambda value: isinstance(value, Mapping) and all(isinstance(key, str) for key in value),
    words="keywords and their values",
)
FILES = Rule(
    holds=lambda value: isinstance(value, tuple | list) and all(isinstance(file, str) and file for file in value),
    words="a list of files, relative to this one",
)


def violations(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> Iterator[str]:
    """Yield a line a field of `values` that breaks its rule."""
    for name, rule in rules.items():
        if name in values and not rule.holds(values[name]):
            yield f"{name} is {_brief(values[name])}, expected {rule.words}"


def check_fields(what: str, entry: Any, rules: Mapping[str, Rule]) -> None:
    """Raise `UsageError` for the first field of an entry that breaks its rule; `what` says whose it is."""
    for problem in violations({name: getattr(entry, name) for name in rules}, rules):
        raise UsageError(f"{what}: {problem}")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# From a row to an entry


class Ruled:
    """An entry's dataclass: its fields' rules, which of them no row has, and what `loader: python` implies."""

    RULES: ClassVar[Mapping[str, Rule]]
    HIDDEN: ClassVar[frozenset[str]]
    IMPLIED: ClassVar[Mapping[str, Any]]


Entry = TypeVar("Entry", bound=Ruled)


def is_file(request: str) -> bool:
    """Return whether a request names a file of the user's, not a row of a table."""
    return request.endswith(ENDINGS)


def problems(cls: Any, row: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each field of a row that is unknown, missing or wrong."""
    hidden, needed = cls.HIDDEN, frozenset[str]()
    if row.get("loader") == "python":
        if "model" in row:
            yield "model is a library's name; loader: python has a target, FILE.py:function"
        row = {key: value for key, value in {**cls.IMPLIED, **row}.items() if key != "model"}
        hidden, needed = hidden | {"model"}, frozenset({"target"})
    known = {field.name for field in fields(cls)} - hidden
    for name in row:
        if name not in known:
            yield f"unknown key {name!r}; {nearest(str(name), known)}"
    for field in fields(cls):
        required = field.default is MISSING and field.default_factory is MISSING
        if (required or field.name in needed) and field.name in known and field.name not in row:
            yield f"{field.name} is missing, expected {cls.RULES[field.name].words}"
    yield from violations({name: value for name, value in row.items() if name in known}, cls.RULES)


def make_entry(
    where: str, cls: type[Entry], name: str, row: Mapping[str, Any], *, folder: Path | None = None, **table: Any
) -> Entry:
    """Make an entry of a row; raise `UsageError` for the first of its fields that is unknown, missing or wrong.

    `folder` is that of a user's file, `table` what only a table says of its rows.
    """
    found = list(problems(cls, row))
    if found:
        more = f" (and {len(found) - 1} more: repa-cache encoders --check {where})" if len(found) > 1 else ""
        raise UsageError(f"{where}: {name}: {found[0]}{more if folder else ''}")
    if row.get("loader") == "python":
        row = {**cls.IMPLIED, **row, "model": row["target"]}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    if "stages" in values:
        values["stages"] = {str(key): tuple(stage) for key, stage in stages_by_name(row["stages"]).items()}
    made: Any = cls
    return made(name=name, folder=folder, **values, **table)


def stages_by_name(value: Any) -> Any:
    """Return `stages` by name: those of a list are numbered from 0."""
    return {str(i): stage for i, stage in enumerate(value)} if isinstance(value, tuple | list) else value


def read_row(option: str, path: Path) -> dict[str, Any]:
    """Return the fields in a file; raise `UsageError` beginning with the option where it holds none."""
    try:
        row = parse_yaml(read_text(path, most=MOST_SETTINGS_BYTES))
    except (OSError, ValueError) as error:
        raise UsageError(f"{option} {path}: cannot be read as YAML ({reason(error)})") from error
    if not isinstance(row, dict):
        raise UsageError(f"{option} {path}: expected one {option[2:]}'s fields (cache_specs/ENCODERS.md explains them)")
    return row


def read_own_entry(option: str, path: Path, cls: type[Entry], *, taken: set[str]) -> Entry:
    """Read a user's own entry, named by the field `name` or by the file, by none of the table's names `taken`."""
    row = read_row(option, path)
    name = str(row.pop("name", path.stem))
    if name in taken:
        raise UsageError(f"{option} {path}: {name} is the table's; give yours another name")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.@-]*", name):
        raise UsageError(f"{option} {path}: the name {name!r} becomes a folder's: letters, digits and _ . @ - only")
    return make_entry(str(path), cls, name, row, folder=path.absolute().parent)


# The code behind an entry


@dataclass(frozen=True, kw_only=True)
class OwnCode:
    """A function, and the files that it is made of.

    `target` is FILE.py:function or package.module:function, as the entry has it. `files` are absolute paths by name;
    a name is the path relative to the entry's folder, of a file outside of it the last part alone. `sources` are the
    bytes of those that end in .py; `digests` the sha256 of each file, and of an installed package's sources.
    """

    target: str
    files: Mapping[str, Path]
    sources: Mapping[str, bytes]
    digests: Mapping[str, str]

    @property
    def module(self) -> str:
        """The name of the target's module: a dotted one, or that of its file below the entry's folder."""
        place = self.target.rpartition(":")[0]
        return module_name(place) if self.in_file else place

    @property
    def function(self) -> str:
        return self.target.rpartition(":")[2]

    @property
    def in_file(self) -> bool:
        """Whether the target lies in one of the sources, not in an installed package."""
        return self.target.rpartition(":")[0].endswith(SOURCE)

    @property
    def digest(self) -> str:
        """One digest of all of them, the component's `weights` where the network tells no weights of its own."""
        return "sha256:" + digest(dict(self.digests))

    def check_here(self, where: str) -> None:
        """Raise `UsageError` where files that do not travel are not the same on this machine."""
        for name, found in self.digests.items():
            if name in self.sources:
                continue
            path = self.files.get(name)
            here = package_digest(where, name) if path is None else _file_digest(where, name, path)
            if here != found:
                raise UsageError(
                    f"{where}: {path or name} changed since the command began, or is another file on this machine; "
                    "every node must see the same files under the same path"
                )


def module_name(source: str) -> str:
    """Return the dotted name under which a source imports as a helper: `parts/blocks.py` is `parts.blocks`."""
    return source.removesuffix(SOURCE).replace("/", ".").removesuffix(".__init__")


def read_own_code(where: str, folder: Path, target: str, files: Sequence[str]) -> OwnCode:
    """Read what an entry in `folder` names; raise `UsageError` beginning with `where` for what is not there."""
    place, _, function = target.rpartition(":")
    in_file = place.endswith(SOURCE)
    if not (function.isidentifier() and (in_file or all(part.isidentifier() for part in place.split(".")))):
        raise UsageError(f"{where}: target is {target!r}, expected FILE.py:function or package.module:function")
    paths: dict[str, Path] = {}
    for name, path in (_place(folder, file) for file in [*([place] if in_file else []), *files]):
        if paths.setdefault(name, path) != path:
            raise UsageError(f"{where}: files: two are called {name}, {paths[name]} and {path}; rename one")
    sources = {name: _read(where, name, path) for name, path in paths.items() if name.endswith(SOURCE)}
    digests = {name: hashlib.sha256(source).hexdigest() for name, source in sources.items()}
    digests |= {name: _file_digest(where, name, path) for name, path in paths.items() if name not in sources}
    if in_file:
        target = f"{_place(folder, place)[0]}:{function}"
    else:
        package = place.partition(".")[0]
        digests[package] = package_digest(where, package)
    return OwnCode(target=target, files=paths, sources=sources, digests=dict(sorted(digests.items())))


def _place(folder: Path, file: str) -> tuple[str, Path]:
    """Return a file's name in the digests, which tells nothing of the machine, and its absolute path."""
    path = (folder / file).resolve()
    below = path.is_relative_to(folder.resolve())
    return path.relative_to(folder.resolve()).as_posix() if below else path.name, path


def _read(where: str, name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{where}: {name}: {path} cannot be read ({error.strerror})") from error


def _file_digest(where: str, name: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{where}: {name}: {path} cannot be read ({error.strerror}); list files, by name") from error


def package_digest(where: str, package: str) -> str:
    """Return the sha256 over the sources of an installed package, by relative path; it is looked up, not imported."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not (spec.submodule_search_locations or spec.has_location):
        raise UsageError(f"{where}: target: no package {package!r} is installed here; expected FILE.py:function or one")
    if not spec.submodule_search_locations:
        return _file_digest(where, package, Path(str(spec.origin)))
    sha = hashlib.sha256()
    for folder in map(Path, spec.submodule_search_locations):
        for source in sorted(folder.rglob(f"*{SOURCE}")):
            data = _read(where, package, source)
            sha.update(f"{source.relative_to(folder).as_posix()} {len(data)}\n".encode() + data)
    return sha.hexdigest()
