"""Where a build on this machine is bound: by its models, by decoding, or by the threads that write.

The three overlap, so that the slowest one is the build's rate: forwards of all models on one device; decoding on every
core; and a thread a component that checks its rows and hands them to the page cache, WRITERS of them at a time.
"""

import io
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...cache_specs.layout import ArrayLayout, CacheLayout
from ..building.encode import WRITERS
from ..images.decode import decode
from ..store.component_writer import rows_not_finite
from ..store.shards import ShardWriter
from .estimate import ModelCost

PHOTO = (500, 375)  # the median picture of ImageNet
PROBE_SECONDS = 0.3
PROBE_BYTES = 2**26


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What was measured of it: images/s that one core decodes, bytes/s that one thread writes."""

    cores: int
    decode: float
    write: float


def bounds(costs: Sequence[ModelCost], cache: CacheLayout, machine: Machine) -> dict[str, float | None]:
    """Return images/s of the models on one device (None where not all have a rate), of decoding, and of writing."""
    rates = [cost.images_per_s for cost in costs]
    sizes = [cost.num_bytes["float16"] / cache.num_samples for cost in costs]
    return {
        "models": 1 / sum(cache.num_views / rate for rate in rates if rate) if all(rates) else None,
        "decoding": machine.decode * machine.cores,
        "writing": machine.write / max(*sizes, sum(sizes) / min(WRITERS, len(sizes)), 1e-9),
    }


def bound_line(rates: Mapping[str, float | None], num_images: int) -> str:
    """Return `bounds` in a line, the slowest first: the build's."""
    (slowest, rate), *others = sorted(((name, rate) for name, rate in rates.items() if rate), key=lambda item: item[1])
    beside = ", ".join(f"{name} {other:.3g}" for name, other in others)
    hours = num_images / rate / 3600
    return f"a build here is bound by {slowest}: {rate:.3g} images/s, {hours:.1f} hours ({beside} images/s)"


def decode_rate(resolution: int) -> float:
    """Return images/s of one core: a soft JPEG of PHOTO, read, scaled and cropped."""
    coarse = np.random.default_rng(0).integers(0, 256, (PHOTO[1] // 15, PHOTO[0] // 15, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(PHOTO, Image.Resampling.BICUBIC).save(file, "jpeg", quality=90)
    data = file.getvalue()
    decode(data, resolution)
    started, num = time.perf_counter(), 0
    while (took := time.perf_counter() - started) < PROBE_SECONDS:
        decode(data, resolution)
        num += 1
    return num / took


def write_rate(array: ArrayLayout, folder: Path | None = None) -> float:
    """Return bytes/s of a shard of `array`, checked, written and made durable in `folder` (None: the temporary one)."""
    chunks = math.prod(array.chunks_per_shard)
    rows = max(1, min(32, chunks, PROBE_BYTES // array.inner_bytes))
    shape = (rows, *array.shape[2:])
    values = np.random.default_rng(0).integers(-99, 99, math.prod(shape)).astype(array.dtype).reshape(shape)
    batches = max(1, min(PROBE_BYTES // values.nbytes, chunks // rows))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        started = time.perf_counter()
        writer = ShardWriter(Path(scratch) / "shard", array, "none")
        for _ in range(batches):
            rows_not_finite(values)
            writer.append(values)
        writer.close()
        return batches * values.nbytes / (time.perf_counter() - started)
