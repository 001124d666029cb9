"""Import from an Arrow data set of moments, as the iREPA study's release is (`datasets.save_to_disk`).

state.json names the Arrow files in their order; the column `data` has one nested list [2C, h, w] a row, mean before
standard deviation. Labels are a column `label`, a text file of one number a line (the release's
imagenet_train_labels.txt), or the images' folders: the release's rows are in the order of torchvision's ImageFolder.
"""

import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...cache_specs.errors import UsageError, reason
from ...cache_specs.files.outside import (
    MOST_SETTINGS_BYTES,
    MOST_TABLE_BYTES,
    open_regular,
    parse_json,
    read_file,
    read_text,
)
from ...cache_specs.layout import VIEWS
from ..images.labels import MAX_CLASSES, whole_number
from ..images.manifest import Manifest, scan_folder
from .source import BadLatent, Kind, manifest_without_images

STATE = "state.json"
SPLITS = "dataset_dict.json"  # a folder of several data sets
DATA, LABEL = "data", "label"


class ArrowSource:
    """A saved `datasets` folder: a `LatentSource`. Files are mapped, not read."""

    layout: ClassVar[str] = "arrow"
    kind: Kind = "moments"
    views: tuple[str, ...] = VIEWS[:1]
    pixel_range: tuple[float, float] | None = (-1.0, 1.0)  # as REPA's, whose preprocessing the study uses

    def __init__(self, folder: Path, images: Path | None, labels_file: Path | None) -> None:
        self.where = folder
        self._batches: list[Any] = []
        labels: list[np.ndarray] = []
        for file in _arrow_files(folder):
            for data, label in _columns(file):
                self._batches.append(data)
                if label is not None:
                    labels.append(label)
        self._stops = np.cumsum([len(batch) for batch in self._batches], dtype=np.int64)
        num = int(self._stops[-1]) if len(self._stops) else 0
        if not num:
            raise UsageError(f"--data {folder}: no rows in it")
        own = np.concatenate(labels) if labels else None
        if labels_file is not None:
            own = _read_labels(labels_file)
        if own is not None and len(own) != num:
            raise UsageError(f"--data {folder}: {len(own)} labels for {num} samples; expected one each")
        self.image_root = images
        if images is not None:
            self.manifest, self._order = _in_image_order(folder, images, own, num)
        elif own is not None:
            self.manifest, self._order = manifest_without_images(str(folder), [f"{i:08d}" for i in range(num)], own)
        else:
            raise UsageError(
                f"--data {folder}: no column {LABEL} in it; name the labels with --labels FILE.txt (a number a line, "
                "in the order of the rows), or the images with --images FOLDER"
            )

    def read(self, row: int) -> np.ndarray:
        place = int(self._order[row])
        index = int(np.searchsorted(self._stops, place, side="right"))
        return _nested(self._batches[index], place - int(self._stops[index - 1] if index else 0))[None]

    def source_bytes(self, row: int, stored: np.ndarray) -> int:
        if self.image_root is not None:
            return (self.image_root / str(self.manifest.sample_ids[row])).stat().st_size
        return stored.nbytes

    def published_statistics(self) -> None:
        return None


