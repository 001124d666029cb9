"""Where a cache lies: a local directory, a prefix of an object store, a repository of the Hugging Face hub (hub.py).

A `Location` is a file or folder of a cache; `location("s3://bucket/in1k") / "features"` is one below. What a cache
asks of its storage is little: read a small file whole, list the names in a folder, write or put a file so that a kill
leaves the old one or the new one, and read ranges of a shard. On disk a write is a temporary name, fsync and rename; in
an object store a put is the commit (remote/object_store.py).
"""

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from .errors import CacheError, UsageError, with_home
from .files.outside import MOST_METADATA_BYTES, open_regular, read_file, regular_files
from .files.partial_files import new_file
from .files.whole_file import sync_folder
from .layout import PARTIAL_FOLDER


class Source(Protocol):
    """An open file of known size, read by position."""

    num_bytes: int

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from byte `offset` on; return how many bytes there were, fewer only at the end of the file."""
        ...


class Location(Protocol):
    """A file or folder of a cache. `str()` is what messages call it, and what `location` takes back.

    Every method raises `CacheError`, one line, where the storage refuses.
    """

    @property
    def name(self) -> str: ...

    @property
    def parent(self) -> Self: ...

    def __truediv__(self, name: str) -> Self: ...

    def absolute(self) -> Self:
        """Return the same place by a name that holds in any working directory."""
        ...

    def read(self, most: int = MOST_METADATA_BYTES) -> bytes | None:
        """Return a small file's bytes, None where there is none; more than `most` are not read."""
        ...

    def exists(self) -> bool:
        """Return whether there is a file here, or a folder with something in it."""
        ...

    def size(self) -> int | None:
        """Return a file's bytes, None where there is none."""
        ...

    def names(self) -> set[str]:
        """Return the names of files and folders directly inside, none where there is no folder."""
        ...

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file directly inside, by name."""
        ...

    def open(self) -> contextlib.AbstractContextManager[Source]:
        """Open a file for reads by position."""
        ...

    def write(self, data: bytes) -> None:
        """Write a small file whole and durably."""
        ...

    def take(self, file: Path) -> None:
        """Make the finished local `file` this one, whole, and remove it there. `sync` of the folder makes it last."""
        ...

    def sync(self) -> None:
        """Make what was taken into this folder durable."""
        ...

    def delete(self) -> None:
        """Remove a file."""
        ...

    def delete_tree(self) -> None:
        """Remove a folder and all in it, if it is there."""
        ...

    def scratch(self) -> Path:
        """Return the folder of this machine for half-written shards and for the locks of builds."""
        ...

    def zarr_store(self) -> Any:
        """Return what `zarr.open_group` and `zarr.open_array` take to read here."""
        ...

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which what the storage raises through zarr is a `CacheError` or an `OSError`."""
        ...


def location(where: "str | Path | Location") -> Location:
    """Return the location of a path or URL; raise `UsageError` for a URL that is not understood."""
    if not isinstance(where, str | Path):
        return where
    text = with_home(str(where))
    scheme, separator, rest = text.partition("://")
    if not separator and re.match(r"\w\w+:/", text):
        raise UsageError(f"{text}: a URL has two slashes, as s3://BUCKET/PREFIX (a Path drops one: give it as str)")
    if not separator:
        return LocalPath(Path(text))
    if scheme == "file":
        return LocalPath(Path("/" + rest.lstrip("/")))
    if scheme == "hf":
        from .remote.hub import hub_path

        return hub_path(rest)
    from .remote.object_store import SCHEMES, ObjectPath

    bucket, _, prefix = rest.partition("/")
    if scheme not in SCHEMES or not bucket or not prefix.strip("/"):
        known = ", ".join(f"{name}://BUCKET/PREFIX" for name in SCHEMES)
        raise UsageError(f"{text}: expected a folder, or one of {known}, hf://OWNER/NAME")
    return ObjectPath(f"{scheme}://{bucket}", prefix.strip("/"))


def write_bytes(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data`; the one place through which a cache's bytes reach the disk."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def disk_error(path: Path, error: OSError) -> CacheError:
    """Return the one line for a write that the disk refused."""
    return CacheError(
        f"{path}: cannot be written ({error.strerror or error}); make room or mend permissions and run the same "
        "command again: finished ranges are kept"
    )


@dataclass(frozen=True)
class LocalPath:
    """A file or folder on a local (or mounted) file system."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> "LocalPath":
        return LocalPath(self.path / name)

    def absolute(self) -> "LocalPath":
        return LocalPath(self.path.absolute())

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> "LocalPath":
        return LocalPath(self.path.parent)

    def read(self, most: int = MOST_METADATA_BYTES) -> bytes | None:
        try:
            return read_file(self.path, most=most)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _read_error(self.path, error) from error

    def exists(self) -> bool:
        try:
            return self.path.exists()
        except OSError as error:
            raise _read_error(self.path, error) from error

    def size(self) -> int | None:
        try:
            found = self.path.stat()
            return found.st_size if stat.S_ISREG(found.st_mode) else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _read_error(self.path, error) from error

    def names(self) -> set[str]:
        try:
            return set(os.listdir(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return set()
        except OSError as error:
            raise _read_error(self.path, error) from error

    def sizes(self) -> dict[str, int]:
        try:
            with os.scandir(self.path) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise _read_error(self.path, error) from error

    @contextlib.contextmanager
    def open(self) -> Iterator["LocalSource"]:
        try:
            descriptor = open_regular(self.path)
        except OSError as error:
            raise _read_error(self.path, error) from error
        try:
            yield LocalSource(self.path, descriptor)
        finally:
            os.close(descriptor)

    def write(self, data: bytes) -> None:
        temporary = self.path.with_name(self.path.name + ".partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = new_file(temporary)
            try:
                write_bytes(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise disk_error(self.path, error) from error

    def take(self, file: Path) -> None:
        try:
            os.replace(file, self.path)
        except OSError as error:
            raise disk_error(self.path, error) from error

    def sync(self) -> None:
        try:
            sync_folder(self.path)
        except OSError as error:
            raise disk_error(self.path, error) from error

    def delete(self) -> None:
        try:
            self.path.unlink()
        except OSError as error:
            raise disk_error(self.path, error) from error

    def delete_tree(self) -> None:
        try:
            shutil.rmtree(self.path)
        except FileNotFoundError:
            pass  # nothing was ever there
        except OSError as error:
            raise disk_error(self.path, error) from error

    def scratch(self) -> Path:
        return self.path / PARTIAL_FOLDER

    def zarr_store(self) -> Any:
        return regular_files(self.path)

    def reading(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class LocalSource:
    """An open local file, by its descriptor."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self.num_bytes = os.fstat(descriptor).st_size

    def read_into(self, buffer: memoryview, offset: int) -> int:
        filled = 0
        try:
            while filled < len(buffer) and (got := os.preadv(self._descriptor, [buffer[filled:]], offset + filled)):
                filled += got
        except OSError as error:  # a failing disk, a file server that has lost the file
            raise _read_error(self._path, error) from error
        return filled


def _read_error(path: Path, error: OSError) -> CacheError:
    return CacheError(f"{path}: cannot be read ({error.strerror or error})")
