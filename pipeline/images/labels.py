"""Which class an image is of: by its folder, by EDM's dataset.json, or by a table of the user's.

A label is never guessed. Numbers stay numbers, however they are written (2.0 is 2); what is no whole number among them
is refused with its line, as are an image with two labels, and a class of which no image would be found.
"""

import csv
import io
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...cache_specs.errors import UsageError, nearest
from ...cache_specs.files.outside import MOST_TABLE_BYTES, parse_json, read_file, read_text

_Label = TypeVar("_Label")

MAX_CLASSES = 1_000_000  # every class up to the largest label is named in the metadata: a stray number would fill it
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
NO_LABELS = frozenset(["", "nan", "inf", "+inf", "-inf", "infinity", "none", "null", "na", "n/a", "<na>"])


def labels_from_folders(
    images: Sequence[str],
    root: Path,
    *,
    folders: Iterable[str],
    five_digits_are_classes: bool,
    allow_empty: bool,
    known: Sequence[str] | None,
) -> tuple[list[int], list[str]]:
    """Return labels and class names of one folder a class, in bytewise order of their names, or of one flat folder.

    `folders` are all folders directly below `root`: one without an image is a class that would vanish and move every
    later one, so it is refused unless `allow_empty`. `known` are the classes of the cache that is there: they stay.
    """
    flat = [path for path in images if "/" not in path]
    if flat and len(flat) < len(images):
        nested = next(path for path in images if "/" in path)
        raise UsageError(
            f"--data {root}: images lie both directly in it ({flat[0]}) and in folders ({nested}); "
            "keep one folder a class, or one flat folder, or name labels with --labels FILE.csv"
        )
    if flat:
        windows = next((path for path in flat if "\\" in path), None)
        if windows is not None:
            raise UsageError(
                f"--data {root}: {windows!r} is a path as Windows writes it, in the name of one file: its folder, and "
                "so its class, is lost; unpack the data again with a tool that makes folders of \\, or name labels "
                "with --labels FILE.csv"
            )
        try:
            root.name.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"--data {root}: the folder's name, that of its one class, is not UTF-8; rename it"
            ) from None
        return [0] * len(images), [root.name or "images"]
    classes = [path.partition("/")[0] for path in images]
    found = set(classes)
    empty = sorted(set(folders) - found, key=os.fsencode)
    if empty and not allow_empty and known is None:
        raise UsageError(
            f"--data {root}: {_listed('class', empty)} no image, and every class after it would move down a number; "
            "add its images, remove the folder, or say --allow-empty, which keeps its number"
        )
    if known is not None and not allow_empty and found <= set(known):
        names = list(known)
    else:
        names = sorted(found.union(empty if allow_empty else ()), key=os.fsencode)
    if not five_digits_are_classes and all(len(name) == 5 and name.isascii() and name.isdigit() for name in names):
        raise UsageError(
            f"--data {root}: are {names[0]} .. {names[-1]} classes, or the shards of an EDM data set whose "
            "dataset.json is missing? Put dataset.json beside them, or say --labels folders to take them as classes"
        )
    index = {name: label for label, name in enumerate(names)}
    return [index[name] for name in classes], names


def labels_from_edm(images: Sequence[str], file: Path) -> tuple[list[int], list[str]]:
    """Return labels and classes by EDM's dataset.json; without labels (null) all images are of one class."""
    try:
        by_path = edm_labels(read_file(file, most=MOST_TABLE_BYTES), file)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror or error})") from error
    if by_path is None:
        return [0] * len(images), ["images"]
    return numbered_classes(images, _lookup(images, by_path, file), file)


def edm_labels(data: bytes, file: Path, *, once: bool = False) -> dict[str, int] | None:
    """Return the labels of a dataset.json by path, None where it says null.

    Raises `UsageError` where it is damaged, or has two labels of one path: two different ones, unless `once`.
    """
    try:
        pairs: Any = parse_json(data)["labels"]
        if pairs is None:
            return None
        by_path: dict[str, int] = {}
        for path, label in pairs:
            if not isinstance(path, str):
                raise ValueError(f"{path!r} is no path")
            number = None if isinstance(label, bool) else whole_number(str(label))
            if number is None:
                raise ValueError(f"label {label!r} of {path} is no whole number")
            if path in by_path and (once or by_path[path] != number):
                raise ValueError(f"two labels of {path}, {by_path[path]} and {number}")
            by_path[path] = number
        return by_path
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f'{file}: {str(error)[:200] or type(error).__name__}; expected {{"labels": '
            '[["00000/img00000000.png", 0], ...]} or {"labels": null}'
        ) from error


