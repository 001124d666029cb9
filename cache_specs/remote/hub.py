"""A data set repository of the Hugging Face hub as a cache's location: read, to be staged, and pushed into whole.

    hf://OWNER/NAME[@REVISION][/FOLDER]     `hf://datasets/OWNER/NAME` says the same

A revision (a branch, a tag, a commit; else the main branch) is looked up once a process, so that no copy mixes two
commits, and its files are listed once. Token and endpoint are those of huggingface-hub: HF_TOKEN or `hf auth login`,
HF_ENDPOINT. Nothing goes into that library's own cache of files: a staged copy would lie on the disk twice.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import CacheError, RepaError, UsageError, reason
from ..files.outside import MOST_METADATA_BYTES
from .object_store import RangedSource

SCHEME = "hf"
TYPE = "dataset"
MOST_ARRAY_BYTES = 2**30  # of an array that is read whole, to the last of its files
TIMEOUT_S = 60

_URL = re.compile(r"(?:datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<key>.+))?")


@dataclass(frozen=True)
class Listing:
    """The files of one commit: bytes by name, by folder; None is a folder."""

    commit: str
    folders: Mapping[str, Mapping[str, int | None]]


def hub() -> Any:
    """Return the hub's client for the endpoint of the environment as it is now."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


@functools.cache
def _listing(endpoint: str | None, repo: str, revision: str | None) -> Listing:
    api = hub()
    commit = str(api.repo_info(repo, repo_type=TYPE, revision=revision).sha)
    folders: dict[str, dict[str, int | None]] = {"": {}}
    for entry in api.list_repo_tree(repo, repo_type=TYPE, revision=commit, recursive=True):
        folder, _, name = entry.path.rpartition("/")
        folders.setdefault(folder, {})[name] = getattr(entry, "size", None)
    return Listing(commit, folders)


@dataclass(frozen=True)
class HubPath:
    """A file or folder `key` of a repository at a revision; "" is its root."""

    repo: str
    revision: str | None
    key: str = ""

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{self.revision}"
        return f"{SCHEME}://{self.repo}{at}" + (f"/{self.key}" if self.key else "")

    def __truediv__(self, name: str) -> "HubPath":
        return HubPath(self.repo, self.revision, f"{self.key}/{name}" if self.key else name)

    def absolute(self) -> "HubPath":
        return self

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> "HubPath":
        return HubPath(self.repo, self.revision, self.key.rpartition("/")[0])

    @property
    def commit(self) -> str:
        """The commit that the revision was when it was first asked for."""
        return self._listing().commit

    def read(self, most: int = MOST_METADATA_BYTES) -> bytes | None:
        size = self.size()
        if size is None:
            return None
        if size > most:
            raise CacheError(f"{self}: cannot be read (it has {size} bytes, and at most {most} are read)")
        return self._get(0, size) if size else b""

    def exists(self) -> bool:
        return self.size() is not None or bool(self.names())

    def size(self) -> int | None:
        return self._files(self.parent.key).get(self.name) if self.key else None

    def names(self) -> set[str]:
        return set(self._files(self.key))

    def sizes(self) -> dict[str, int]:
        return {name: size for name, size in self._files(self.key).items() if size is not None}

    @contextlib.contextmanager
    def open(self) -> Iterator[RangedSource]:
        size = self.size()
        if size is None:
            raise CacheError(f"{self}: no such file there")
        yield RangedSource(size, self._get)

    def write(self, data: bytes) -> None:
        self._refuse()

    def take(self, file: Path) -> None:
        self._refuse()

    def sync(self) -> None:
        self._refuse()

    def delete(self) -> None:
        self._refuse()

    def delete_tree(self) -> None:
        self._refuse()

    def scratch(self) -> Path:
        self._refuse()

    def zarr_store(self) -> Any:
        """Return the files below this folder in memory: what is read whole through zarr is small."""
        from zarr.core.buffer import default_buffer_prototype
        from zarr.storage import MemoryStore

        inside = {
            f"{folder}/{name}"[len(self.key) :].lstrip("/"): size
            for folder, files in self._listing().folders.items()
            if folder == self.key or folder.startswith(f"{self.key}/")
            for name, size in files.items()
            if size is not None
        }
        if sum(inside.values()) > MOST_ARRAY_BYTES:
            raise CacheError(f"{self}: {sum(inside.values())} bytes; copy the cache first (--stage DIR), and read that")
        buffer = default_buffer_prototype().buffer
        return MemoryStore({name: buffer.from_bytes((self / name).read(size) or b"") for name, size in inside.items()})

    def reading(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _files(self, folder: str) -> Mapping[str, int | None]:
        return self._listing().folders.get(folder, {})

    def _listing(self) -> Listing:
        with errors(self, "listed"):
            return _listing(os.environ.get("HF_ENDPOINT"), self.repo, self.revision)

    def _get(self, start: int, length: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        with errors(self, "read"):
            endpoint = os.environ.get("HF_ENDPOINT")
            url = hf_hub_url(self.repo, self.key, repo_type=TYPE, revision=self.commit, endpoint=endpoint)
            headers = {**build_hf_headers(), "range": f"bytes={start}-{start + length - 1}"}
            response = http_backoff("GET", url, headers=headers, timeout=TIMEOUT_S)
            hf_raise_for_status(response)
            content = bytes(response.content)
            if len(content) != length:
                raise OSError(f"{len(content)} of {length} bytes came")
            return content

    def _refuse(self) -> NoReturn:
        raise UsageError(
            f"{self}: nothing is written there piece by piece; build in a folder, then repa-cache push FOLDER "
            f"{SCHEME}://{self.repo}"
        )


def hub_path(text: str) -> HubPath:
    """Return the place of what follows `hf://`; raise `UsageError` where it names no repository."""
    found = _URL.fullmatch(text.rstrip("/"))
    if found is None:
        raise UsageError(f"{SCHEME}://{text}: expected {SCHEME}://OWNER/NAME, {SCHEME}://OWNER/NAME@REVISION")
    return HubPath(found["repo"], found["revision"], found["key"] or "")


@contextlib.contextmanager
def errors(where: HubPath, done: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line, which says what cannot be `done` and what to do."""
    try:
        yield
    except RepaError:
        raise
    except Exception as error:  # its own, and those of the HTTP library of its version
        raise CacheError(f"{where}: cannot be {done} ({_said(error, where)})") from error


def _said(error: Exception, where: HubPath) -> str:
    """Return what is wrong in a few words, and what to do about it."""
    from huggingface_hub import errors as of_hub

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, of_hub.GatedRepoError):
        return f"access to it is by request: ask for it on the page of {where.repo}, then log in with `hf auth login`"
    if isinstance(error, of_hub.RepositoryNotFoundError):
        return f"no data set {where.repo}, or a private one that this token may not see: `hf auth login`, or HF_TOKEN"
    if isinstance(error, of_hub.RevisionNotFoundError):
        return f"{where.repo} has no revision {where.revision!r}: give a branch, a tag or a commit of it"
    if isinstance(error, of_hub.LocalTokenNotFoundError) or status in (401, 403):
        return "the hub wants a token that may do this: `hf auth login`, or HF_TOKEN"
    if isinstance(error, of_hub.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so that nothing is asked of the hub"
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{type(error).__name__}: {reason(OSError(first))}; run the same command again: what came is kept"
