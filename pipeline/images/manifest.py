"""Which images, in which order, with which labels: a folder becomes a manifest.

A sample's row in every array of the cache is its place here, for ever: sample ids are POSIX paths relative to the
root, in bytewise order. Three layouts are read: one folder a class, a flat folder (one class), and the EDM/REPA
layout, where dataset.json gives the labels. Ids are held in one numpy string array, not in Python objects.
"""

import csv
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from ...cache_specs.errors import UsageError, nearest
from ...cache_specs.fingerprint import manifest_fingerprint

_Label = TypeVar("_Label", int, str)

MAX_CLASSES = 1_000_000  # every class up to the largest label is named in the metadata: a stray number would fill it
IMAGE_SUFFIXES = frozenset([".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"])


class ImageSource(Protocol):
    """Where pictures come from. It travels to the decode workers, so it holds no per-sample state."""

    def read(self, sample_id: str) -> bytes:
        """Return the picture's file, whole; raise OSError where it cannot be read."""
        ...


@dataclass(frozen=True)
class FolderSource:
    """Image files below `root`."""

    root: Path

    def read(self, sample_id: str) -> bytes:
        return (self.root / sample_id).read_bytes()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """N samples in row order.

    `sample_ids` [N] numpy strings; `labels` [N] int32 in [0, K); `class_names` K strings; `where` names the data in
    messages; `left_out` counts files that are no images by their ending.
    """

    where: str
    sample_ids: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    source: ImageSource
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.sample_ids)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The digest of the ids and labels in row order; some seconds for a million, so it is taken once."""
        return manifest_fingerprint(self.sample_ids.tolist(), self.labels.tolist())


def scan_folder(root: Path, labels_file: str | None = None) -> Manifest:
    """Read the manifest of an image folder.

    `labels_file` is a CSV of `sample id, label` (whole numbers, or class names in any text), or the word `folders`:
    take five-digit folder names as classes. Raises `UsageError` for a folder that is missing, empty, unreadable,
    ambiguous, or holds a name that is not UTF-8.
    """
    root = root.absolute()
    try:
        found = root.is_dir()
    except OSError as error:  # a folder above it is closed to this user
        raise UsageError(f"--data {root}: cannot be read ({error.strerror}); mend its permissions") from error
    if not found:
        raise UsageError(f"--data {root}: no such folder; give a folder of images, or the word demo")
    images: list[str] = []
    left_out = 0
    edm_labels = root / "dataset.json"
    for path in walk_files(root):
        if Path(path).suffix.lower() in IMAGE_SUFFIXES:
            images.append(path)
        elif path != edm_labels.name:
            left_out += 1
    if not images:
        raise UsageError(
            f"--data {root}: no images below it ({left_out} files with other endings); "
            f"expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    images.sort(key=os.fsencode)
    if labels_file not in (None, "folders"):
        labels, names = _labels_from_csv(images, Path(labels_file or ""))
    elif edm_labels.exists():
        labels, names = _labels_from_edm(images, edm_labels)
    else:
        labels, names = _labels_from_folders(images, root, five_digits_are_classes=labels_file == "folders")
    return Manifest(
        where=str(root),
        sample_ids=np.array(images, dtype=np.dtypes.StringDType()),
        labels=np.asarray(labels, dtype=np.int32),
        class_names=tuple(names),
        source=FolderSource(root),
        left_out=left_out,
    )


def walk_files(root: Path) -> Iterator[str]:
    """Yield every visible file below `root` as a POSIX path relative to it; follow links, but never in a circle."""
    stack: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while stack:
        relative, above = stack.pop()
        folder = root / relative
        try:
            status = folder.stat()
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                continue
            with os.scandir(folder) as entries:
                listing = list(entries)
        except OSError as error:
            raise UsageError(f"--data {folder}: cannot be read ({error.strerror}); mend its permissions") from error
        for entry in listing:
            if entry.name.startswith("."):
                continue
            path = f"{relative}/{entry.name}" if relative else entry.name
            try:
                path.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"--data {root}: the name {os.fsencode(path)!r} is not UTF-8; rename it, sample ids are UTF-8 text"
                ) from error
            try:
                is_folder = entry.is_dir()
            except OSError as error:  # a link that leads back to itself, for one; a broken link is only no folder
                raise UsageError(
                    f"--data {root}: {path} cannot be followed ({error.strerror}); mend or remove this link"
                ) from error
            if is_folder:
                stack.append((path, above | {identity}))
            else:
                yield path


def _labels_from_folders(
    images: list[str], root: Path, *, five_digits_are_classes: bool
) -> tuple[list[int], list[str]]:
    flat = [path for path in images if "/" not in path]
    if flat and len(flat) < len(images):
        nested = next(path for path in images if "/" in path)
        raise UsageError(
            f"--data {root}: images lie both directly in it ({flat[0]}) and in folders ({nested}); "
            "keep one folder a class, or one flat folder, or name labels with --labels FILE.csv"
        )
    if flat:
        return [0] * len(images), [root.name or "images"]
    classes = [path.partition("/")[0] for path in images]
    names = sorted(set(classes), key=os.fsencode)
    if not five_digits_are_classes and all(len(name) == 5 and name.isascii() and name.isdigit() for name in names):
        raise UsageError(
            f"--data {root}: are {names[0]} .. {names[-1]} classes, or the shards of an EDM data set whose "
            "dataset.json is missing? Put dataset.json beside them, or say --labels folders to take them as classes"
        )
    index = {name: label for label, name in enumerate(names)}
    return [index[name] for name in classes], names


def _labels_from_edm(images: list[str], file: Path) -> tuple[list[int], list[str]]:
    try:
        pairs = json.loads(file.read_text(encoding="utf-8"))["labels"]
        by_path = None if pairs is None else {str(path): int(label) for path, label in pairs}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f'{file}: expected {{"labels": [["00000/img00000000.png", 0], ...]}} or {{"labels": null}} ({error!r})'
        ) from error
    if by_path is None:
        return [0] * len(images), ["images"]
    return numbered_classes(images, _lookup(images, by_path, file), file)


def _labels_from_csv(images: list[str], file: Path) -> tuple[list[int], list[str]]:
    by_path: dict[str, str] = {}
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            for row in csv.reader(stream):
                if len(row) != 2:
                    raise UsageError(f"--labels {file}: {row!r}: expected two columns, sample id and label")
                by_path[row[0]] = row[1].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--labels {file}: cannot be read ({error}); expected lines of: sample id,label") from error
    words = _lookup(images, by_path, file)
    if all(word.isascii() and word.isdigit() for word in words):
        return numbered_classes(images, [int(word) for word in words], file)
    names = sorted(set(words), key=os.fsencode)
    index = {name: label for label, name in enumerate(names)}
    return [index[word] for word in words], names


def numbered_classes(images: list[str], labels: list[int], file: Path) -> tuple[list[int], list[str]]:
    """Return labels that are numbers already, and their classes: every number up to the largest, named by itself."""
    for label in (min(labels), max(labels)):
        if not 0 <= label < MAX_CLASSES:
            raise UsageError(
                f"{file}: label {label} of {images[labels.index(label)]}: expected class numbers from 0 to "
                f"{MAX_CLASSES - 1}"
            )
    return labels, [str(label) for label in range(max(labels) + 1)]


def _lookup(images: list[str], by_path: dict[str, _Label], file: Path) -> list[_Label]:
    missing = [path for path in images if path not in by_path]
    if missing:
        raise UsageError(
            f"{file}: {len(missing)} of {len(images)} images have no label, the first is {missing[0]}; "
            f"{nearest(missing[0], list(by_path)[:3])}"
        )
    return [by_path[path] for path in images]
