"""FID and Inception score: which pictures the library is given, and the words where there is none."""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repa.cache_specs.errors import UsageError
from repa.pipeline.images.decode import decode
from repa.pipeline.models.inception import NpzImages, RealImages, inception_figures, manifest_of, why_not


@pytest.fixture
def npz(tmp_path: Path) -> tuple[Path, np.ndarray]:
    pictures = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", pictures)
    return tmp_path / "samples.npz", pictures


def test_the_library_is_given_the_samples_and_the_crops_that_a_build_takes(
    npz: tuple[Path, np.ndarray],
    make_images: Callable[..., list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = make_images(tmp_path / "images", num=3)
    given: dict[str, Any] = {}

    def calculate_metrics(**options: Any) -> dict[str, float]:
        given.update(options)
        return {"inception_score_mean": 2.5, "inception_score_std": 0.1, "frechet_inception_distance": 7.0}

    library = types.ModuleType("torch_fidelity")
    library.calculate_metrics = calculate_metrics  # type: ignore[attr-defined]  # a module made here
    monkeypatch.setitem(sys.modules, "torch_fidelity", library)
    weights = tmp_path / "weights.pth"
    weights.touch()
    assert why_not(weights) is None
    real = RealImages(manifest_of(str(tmp_path / "images")), 16)
    figures = inception_figures(npz[0], weights=weights, real=real, device="cpu")
    assert figures == {"inception_score": 2.5, "fid": 7.0}
    assert (given["isc"], given["fid"], given["cuda"]) == (True, True, False)
    assert given["feature_extractor_weights_path"] == str(weights)
    samples = [given["input1"][i].permute(1, 2, 0).numpy() for i in range(len(given["input1"]))]
    np.testing.assert_array_equal(samples, npz[1])
    for i, file in enumerate(files):
        np.testing.assert_array_equal(given["input2"][i].permute(1, 2, 0).numpy(), decode(file.read_bytes(), 16))
    assert inception_figures(npz[0], weights=weights, real=None, device="cpu") == {"inception_score": 2.5}
    assert given["fid"] is False


def test_what_is_not_at_hand_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Inception's weights are not at hand" in str(why_not(None))
    with pytest.raises(UsageError, match=r"inception_weights=.*nothing\.pth: no such file"):
        why_not(tmp_path / "nothing.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    (tmp_path / "weights.pth").touch()
    assert "torch-fidelity is not installed" in str(why_not(tmp_path / "weights.pth"))


def test_files_without_pictures_are_refused(npz: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    np.savez(tmp_path / "latents.npz", np.zeros((2, 4, 8, 8), dtype=np.float32))
    with pytest.raises(UsageError, match=r"arr_0 is float32 \[2, 4, 8, 8\]; expected stored pictures"):
        NpzImages(tmp_path / "latents.npz")
    np.savez_compressed(tmp_path / "packed.npz", npz[1])
    with pytest.raises(UsageError, match="expected stored pictures"):
        NpzImages(tmp_path / "packed.npz")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"bad\.png: not an image"):
        RealImages(manifest_of(str(tmp_path / "data")), 8)[0]
