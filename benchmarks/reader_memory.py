"""Print the peak memory of a process that reads a cache ahead, over what its imports hold, as one JSON object.

python benchmarks/reader_memory.py CACHE BATCH_SIZE
"""

import argparse
import json
import time
from pathlib import Path

import torch
import zarr  # noqa: F401  # the reader imports it when it opens a cache
from peak_memory import peak_bytes, reset_peak

from repa.trainer.reading.batches import Batches, Place
from repa.trainer.reading.draws import DrawSpec, gaussian, view_coin
from repa.trainer.reading.prefetch import ReadAhead, batches_ahead
from repa.trainer.reading.reader import CacheReader
from repa.trainer.runs.config import RunConfig

IDLE_S = 0.5  # longer than the reading of one batch takes


def wait_until_full(ahead: ReadAhead) -> None:
    """Return when the thread has nothing left to do."""
    before = -1.0
    while ahead.reading_s != before:
        before = ahead.reading_s
        time.sleep(IDLE_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("batch_size", type=int)
    options = parser.parse_args()
    torch.randn(8)  # its generator and libraries are loaded
    base = reset_peak()
    reader = CacheReader(options.cache)
    latent_shape = (reader.latents.channels, *reader.latents.size)
    draws = [view_coin(len(reader.views)), gaussian("posterior_noise", latent_shape), gaussian("noise", latent_shape)]
    spec = DrawSpec(seed=0, draws=draws)
    batches = Batches(reader, spec, Place(batch_size=options.batch_size))
    depth = batches_ahead(RunConfig.prefetch_bytes, batches.num_bytes)
    steps = depth + 2  # the first buffers are filled again
    with ReadAhead(batches, first=0, last=steps, depth=depth, device=torch.device("cpu")) as ahead:
        ahead.next()
        wait_until_full(ahead)  # as it is where a step takes longer than the reading
        for _ in range(1, steps):
            ahead.next()
    found = {
        "peak_bytes": peak_bytes() - base,
        "prefetch_bytes": RunConfig.prefetch_bytes,
        "batch_bytes": batches.num_bytes,
        "batches_ahead": depth,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
