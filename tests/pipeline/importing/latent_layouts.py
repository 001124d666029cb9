"""Small sources of latents in the layouts that others publish, written as their own tools write them.

Each function returns what it stored, so that a test compares with that and never with our own reading.
"""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from safetensors.torch import save_file

# Of Stable Diffusion's latents over ImageNet, to which the import's checks compare: mean and std a channel.
MEAN = np.array([0.865, -0.278, 0.216, 0.374])
STD = np.array([4.86, 5.32, 3.94, 3.99])
MEAN_OF_UNIT_PIXELS = np.array([5.81, 3.25, 0.12, -2.15])


def draw_latents(num: int, side: int = 4, *, mean: np.ndarray = MEAN, seed: int = 0) -> np.ndarray:
    """Return latents [num, C, side, side] float32 with the given channel means."""
    noise = np.random.default_rng(seed).standard_normal((num, len(mean), side, side))
    return (noise * STD[:, None, None] + mean[:, None, None]).astype(np.float32)


def draw_moments(num: int, side: int = 4, *, mean: np.ndarray = MEAN, seed: int = 0) -> np.ndarray:
    """Return moments [num, 2C, side, side] float32: means as `draw_latents`, then standard deviations."""
    std = np.random.default_rng(seed + 1).uniform(1e-3, 0.1, (num, len(mean), side, side)).astype(np.float32)
    return np.concatenate([draw_latents(num, side, mean=mean, seed=seed), std], axis=1)


def labels_json(names: list[str], labels: list[int]) -> str:
    return json.dumps({"labels": [[name, label] for name, label in zip(names, labels, strict=True)]})


def npy_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def numbered(prefix: str, ending: str, num: int, folder_size: int = 4) -> list[str]:
    """Return names as EDM2's tools give: a folder of some, then the number; here few lie in one folder."""
    return [f"{i // folder_size:05d}/{prefix}{i:08d}.{ending}" for i in range(num)]


def write_repa(root: Path, *, num: int = 10, side: int = 4, seed: int = 0) -> tuple[np.ndarray, list[int]]:
    """Write REPA's folder, images/ and vae-sd/; return moments [num, 8, side, side] and labels, by number."""
    moments, labels = draw_moments(num, side, seed=seed), [i * 3 // num for i in range(num)]
    rng = np.random.default_rng(seed)
    images, latents = numbered("img", "png", num), numbered("img-mean-std-", "npy", num)
    for name, latent, values in zip(images, latents, moments, strict=True):
        for file in (root / "images" / name, root / "vae-sd" / latent):
            file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8 * side, 8 * side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / name, compress_level=0)
        (root / "vae-sd" / latent).write_bytes(npy_bytes(values))
    (root / "images" / "dataset.json").write_text(labels_json(images, labels))
    (root / "vae-sd" / "dataset.json").write_text(labels_json(latents, labels))
    return moments, labels


def write_images_of(folder: Path, names: list[str] | None = None, *, side: int = 32) -> Path:
    """Write pictures of these names below folder/pictures; return that folder."""
    for name in names or ["a/1.png", "b/2.png"]:
        file = folder / "pictures" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side)).save(file)
    return folder / "pictures"


def write_edm2(file: Path, moments: np.ndarray, labels: list[int]) -> list[str]:
    """Write a zip of EDM2's encode command, stored and not compressed; return the names of its latents."""
    names = numbered("img-mean-std-", "npy", len(moments))
    with zipfile.ZipFile(file, "w", compression=zipfile.ZIP_STORED) as archive:
        for name, values in zip(names, moments, strict=True):
            archive.writestr(name, npy_bytes(values))
        archive.writestr("dataset.json", labels_json(names, labels))
    return names


def write_lightningdit(
    folder: Path, *, counts: tuple[int, ...] = (6, 4), side: int = 4, flip: bool = True, statistics: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Write LightningDiT's files; return latents [N, V, C, side, side] and labels [N] in the order of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    num = sum(counts)
    views = np.stack([draw_latents(num, side, seed=view) for view in range(1 + flip)], axis=1)
    labels = np.arange(num) % 3
    start = 0
    for shard, count in enumerate(counts):
        part = slice(start, start + count)
        tensors = {"latents": views[part, 0], "labels": labels[part]} | (
            {"latents_flip": views[part, 1]} if flip else {}
        )
        save_file(
            {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in tensors.items()},
            folder / f"latents_rank00_shard{shard:03d}.safetensors",
            metadata={"total_size": str(count), "dtype": "torch.float32", "device": "cpu"},
        )
        start += count
    if statistics:
        latents = torch.from_numpy(views[:, 0])
        found = {"mean": latents.mean(dim=[0, 2, 3], keepdim=True), "std": latents.std(dim=[0, 2, 3], keepdim=True)}
        torch.save(found, folder / "latents_stats.pt")
    return views, labels


def write_arrow(
    folder: Path,
    moments: np.ndarray,
    *,
    labels: list[int] | None = None,
    files: int = 2,
    dtype: str = "float32",
    nested: Callable[[pa.DataType, int], pa.DataType] = lambda item, length: pa.list_(item),
) -> None:
    """Write moments as `datasets` saves them: Arrow streams in some batches a file, state.json, dataset_info.json.

    `nested` gives the type of a list of `length` items; those of datasets' features differ.
    """

    def lists(values: np.ndarray) -> list[Any]:  # of numpy's numbers: pyarrow 17 takes no float for a float16
        return [lists(value) for value in values] if values.ndim > 1 else list(values)

    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    value_type = pa.from_numpy_dtype(np.dtype(dtype))
    for length in reversed(moments.shape[1:]):
        value_type = nested(value_type, length)
    parts = np.array_split(np.arange(len(moments)), files)
    for name, rows in zip(names, parts, strict=True):
        columns = {"data": pa.array([lists(moments[i].astype(dtype)) for i in rows], type=value_type)}
        if labels is not None:
            columns["label"] = pa.array([labels[i] for i in rows], type=pa.int64())
        table = pa.table(columns)
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    state = {"_data_files": [{"filename": name} for name in names], "_indices_data_files": None, "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
