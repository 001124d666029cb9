"""The index at the end of a shard file: where each inner chunk lies.

Zarr v3's sharding codec with `index_location: end`: uint64 little-endian pairs (offset, length) in C order of the chunk
grid, then the crc32c of those bytes. A chunk that is not in the file has both words 2^64 - 1 and reads as fill value.

The codec leaves open where in the file the chunks lie. Ours begin at multiples of 64 bytes, zeros between them, as the
memory does that rows are copied into: the processor copies such bytes faster. (AMD's takes several times as long where
the memory begins 1 to 31 bytes after the data, counted modulo 4096, as for some rows it did without the zeros.)
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
ALIGNMENT = 64  # bytes


def checksum(data: bytes | np.ndarray) -> bytes:
    """Return the crc32c of `data`, 4 bytes little-endian, as Zarr's crc32c codec appends it."""
    return int(google_crc32c.value(data)).to_bytes(CHECKSUM_BYTES, "little")


def index_bytes(layout: ArrayLayout) -> int:
    """Return the size of the index of one shard, its checksum included."""
    return 16 * math.prod(layout.chunks_per_shard) + CHECKSUM_BYTES


def padding(offset: int) -> int:
    """Return how many bytes after `offset` a chunk may begin."""
    return -offset % ALIGNMENT


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
    source: Source, layout: ArrayLayout, *, where: Location | Path | str, checksums: bytearray | None = None
) -> Iterator[tuple[int, np.ndarray | str | None]]:
    """Yield the chunks of an open shard by number, in their order, in the memory of the largest.

    Each comes as its stored bytes [n] uint8 without the checksum, which held, valid until the next is asked for; as
    None where it is not stored; or as what is wrong with it or with the padding before it. `checksums` is extended by
    the stored checksum of each. Raises `CacheError` where there is no index to go by.
    """
    index = read_index(source, layout, where=where)
    absent = index[:, 0] == ABSENT
    buffer = np.empty(ALIGNMENT + int(index[~absent, 1].max(initial=0)), dtype=np.uint8)
    gaps = _gaps_before(index)
    for i, (offset, length) in enumerate(index.tolist()):
        if absent[i]:
            yield i, None
            continue
        gap = int(gaps[i])
        stored = buffer[: gap + length]
        num_read = source.read_into(stored.data, offset - gap)
        data, found = stored[gap:-CHECKSUM_BYTES], stored[-CHECKSUM_BYTES:].tobytes()
        if checksums is not None:
            checksums += found
        if num_read != gap + length or length < CHECKSUM_BYTES or checksum(data) != found:
            yield i, "its checksum does not hold"
        elif stored[:gap].any():
            yield i, "the padding before it is not zero"
        else:
            yield i, data


def _gaps_before(index: np.ndarray) -> np.ndarray:
    """Return how many bytes of padding lie before each chunk [chunks] uint64; other writers' shards may have none."""
    order = np.argsort(index[:, 0], kind="stable")  # as they lie in the file; those that are not stored come last
    starts, ends = index[order, 0], index[order].sum(axis=1, dtype=np.uint64)
    gaps = np.zeros_like(starts)
    gaps[order] = starts - np.concatenate([np.zeros(1, np.uint64), ends[:-1]])
    return np.where(gaps < ALIGNMENT, gaps, 0)
