"""Where the rows of an .npz of samples lie: what its headers claim is held against the file before it is believed."""

import math
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import reason
from .outside import open_regular

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
