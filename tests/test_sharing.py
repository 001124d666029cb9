"""Sharing a cache through the hub: pushed whole and again, staged with every digest compared, refused in one line.

The hub is a server on loopback that speaks what its client asks for; the client is the real one.
"""

import base64
import hashlib
import http.server
import importlib.metadata
import json
import re
import shutil
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repa.cache_specs.errors import CacheError, RepaError, UsageError
from repa.cache_specs.remote.hub import HubPath, _listing
from repa.cache_specs.storage import location
from repa.pipeline.building.build import run_build
from repa.pipeline.building.plan import BuildOptions
from repa.pipeline.checking import push as push_module
from repa.pipeline.checking.info import cache_record, info_lines
from repa.pipeline.checking.push import push
from repa.pipeline.deriving.derive import DeriveOptions, run_derive
from repa.pipeline.images.manifest import scan_folder
from repa.trainer import CacheReader, stage_cache

REPO = "me/tokens"


class Hub(http.server.ThreadingHTTPServer):
    """Commits by name, each its files; a branch is the list of its commits. Large files are kept as LFS objects."""

    LARGE = 1500  # bytes, from which a file has a sha256 and no git name that says anything

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, dict[str, list[str]]] = {}  # of each repository
        self.private: dict[str, bool] = {}
        self.token: str | None = "secret"
        self.uploads: list[str] = []
        self.fails_after: int | None = None  # commits
        self.changed: dict[str, bytes] = {}  # what is sent instead of a file, by its end

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        commits = self.branches[repo][branch]
        whole = {**(self.commits[commits[-1]] if commits else {}), **files}
        name = hashlib.sha1(f"{repo}{branch}{len(self.commits)}".encode()).hexdigest()
        self.commits[name] = whole
        commits.append(name)
        return name

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[REPO][branch][-1]]


