"""One worker: the device goes on while rows are written and ranges committed, and never further than one sub-batch."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from repa.cache_specs.errors import CacheError
from repa.cache_specs.schema import ComponentSpec
from repa.pipeline.building.encode import Worker
from repa.pipeline.building.plan import BuildOptions, plan_build
from repa.pipeline.building.resources import images_a_pass
from repa.pipeline.images.decode import DecodedBatch, decode_batch
from repa.pipeline.images.manifest import Manifest, scan_folder
from repa.pipeline.store.component_writer import ComponentWriter
from repa.pipeline.store.store import CacheStore

PATH, OTHER = "features/hog-grid4", "features/hog-grid2"


class SmallRanges:
    """Two ranges of 8 samples, four sub-batches each; `did` names what was done, in its order."""

    def __init__(self, manifest: Manifest, cache: Path, encoders: tuple[str, ...] = ("hog:grid=4",)) -> None:
        options = BuildOptions(
            manifest=manifest,
            cache=cache,
            encoders=encoders,
            autoencoder="none",
            resolution=16,
            shard_samples=8,
        )
        plan = plan_build(options)
        self.store = CacheStore.create_or_open(cache, plan.layout, manifest)
        self.worker = Worker(self.store.path, plan.layout, plan.requests, device="cpu", threads=1)
        for component in self.worker.components:
            self.store.create_component(component)
        self.did: list[str] = []
        self.encoding = threading.Condition()
        self._manifest = manifest
        network, *others = self.worker._networks
        self._encode = network.encode
        self.worker._networks = [replace(network, encode=self._noted), *others]

    def _noted(self, images: torch.Tensor, components: Sequence[ComponentSpec]) -> dict[str, dict[str, torch.Tensor]]:
        arrays = self._encode(images, components)
        with self.encoding:
            self.did.append("encode")
            self.encoding.notify_all()
        return arrays

    def batches(self, index: int) -> Iterator[DecodedBatch]:
        for start in range(8 * index, 8 * index + 8, 2):
            ids = self._manifest.sample_ids[start : start + 2].tolist()
            yield decode_batch(self._manifest.source, ids, 16, np.zeros(2, dtype=np.int64))

    def encode(self, index: int, *more: str) -> Any:
        return self.worker.encode_range(index, [PATH, *more], self.batches(index), skip_bad=False)

    def hold(self, monkeypatch: pytest.MonkeyPatch, method: str, until: int) -> None:
        """Make the first call of a writer's method wait until `until` sub-batches are encoded."""
        plain, calls = getattr(ComponentWriter, method), []

        def held(*arguments: Any, **named: Any) -> Any:
            with self.encoding:
                if not calls:
                    assert self.encoding.wait_for(lambda: self.did.count("encode") >= until, timeout=60)
                calls.append(method)
                self.did.append(method)
            return plain(*arguments, **named)

        monkeypatch.setattr(ComponentWriter, method, held)


@pytest.fixture
def ranges(make_images: Callable[..., list[Path]], tmp_path: Path) -> Iterator[SmallRanges]:
    make_images(tmp_path / "images", num=16)
    small = SmallRanges(scan_folder(tmp_path / "images"), tmp_path / "cache")
    yield small
    small.worker.close()


def test_the_next_sub_batch_is_encoded_while_one_is_written_and_no_further_one(
    ranges: SmallRanges, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges.hold(monkeypatch, "append", until=2)
    assert ranges.encode(0).result().written == [PATH]
    assert ranges.did[:3] == ["encode", "encode", "append"]
    ahead = np.cumsum([{"encode": 1, "append": -1}[name] for name in ranges.did])
    assert (ahead.max(), ahead[-1]) == (2, 0)


def test_the_next_range_is_encoded_while_one_is_committed(ranges: SmallRanges, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges.hold(monkeypatch, "commit", until=5)
    first, second = ranges.encode(0), ranges.encode(1)
    assert [future.result().written for future in (first, second)] == [[PATH], [PATH]]
    (component,) = ranges.worker.components
    assert ranges.store.missing_ranges(component) == []


@pytest.mark.parametrize("call", [1, 4])
def test_what_the_disk_refuses_ends_the_range_and_leaves_nothing_behind(
    ranges: SmallRanges, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    plain, calls = ComponentWriter.append, []

    def refused(*arguments: Any, **named: Any) -> Any:
        calls.append(call)
        if len(calls) == call:
            raise CacheError("the disk is full")
        return plain(*arguments, **named)

    monkeypatch.setattr(ComponentWriter, "append", refused)
    with pytest.raises(CacheError, match="the disk is full"):
        ranges.encode(0).result()
    (component,) = ranges.worker.components
    assert ranges.store.missing_ranges(component) == [0, 1]
    assert list(ranges.store.partial_folder(PATH).iterdir()) == []
    # The worker goes on: the next range is another matter.
    assert ranges.encode(1).result().written == [PATH]


def test_a_file_that_stays_in_the_folder_of_an_abandoned_range_is_no_error_of_its_own(ranges: SmallRanges) -> None:
    (component,) = ranges.worker.components
    writer = ComponentWriter(ranges.store, component, 0)
    (folder,) = ranges.store.partial_folder(PATH).iterdir()
    (folder / ".nfs0001").touch()
    writer.abandon()
    assert folder.exists()


@pytest.fixture
def two(make_images: Callable[..., list[Path]], tmp_path: Path) -> Iterator[SmallRanges]:
    make_images(tmp_path / "images", num=16)
    small = SmallRanges(scan_folder(tmp_path / "images"), tmp_path / "cache", ("hog:grid=4", "hog:grid=2"))
    yield small
    small.worker.close()


def test_components_are_written_side_by_side(two: SmallRanges, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, side_by_side = ComponentWriter.append, threading.Barrier(2, timeout=60)

    def together(*arguments: Any, **named: Any) -> Any:
        side_by_side.wait()  # nobody comes, where one thread writes both
        return plain(*arguments, **named)

    monkeypatch.setattr(ComponentWriter, "append", together)
    assert two.encode(0, OTHER).result().written == [PATH, OTHER]


def test_a_component_that_cannot_be_committed_costs_no_other_one_its_range(
    two: SmallRanges, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ComponentWriter.commit

    def refused(writer: ComponentWriter) -> None:
        if writer.component.path == PATH:
            raise CacheError("the disk is full")
        plain(writer)

    monkeypatch.setattr(ComponentWriter, "commit", refused)
    with pytest.raises(CacheError, match="the disk is full"):
        two.encode(0, OTHER).result()
    assert [two.store.missing_ranges(component) for component in two.worker.components] == [[0, 1], [1]]
    for path in (PATH, OTHER):
        assert list(two.store.partial_folder(path).iterdir()) == []


@pytest.mark.parametrize(
    ("memory", "share", "resolution", "expected"),
    [(80, 1.0, 256, 128), (24, 1.0, 256, 32), (24, 0.5, 256, 16), (80, 1.0, 512, 32), (2, 0.25, 512, 8)],
)
def test_a_forward_pass_takes_what_the_gpu_holds(
    monkeypatch: pytest.MonkeyPatch, memory: int, share: float, resolution: int, expected: int
) -> None:
    found = SimpleNamespace(total_memory=memory * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert images_a_pass("cuda", resolution, share=share) == expected
    assert images_a_pass("cpu", resolution) == 32