def _arrow_files(folder: Path) -> list[Path]:
    file = folder / STATE
    if (folder / SPLITS).exists():
        splits = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{STATE}")))
        raise UsageError(f"--data {folder}: holds several splits ({splits}); give the folder of one")
    try:
        state = parse_json(read_file(file, most=MOST_SETTINGS_BYTES))
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except OSError as error:
        raise UsageError(
            f"--data {folder}: {STATE} cannot be read ({reason(error)}); expected the folder that save_to_disk of "
            "datasets writes"
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{file}: expected a data set as save_to_disk of datasets writes it ({error!r})") from error
    if state.get("_indices_data_files"):
        raise UsageError(f"--data {folder}: its rows are in another order; write it anew after flatten_indices()")
    for name in names:
        if Path(name).name != name:
            raise UsageError(f"{file}: names {name!r}, which leads out of the folder; not used")
    return [folder / name for name in names]


def _columns(file: Path) -> list[tuple[Any, np.ndarray | None]]:
    """Return the latents (an Arrow array of nested lists) and labels of each record batch of a file."""
    import pyarrow as pa

    try:
        os.close(open_regular(file))
        with pa.memory_map(str(file)) as source:
            batches = list(pa.ipc.open_stream(source))
        for batch in batches:
            batch.validate()  # that its buffers are as long as they say
    except (OSError, pa.ArrowException) as error:
        raise UsageError(
            f"--data {file}: not a whole Arrow file ({reason(error)}); copy or download it again"
        ) from error
    found = []
    for batch in batches:
        if DATA not in batch.schema.names:
            raise UsageError(f"--data {file}: columns {', '.join(batch.schema.names)}; expected {DATA}, and {LABEL}")
        data = batch.column(DATA)
        data = data.storage if isinstance(data, pa.ExtensionArray) else data
        label = batch.column(LABEL) if LABEL in batch.schema.names else None
        if label is not None and (label.null_count or not pa.types.is_integer(label.type)):
            raise UsageError(f"--data {file}: {LABEL} is {label.type}, {label.null_count} missing; expected numbers")
        found.append((data, None if label is None else label.to_numpy(zero_copy_only=False)))
    return found


def _nested(array: Any, row: int) -> np.ndarray:
    """Return one row of nested lists as an array with a dimension a level; raise `BadLatent`."""
    level, shape = array.slice(row, 1), []
    while hasattr(level, "flatten") and hasattr(level.type, "value_type"):
        lengths = level.value_lengths().to_numpy(zero_copy_only=False)
        if level.null_count or len(set(lengths.tolist())) != 1:
            raise BadLatent("missing, or its nested lists are not of one length")
        shape.append(int(lengths[0]))
        level = level.flatten()
    if level.null_count:
        raise BadLatent("some of its numbers are missing")
    values: np.ndarray = level.to_numpy(zero_copy_only=False)
    return values.reshape(shape)


def _read_labels(file: Path) -> np.ndarray:
    try:
        lines = read_text(file, most=MOST_TABLE_BYTES).split("\n")
        labels = [(number, whole_number(line.strip())) for number, line in enumerate(lines, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--labels {file}: cannot be read ({reason(error)})") from error
    for number, label in labels:
        if label is None or not 0 <= label < MAX_CLASSES:
            raise UsageError(
                f"--labels {file}: line {number}: {lines[number - 1].strip()[:40]!r}: expected one whole number a "
                f"line, 0 to {MAX_CLASSES - 1}, in the order of the rows"
            )
    return np.array([label for _, label in labels], dtype=np.int64)


def _in_image_order(folder: Path, images: Path, labels: np.ndarray | None, num: int) -> tuple[Manifest, np.ndarray]:
    """Return the manifest of `images`, and the data set's row of each of its rows.

    ImageFolder sorts the classes, the folders below each, then the files of each; the manifest sorts whole paths.
    """
    manifest = scan_folder(images)
    if len(manifest) != num:
        raise UsageError(f"--data {folder}: {num} rows, and {len(manifest)} images in {images}; expected one row each")
    paths = manifest.sample_ids.tolist()
    keys = [(path.split("/")[0], *path.rpartition("/")[::2]) for path in paths]
    rows = np.argsort(np.array(sorted(range(num), key=keys.__getitem__), dtype=np.int64))
    if labels is not None:
        differ = np.flatnonzero(manifest.labels != labels[rows])
        if len(differ):
            raise UsageError(
                f"--data {folder}: the labels differ from those of {images} for {len(differ)} samples, the first is "
                f"{manifest.sample_ids[differ[0]]}; expected the images that the latents were made of"
            )
    return manifest, rows
