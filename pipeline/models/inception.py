"""FID and Inception score of a file of samples, by torch-fidelity, where it is installed and Inception's weights are
at hand.

The library computes them; it is imported here and nowhere else, and nothing is downloaded. Everything else that calls
itself a Frechet distance in this house names the encoder in whose space it is.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ...cache_specs.errors import UsageError, reason
from ...cache_specs.files.npz import open_rows
from ..images.decode import BadImage, decode
from ..images.demo_data import demo_manifest
from ..images.manifest import Manifest, scan_folder


class NpzImages(Dataset[torch.Tensor]):
    """The pictures [3, H, W] uint8 of an .npz's `arr_0` [N, H, W, 3], mapped, not read: it is stored uncompressed."""

    def __init__(self, npz: Path) -> None:
        try:
            stream, rows = open_rows(npz)
        except (OSError, ValueError) as error:
            raise UsageError(f"{npz}: {reason(error)}; expected stored pictures uint8 [N, H, W, 3]") from error
        with stream:
            if rows.dtype != np.uint8 or len(rows.shape) != 4 or rows.shape[-1] != 3:
                raise UsageError(
                    f"{npz}: arr_0 is {rows.dtype} {list(rows.shape)}; expected stored pictures uint8 [N, H, W, 3]"
                )
            self._pictures = np.memmap(stream, dtype=rows.dtype, mode="r", offset=rows.offset, shape=rows.shape)

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(self._pictures[index]).permute(2, 0, 1)


class RealImages(Dataset[torch.Tensor]):
    """The centre crops [3, R, R] uint8 of a manifest, as a build takes them."""

    def __init__(self, manifest: Manifest, resolution: int) -> None:
        self._manifest = manifest
        self._resolution = resolution

    def __len__(self) -> int:
        return len(self._manifest)

    def __getitem__(self, index: int) -> torch.Tensor:
        name = str(self._manifest.sample_ids[index])
        try:
            picture = decode(self._manifest.source.read(name), self._resolution)
        except (OSError, BadImage) as error:
            raise UsageError(f"{self._manifest.where}: {name}: {error}") from error
        return torch.tensor(picture).permute(2, 0, 1)


def manifest_of(data: str) -> Manifest:
    """Return the manifest of a folder of images, or of the demo."""
    return demo_manifest() if data == "demo" else scan_folder(Path(data), allow_empty=True)


def why_not(weights: Path | None) -> str | None:
    """Return why there will be no FID and Inception score, None where there will."""
    if weights is None:
        return "Inception's weights are not at hand (evaluation.inception_weights=FILE, pt_inception-2015-12-05.pth)"
    if not weights.is_file():
        raise UsageError(f"evaluation.inception_weights={weights}: no such file")
    try:
        import torch_fidelity  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torch_fidelity":
            raise
        return "torch-fidelity is not installed (pip install torch-fidelity)"
    return None


def inception_figures(npz: Path, *, weights: Path, real: Dataset[Any] | None, device: str) -> dict[str, float]:
    """Return `inception_score` of the samples (mean of ten splits) and, with `real` pictures, `fid`."""
    import torch_fidelity

    found = torch_fidelity.calculate_metrics(
        input1=NpzImages(npz),
        input2=real,
        isc=True,
        fid=real is not None,
        cuda=device.startswith("cuda"),
        feature_extractor_weights_path=str(weights),
        cache=False,
        verbose=False,
    )
    figures = {"inception_score": float(found["inception_score_mean"])}
    return figures | ({} if real is None else {"fid": float(found["frechet_inception_distance"])})
