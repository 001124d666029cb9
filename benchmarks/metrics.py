"""Spatial metrics of 256 x 768 tokens against the naive computation: one Gram matrix a metric and image.

    python benchmarks/metrics.py            # measures in turn, prints, appends a line to results/metrics.jsonl
    python benchmarks/metrics.py --rounds 3 --dry-run

In turn, on the same cores: the naive way, ours (`unmasked_metrics`), and ours fed from a cache on disk that the
benchmark writes, whose peak memory is that of a process of its own. The last line is scaled to 10,000 images.
"""

import argparse
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from conditions import append_line, conditions
from torch import Tensor

from repa.cache_specs.fingerprint import manifest_fingerprint, transform_fingerprint
from repa.cache_specs.layout import CROP, CacheLayout
from repa.cache_specs.schema import ComponentSpec
from repa.pipeline.analysis.features import choose_rows, open_encoders
from repa.pipeline.analysis.measure import measure
from repa.pipeline.analysis.spatial_metrics import distances, unmasked_metrics
from repa.pipeline.images.manifest import FolderSource, Manifest
from repa.pipeline.store.quantize import stored_tokens
from repa.pipeline.store.shards import ShardWriter
from repa.pipeline.store.store import CacheStore

GRID, WIDTH = (16, 16), 768
IMAGES = 64  # a timing
ON_DISK = 512  # images of the cache that is streamed
BAR = 4.0


def naive(tokens: Tensor) -> dict[str, Tensor]:
    """Return LDS, CDS and RMSC as their definitions read: image by image, metric by metric, a Gram matrix each."""
    apart = distances(GRID)

    def cosines(image: Tensor) -> Tensor:
        unit = F.normalize(image.float(), dim=-1)
        return unit @ unit.T

    def lds(image: Tensor) -> Tensor:
        gram = cosines(image)
        return gram[apart == 1].mean() - gram[apart >= 6].mean()

    def cds(image: Tensor) -> Tensor:
        gram = cosines(image)
        decay = torch.stack([gram[apart == d].mean() for d in range(1, 9)])
        places = torch.arange(1.0, 9.0) - 4.5
        return -(decay @ places) / (places @ places)

    def rmsc(image: Tensor) -> Tensor:
        unit = F.normalize(image.float(), dim=-1)
        return (unit - unit.mean(0)).square().sum(-1).mean().sqrt()

    metrics = {"lds": lds, "cds": cds, "rmsc": rmsc}
    return {name: torch.stack([metric(image) for image in tokens]) for name, metric in metrics.items()}


def make_tokens(images: int, seed: int = 0) -> Tensor:
    """Return smooth float16 tokens [images, 256, 768]: neighbours alike, around a common mean."""
    noise = torch.randn(images, WIDTH, 4, 4, generator=torch.Generator().manual_seed(seed))
    field = F.interpolate(noise, size=GRID, mode="bilinear") + 0.5
    return field.flatten(2).transpose(1, 2).contiguous().half()


def write_cache(path: Path, images: int) -> None:
    """Write a finished cache of one float16 encoder, with the product's own writer."""
    ids = [f"{i:05d}.png" for i in range(images)]
    labels = np.zeros(images, dtype=np.int32)
    manifest = Manifest(
        where="benchmark",
        sample_ids=np.array(ids, dtype=np.dtypes.StringDType()),
        labels=labels,
        class_names=("images",),
        source=FolderSource(path),
    )
    fingerprint = manifest_fingerprint(ids, labels.tolist())
    layout = CacheLayout(
        num_samples=images, resolution=256, views=("identity",), class_names=("images",), shard_samples=256,
        manifest_fingerprint=fingerprint,
        dataset_fingerprint=transform_fingerprint(
            fingerprint, resolution=256, crop=CROP, views=("identity",), class_names=("images",)
        ),
    )  # fmt: skip
    spec = {"entry": "dinov2-vit-b", "grid": list(GRID), "width": WIDTH, "cls_token": False, "random_weights": True}
    component = ComponentSpec(kind="features", name="benchmark", spec=spec, weights="none")
    store = CacheStore.create_or_open(path, layout, manifest)
    store.create_component(component)
    for index in range(layout.num_ranges):
        start, stop = layout.sample_range(index)
        rows: dict[str, Any] = stored_tokens(make_tokens(stop - start, seed=index).float(), "float16")
        rows = {name: values.numpy() for name, values in rows.items()}
        rows |= {name: np.ones((1, layout.shard_samples), dtype) for name, dtype in _RECORDS.items()}
        partials, numbers = {}, {}
        for array in component.arrays(layout):
            partials[array.name] = path / f"{array.name}.partial"
            writer = ShardWriter(partials[array.name], array, component.compressor)
            writer.append(rows[array.name])
            writer.close()
            numbers[array.name] = writer.number
        store.commit_range(component, index, partials, numbers)
    store.complete_component(component, {})


