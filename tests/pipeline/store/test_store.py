"""In which order a build makes its files durable: what a power cut may not turn round."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_a_range_is_durable_before_valid_says_so_and_all_ranges_before_complete(
    make_images: Callable[..., list[Path]], tmp_path: Path, build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(tmp_path / "images", num=6)
    done: list[tuple[str, str]] = []  # (operation, path), each once it is done
    fsync, replace = os.fsync, os.replace

    def counted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def counted_replace(source: Any, target: Any) -> None:
        assert ("fsync", str(source)) in done, f"{source} was renamed before it was on the disk"
        replace(source, target)
        done.append(("replace", str(target)))

    monkeypatch.setattr(os, "fsync", counted_fsync)
    monkeypatch.setattr(os, "replace", counted_replace)
    cache = tmp_path / "cache"
    assert build(tmp_path / "images", cache).code == 0

    for group in (cache / "latents/pixels", cache / "features/hog-grid4"):
        arrays = [folder for folder in group.iterdir() if folder.is_dir()]
        for index in range(2):
            (valid,) = [i for i, entry in enumerate(done) if entry == ("replace", f"{group}/valid/c.{index}")]
            for folder in arrays:
                (shard,) = folder.glob(f"c.{index}*")
                if folder.name != "valid":
                    assert ("fsync", str(folder)) in done[done.index(("replace", str(shard))) : valid], shard
        complete = len(done) - 1 - done[::-1].index(("replace", f"{group}/zarr.json"))
        assert ("fsync", f"{group}/valid") in done[done.index(("replace", f"{group}/valid/c.1")) : complete]
        assert ("fsync", str(group)) in done[complete:]
