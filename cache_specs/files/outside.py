"""What others supply: opened only where it is a regular file, read up to a bound, parsed with one kind of error.

A FIFO waits for its writer, a device has no end, a sparse file is as large as it says: none of them is opened as data.
The parsers of JSON and YAML raise a dozen classes of their own on what nobody writes by hand (a nesting of a million, a
number of 6,000 digits, a list that holds itself); here each of these is a `ValueError` with a short text.
"""

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from ..errors import with_home

GIB = 2**30
MOST_METADATA_BYTES = GIB // 2  # of a zarr.json: a reason for each of ImageNet's images takes 0.3 GB
MOST_TABLE_BYTES = GIB  # of a table of labels: 20 million lines
MOST_SETTINGS_BYTES = 2**20  # of a YAML file, which a person writes
MOST_YAML_VALUES = 20_000  # with every alias written out
MOST_INTEGER = 2**63


class UnfitFileError(OSError):
    """A file that is not to be read: no regular one, or larger than its kind has reason to be. Trying again is vain."""


def open_regular(path: str | Path) -> int:
    """Return a descriptor for reading `path`, which must be a regular file or lead to one; raise `OSError`."""
    # Nonblocking: the open of a FIFO would wait for a writer. For a regular file it makes no difference.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise UnfitFileError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    what = "a FIFO" if stat.S_ISFIFO(mode) else "a device"  # a socket cannot be opened
    raise UnfitFileError(errno.EINVAL, f"it is {what}, not a file", str(path))


def read_file(path: str | Path, *, most: int) -> bytes:
    """Return a regular file's bytes; raise `UnfitFileError` where they are more than `most`, `OSError` as open does."""
    with os.fdopen(open_regular(path), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise UnfitFileError(errno.EFBIG, f"it has {size} bytes, and at most {most} are read", str(path))
        data = stream.read(size + 1)
    if len(data) > size:
        raise OSError(errno.EAGAIN, "it grew while it was read", str(path))
    return data


def read_text(path: str | Path, *, most: int) -> str:
    """Return a regular file's UTF-8 text without a byte order mark; raise as `read_file`, and `UnicodeDecodeError`."""
    return read_file(path, most=most).decode("utf-8-sig")


def regular_files(folder: Path) -> Any:
    """Return a Zarr store of `folder` that opens regular files only."""
    from zarr.storage import LocalStore

    class RegularFiles(LocalStore):
        async def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
            file = self.root / key
            if file.exists() and not file.is_file() and not file.is_dir():
                raise UnfitFileError(errno.EINVAL, "it is no file", str(file))
            return await super().get(key, *args, **kwargs)

    return RegularFiles(folder)


def parse_json(data: str | bytes) -> Any:
    """Return what JSON `data` says; raise `ValueError` whatever is wrong with it, NaN and numbers without bound too."""
    try:
        return json.loads(data, parse_constant=_no_number, parse_float=_finite, parse_int=_bounded)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_yaml(text: str) -> Any:
    """Return what YAML `text` says; raise `ValueError` whatever is wrong with it."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count_values(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    # What the library's constructors raise on scalars that only look like numbers, dates or truth values.
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"a value that cannot be read ({error!r})") from None


class _Loader(yaml.SafeLoader):
    """SafeLoader, with integers as large as a machine's, and texts that begin with `~/` in the home folder."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        digits = len(node.value)
        if digits > 80:  # of 64 bits, each with an underscore before it, and a sign and a base
            raise ValueError(f"a number of {digits} digits")
        value = super().construct_yaml_int(node)
        if abs(value) > MOST_INTEGER:
            raise ValueError(f"{node.value} is larger than 64 bits hold")
        return value

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        text = str(super().construct_yaml_str(node))
        return with_home(text) if text.startswith("~") else text


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)


def _count_values(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """Return how many values `node` stands for with every alias written out; raise `ValueError` for too many.

    `counts` has what is known by node, None while it is counted: who meets that holds itself.
    """
    if id(node) in counts:
        known = counts[id(node)]
        if known is None:
            raise ValueError("a value that holds itself")
        return known
    counts[id(node)] = None
    total = 1
    if isinstance(node, yaml.MappingNode):
        total += sum(_count_values(part, counts) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count_values(part, counts) for part in node.value)
    if total > MOST_YAML_VALUES:
        raise ValueError(f"more than {MOST_YAML_VALUES} values, with every alias written out")
    counts[id(node)] = total
    return total


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large a number")
    return value


def _bounded(digits: str) -> int:
    if len(digits) > 80:
        raise ValueError(f"a number of {len(digits)} digits")
    value = int(digits)
    if abs(value) > MOST_INTEGER:
        raise ValueError(f"{digits} is larger than 64 bits hold")
    return value
