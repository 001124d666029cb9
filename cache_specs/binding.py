"""What ties a shard to its place, and a component to its images: a number a shard, and two digests (README.md).

A shard's number is the crc32c of the checksums that are stored with its chunks, in their order. Whoever writes or reads
the chunks has these at hand, so that it costs no pass over the data.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import CacheError
from .layout import ArrayLayout, CacheLayout
from .shard_index import CHECKSUM_BYTES, checksum
from .storage import Location

SHARD_CHECKSUMS = "shard_checksums"  # the array of a component that holds them
SHARDS_DIGEST = "shards_digest"
SOURCE_DIGEST = "source_bytes_digest"

NUMBER = np.dtype("<u4")


def shard_number(checksums: bytes | bytearray) -> int:
    """Return the number of a shard from its chunks' stored checksums, 4 bytes each in C order."""
    return int.from_bytes(checksum(bytes(checksums)), "little")


def checksums_layout(cache: CacheLayout, num_arrays: int) -> ArrayLayout:
    """Return where the numbers lie: one file a range, one column an array. They are chunks, not shards."""
    row = (1, num_arrays)
    return ArrayLayout(
        name=SHARD_CHECKSUMS, shape=(cache.num_ranges, num_arrays), dtype=NUMBER.name, inner=row, shard=row
    )


def pack_numbers(numbers: Sequence[int]) -> bytes:
    """Return the file of one range: its numbers in the order of the component's arrays, and their checksum."""
    data = np.array(numbers, dtype=NUMBER).tobytes()
    return data + checksum(data)


def read_numbers(file: Location, num_arrays: int) -> np.ndarray | None:
    """Return the numbers [num_arrays] uint32 of one range, None where there is no file; raise where it is damaged."""
    data = file.read()
    if data is None:
        return None
    numbers = data[:-CHECKSUM_BYTES]
    if len(numbers) != num_arrays * NUMBER.itemsize or checksum(numbers) != data[-CHECKSUM_BYTES:]:
        raise CacheError(f"{file}: its checksum does not hold; delete this file and run the build again")
    return np.frombuffer(numbers, dtype=NUMBER)


def array_digest(values: np.ndarray, dtype: str | np.dtype[Any]) -> str:
    """Return the sha256 (hex) of `values` in C order as little-endian `dtype`."""
    return hashlib.sha256(np.ascontiguousarray(values, dtype=dtype).tobytes()).hexdigest()


def numbers_digest(numbers: np.ndarray) -> str:
    """Return `shards_digest` of all numbers [ranges, arrays]."""
    return array_digest(numbers, NUMBER)


def source_digest(source_bytes: np.ndarray) -> str:
    """Return `source_bytes_digest` of the file sizes [N]."""
    return array_digest(source_bytes, "<i8")
