"""Numbered .npy latents and their dataset.json, in a folder or a zip, as EDM2's and REPA's tools write them.

Both tools put sample n into `<first five digits>/img-mean-std-<eight digits>.npy`, float32 [2C, h, w], mean before
standard deviation, and the labels into dataset.json beside it. Names of a zip are only ever ids: nothing is unpacked.
Python's zipfile holds about 1 KB a member: 1.2 GB for ImageNet.
"""

import io
import itertools
import math
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ...cache_specs.errors import UsageError, reason
from ...cache_specs.files.outside import MOST_TABLE_BYTES, open_regular, read_file
from ..images.labels import edm_labels
from ..images.manifest import walk_files
from .source import BadLatent

LATENT_NAME = re.compile(r"(?:.*/)?img-mean-std-(\d{8})\.npy")
IMAGE_NAME = re.compile(r"(?:.*/)?img(\d{8})\.[a-z]+")
LABELS_FILE = "dataset.json"
MOST_LATENT_BYTES = 2**28  # of one sample's .npy: latents of a picture of 8,192 pixels a side have as many


class Members(Protocol):
    """Named files: a folder's or a zip's."""

    where: Path
    names: list[str]

    def read(self, name: str, *, most: int = MOST_LATENT_BYTES) -> bytes:
        """Return a file, whole; raise `BadLatent` where it cannot be read, or has more than `most` bytes."""
        ...

    def size(self, name: str) -> int: ...


class FolderMembers:
    """The files below `root`."""

    def __init__(self, root: Path) -> None:
        self.where = root
        self.names = list(walk_files(root))

    def read(self, name: str, *, most: int = MOST_LATENT_BYTES) -> bytes:
        try:
            return read_file(self.where / name, most=most)
        except OSError as error:
            raise BadLatent(f"cannot be read ({reason(error)})") from error

    def size(self, name: str) -> int:
        return (self.where / name).stat().st_size


class ZipMembers:
    """The files of a zip, each checked against the zip's own checksum when it is read. Threads may share it.

    Raises `UsageError` for a zip that is not whole, and for names that no tool of the field writes: absolute, leading
    out of the folder, or given twice.
    """

    def __init__(self, file: Path) -> None:
        self.where = file
        try:
            os.close(open_regular(file))
            self._zip = zipfile.ZipFile(file)
        # A damaged directory is whatever zipfile makes of it: struct.error, OverflowError, UnicodeDecodeError, ...
        except Exception as error:
            raise UsageError(
                f"--data {file}: not a whole zip file ({reason(error)}); copy or download it again"
            ) from error
        self.names = [name for name in self._zip.namelist() if not name.endswith("/")]
        for name in self.names:
            if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"):
                raise UsageError(f"--data {file}: a member is called {name!r}, which leads out of the zip; not used")
        if len(set(self.names)) < len(self.names):
            twice = next(name for name, following in itertools.pairwise(sorted(self.names)) if name == following)
            raise UsageError(f"--data {file}: two members are called {twice}; a sample's id must be its own")

    def read(self, name: str, *, most: int = MOST_LATENT_BYTES) -> bytes:
        claimed = self.size(name)
        if claimed > most:
            raise BadLatent(f"it says that it has {claimed} bytes unpacked, and at most {most} are read")
        try:
            with self._zip.open(name) as member:  # which ends where the member said, whatever more is packed
                return member.read()
        # A damaged member is whatever zipfile or its decompressor make of it; an encrypted one is a RuntimeError.
        except Exception as error:
            raise BadLatent(f"cannot be read from the zip ({reason(error)})") from error

    def size(self, name: str) -> int:
        return self._zip.getinfo(name).file_size


