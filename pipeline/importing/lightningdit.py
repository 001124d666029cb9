"""Import from LightningDiT: safetensors files of sampled latents (hustvl/LightningDiT, extract_features.py).

Each file holds `latents` [n, C, h, w], `latents_flip` of the mirrored images, and `labels` [n]. These are draws of the
posterior, one an image and view, not moments: training sees the same noise at every epoch. A sample's id is its file
and its place in it; which image it was, the files do not say.
"""

import os
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ...cache_specs.errors import UsageError, reason
from ...cache_specs.files.outside import open_regular
from ...cache_specs.layout import VIEWS
from .source import BadLatent, Kind, manifest_without_images

TENSORS = ("latents", "latents_flip")
STATISTICS = "latents_stats.pt"
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # dtypes of labels


class SampledSource:
    """The safetensors files of a folder, in the order of their names: a `LatentSource`."""

    layout: ClassVar[str] = "lightningdit"
    kind: Kind = "sample"
    image_root: Path | None = None
    pixel_range: tuple[float, float] | None = None  # the autoencoder's own tool reads the images

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.where = folder
        self._files: list[Any] = []
        names, labels, counts = sorted(file.name for file in folder.glob("*.safetensors")), [], []
        if not names:
            raise UsageError(f"--data {folder}: no .safetensors files in it; expected LightningDiT's latents")
        present: set[tuple[str, ...]] = set()
        for name in names:
            try:
                os.close(open_regular(folder / name))
                # One handle a file: it maps the file, and threads may share it.
                handle = safe_open(folder / name, framework="pt").__enter__()
            except Exception as error:  # the library's own class, and OSError
                raise UsageError(
                    f"--data {folder / name}: not a whole safetensors file ({reason(error)}); copy or download it again"
                ) from error
            keys = set(handle.keys())
            tensors = tuple(tensor for tensor in TENSORS if tensor in keys)
            if tensors[:1] != TENSORS[:1] or "labels" not in keys:
                raise UsageError(
                    f"--data {folder / name}: tensors {', '.join(sorted(keys))}; expected latents, labels and, for two "
                    "views, latents_flip"
                )
            present.add(tensors)
            try:
                found = handle.get_tensor("labels")
            except Exception as error:  # the library's own class, and what torch says of a dtype that it has not
                raise UsageError(f"--data {folder / name}: its labels cannot be read ({reason(error)})") from error
            if found.ndim != 1 or found.dtype not in WHOLE:
                raise UsageError(
                    f"--data {folder / name}: labels are {found.dtype} {list(found.shape)}; expected whole numbers [n]"
                )
            if not len(found):
                raise UsageError(f"--data {folder / name}: no rows in it; copy or download it again, or remove it")
            for tensor in tensors:
                shape = handle.get_slice(tensor).get_shape()
                if len(shape) != 4 or shape[0] != len(found):
                    raise UsageError(
                        f"--data {folder / name}: {tensor} is {shape} for {len(found)} labels; expected [n, C, h, w]"
                    )
            self._files.append(handle)
            labels.append(found.numpy())
            counts.append(len(found))
        if len(present) > 1:
            raise UsageError(f"--data {folder}: some files have latents_flip and some have not; expected all or none")
        self._tensors = present.pop()
        self.views = VIEWS[: len(self._tensors)]
        self._stops = np.cumsum(counts)
        ids = [f"{name}/{row:08d}" for name, count in zip(names, counts, strict=True) for row in range(count)]
        self.manifest, self._order = manifest_without_images(str(folder), ids, np.concatenate(labels))

    def read(self, row: int) -> np.ndarray:
        place = int(self._order[row])
        file = int(np.searchsorted(self._stops, place, side="right"))
        row = place - int(self._stops[file - 1] if file else 0)
        try:
            views = [self._files[file].get_slice(tensor)[row] for tensor in self._tensors]
        except Exception as error:  # the library's own class, where the file was cut after it was opened
            raise BadLatent(f"cannot be read ({reason(error)})") from error
        stacked = torch.stack(views)
        return (stacked.float() if stacked.dtype == torch.bfloat16 else stacked).numpy()

    def source_bytes(self, row: int, stored: np.ndarray) -> int:
        return stored.nbytes

    def published_statistics(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return mean and std [C] of latents_stats.pt, which LightningDiT takes over at most 10,000 samples."""
        file = self.where / STATISTICS
        if not file.exists():
            return None
        try:
            os.close(open_regular(file))
            stored = torch.load(file, map_location="cpu", weights_only=True)
            mean, std = (stored[name].double().reshape(-1).numpy() for name in ("mean", "std"))
        except Exception as error:  # what unpickling raises is anything; its advice to unpickle all is none of ours
            what = "it is no file of tensors" if isinstance(error, pickle.UnpicklingError) else reason(error)
            raise UsageError(
                f"{file}: expected mean and std, [1, C, 1, 1] each ({what}); remove it if it is not the latents'"
            ) from error
        return mean, std
