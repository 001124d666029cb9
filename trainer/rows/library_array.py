"""Rows of one array through tensorstore: compressed shards, object stores, other people's sharding.

All rows of a batch are asked for at once, and of all its arrays together, so that an object store's latency is waited
for once and not once a row (measured on random rows of a local store: 9,000 to 13,000 samples/s against 1,240 by
zarr-python with zarrs and 515 without, which read one row after the other). Every chunk's crc32c is checked.

Shard indices are cached with what was read last, in a pool that is bounded for the whole process. A global shuffle of a
cache with more shards than fit asks for index and row each time; `--shuffle blocks` stays among shards that are known.
"""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...cache_specs.errors import CacheError, UsageError, option
from ...cache_specs.layout import ArrayLayout
from ...cache_specs.remote.object_store import ObjectPath
from ...cache_specs.storage import LocalPath, Location

CACHE_BYTES = 128 * 2**20
REQUESTS_IN_FLIGHT = 64
RETRIES = {"max_retries": 4, "initial_delay": "500ms", "max_delay": "4s"}  # a server that is gone is said so in seconds

NDArray = np.ndarray[Any, Any]


class LibraryArray:
    """Reads any shards that tensorstore can.

    `in_shard_files` says that shards lie in files as `layout.shard_file` names them: one that is not there is then an
    error. A chunk that is not stored in a shard reads as zero, as everything does in another layout.

    Raises CacheError where the array cannot be opened, UsageError where tensorstore is missing. From where tensorstore
    cannot read (az://, hf://) no row is read, with a UsageError, but a copy can be staged.
    """

    def __init__(self, folder: Location, layout: ArrayLayout, *, in_shard_files: bool) -> None:
        self.folder = folder
        self.layout = layout
        self._in_shard_files = in_shard_files
        kvstore = _kvstore(folder)
        if in_shard_files and isinstance(folder, LocalPath):
            _check_regular(folder.path)
        self._array: Any = None
        if kvstore is None:
            return
        spec = {
            "driver": "zarr3",
            "kvstore": kvstore,
            "recheck_cached_data": "open",
            "recheck_cached_metadata": "open",
            "fill_missing_data_reads": False,  # told apart in `_read_one`
        }
        context = _context(folder)  # before tensorstore is imported: it says what to install
        import tensorstore

        try:
            self._array = tensorstore.open(spec, context=context, read=True, open=True).result()
        except Exception as error:  # tensorstore has no class of its own
            raise CacheError(f"{folder} cannot be opened ({_reason(error)})") from error

    def begin(self, rows: NDArray, views: NDArray, out: NDArray) -> Callable[[], None]:
        """Begin to read inner chunks (rows[i], views[i]); what is returned waits for them and fills `out` [B, *row].

        An array of one view has that alone, whatever `views` are.
        Only that writes into `out`, and it raises CacheError naming the sample where a stored row cannot be read.
        """
        if self._array is None:
            raise UsageError(
                f"{self.folder}: rows cannot be read from there directly; "
                f"{option('add --stage DIR, which copies', 'open what stage_cache returns: it copies')} the cache once "
                f"to a local disk{option(' (an evaluation reads --cache itself: name the copy there)', '')}"
            )
        if self.layout.num_views == 1:
            views = np.zeros_like(views)
        future = self._array.vindex[rows, views].read()

        def wait() -> None:
            # Into memory of its own first: a read that is still under way when another array fails must not write
            # into a buffer that may be in use again.
            try:
                out[...] = future.result()
            except Exception:
                for i, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
                    out[i] = self._read_one(row, view)

        return wait

    def _read_one(self, row: int, view: int) -> NDArray:
        """Return one row, zero where it is not stored; raise CacheError where it cannot be read."""
        try:
            return np.asarray(self._array[row, view].read().result())
        except Exception as error:
            name = self.layout.shard_file(row // self.layout.shard[0])
            where = f"{self.folder}/{name}" if self._in_shard_files else str(self.folder)
            missing = "NOT_FOUND" in str(error)
            if missing and not (self._in_shard_files and (self.folder / name).size() is None):
                return np.zeros((), dtype=self.layout.dtype)
            reason = "it is missing" if missing else _reason(error)
            raise CacheError(
                f"{where}: sample {row}, view {view} cannot be read ({reason}). See that the storage answers, and what "
                "`repa-cache verify` says of this cache; then resume"
            ) from error


def _check_regular(folder: Path) -> None:
    """Raise CacheError for a shard that is no file: tensorstore would wait for a FIFO for ever."""
    try:
        with os.scandir(folder) as entries:
            unfit = next((entry.name for entry in entries if entry.name.startswith("c.") and not entry.is_file()), None)
    except OSError as error:
        raise CacheError(f"{folder} cannot be read ({error.strerror})") from error
    if unfit is not None:
        raise CacheError(f"{folder / unfit} is no file; remove it, and copy the cache again or run the build again")


def _kvstore(folder: Location) -> dict[str, Any] | None:
    """Return what tensorstore calls a place, None for one that it cannot read."""
    if isinstance(folder, LocalPath):
        return {"driver": "file", "path": f"{folder.absolute()}/"}
    if not isinstance(folder, ObjectPath):  # hf://
        return None
    scheme, _, bucket = folder.root.partition("://")
    store: dict[str, Any] = {"bucket": bucket, "path": f"{folder.key}/"}
    if scheme == "gs":
        return {"driver": "gcs", **store}
    if scheme != "s3":
        return None
    # As obstore, which writes and lists, takes them from the environment.
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    credentials = "default"
    if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true"):
        credentials = "anonymous"
    elif "AWS_ACCESS_KEY_ID" in os.environ:
        credentials = "environment"
    options = {"endpoint": os.environ.get("AWS_ENDPOINT_URL"), "aws_region": region}
    given = {name: value for name, value in options.items() if value}
    return {"driver": "s3", **store, **given, "aws_credentials": {"type": credentials}}


def _context(where: Location) -> Any:
    try:
        return _shared_context()
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{where}: object stores and compressed shards are read through tensorstore, which is not installed; "
            "pip install tensorstore"
        ) from error


@functools.cache
def _shared_context() -> Any:
    import tensorstore

    requests = {"limit": REQUESTS_IN_FLIGHT}
    return tensorstore.Context(
        {
            "cache_pool": {"total_bytes_limit": CACHE_BYTES},
            "s3_request_concurrency": requests,
            "gcs_request_concurrency": requests,
            "s3_request_retries": RETRIES,
            "gcs_request_retries": RETRIES,
        }
    )


def _reason(error: Exception) -> str:
    """Return what tensorstore said, without the specification that it repeats."""
    text = re.split(r" \[\w+(?: locations)?=", str(error))[0]
    return " ".join(text.split())[:300]
