"""A small cache to derive from: two dtypes, two views, one image that cannot be used, and copies of it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from repa.pipeline import BuildOptions, run_build, scan_folder

SOURCE = "features/hog-grid4"


@pytest.fixture(scope="session")
def sources(make_images: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `images` of 3 classes and their cache `c` of 4 ranges; the sample of row 5 is not valid."""
    folder = tmp_path_factory.mktemp("sources")
    files = make_images(folder / "images", num=14, num_classes=3)
    files[5].write_text("no picture")
    for dtype in ("float16", "int8"):
        options = BuildOptions(
            manifest=scan_folder(folder / "images"),
            cache=folder / "c",
            encoders=("hog:grid=4",),
            autoencoder="pixels",
            resolution=16,
            flip=True,
            shard_samples=4,
            batch_size=3,
            dtype=dtype,
            workers=0,
            skip_bad=True,
        )
        run_build(options, on_start=lambda done, total: None, on_progress=lambda samples: None)
    return folder


@pytest.fixture
def cache(sources: Path, tmp_path: Path) -> Path:
    """Return a copy of the small cache."""
    return Path(shutil.copytree(sources / "c", tmp_path / "c"))


def stored(cache: Path, name: str, source: str = SOURCE) -> np.ndarray:
    """Return an array of a component through zarr."""
    return np.asarray(zarr.open_group(cache / source, mode="r")[name][:])


def principal(tokens: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean [E], axes [num, E] and all variances of `tokens` [n, E], by the singular values of them all."""
    mean = tokens.mean(axis=0)
    _, singular, axes = np.linalg.svd(tokens - mean, full_matrices=False)
    axes = axes[:num]
    axes = axes * np.sign(axes[np.arange(num), np.abs(axes).argmax(axis=1)])[:, None]
    return mean, axes, singular**2 / len(tokens)