_RECORDS = {"source_bytes": "int64", "valid": "bool"}


def stream(path: Path) -> None:
    """Measure the cache at `path` from disk, as stored and normalised."""
    _, (encoder,) = open_encoders(path, [])
    measure(encoder, choose_rows([encoder], None), gamma=0.6)


def peak_bytes(path: Path | None) -> int:
    """Return the peak resident memory of a process that imports everything and, with `path`, streams the cache."""
    command = [sys.executable, __file__, "--child", "" if path is None else str(path)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def high_water_bytes() -> int:
    """Return this process's own peak; getrusage's would be its parent's, whose peak survives fork and exec."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def benchmark(rounds: int) -> dict[str, Any]:
    """Return the figures: milliseconds an image of each way, ratios of neighbouring timings, peak memory."""
    tokens = make_tokens(IMAGES)
    slow, fast = naive(tokens), unmasked_metrics(tokens, GRID)
    error = max(float((slow[name] - fast[name]).abs().max()) for name in fast)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        write_cache(cache, ON_DISK)
        ways = {
            "naive": (functools.partial(naive, tokens), IMAGES),
            "ours": (functools.partial(unmasked_metrics, tokens, GRID), IMAGES),
            "from_cache": (functools.partial(stream, cache), 2 * ON_DISK),  # as stored and normalised
        }
        for run, _ in ways.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (run, images) in ways.items():
                times[name].append(1e3 * seconds(run) / images)
        streamed, idle = peak_bytes(cache), peak_bytes(None)
    ratios = [a / b for a, b in zip(times["naive"], times["ours"], strict=True)]
    whole = [a / b for a, b in zip(times["naive"], times["from_cache"], strict=True)]
    return {
        "shape": [IMAGES, GRID[0] * GRID[1], WIDTH],
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "ms_per_image": {name: _spread(values) for name, values in times.items()},
        "speedup": _spread(ratios),
        "speedup_from_cache": _spread(whole),
        "bar": BAR,
        "largest_difference": error,
        "peak_mb_streaming": streamed / 1e6,
        "peak_mb_imports": idle / 1e6,
        "cache_mb": ON_DISK * 2 * GRID[0] * GRID[1] * WIDTH / 1e6,
    }


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "quartile_1": low, "quartile_3": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timings of each way (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print only")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        if arguments.child:
            stream(Path(arguments.child))
        print(high_water_bytes())
        return
    found = benchmark(arguments.rounds)
    for name, spread in found["ms_per_image"].items():
        quartiles = f"[{spread['quartile_1']:.3f}, {spread['quartile_3']:.3f}]"
        print(f"{name:<11} {spread['median']:7.3f} ms an image {quartiles}")
    print(f"ours is {found['speedup']['median']:.2f} times as fast as the naive way; the bar is {BAR}")
    print(f"from the cache, {found['speedup_from_cache']['median']:.2f} times")
    print(f"peak memory {found['peak_mb_streaming']:.0f} MB, of which imports {found['peak_mb_imports']:.0f} MB")
    print(f"10,000 images, as stored and normalised: {2 * 10 * found['ms_per_image']['from_cache']['median']:.0f} s")
    if not arguments.dry_run:
        append_line("metrics", {**conditions(), **found})


if __name__ == "__main__":
    main()
