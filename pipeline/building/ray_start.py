"""What a Ray of our own needs of the machine before it starts, and what is left of it when it was stopped: nothing.

Ray puts its sockets below the temporary folder, and a socket's path holds 107 bytes; it keeps a token in the home
folder; its agents look for their raylet once a minute. On clusters the temporary folder is long, and the home folder
read-only. Nothing here imports ray.
"""

import contextlib
import fcntl
import os
import re
import secrets
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

from ...cache_specs.errors import JobError, reason
from ...cache_specs.files.partial_files import clear_folder

SOCKET_BYTES = 107  # of a path, by Linux
SESSION = "/ray/session_2026-11-30_19-45-04_455019_4194304/sockets/plasma_store"  # what Ray adds to its folder, at most
SHORT_FOLDERS = ("/tmp", "/var/tmp")  # tried in this order where the folder that Ray would take is of no use
DRIVER_PREFIX, SESSION_PREFIX = "repa-cache-", "repa-ray-"


@contextlib.contextmanager
def driver_folder() -> Iterator[Path]:
    """Make an empty folder to start Ray from, removed at the end; remove those of drivers that were killed."""
    with _own_folder(Path(tempfile.gettempdir()), DRIVER_PREFIX) as folder:
        yield folder


@contextlib.contextmanager
def session_folder() -> Iterator[Path | None]:
    """Yield the folder for Ray's sessions, None where the one that it takes by itself is short and can be written.

    Raises `JobError` where there is none.
    """
    usual = Path(os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp")))
    for folder in map(Path, SHORT_FOLDERS):
        clear_old(folder, SESSION_PREFIX)
    if (
        usual.is_absolute()
        and fits(usual)
        and _writable(usual)
        and (not (usual / "ray").exists() or _writable(usual / "ray"))
    ):
        yield None
        return
    short = next((folder for folder in map(Path, SHORT_FOLDERS) if _writable(folder)), None)
    if short is None:
        raise JobError(
            f"Ray cannot put its sockets into {usual} (a path too long, or a folder that cannot be written); name "
            "another with RAY_TMPDIR, or encode in this process with --workers 0"
        )
    with _own_folder(short, SESSION_PREFIX) as own:
        yield own


def fits(folder: Path) -> bool:
    """Return whether the sockets of a Ray session below `folder` have paths that Linux takes."""
    return len(os.fsencode(folder)) + len(SESSION) <= SOCKET_BYTES


def give_token() -> None:
    """Give a Ray of our own a token where the user has none, so that it writes none into the home folder.

    Before ray is imported, and for as long as this process lives: Ray keeps what it has read.
    """
    given = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if not given and not os.path.exists(os.path.expanduser("~/.ray/auth_token")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Kill every process that was started in this block, and theirs, where it does not end well."""
    before = descendants(os.getpid())
    try:
        yield
    except BaseException:
        kill_started(before)
        raise


def kill_started(before: Mapping[int, int]) -> None:
    """Kill every process below this one that is not among `before`, its `descendants` of then."""
    while started := descendants(os.getpid()).items() - before.items():
        for pid, born in started:
            if descendants(os.getpid()).get(pid) == born:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def descendants(parent: int) -> dict[int, int]:
    """Return the running processes below `parent`, each with the time of its start, which tells it from a later one."""
    children: dict[int, list[tuple[int, int]]] = {}
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            words = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            if name.isdigit() and words[0] not in "ZX":
                children.setdefault(int(words[1]), []).append((int(name), int(words[19])))
    found: dict[int, int] = {}
    waiting = [parent]
    while waiting:
        for pid, born in children.get(waiting.pop(), []):
            found[pid] = born
            waiting.append(pid)
    return found


@contextlib.contextmanager
def terminated_quietly() -> Iterator[None]:
    """Let SIGTERM unwind this process with its usual exit code; Ray would print its stack. Only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def take_back_sigterm() -> None:
    """Undo what Ray has set for SIGTERM while it started, in a block of `terminated_quietly`."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _own_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Make a folder in `parent`, locked while this process lives, and remove it; raise `JobError` where none can be."""
    clear_old(parent, prefix)
    try:
        while True:
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.exists():  # else another start took it for an old one, before it was locked
                break
            os.close(descriptor)
    except OSError as error:
        raise JobError(f"{parent}: cannot be written ({reason(error)}); name another folder with TMPDIR") from error
    try:
        yield folder
    finally:
        clear_folder(folder)
        os.close(descriptor)


def clear_old(parent: Path, prefix: str) -> None:
    """Remove this user's folders of processes that were killed: those that no process holds the lock of."""
    ours = re.compile(re.escape(prefix) + "[a-z0-9_]{8}")  # as mkdtemp names them
    with contextlib.suppress(OSError):
        for name in filter(ours.fullmatch, os.listdir(parent)):
            with contextlib.suppress(OSError):
                descriptor = os.open(parent / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.fstat(descriptor).st_uid != os.getuid():
                        continue
                    if prefix == DRIVER_PREFIX:
                        os.rmdir(parent / name)  # always empty; an earlier version took no lock
                    else:
                        clear_folder(parent / name)
                finally:
                    os.close(descriptor)


def _writable(folder: Path) -> bool:
    try:
        return stat.S_ISDIR(folder.stat().st_mode) and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False
