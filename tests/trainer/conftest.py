"""Caches for the trainer's tests, written by zarr-python, or by hand, from the contract alone.

Nothing of repa.pipeline and nothing of the direct reader is used: two ways to the bytes that must agree.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
import pytest
import torch
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from repa.cache_specs.fingerprint import manifest_fingerprint, transform_fingerprint
from repa.cache_specs.layout import BAD_FILES, CROP, VIEWS, ArrayLayout, CacheLayout
from repa.cache_specs.schema import ComponentSpec
from repa.cache_specs.storage import location
from repa.trainer.diffusion.interpolant import Interpolant
from repa.trainer.diffusion.latents import LatentNorm
from repa.trainer.models.sit import SIZES
from repa.trainer.objectives.alignment import AlignmentConfig
from repa.trainer.objectives.objective import Given
from repa.trainer.objectives.velocity import Velocity
from repa.trainer.reading.draws import DrawSpec
from repa.trainer.rows.row_batch import Batch

# Where the chunks of a shard lie: in C order at multiples of 64 bytes; or in zarr's order without gaps
Shards = Literal["as built", "zarr's", "zarr's, nothing for zeros", "zstd"]


@dataclass
class WrittenCache:
    """A cache on disk beside the numpy arrays that were written into it, by `group/array`."""

    path: Path
    layout: CacheLayout
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def shard(self, array: str, index: int) -> Path:
        """Return the file of one shard, found on disk by its first chunk coordinate."""
        (file,) = [file for file in (self.path / array).glob(f"c.{index}*") if file.name.split(".")[1] == str(index)]
        return file

    def assert_rows(
        self, batch: Batch, rows: Sequence[int], views: Sequence[int], encoders: Sequence[str] = ("toy",)
    ) -> None:
        """Assert that every tensor of the batch holds exactly the bytes that were written for those rows and views."""
        assert batch.rows.tolist() == list(rows)
        np.testing.assert_array_equal(batch.labels.numpy(), self.arrays["label"][rows])
        np.testing.assert_array_equal(batch.moments.numpy(), self.arrays["latents/toy-ae/moments"][rows, views])
        for features, name in zip(batch.features, encoders, strict=True):
            for array, tensor in (
                ("patch_tokens", features.tokens),
                ("token_scale", features.token_scale),
                ("channel_mean", features.channel_mean),
                ("channel_std", features.channel_std),
                ("cls_token", features.cls_token),
            ):
                expected = self.arrays.get(f"features/{name}/{array}")
                if expected is None:
                    assert tensor is None
                else:
                    np.testing.assert_array_equal(tensor.numpy(), expected[rows, views])
                    assert tensor.numpy().dtype == expected.dtype


def int8_tokens(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Quantise [N,V,T,E] float32 as DESIGN says, in float64: q, token_scale, channel_mean, channel_std."""
    mean = tokens.astype(np.float64).mean(2, keepdims=True)
    std = tokens.astype(np.float64).std(2, ddof=1, keepdims=True)
    x = np.divide(tokens - mean, std, out=np.zeros_like(mean + tokens), where=std > 0)
    scale = (np.abs(x).max(-1, keepdims=True) / 127).astype(np.float16).astype(np.float64)
    q = np.divide(x, scale, out=np.zeros_like(x), where=scale > 0).round().clip(-127, 127)
    return q.astype(np.int8), scale[..., 0].astype(np.float16), mean[:, :, 0], std[:, :, 0]