def labels_from_csv(images: Sequence[str], file: Path) -> tuple[list[int], list[str]]:
    """Return labels and classes by a CSV of `sample id,label`: whole numbers, or names in any text."""
    by_path: dict[str, tuple[str, int]] = {}
    try:
        text = read_text(file, most=MOST_TABLE_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--labels {file}: cannot be read ({reason}); expected lines of: sample id,label") from error
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for row in rows:
            if len(row) == 2:
                word = row[1].strip()
                earlier, at = by_path.setdefault(row[0], (word, line))
                if not _same(earlier, word):
                    raise UsageError(
                        f"--labels {file}: {row[0]} has two labels, {earlier!r} in line {at} and {word!r} in line "
                        f"{line}; keep the right one"
                    )
            elif row and (len(row) > 1 or row[0].strip()):
                raise UsageError(
                    f"--labels {file}: line {line}: {str(row)[:80]}: expected two columns, sample id and label"
                )
            line = rows.line_num + 1
    except csv.Error as error:
        raise UsageError(
            f"--labels {file}: line {line}: cannot be read ({error}); is a quote open? Expected: sample id,label"
        ) from error
    found = _lookup(images, by_path, file)
    words = [word for word, _ in found]
    numbers = _numbers(found, images, file)
    if numbers is not None:
        return numbered_classes(images, numbers, file, lines=[at for _, at in found])
    names = sorted(set(words), key=os.fsencode)
    index = {name: label for label, name in enumerate(names)}
    return [index[word] for word in words], names


def numbered_classes(
    images: Sequence[str], labels: list[int], file: Path, *, lines: Sequence[int] | None = None
) -> tuple[list[int], list[str]]:
    """Return labels that are numbers already, and their classes: every number up to the largest, named by itself."""
    for label in (min(labels), max(labels)):
        if not 0 <= label < MAX_CLASSES:
            place = labels.index(label)
            where = f"{file}: " if lines is None else f"--labels {file}: line {lines[place]}: "
            raise UsageError(
                f"{where}label {label} of {images[place]}: expected class numbers from 0 to {MAX_CLASSES - 1}"
            )
    return labels, [str(label) for label in range(max(labels) + 1)]


def whole_number(word: str) -> int | None:
    """Return the whole number that `word` writes (`2`, `2.0`, `1e3`), None where it writes none."""
    if word.isascii() and word.isdigit() and len(word) < 20:
        return int(word)
    if NUMBER.fullmatch(word) is None or len(word) > 40:
        return None
    value = float(word)
    return int(value) if value.is_integer() else None


def _numbers(found: Sequence[tuple[str, int]], images: Sequence[str], file: Path) -> list[int] | None:
    """Return the labels as numbers, None where they are names.

    Names may look like numbers (0 to 9 and A to Z, of letters), but only where their order as text is that of the
    numbers: else one word among a thousand numbers would put 10 before 2.
    """
    numbers = [whole_number(word) for word, _ in found]
    whole = [number for number in numbers if number is not None]
    empty = next((place for place, (word, _) in enumerate(found) if not word), None)
    if empty is None and len(whole) == len(found):
        return whole
    like_numbers = {word for word, _ in found if NUMBER.fullmatch(word)}
    as_names = any(word.lower() not in NO_LABELS and word not in like_numbers for word, _ in found)
    if empty is None and not like_numbers:
        return None
    if empty is None and as_names and None not in map(whole_number, like_numbers):
        by_number = sorted(like_numbers, key=lambda word: (whole_number(word), word))
        if by_number == sorted(like_numbers, key=os.fsencode) and len(set(whole)) == len(like_numbers):
            return None
    place = numbers.index(None) if empty is None else empty
    word, line = found[place]
    raise UsageError(
        f"--labels {file}: line {line}: label {word!r} of {images[place]} is no whole number, and others are numbers; "
        "give class numbers from 0 on, or names"
        if word
        else f"--labels {file}: line {line}: the label of {images[place]} is empty; give class numbers, or names"
    )


def _same(one: str, other: str) -> bool:
    return one == other or (whole_number(one) is not None and whole_number(one) == whole_number(other))


def _lookup(images: Sequence[str], by_path: Mapping[str, _Label], file: Path) -> list[_Label]:
    """Return the label of each image; raise `UsageError` where one has none.

    A name may be written with composed letters here and decomposed ones there (macOS): they are one name where that is
    clear.
    """
    missing = [path for path in images if path not in by_path]
    other_form: dict[str, str] = {}
    if missing:
        here = set(images)
        composed: dict[str, list[str]] = {}
        for path in by_path:
            if path not in here and not path.isascii():
                composed.setdefault(unicodedata.normalize("NFC", path), []).append(path)
        for path in missing:
            found = composed.get(unicodedata.normalize("NFC", path), [])
            if len(found) == 1:
                other_form[path] = found[0]
        missing = [path for path in missing if path not in other_form]
    if missing:
        raise UsageError(
            f"{file}: {len(missing)} of {len(images)} images have no label, the first is {missing[0]}; "
            f"{nearest(missing[0], list(by_path)[:3])}"
        )
    return [by_path[other_form.get(path, path)] for path in images]


def _listed(what: str, names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"{what} {names[0]} holds"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}es {', '.join(names[:3])}{more} hold"