class NumberedLatents:
    """The latents among `members`, by number: `numbers` [N] int64 ascending.

    Raises `UsageError` where there are none, or two have one number, or another .npy lies among them.
    """

    def __init__(self, members: Members) -> None:
        self.members = members
        names = [name for name in members.names if name.endswith(".npy")]
        if not names:
            if any(IMAGE_NAME.fullmatch(name) for name in members.names):
                raise UsageError(
                    f"--data {members.where}: holds images, and no latents; unpack it, and encode them with repa-cache "
                    "build --data FOLDER"
                )
            raise UsageError(
                f"--data {members.where}: no img-mean-std-00000000.npy in it ({len(members.names)} other files); "
                "expected latents as the encode command of EDM2's or REPA's dataset tool writes them"
            )
        numbers = numbers_of(names, LATENT_NAME, members.where, "img-mean-std-00000000.npy")
        order = np.argsort(numbers, kind="stable")
        self.numbers = numbers[order]
        self.names = np.array(names, dtype=np.dtypes.StringDType())[order]
        same = np.flatnonzero(self.numbers[1:] == self.numbers[:-1])
        if len(same):
            raise UsageError(
                f"--data {members.where}: {self.names[same[0]]} and {self.names[same[0] + 1]} are one sample"
            )

    def name(self, number: int) -> str:
        return str(self.names[np.searchsorted(self.numbers, number)])

    def read(self, number: int) -> np.ndarray:
        """Return one sample's array as it is stored; raise `BadLatent`."""
        return read_npy(self.members.read(self.name(number)))

    def labels(self) -> np.ndarray:
        """Return the labels [N] of dataset.json by number, zeros where it says null; raise `UsageError`."""
        file = self.members.where / LABELS_FILE
        if LABELS_FILE not in self.members.names:
            raise UsageError(f"{file}: missing; it has the labels of the latents beside it")
        by_name = read_labels(self.members)
        if by_name is None:
            return np.zeros(len(self.numbers), dtype=np.int64)
        missing = [name for name in self.names.tolist() if name not in by_name]
        if missing or len(by_name) != len(self.names):
            first = f", the first without one is {missing[0]}" if missing else ""
            raise UsageError(f"{file}: {len(by_name)} labels for {len(self.names)} latents{first}; expected one each")
        return np.array([by_name[name] for name in self.names.tolist()], dtype=np.int64)


def numbers_of(names: Sequence[str], pattern: re.Pattern[str], where: Path, expected: str) -> np.ndarray:
    """Return the numbers [N] int64 in `names`; raise `UsageError` for one that is not named as `expected`."""
    numbers = np.empty(len(names), dtype=np.int64)
    for i, name in enumerate(names):
        match = pattern.fullmatch(name)
        if match is None:
            raise UsageError(f"--data {where}: {name} among its files; expected names like 00000/{expected}")
        numbers[i] = int(match[1])
    return numbers


def read_npy(data: bytes) -> np.ndarray:
    """Return the array of a .npy file; raise `BadLatent` where it is not a whole one. Nothing is unpickled."""
    stream = io.BytesIO(data)
    if not data.startswith(np.lib.format.MAGIC_PREFIX):
        raise BadLatent("not a whole .npy file of numbers (it does not begin as one)")
    try:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = readers[np.lib.format.read_magic(stream)](stream)
        claimed, there = abs(math.prod(shape)) * dtype.itemsize, len(data) - stream.tell()
        if claimed > there and not dtype.hasobject:  # numpy would ask for the memory first, and then look
            raise ValueError(f"{dtype} {list(shape)[:8]} has {claimed} bytes, and {there} follow its header")
        stream.seek(0)
        array: np.ndarray = np.load(stream, allow_pickle=False)
    # The header is Python's text: what its parser raises on other people's is SyntaxError, MemoryError, KeyError, ...
    except Exception as error:
        raise BadLatent(f"not a whole .npy file of numbers ({reason(error)})") from error
    if stream.read(1):
        raise BadLatent("not a single .npy array; something follows it")
    return array


def read_labels(members: Members) -> dict[str, int] | None:
    """Return the labels of dataset.json by name, None where it says null; raise `UsageError` where it is damaged."""
    file = members.where / LABELS_FILE
    try:
        data = members.read(LABELS_FILE, most=MOST_TABLE_BYTES)
    except BadLatent as error:
        raise UsageError(f"{file}: {error}") from error
    return edm_labels(data, file, once=True)
