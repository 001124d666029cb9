"""What an import reads from: somebody's latents in their own layout, as rows of one manifest.

Each published layout is read by a module beside this one (edm2.py, which reads REPA's too, lightningdit.py, arrow.py)
that lists samples, labels and ids, and reads one row as it lies there. What the numbers mean is checked and converted
in one place for all of them, checks.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import numpy as np

from ..images.labels import numbered_classes
from ..images.manifest import Manifest

Kind = Literal["moments", "sample"]


class BadLatent(Exception):
    """One sample's latents that cannot be used, with the reason; always caught and listed by sample."""


class LatentSource(Protocol):
    """Latents of a manifest's samples.

    `where` is the file or folder of the latents, for messages. `kind` is what a row holds: moments (the posterior's C
    means, then C standard deviations or log-variances) or sample (C planes of one draw). `views` are the cache's.
    `image_root` is the folder that the sample ids are relative to, None where there are no images. `pixel_range` is
    what the layout's own tool feeds the autoencoder, None where that is not known.
    """

    layout: ClassVar[str]
    where: Path
    kind: Kind
    views: tuple[str, ...]
    manifest: Manifest
    image_root: Path | None
    pixel_range: tuple[float, float] | None

    def read(self, row: int) -> np.ndarray:
        """Return [V, M, h, w] of the manifest's sample `row` as it is stored there; raise `BadLatent`."""
        ...

    def source_bytes(self, row: int, stored: np.ndarray) -> int:
        """Return the size of the sample's image file, or of its latents, `stored` as `read` returns them, without."""
        ...

    def published_statistics(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the per-channel mean and std [C] that lie beside the data, None where the layout has none."""
        ...


@dataclass(frozen=True)
class NoImages:
    """The images of an import that has none: an `ImageSource` that says so."""

    where: str

    def read(self, sample_id: str) -> bytes:
        raise FileNotFoundError(f"{self.where} was imported without images")


def manifest_without_images(where: str, ids: Sequence[str], labels: np.ndarray) -> tuple[Manifest, np.ndarray]:
    """Return the manifest of samples that have no images, and where in `ids` each of its rows is: [N] int64.

    `ids` are N different names, `labels` [N] whole numbers. Raises `UsageError` where a label is out of range.
    """
    names = np.array(ids, dtype=np.dtypes.StringDType())
    order = np.array(sorted(range(len(ids)), key=lambda i: ids[i].encode()), dtype=np.int64)
    names, numbers = names[order], np.asarray(labels)[order]
    listed, classes = numbered_classes(names.tolist(), numbers.tolist(), Path(where))
    manifest = Manifest(
        where=where,
        sample_ids=names,
        labels=np.asarray(listed, dtype=np.int32),
        class_names=tuple(classes),
        source=NoImages(where),
    )
    return manifest, order


def spread_rows(size: int, most: int) -> list[int]:
    """Return up to `most` of `size` rows, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, size - 1, min(most, size)).round().astype(np.int64)).tolist()
