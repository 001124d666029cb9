"""How fast a model encodes on this device: a short measurement with random weights, which take as long as any."""

import os
import time

import torch

from ...cache_specs.derived import network_spec
from ...cache_specs.tables import ResolvedModel
from ..building.memory import freed_memory_kept
from ..building.networks import load_model
from ..building.request import ModelRequest

PROBE_SECONDS = 2.0
PROBE_IMAGES = 8  # a forward pass on a CPU
MEMORY_SHARE = 0.4  # of what is free: activations need room beside the weights


def fits_memory(params_m: float, device: str) -> bool:
    """Return whether float32 weights of `params_m` million parameters leave room on the device, and here to make it."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device != "cpu":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return params_m * 4e6 <= MEMORY_SHARE * free


def measure(kind: str, model: ResolvedModel, *, resolution: int, batch_size: int, precision: str, device: str) -> float:
    """Return images/s of a model's forward with random weights: a warm-up, then batches for about two seconds."""
    request = ModelRequest(
        kind=kind,
        name=model.name,
        spec={**network_spec(model.spec), "random_weights": model.code is None},
        dtype="float16",
        precision=precision,
        compressor="none",
        code=model.code,
    ).on(device)
    encode, _ = load_model(request, device)
    shape = (batch_size, 3, resolution, resolution)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def finished() -> float:
        next(iter(encode(images).values())).cpu()  # on a GPU, waits for what was asked of it
        return time.perf_counter()

    with freed_memory_kept(device):  # as a build does
        started = finished()
        num = 0
        while (now := finished()) - started < PROBE_SECONDS:
            num += batch_size
    return (num + batch_size) / (now - started)