def with_digest(attributes: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(attributes, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return {**attributes, "attributes_digest": hashlib.sha256(text.encode()).hexdigest()}


def write_cache(
    path: Path,
    *,
    num_samples: int = 23,
    shard_samples: int = 5,
    num_views: int = 2,
    num_classes: int = 3,
    size: int = 8,
    latents: str = "sample",
    encoders: dict[str, str] | None = None,
    grid: int = 4,
    width: int = 16,
    cls_token: bool = True,
    invalid: dict[str, list[int]] | None = None,
    zero_rows: tuple[int, ...] = (),
    nan_rows: tuple[int, ...] = (),
    complete: bool = True,
    shards: Shards = "as built",
    seed: int = 0,
) -> WrittenCache:
    """Write random rows: latents "toy-ae" of 3 channels and one group an entry of `encoders` (name: dtype).

    `latents` is their kind, or uint8: then they are "pixels", view 0 alone.
    """
    rng = np.random.default_rng(seed)
    encoders = {"toy": "float16"} if encoders is None else encoders
    compressor = "zstd" if shards == "zstd" else "none"
    ids = [f"{i % num_classes}/{seed}-{i:05d}.png" for i in range(num_samples)]
    labels = rng.integers(0, num_classes, num_samples).astype(np.int32)
    manifest = manifest_fingerprint(ids, labels.tolist())
    views, names = VIEWS[:num_views], tuple(f"class {c}" for c in range(num_classes))
    layout = CacheLayout(
        num_samples=num_samples,
        resolution=size,
        views=views,
        class_names=names,
        shard_samples=shard_samples,
        manifest_fingerprint=manifest,
        dataset_fingerprint=transform_fingerprint(manifest, resolution=size, crop=CROP, views=views, class_names=names),
    )
    root = zarr.open_group(path, mode="w", attributes=with_digest(layout.attributes()))
    label = {"chunks": (65_536,), "compressors": [ZstdCodec(level=1), Crc32cCodec()]}
    root.create_array("label", data=labels, **label, config={"write_empty_chunks": True})  # type: ignore[arg-type]  # zarr's overloads
    written = WrittenCache(path, layout, {"label": labels})

    moment_channels = 6 if latents == "mean_std" else 3
    moments = rng.standard_normal((num_samples, num_views, moment_channels, size, size)).astype(np.float32)
    if latents == "mean_std":
        moments[:, :, 3:] = 0.1 * np.abs(moments[:, :, 3:])
    moments[list(nan_rows)] = np.nan
    latent_spec = {
        "entry": "pixels",
        "loader": "builtin",
        "model": "identity",
        "pixel_range": [-1.0, 1.0],
        "kind": "sample" if latents == "uint8" else latents,
        "latent_channels": 3,
        "moment_channels": moment_channels,
        "latent_size": [size, size],
        "random_weights": False,
    }
    how: Any = {"name": "toy-ae", "compressor": compressor}
    if latents == "uint8":
        moments = rng.integers(0, 256, (num_samples, 1, 3, size, size))
        latent_spec["views"] = ["identity"]
        how |= {"name": "pixels", "dtype": "uint8"}
    component = ComponentSpec(kind="latents", spec=latent_spec, weights="none", **how)
    results = {"latent_mean": [0.1, -0.2, 0.3], "latent_std": [1.0, 2.0, 0.5]}
    rows = {"moments": moments}
    parts = [(component, rows, results)]

    for name, dtype in encoders.items():
        tokens = rng.standard_normal((num_samples, num_views, grid * grid, width)).astype(np.float32)
        tokens = 3 * tokens + rng.standard_normal(width).astype(np.float32)
        q, scale, mean, std = int8_tokens(tokens)
        spec = {"entry": "hog", "width": width, "grid": [grid, grid], "cls_token": cls_token, "random_weights": False}
        storage: Any = {"dtype": dtype, "compressor": compressor}
        component = ComponentSpec(kind="features", name=name, spec=spec, weights="none", **storage)
        rows = {
            "patch_tokens": q if dtype == "int8" else tokens,
            "token_scale": scale,
            "channel_mean": mean,
            "channel_std": std,
            "cls_token": rng.standard_normal((num_samples, num_views, width)),
        }
        parts.append((component, rows, {}))

    for component, rows, results in parts:
        bad = (invalid or {}).get(component.path, [])
        results = {**results, **({BAD_FILES: {ids[row]: "not an image" for row in bad}} if bad else {})}
        group = root.create_group(component.path)
        valid = np.ones(num_samples, dtype=bool)
        valid[bad] = False
        rows = {**rows, "valid": valid, "source_bytes": np.where(valid, 1 + np.arange(num_samples), 0)}
        for array in component.arrays(layout):
            data = rows[array.name].astype(array.dtype)
            data[list(zero_rows)] = 1 if array.name == "valid" else 0
            _write_array(group, array, data, shards)
            written.arrays[f"{component.path}/{array.name}"] = data
        arrays = [array.name for array in component.arrays(layout)]
        results |= _write_checksums(written, group, component.path, arrays)
        finished = {"complete": True} if complete else {}
        group.attrs.put(with_digest({**component.attributes(layout), **results, **finished}))
    return written


def _write_array(group: zarr.Group, layout: ArrayLayout, data: np.ndarray, shards: Shards) -> None:
    array = group.create_array(
        layout.name,
        shape=layout.shape,
        dtype=layout.dtype,
        chunks=layout.inner,
        shards=layout.shard,
        filters=None,
        compressors=[ZstdCodec(level=1), Crc32cCodec()] if shards == "zstd" else [Crc32cCodec()],
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": shards != "zarr's, nothing for zeros"},
    )
    if shards != "as built":
        array[...] = data
        return
    folder = Path(str(array.store_path).removeprefix("file://"))
    for shard in range(layout.num_shards):
        samples = data[shard * layout.shard[0] :][: layout.shard[0]]
        if len(layout.shape) == 1:  # one chunk, with room for samples past the last
            chunks = [np.concatenate([samples, np.zeros(layout.shard[0] - len(samples), samples.dtype)])]
        else:
            chunks = [view for sample in samples for view in sample]
        index = np.full((math.prod(layout.chunks_per_shard), 2), 2**64 - 1, dtype="<u8")
        file = b""
        for i, chunk in enumerate(chunks):
            file += bytes(-len(file) % 64)
            index[i] = len(file), chunk.nbytes + 4
            file += with_checksum(chunk.tobytes())
        (folder / layout.shard_file(shard)).write_bytes(file + with_checksum(index.tobytes()))
    np.testing.assert_array_equal(array[...], data)  # as zarr reads it


def _write_checksums(written: WrittenCache, group: zarr.Group, path: str, arrays: list[str]) -> dict[str, str]:
    """Write the number of every shard, from the bytes of its file; return the two digests."""
    numbers = np.zeros((written.layout.num_ranges, len(arrays)), dtype="<u4")
    for k, a in np.ndindex(numbers.shape):
        file = written.shard(f"{path}/{arrays[a]}", k).read_bytes()
        entries = int(np.prod(np.array(group[arrays[a]].shards) // group[arrays[a]].chunks))  # type: ignore[union-attr]  # an array
        index = np.frombuffer(file[-4 - 16 * entries : -4], dtype="<u8").reshape(-1, 2)
        ends = [int(start + length) for start, length in index if start != 2**64 - 1]
        numbers[k, a] = google_crc32c.value(b"".join(file[end - 4 : end] for end in ends))
    array = group.create_array(
        "shard_checksums",
        shape=numbers.shape,
        dtype="uint32",
        chunks=(1, len(arrays)),
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        attributes={"arrays": arrays},
    )
    array[...] = numbers
    sources = written.arrays[f"{path}/source_bytes"].astype("<i8")
    return {
        "source_bytes_digest": hashlib.sha256(sources.tobytes()).hexdigest(),
        "shards_digest": hashlib.sha256(numbers.tobytes()).hexdigest(),
    }


def with_checksum(data: bytes) -> bytes:
    return data + google_crc32c.value(data).to_bytes(4, "little")


@pytest.fixture(scope="session")
def make_cache(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., WrittenCache]:
    """Return a function that gives a cache in a folder of its own; see `write_cache` for what it takes.

    Those of the same options are copies of one: a copy takes 7 ms, writing one 200.
    """
    written: dict[str, WrittenCache] = {}

    def make(**options: Any) -> WrittenCache:
        key = repr(sorted(options.items()))
        if key not in written:
            written[key] = write_cache(tmp_path_factory.mktemp("written") / "cache", **options)
        path = tmp_path_factory.mktemp("cache") / "cache"
        shutil.copytree(written[key].path, path, copy_function=shutil.copyfile)
        arrays = {name: array.copy() for name, array in written[key].arrays.items()}
        return replace(written[key], path=path, arrays=arrays)

    return make


@pytest.fixture(scope="session")
def change_attributes() -> Callable[..., None]:
    """Return a function that gives a group of a cache these attributes, and the digest that goes with them."""

    def change(group: Path, **changes: Any) -> None:
        metadata = json.loads((group / "zarr.json").read_text())
        attributes = {key: value for key, value in metadata["attributes"].items() if key != "attributes_digest"}
        metadata["attributes"] = with_digest({**attributes, **changes})
        (group / "zarr.json").write_text(json.dumps(metadata))

    return change


@pytest.fixture(scope="session")
def upload() -> Callable[[Path, str], str]:
    """Return a function that puts a local cache below a URL, as a sync tool would, and returns the URL."""

    def put(cache: Path, url: str) -> str:
        for file in sorted(cache.rglob("*")):
            if file.is_file():
                (location(url) / file.relative_to(cache).as_posix()).write(file.read_bytes())
        return url

    return put


def sit_draws(
    *,
    seed: int = 7,
    num_views: int = 2,
    latent_shape: tuple[int, int, int] = (3, 8, 8),
    posterior: bool = True,
    label_dropout: float = 0.25,
) -> DrawSpec:
    """Return what SiT, REPA and iREPA draw for latents of this shape."""
    given = Given(
        latent_shape=latent_shape,
        latent_kind="mean_std" if posterior else "sample",
        norm=LatentNorm(scale=(1.0,) * latent_shape[0], bias=(0.0,) * latent_shape[0]),
        num_views=num_views,
        features=(),
        null_label=3,
        label_dropout=label_dropout,
        interpolant=Interpolant(),
        alignment=AlignmentConfig(projector="none"),
        micro_batch=8,
        accumulation=1,
        precision="fp32",
        compile=False,
        device=torch.device("cpu"),
    )
    return DrawSpec(seed=seed, draws=Velocity(given).draws())


@dataclass
class Outcome:
    """What a command left behind: its exit code, what it printed, and the records of metrics.jsonl."""

    code: int
    output: str
    error: str
    records: list[dict[str, float]]

    def losses(self) -> list[tuple[float, ...]]:
        """Every number that must be bit-identical between two equal runs, a tuple a step."""
        names = ("step", "denoising_loss", "cls_loss", "alignment_loss", "grad_norm")
        return [tuple(record[name] for name in names if name in record) for record in self.records]


def read_records(run: Path) -> list[dict[str, float]]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.fixture
def run_outcome() -> Callable[[Path], Outcome]:
    """Return a function that reads the records of a run that was trained elsewhere."""
    return lambda run: Outcome(code=0, output="", error="", records=read_records(run))


@pytest.fixture
def small_sit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make SiT-Ti two blocks of width 32, for tests of everything but the model.

    On one thread: on a busy machine, ops this small take 40 times longer on two, waiting for each other.
    """
    monkeypatch.setitem(SIZES, "Ti", (2, 32, 2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def repa_train(small_sit: None, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Return a function that runs repa-train in this process: (cache, out, *arguments) -> Outcome.

    Eight samples a step of the small SiT, recipe irepa tapped after the first block, unless arguments say otherwise.
    """
    from repa.trainer.commands.train import train_command

    def run(cache: Path, out: Path, *arguments: str) -> Outcome:
        capsys.readouterr()
        common = ["--cache", str(cache), "--out", str(out), "--model", "SiT-Ti/2", "--device", "cpu"]
        depth = ["--set", "alignment.encoder_depth=1", "--set", "log_every=3"]
        recipe = [] if "--recipe" in arguments else ["--recipe", "irepa"]
        size = [] if "--batch-size" in arguments else ["--batch-size", "8"]
        code = 0
        try:
            train_command.main([*common, *depth, *recipe, *size, *arguments], standalone_mode=False)
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        printed = capsys.readouterr()
        return Outcome(code=code, output=printed.out, error=printed.err, records=read_records(out))

    return run