class _Answers(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def say(self, code: int, value: Any = None, *, data: bytes = b"", **headers: str) -> None:
        data = data if value is None else json.dumps(value).encode()
        self.send_response(code)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code: int, kind: str) -> None:
        self.say(code, {"error": kind}, X_Error_Code=kind, X_Error_Message=kind)

    def commit_of(self, repo: str, revision: str) -> str | None:
        branches = self.server.branches.get(repo)
        if branches is None or (
            self.server.private[repo] and self.headers.get("Authorization") != f"Bearer {self.server.token}"
        ):
            self.refuse(401, "RepoNotFound")
            return None
        names = branches.get(revision)
        commit = names[-1] if names else revision if revision in self.server.commits else None
        if commit is None:
            self.refuse(404, "RevisionNotFound")
        return commit

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        if found := re.fullmatch(r"/api/datasets/([\w.-]+/[\w.-]+)(?:/revision/([^/]+))?", path):
            commit = self.commit_of(found[1], found[2] or "main")
            if commit is not None:
                self.say(200, {"id": found[1], "sha": commit, "siblings": [], "tags": []})
        elif found := re.fullmatch(r"/api/datasets/([\w.-]+/[\w.-]+)/tree/([^/]+)", path):
            commit = self.commit_of(found[1], found[2])
            if commit is not None:
                self.say(200, list(self.tree(self.server.commits[commit])))
        elif found := re.fullmatch(r"/datasets/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            data = self.server.commits[found[2]][found[3]]
            for end, instead in self.server.changed.items():
                data = instead if found[3].endswith(end) else data
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            part = data[first : last + 1]
            self.say(206, data=part, Content_Range=f"bytes {first}-{last}/{len(data)}")
        else:
            self.say(404, {"error": path})

    def tree(self, files: dict[str, bytes]) -> Iterator[dict[str, Any]]:
        for folder in {str(parent) for name in files for parent in Path(name).parents if str(parent) != "."}:
            yield {"type": "directory", "path": folder, "oid": "0", "size": 0}
        for name, data in files.items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data)}
            entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if len(data) >= Hub.LARGE:
                entry |= {"oid": "0", "lfs": {"size": len(data), "oid": hashlib.sha256(data).hexdigest()}}
                entry["lfs"]["pointerSize"] = 130
            yield entry

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.refuse(401, "")
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if repo in self.server.branches:
                self.say(409, {"error": "exists", "url": f"{self.server.url}/datasets/{repo}"})
                return
            self.server.branches[repo] = {"main": []}
            self.server.private[repo] = asked.get("private", False) or asked.get("visibility") == "private"
            self.server.commit(repo, "main", {".gitattributes": b"* -text\n"})
            self.say(200, {"url": f"{self.server.url}/datasets/{repo}"})
        elif found := re.fullmatch(r"/api/datasets/([\w.-]+/[\w.-]+)/preupload/([^/]+)", self.path):
            if self.commit_of(found[1], found[2]) is not None:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self.say(200, {"files": files})
        elif found := re.fullmatch(r"/api/datasets/([\w.-]+/[\w.-]+)/commit/([^/]+)", self.path):
            if self.server.fails_after == 0:
                self.refuse(403, "Forbidden")
                return
            self.server.fails_after = None if self.server.fails_after is None else self.server.fails_after - 1
            lines = [json.loads(line) for line in body.splitlines()]
            (parent,) = [line["value"]["parentCommit"] for line in lines if line["key"] == "header"]
            if parent != self.server.branches[found[1]][found[2]][-1]:
                self.refuse(412, "")
                return
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            self.server.uploads += files
            commit = self.server.commit(found[1], found[2], files)
            self.say(200, {"commitUrl": f"{self.server.url}/datasets/{found[1]}/commit/{commit}", "commitOid": commit})
        else:
            self.say(404, {"error": self.path})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Yield a hub that the client of this process asks, and whose token it has."""
    if int(importlib.metadata.version("huggingface-hub").partition(".")[0]) < 1:
        pytest.skip("the hub's client before 1 takes HF_ENDPOINT from the environment that it was imported in")
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield server
        server.shutdown()
    _listing.cache_clear()


def build(images: Path, cache: Path | str, *encoders: str, dtype: str = "float16") -> None:
    options = BuildOptions(
        manifest=scan_folder(images),
        cache=cache,
        encoders=encoders,
        autoencoder="none" if Path(cache, "latents").exists() else "pixels",
        resolution=16,
        flip=True,
        shard_samples=8,
        dtype=dtype,
        workers=0,
        threads=1,
    )
    run_build(options, on_start=lambda done, total: None, on_progress=lambda samples: None)


@pytest.fixture(scope="module")
def images(make_images: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharing") / "images"
    make_images(folder, num=20)
    return folder


@pytest.fixture(scope="module")
def built(images: Path) -> Path:
    """A cache of 20 images in 3 ranges: pixels and HOG tokens."""
    build(images, images.parent / "cache", "hog:grid=4")
    return images.parent / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_pushed_cache_is_staged_as_it_was_and_again_adds_what_is_new(
    hub: Hub, images: Path, built: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(built, cache)
    pushed = push(cache, f"hf://{REPO}")
    assert hub.private[REPO]
    there = {name: data for name, data in hub.files().items() if name != ".gitattributes"}
    assert there == contents(cache)
    assert (pushed.sent, pushed.kept) == (len(there), 0)
    last = set(hub.commits[hub.branches[REPO]["main"][-1]]) - set(hub.commits[hub.branches[REPO]["main"][-2]])
    assert last == {name for name in there if name.count("/") in (0, 1, 2) and name.endswith("zarr.json")} - {
        "label/zarr.json",
        "sample_id/zarr.json",
    }

    copy = stage_cache(f"hf://{REPO}", tmp_path / "stage")
    assert contents(copy) == contents(cache)
    here, read = CacheReader(cache), CacheReader(copy)
    rows = np.arange(20)
    np.testing.assert_array_equal(here.rows(rows).features[0].tokens, read.rows(rows).features[0].tokens)
    assert here.fingerprints == read.fingerprints == CacheReader(f"hf://{REPO}").fingerprints

    first = pushed.place
    assert first == f"hf://{REPO}@{hub.branches[REPO]['main'][-1]}"
    hub.uploads.clear()
    assert push(cache, f"hf://{REPO}").place is None
    build(images, cache, "hog:grid=4", dtype="int8")
    derived = DeriveOptions(cache=str(cache), source="features/hog-grid4", method="pca:2")
    run_derive(derived, on_start=lambda done, total: None, on_progress=lambda samples: None)
    again = push(cache, f"hf://{REPO}")
    assert {name.rpartition("/")[0].split("/")[1] for name in hub.uploads if name.count("/") > 1} == {
        "hog-grid4-int8", "hog-grid4-pca2",
    }  # fmt: skip
    assert again.sent == len(hub.uploads) == len(contents(cache)) - len(there)
    _listing.cache_clear()  # as another process would see it
    assert "hog-grid4-int8" not in (location(str(first)) / "features").names()
    assert contents(stage_cache(f"hf://{REPO}", tmp_path / "new", encoders=["hog-grid4-int8"])).items() <= (
        contents(cache).items()
    )
    build(images, cache, "hog:grid=4:pca=3")
    push(cache, f"hf://{REPO}")  # with its fit
    assert {name: data for name, data in hub.files().items() if name != ".gitattributes"} == contents(cache)


def test_a_push_that_was_killed_shows_no_cache_and_goes_on(
    hub: Hub, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_module, "COMMIT_FILES", 7)
    hub.fails_after = 2
    with pytest.raises(CacheError, match="the hub wants a token that may do this"):
        push(built, f"hf://{REPO}")
    assert len(hub.uploads) == 14
    with pytest.raises(CacheError, match="no cache here"):
        CacheReader(f"hf://{REPO}")
    _listing.cache_clear()
    hub.fails_after = None
    pushed = push(built, f"hf://{REPO}")
    assert pushed.kept == 14
    assert len(hub.uploads) == len(set(hub.uploads)) == len(contents(built))
    assert contents(stage_cache(f"hf://{REPO}", tmp_path / "stage")) == contents(built)


def test_what_arrives_is_compared_and_another_cache_is_not_overwritten(
    hub: Hub, images: Path, built: Path, tmp_path: Path
) -> None:
    push(built, f"hf://{REPO}/caches/a")
    place = f"hf://datasets/{REPO}@main/caches/a"
    name = "features/hog-grid4/patch_tokens/c.1.0.0.0"
    good, other = (built / name).read_bytes(), (built / name.replace("c.1", "c.0")).read_bytes()
    for instead, words in ((good[:200] + b"\xff" + good[201:], "checksum"), (other, "is not the shard that was")):
        hub.changed = {name: instead}
        with pytest.raises(CacheError, match=words) as refused:
            stage_cache(place, tmp_path / "stage")
        assert f"hf://{REPO}@main/caches/a/{name}" in str(refused.value)
    hub.changed = {}
    assert contents(stage_cache(place, tmp_path / "stage")) == contents(built)

    build(images, tmp_path / "other", "hog:grid=2")
    metadata = tmp_path / "other" / "zarr.json"
    metadata.write_text(metadata.read_text().replace("\n", " ", 1))
    with pytest.raises(CacheError, match="another cache, or another build of it, lies there"):
        push(tmp_path / "other", f"hf://{REPO}/caches/a")
    with pytest.raises(UsageError, match="nothing is written there piece by piece"):
        build(images, f"hf://{REPO}/caches/a", "hog:grid=2")


def test_a_damaged_shard_does_not_replace_the_good_one(hub: Hub, built: Path, tmp_path: Path) -> None:
    push(built, f"hf://{REPO}")
    before = hub.files()
    cache = Path(shutil.copytree(built, tmp_path / "cache"))
    for name in ("patch_tokens/c.1.0.0.0", "shard_checksums/c.1.0"):
        file = cache / "features/hog-grid4" / name
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(CacheError, match=r"one of them is damaged; run repa-cache verify") as refused:
            push(cache, f"hf://{REPO}")
        assert "\n" not in str(refused.value)
        file.write_bytes(good)
    assert hub.files() == before
    assert push(cache, f"hf://{REPO}").sent == 0


def test_a_push_beside_another_is_refused(hub: Hub, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_module, "COMMIT_FILES", 7)

    def other(done: int, total: int) -> None:
        hub.commit(REPO, "main", {"another": b"1"})

    with pytest.raises(CacheError, match="another push is running there"):
        push(built, f"hf://{REPO}", on_progress=other)
    assert len(hub.uploads) == 7
    push(built, f"hf://{REPO}")
    assert {name: data for name, data in hub.files().items() if name not in (".gitattributes", "another")} == (
        contents(built)
    )


def test_what_is_being_written_is_not_pushed(hub: Hub, built: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(built, tmp_path / "cache"))
    for name in ("fits/half/mean/c.0", "fits/zarr.json.partial", "label/zarr.json.partial"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(b"half")
    push(cache, f"hf://{REPO}")
    assert {name: data for name, data in hub.files().items() if name != ".gitattributes"} == contents(built)


def test_errors_of_the_hub_are_one_line(hub: Hub, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(built, f"hf://{REPO}", public=True)
    assert not hub.private[REPO]

    def refusal(cache: str) -> str:
        with pytest.raises(RepaError) as refused:
            stage_cache(cache, tmp_path / "stage")
        assert "\n" not in str(refused.value)
        assert cache in str(refused.value)
        return str(refused.value)

    assert "no data set me/nothing, or a private one that this token may not see" in refusal("hf://me/nothing")
    assert "has no revision 'v9': give a branch" in refusal(f"hf://{REPO}@v9")
    assert "expected hf://OWNER/NAME" in refusal("hf://tokens")
    hub.private[REPO] = True
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "this token may not see: `hf auth login`, or HF_TOKEN" in refusal(f"hf://{REPO}")
    with pytest.raises(CacheError, match="the hub wants a token that may do this: `hf auth login`"):
        push(built, f"hf://{REPO}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(f"hf://{REPO}@main")
    with pytest.raises(UsageError, match="expected hf://OWNER/NAME; buckets and folders are filled by"):
        push(built, str(tmp_path / "folder"))


def test_rows_are_not_read_from_the_hub_one_by_one(hub: Hub, built: Path) -> None:
    push(built, f"hf://{REPO}")
    with pytest.raises(UsageError, match="open what stage_cache returns"):
        CacheReader(f"hf://{REPO}").rows([0])
    assert any("features/hog-grid4" in line for line in info_lines(cache_record(f"hf://{REPO}")))


def test_places_on_the_hub() -> None:
    path = location("hf://datasets/me/tokens@v1/caches/a/")
    assert path == HubPath("me/tokens", "v1", "caches/a")
    assert str(path / "label") == "hf://me/tokens@v1/caches/a/label"
    assert location(str(path / "label")) == path / "label"
    assert (path / "label").parent == path
    assert str(location("hf://me/tokens")) == "hf://me/tokens"
