"""Locks between the processes of one machine: one builds a component, or stages it, at a time.

flock dies with its process, so nothing is left over that must be told from a build that runs. Object stores have no
such lock: there it is kept on this machine, by URL. Two machines that build one component of a bucket write the same
bytes twice.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import CacheError

MOST_TRIES = 1000  # at a folder that others remove and make: some tries a race; what never succeeds is no race


@contextlib.contextmanager
def locked(file: Path, *, wait: bool, option: str = "--cache") -> Iterator[bool]:
    """Hold the lock `file`, made for it and removed with it, and its folder where that is empty then.

    Yields False where another process holds it and `wait` is false. Raises `CacheError` where the file system refuses,
    naming the `option` by which the user chose it.
    """
    descriptor = _acquire(file, wait=wait, option=option)
    if descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            file.unlink()  # while it is held: who waits on the old file sees that it is gone and opens the new one
        os.close(descriptor)
        with contextlib.suppress(OSError):
            file.parent.rmdir()


def _acquire(file: Path, *, wait: bool, option: str) -> int | None:
    tries = 0
    while True:
        tries += 1
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.parent.is_symlink():  # what lies there is made and removed, and is not ours
                raise CacheError(f"{file.parent}: a link, where our own half-written files lie; remove it")
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            race = isinstance(error, FileNotFoundError | FileExistsError) and _is_folder_or_gone(file.parent)
            if race and tries < MOST_TRIES:
                continue  # another process removed the empty folder, or made it again, between two calls
            raise CacheError(
                f"{file.parent.parent}: cannot be written ({error.strerror}); name a {option} that can"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            raise CacheError(
                f"{file.parent.parent}: the file system cannot lock files ({error.strerror}), so two processes could "
                f"not be kept apart; mount it with locks (flock), or name a {option} on another"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.stat(file).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)


def _is_folder_or_gone(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)  # one look: between two it may come or go
    except FileNotFoundError:
        return True
