"""The index at the end of a shard file: where each inner chunk lies.

Zarr v3's sharding codec with `index_location: end`: uint64 little-endian pairs (offset, length) in C order of the chunk
grid, then the crc32c of those bytes. A chunk that is not in the file has both words 2^64 - 1 and reads as fill value.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np

from .errors import CacheError
from .layout import ArrayLayout
from .storage import Location, Source

ABSENT = np.uint64(2**64 - 1)
CHECKSUM_BYTES = 4


def checksum(data: bytes | np.ndarray) -> bytes:
    """Return the crc32c of `data`, 4 bytes little-endian, as Zarr's crc32c codec appends it."""
    return int(google_crc32c.value(data)).to_bytes(CHECKSUM_BYTES, "little")


def index_bytes(layout: ArrayLayout) -> int:
    """Return the size of the index of one shard, its checksum included."""
    return 16 * math.prod(layout.chunks_per_shard) + CHECKSUM_BYTES


def pack_index(entries: np.ndarray) -> bytes:
    """Return the bytes of an index from `entries` [chunks, 2] uint64 (offset, length)."""
    data = np.ascontiguousarray(entries, dtype="<u8").tobytes()
    return data + checksum(data)


def unpack_index(tail: bytes, layout: ArrayLayout, *, file_bytes: int, where: Location | Path | str) -> np.ndarray:
    """Return the entries [chunks, 2] uint64 (offset, length) from the last `index_bytes(layout)` bytes of a shard file.

    Raises `CacheError` where the file is too short, the index's checksum does not hold, or an entry points outside
    the file: a shard that passes can be read at any of its entries without a short read.
    """
    size = index_bytes(layout)
    if len(tail) != size:
        raise CacheError(f"{where}: {file_bytes} bytes, but the index of a shard alone has {size}; it was cut")
    if checksum(tail[:-CHECKSUM_BYTES]) != tail[-CHECKSUM_BYTES:]:
        raise CacheError(f"{where}: the checksum of the shard's index does not hold; the file is damaged or was cut")
    entries = np.frombuffer(tail, dtype="<u8", count=size // 16 * 2).reshape(-1, 2)
    present = entries[(entries != ABSENT).any(axis=1)]
    limit = np.uint64(file_bytes - size)
    if (present > limit).any() or (present.sum(axis=1, dtype=np.uint64) > limit).any():
        raise CacheError(f"{where}: the index points outside the file's {file_bytes} bytes; the file is damaged")
    return entries


def read_index(source: Source, layout: ArrayLayout, *, where: Location | Path | str) -> np.ndarray:
    """Return the entries of an open shard; raise as `unpack_index` does."""
    tail = bytearray(min(index_bytes(layout), source.num_bytes))
    num_read = source.read_into(memoryview(tail), source.num_bytes - len(tail))
    return unpack_index(bytes(tail[:num_read]), layout, file_bytes=source.num_bytes, where=where)


def stored_chunks(
    source: Source, layout: ArrayLayout, *, where: Location | Path | str
) -> Iterator[tuple[int, np.ndarray | str | None]]:
    """Yield the chunks of an open shard by number, in their order, in the memory of the largest.

    Each comes as its stored bytes [n] uint8 without the checksum, which held, valid until the next is asked for; as
    None where it is not stored; or as what is wrong with it. Raises `CacheError` where there is no index to go by.
    """
    index = read_index(source, layout, where=where)
    absent = index[:, 0] == ABSENT
    buffer = np.empty(int(index[~absent, 1].max(initial=0)), dtype=np.uint8)
    for i, (offset, length) in enumerate(index.tolist()):
        if absent[i]:
            yield i, None
            continue
        stored = buffer[:length]
        num_read = source.read_into(stored.data, offset)
        data, found = stored[:-CHECKSUM_BYTES], stored[-CHECKSUM_BYTES:].tobytes()
        yield i, data if num_read == length and checksum(data) == found else "its checksum does not hold"
