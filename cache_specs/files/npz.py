"""The rows of an .npz of pictures: where they lie, headers' claims held against the file, and how they are written."""

import contextlib
import math
import os
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import reason
from .outside import open_regular
from .partial_files import new_file
from .whole_file import partial_of, sync_folder

MEMBER = "arr_0.npy"
LOCAL_HEADER_BYTES = 30  # of a zip's member, before its name and extra field


@dataclass(frozen=True, kw_only=True)
class StoredRows:
    """`arr_0` [N, ...], whose N rows begin at `offset` of the file, after `header_bytes` of the member."""

    shape: tuple[int, ...]
    dtype: "np.dtype[Any]"
    header_bytes: int
    offset: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def open_rows(npz: Path) -> tuple[BinaryIO, StoredRows]:
    """Return an open .npz as this house writes them, uncompressed, and where its rows lie; the caller closes it.

    Raises `ValueError` where it is damaged or holds anything else, `OSError` where it cannot be read.
    """
    stream = os.fdopen(open_regular(npz), "rb")
    try:
        return stream, _find_rows(stream)
    except OSError:
        stream.close()
        raise
    # What zipfile, and numpy's parser of headers, which are Python's text, make of other people's files.
    except Exception as error:
        stream.close()
        raise ValueError(reason(error)) from error


def _find_rows(stream: BinaryIO) -> StoredRows:
    with zipfile.ZipFile(stream) as archive, archive.open(MEMBER) as member:
        entry = archive.getinfo(MEMBER)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("arr_0 is compressed; expected it stored as it is")
        np.lib.format.read_magic(member)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        header_bytes = member.tell()
    if dtype.hasobject or fortran or not shape or min(shape) < 1:
        raise ValueError(f"arr_0 is {dtype} {list(shape)[:8]}; expected rows of numbers")
    stream.seek(entry.header_offset + 26)  # of the local header: the lengths of name and extra field
    name_bytes, extra_bytes = struct.unpack("<HH", stream.read(4))
    offset = entry.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes + header_bytes
    claimed = math.prod(shape) * dtype.itemsize
    there = min(entry.file_size - header_bytes, os.fstat(stream.fileno()).st_size - offset)
    if claimed != entry.file_size - header_bytes or claimed > there:
        raise ValueError(f"arr_0 is {dtype} {list(shape)[:8]}, {claimed} bytes, and {max(there, 0)} are there")
    return StoredRows(shape=shape, dtype=dtype, header_bytes=header_bytes, offset=offset)


def write_rows(npz: Path, shape: tuple[int, ...], dtype: "np.dtype[Any]", batches: Iterable[np.ndarray]) -> None:
    """Write `batches` of rows as they come, `shape` in all, to `arr_0` of an .npz: whole, or what was there before.

    The member is stored as it is, with the same bytes at any time of day. Raises `OSError`.
    """
    partial = partial_of(npz)
    entry = zipfile.ZipInfo(MEMBER, date_time=(1980, 1, 1, 0, 0, 0))
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    try:
        with open(new_file(partial), "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                with archive.open(entry, "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    written = 0
                    for rows in batches:
                        assert (rows.dtype, rows.shape[1:]) == (dtype, shape[1:]), (rows.dtype, rows.shape)
                        member.write(np.ascontiguousarray(rows).data)
                        written += len(rows)
                assert written == shape[0], (written, shape)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, npz)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(npz.parent)
