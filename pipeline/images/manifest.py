"""Which images, in which order, with which labels: a folder becomes a manifest.

A sample's row in every array of the cache is its place here, for ever: sample ids are POSIX paths relative to the
root, in bytewise order. Three layouts are read: one folder a class, a flat folder (one class), and the EDM/REPA
layout, where dataset.json gives the labels. Ids are held in one numpy string array, not in Python objects.
"""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ...cache_specs.errors import UsageError
from ...cache_specs.files.outside import GIB, read_file
from ...cache_specs.fingerprint import manifest_fingerprint
from .formats import IMAGE_SUFFIXES
from .labels import NUMBER, labels_from_csv, labels_from_edm, labels_from_folders

MOST_IMAGE_BYTES = GIB  # of one file: Pillow refuses more than 179 million pixels, of up to six bytes


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
        return read_file(self.root / sample_id, most=MOST_IMAGE_BYTES)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """N samples in row order.

    `sample_ids` [N] numpy strings; `labels` [N] int32 in [0, K); `class_names` K strings; `where` names the data in
    messages; `left_out` counts files that are no images by their ending, `further` images that are not in the cache.
    """

    where: str
    sample_ids: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    source: ImageSource
    left_out: int = 0
    further: int = 0

    def __len__(self) -> int:
        return len(self.sample_ids)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The digest of the ids and labels in row order; some seconds for a million, so it is taken once."""
        return manifest_fingerprint(self.sample_ids.tolist(), self.labels.tolist())


@dataclass(frozen=True, kw_only=True)
class KnownSamples:
    """The samples of a cache that is there: its ids [N], numpy strings in row order, and its class names."""

    sample_ids: np.ndarray
    class_names: tuple[str, ...]


def scan_folder(
    root: Path, labels_file: str | None = None, *, allow_empty: bool = False, known: KnownSamples | None = None
) -> Manifest:
    """Read the manifest of an image folder.

    `labels_file` is a CSV of `sample id, label` (whole numbers, or class names in any text), or the word `folders`:
    take five-digit folder names as classes. `allow_empty` gives a class to a folder without images, too. The images of
    a cache that is there are those that it has, where the folder still holds them all: `known`. Raises `UsageError` for
    a folder that is missing, empty, unreadable, ambiguous, or holds a name that is not UTF-8.
    """
    root = root.absolute()
    _check_folder(root)
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
    further = 0
    if known is not None and not (own := set(known.sample_ids.tolist())) - set(images):
        further = len(images) - len(own)
        images = list(own)
    images.sort(key=os.fsencode)
    if labels_file not in (None, "folders"):
        labels, names = labels_from_csv(images, Path(labels_file or ""))
    elif edm_labels.exists():
        labels, names = labels_from_edm(images, edm_labels)
    else:
        labels, names = labels_from_folders(
            images,
            root,
            folders=_visible_folders(root),
            five_digits_are_classes=labels_file == "folders",
            allow_empty=allow_empty,
            known=None if known is None else known.class_names,
        )
    return Manifest(
        where=str(root),
        sample_ids=np.array(images, dtype=np.dtypes.StringDType()),
        labels=np.asarray(labels, dtype=np.int32),
        class_names=tuple(names),
        source=FolderSource(root),
        left_out=left_out,
        further=further,
    )


def class_lines(manifest: Manifest) -> Iterator[str]:
    """Yield what the classes of `manifest` are called, and where folders below them are none: `2023/cats` is 2023."""
    names = manifest.class_names
    shown = ", ".join(names[:8]) + (f", ... {names[-1]}" if len(names) > 8 else "")
    yield f"{len(manifest)} images of {len(names)} class{'es' * (len(names) > 1)}: {shown}"
    if len(names) > 1 and all(NUMBER.fullmatch(name) for name in names):
        first = next((path for path in manifest.sample_ids if str(path).startswith(f"{names[0]}/")), "")
        below = str(first).split("/")[1:-1]
        if below:
            yield (
                f"  the class of {first} is {names[0]}, its first folder, not {below[0]}; "
                "if that is not what you mean, name them with --labels FILE.csv"
            )


def _check_folder(root: Path) -> None:
    try:
        found = root.is_dir()
        is_file = root.is_file()
    except OSError as error:  # a folder above it is closed to this user
        raise UsageError(f"--data {root}: cannot be read ({error.strerror}); mend its permissions") from error
    if is_file:
        raise UsageError(
            f"--data {root}: a file, and images are read from a folder; unpack it, or import latents in it with "
            "repa-cache import"
        )
    if not found:
        raise UsageError(f"--data {root}: no such folder; give a folder of images, or the word demo")


def _visible_folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]


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
