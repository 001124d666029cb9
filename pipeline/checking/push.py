"""A finished cache goes to a data set repository of the Hugging Face hub, from where others stage it.

What the hub has already is not sent again, so that a push that was killed goes on where it was, and one after a build
adds what is new. Shards go first, in commits of their own; what says that a component is there goes last, in one: until
then nobody sees a component that lacks a shard. Whoever stages it compares every checksum, and the number of every
shard with what its component was completed with.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...cache_specs.binding import SHARDS_DIGEST, checksums_layout
from ...cache_specs.derived import FITS
from ...cache_specs.errors import CacheError, UsageError
from ...cache_specs.group import METADATA
from ...cache_specs.remote.hub import SCHEME, TYPE, HubPath, errors, hub
from ...cache_specs.schema import FEATURES, LATENTS, ComponentSpec
from ...cache_specs.storage import LocalPath, location
from ..store.store import CacheStore

COMMIT_FILES, COMMIT_BYTES = 200, 4 * 10**9  # of one commit: what a kill can cost to look at again


@dataclass(kw_only=True)
class Pushed:
    """What became of a push: paths of components, files sent and there before, bytes sent.

    `place` is the target at the last commit made, None where there was nothing to send.
    """

    components: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # components that are not finished
    sent: int = 0
    kept: int = 0
    sent_bytes: int = 0
    place: str | None = None


def push(
    cache: str | Path,
    target: str,
    *,
    public: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pushed:
    """Push the finished components of a local cache to `target`, hf://OWNER/NAME[@BRANCH][/FOLDER].

    A repository that is not there is made, private unless `public`. `on_progress(bytes done, bytes in all)` counts
    what was looked at. Raises `UsageError` for another kind of target or cache, `CacheError` where nothing is finished,
    a component is not bound or lacks a shard, the target holds another cache, or the hub refuses.
    """
    store, there = CacheStore.open(cache), location(target)
    if not isinstance(there, HubPath):
        raise UsageError(
            f"{target}: expected {SCHEME}://OWNER/NAME; buckets and folders are filled by cp or a sync tool"
        )
    if not isinstance(store.path, LocalPath):
        raise UsageError(f"{cache}: only a cache in a folder is pushed; copy it to one first")
    pushed = Pushed()
    shards, records = [], [METADATA, f"{LATENTS}/{METADATA}", f"{FEATURES}/{METADATA}"]
    for path in store.components():
        opened = store.opened(path)
        if opened is None or not opened.complete:
            pushed.left_out.append(path)
            continue
        if SHARDS_DIGEST not in opened.attributes:
            raise CacheError(f"{cache}: {path} was completed by an earlier version; repa-cache bind {cache}, then push")
        pushed.components.append(path)
        shards += list(_files(store, opened.spec))
        records.append(f"{path}/{METADATA}")
    if not pushed.components:
        raise CacheError(f"{cache}: no component is complete; finish its build, then push")
    root = store.path.path
    rows = [
        file for name in ("sample_id", "label", FITS) for file in sorted((root / name).rglob("*")) if file.is_file()
    ]
    shards = [file.relative_to(root).as_posix() for file in rows if _is_whole(root, file)] + shards
    records = [name for name in records if (root / name).exists()]
    for name in (*shards, *records):
        if not (root / name).is_file() or (root / name).is_symlink():
            raise CacheError(f"{root / name}: missing, or a link; repa-cache verify says how to mend it, then push")
    _send(root, there, shards, records, pushed, public, on_progress)
    return pushed


def _is_whole(root: Path, file: Path) -> bool:
    """Say whether a file of the rows or of a fit is not one that is being written, nor of a fit without its record."""
    if file.name.startswith(".") or file.suffix == ".partial":
        return False
    name, *rest = file.relative_to(root).parts
    return name != FITS or len(rest) == 1 or (root / name / rest[0] / METADATA).is_file()


def _files(store: CacheStore, spec: ComponentSpec) -> Iterator[str]:
    """Yield the files of a component but its own record, in the order of its arrays."""
    arrays = spec.arrays(store.layout)
    for array in (*arrays, checksums_layout(store.layout, len(arrays))):
        yield f"{spec.path}/{array.name}/{METADATA}"
        for index in range(array.num_shards):
            yield f"{spec.path}/{array.name}/{array.shard_file(index)}"


def _send(
    root: Path,
    there: HubPath,
    shards: list[str],
    records: list[str],
    pushed: Pushed,
    public: bool,
    on_progress: Callable[[int, int], None],
) -> None:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    api, bars = hub(), not are_progress_bars_disabled()
    sizes = {name: (root / name).stat().st_size for name in (*shards, *records)}
    total, done = sum(sizes.values()), 0
    with errors(there, "pushed to"):
        api.create_repo(there.repo, repo_type=TYPE, private=not public, exist_ok=True)
        head = str(api.repo_info(there.repo, repo_type=TYPE, revision=there.revision).sha)
        found = _remote(api, there, head)
    for name in records:
        if name in found and not _same(root / name, found[name]):
            raise CacheError(
                f"{there / name} is not what {root / name} is: another cache, or another build of it, lies there; push "
                f"to another repository or folder, or remove that one"
            )

    def commit(names: list[str]) -> None:
        nonlocal done, head
        new = [name for name in names if name not in found or not _same(root / name, found[name])]
        for name in new:
            owner = next((path for path in pushed.components if name.startswith(f"{path}/")), None)
            if name in found and owner is not None and f"{owner}/{METADATA}" in found:  # the same record, as seen above
                raise CacheError(
                    f"{root / name} is not what {there / name} is, of the same component: one of them is damaged; run "
                    f"repa-cache verify {root}, mend it, then push"
                )
        if new:
            operations = [
                CommitOperationAdd(path_in_repo=(there / name).key, path_or_fileobj=os.fspath(root / name))
                for name in new
            ]
            message = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
            with errors(there, "pushed to"):
                try:
                    made = api.create_commit(
                        there.repo,
                        operations,
                        commit_message=message,
                        repo_type=TYPE,
                        revision=there.revision,
                        parent_commit=head,
                    )
                except Exception as error:
                    if getattr(getattr(error, "response", None), "status_code", None) not in (409, 412):
                        raise
                    raise CacheError(
                        f"{there}: another push is running there, or its branch was changed; push again when it ends"
                    ) from error
            head = str(made.oid)
            pushed.place = str(HubPath(there.repo, str(made.oid), there.key))
        pushed.sent += len(new)
        pushed.kept += len(names) - len(new)
        pushed.sent_bytes += sum(sizes[name] for name in new)
        done += sum(sizes[name] for name in names)
        on_progress(done, total)

    disable_progress_bars()
    try:
        for names in _batches(shards, sizes):
            commit(names)
        commit(records)
    finally:
        if bars:
            enable_progress_bars()


def _batches(names: list[str], sizes: dict[str, int]) -> Iterator[list[str]]:
    batch: list[str] = []
    for name in names:
        if batch and (len(batch) == COMMIT_FILES or sum(map(sizes.__getitem__, batch)) + sizes[name] > COMMIT_BYTES):
            yield batch
            batch = []
        batch.append(name)
    if batch:
        yield batch


def _remote(api: Any, there: HubPath, commit: str) -> dict[str, Any]:
    """Return what a commit holds below the target, by name."""
    entries = api.list_repo_tree(there.repo, repo_type=TYPE, revision=commit, recursive=True)
    below = f"{there.key}/" if there.key else ""
    return {
        entry.path.removeprefix(below): entry
        for entry in entries
        if entry.path.startswith(below) and hasattr(entry, "blob_id")
    }


def _same(file: Path, entry: Any) -> bool:
    """Say whether the hub has this file: a large one by its sha256, a small one as git names it."""
    if file.stat().st_size != entry.size:
        return False
    if entry.lfs is not None:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == str(entry.lfs.sha256)
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == str(entry.blob_id)
