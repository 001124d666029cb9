"""A prefix of an object store as a cache's location, through obstore. The only importer of obstore.

A put is whole or not at all, so it is the commit: nothing is written beside and renamed. Credentials, region and
endpoint are those of the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ..., GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_ACCOUNT_NAME, ...), or of the machine's role. obstore is one wheel that brings no AWS library, and moves
a large object in parallel parts; fsspec's s3fs brings aiobotocore, which holds botocore to a narrow range of versions.
"""

import contextlib
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..errors import CacheError, UsageError
from ..files.outside import MOST_METADATA_BYTES

SCHEMES = ("s3", "gs", "az")
MAX_RETRIES = 4
RETRY_S = 30  # of one request with its retries: a server that is gone is said so within this
CONNECT_S = 5
REQUEST_S = 120  # for a piece of READ_AHEAD_BYTES, or a part of a put, on a slow line
READ_AHEAD_BYTES = 8 * 2**20  # a shard read in order is fetched in pieces of this: a request costs tens of ms


def _obstore() -> Any:
    try:
        import obstore.exceptions
        import obstore.store
    except ModuleNotFoundError as error:
        raise UsageError("object stores need obstore, which is not installed; pip install obstore") from error
    return obstore


@functools.cache
def _store(root: str) -> Any:
    obstore = _obstore()
    try:
        return obstore.store.from_url(
            root,
            # Plain http is spoken only to an endpoint that the user gave as such.
            client_options={
                "allow_http": True,
                "connect_timeout": timedelta(seconds=CONNECT_S),
                "timeout": timedelta(seconds=REQUEST_S),
            },
            retry_config={"max_retries": MAX_RETRIES, "retry_timeout": timedelta(seconds=RETRY_S)},
        )
    except obstore.exceptions.BaseError as error:
        raise UsageError(f"{root}: {reason(error)}; see that the environment names the account") from error


def reason(error: BaseException) -> str:
    """Return what an object store said, in a few words: the server's own where it sent any."""
    text = str(error)
    said = [re.search(rf"<{tag}>(?:<!\[CDATA\[)?([^<\]]*)", text) for tag in ("Code", "Message")]
    if any(said):
        return ": ".join(match[1].rstrip(".") for match in said if match)
    if isinstance(error, FileNotFoundError):
        return "no such object"
    first = text.partition("\n\n")[0].partition("\n")[0]
    first = re.sub(r"^Generic \w+ error: |Error performing (list|token) request: ", "", first)
    return " ".join(first.split())[:300]


@dataclass(frozen=True)
class ObjectPath:
    """An object, or a prefix of objects as a folder: `key` in the bucket `root` (`s3://bucket`)."""

    root: str
    key: str

    def __str__(self) -> str:
        return f"{self.root}/{self.key}"

    def __truediv__(self, name: str) -> "ObjectPath":
        return ObjectPath(self.root, f"{self.key}/{name}")

    def absolute(self) -> "ObjectPath":
        return self

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> "ObjectPath":
        return ObjectPath(self.root, self.key.rpartition("/")[0])

    def read(self, most: int = MOST_METADATA_BYTES) -> bytes | None:
        with self.errors("read"):
            try:
                found = _store(self.root).get(self.key)
                if found.meta["size"] > most:
                    raise OSError(f"it has {found.meta['size']} bytes, and at most {most} are read")
                return bytes(found.bytes())
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None

    def exists(self) -> bool:
        return self.size() is not None or bool(self.names())

    def size(self) -> int | None:
        with self.errors("read"):
            try:
                return int(_store(self.root).head(self.key)["size"])
            except FileNotFoundError:  # for a bucket that is not there too: a HEAD has no words
                return None

    def names(self) -> set[str]:
        with self.errors("listed"):
            found = _store(self.root).list_with_delimiter(self.key)
        keys = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        return {key.rstrip("/").rpartition("/")[2] for key in keys}

    def sizes(self) -> dict[str, int]:
        with self.errors("listed"):
            found = _store(self.root).list_with_delimiter(self.key)
        return {entry["path"].rpartition("/")[2]: entry["size"] for entry in found["objects"]}

    @contextlib.contextmanager
    def open(self) -> Iterator["RangedSource"]:
        with self.errors("read"):
            store = _store(self.root)
            num_bytes = store.head(self.key)["size"]

        def fetch(start: int, length: int) -> Any:
            with self.errors("read"):
                return store.get_range(self.key, start=start, length=length)

        yield RangedSource(num_bytes, fetch)

    def write(self, data: bytes) -> None:
        with self.errors("written"):
            _store(self.root).put(self.key, data)

    def take(self, file: Path) -> None:
        with self.errors("written"):
            _store(self.root).put(self.key, file)
        file.unlink()

    def sync(self) -> None:
        """Do nothing: an object that was put is durable."""

    def delete(self) -> None:
        with self.errors("deleted"):
            _store(self.root).delete(self.key)

    def delete_tree(self) -> None:
        with self.errors("deleted"):
            store = _store(self.root)
            for page in store.list(self.key):
                store.delete([entry["path"] for entry in page])

    def scratch(self) -> Path:
        """Return a folder of this user in the machine's temporary one (TMPDIR), the same for every build here."""
        digest = hashlib.sha256(str(self).encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"repa-cache-{os.getuid()}" / digest

    def zarr_store(self) -> Any:
        from zarr.storage import ObjectStore, StorePath

        return StorePath(ObjectStore(_store(self.root), read_only=True), self.key)

    def reading(self) -> contextlib.AbstractContextManager[None]:
        return self.errors("read")

    @contextlib.contextmanager
    def errors(self, done: str) -> Iterator[None]:
        """Turn what obstore raises into one line, which says what cannot be `done`: read, listed, written."""
        obstore = _obstore()
        try:
            yield
        except (obstore.exceptions.BaseError, OSError) as error:
            raise CacheError(
                f"{self}: cannot be {done} ({reason(error)}); see that the bucket is there and that the environment "
                "has its endpoint, region and credentials, then run the same command again: what was put is kept"
            ) from error


class RangedSource:
    """What is read by requests of (start, length), by position; reads that follow each other share one of a piece."""

    def __init__(self, num_bytes: int, fetch: Callable[[int, int], Any]) -> None:
        self.num_bytes = num_bytes
        self._fetch = fetch
        self._start = 0
        self._piece = memoryview(b"")

    def read_into(self, buffer: memoryview, offset: int) -> int:
        length = max(0, min(len(buffer), self.num_bytes - offset))
        end = self._start + len(self._piece)
        if length and not self._start <= offset <= offset + length <= end:
            # The index at the end is read by itself; then come the chunks, from the first one on.
            follows = self._start <= offset <= end
            fetched = min(max(length, READ_AHEAD_BYTES) if follows else length, self.num_bytes - offset)
            self._piece = memoryview(self._fetch(offset, fetched))
            self._start = offset
        piece = self._piece[offset - self._start :][:length] if length else b""
        buffer[: len(piece)] = piece
        return len(piece)
