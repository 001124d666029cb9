"""Time the forward of a build on a CPU by how its memory is taken: page faults against arithmetic.

    python benchmarks/allocator.py                        # all models; appends to results/allocator.jsonl
    python benchmarks/allocator.py --model mobilenetv2 --rounds 5

The activations of a convolutional network at 256 px are hundreds of MB, and glibc gives each back to the system when
it is freed: the next forward faults every page in again. Ways out: `default` is none; `sub-8` cuts the batch into parts
of 8 images; `keep` tells glibc to keep what is freed, as builds do (pipeline/building/memory.py); `huge` asks PyTorch
for huge pages. Each way has a process of its own, and they take turns, round after round. Beside images/s stand the
minor page faults an image, the share of processor time that the kernel takes, peak memory, and whether the bits are the
default's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from conditions import append_line, conditions
from peak_memory import in_own_process, peak_bytes, reset_peak
from rounds import median_interval, show

WAYS = ("default", "sub-4", "sub-8", "sub-16", "keep", "huge")
RESOLUTION = 256
# Encoder or autoencoder of each, its batch, and how many batches are timed.
MODELS = {"mobilenetv2": (64, 2), "dinov2-vit-s": (32, 2), "sd-vae-ft-mse": (4, 1)}
MOBILENET = """
loader: timm
model: mobilenetv2_100
width: 1280
patch: 32
prefix_tokens: 0
cls_token: false
output: map
tensor: no_norm
mean: [0.485, 0.456, 0.406]
std: [0.229, 0.224, 0.225]
interpolation: bicubic
antialias: true
licence: apache-2.0
"""


def run(model: str, way: str) -> dict[str, Any]:
    """Return what one way takes; in a process of its own."""
    if way == "huge":
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # read by PyTorch at its first allocation
    import torch

    from repa.cache_specs.tables import resolve_autoencoder, resolve_encoder
    from repa.pipeline.building.memory import keep_freed_memory
    from repa.pipeline.building.networks import load_model
    from repa.pipeline.building.request import ModelRequest

    batch, repeats = MODELS[model]
    with tempfile.TemporaryDirectory() as folder:
        entry = Path(folder) / "mobilenetv2.yaml"
        entry.write_text(MOBILENET, encoding="utf-8")
        kind = "latents" if "vae" in model else "features"
        resolve: Any = resolve_autoencoder if kind == "latents" else resolve_encoder
        request = f"{entry}:grid=8" if model == "mobilenetv2" else model
        resolved = resolve(request, resolution=RESOLUTION, random_weights=True)
        asked = ModelRequest(
            kind=kind, name=resolved.name, spec=resolved.spec, dtype="float16", precision="fp32", compressor="none"
        ).on("cpu")
        encode, _ = load_model(asked, "cpu")
    size = int(way.removeprefix("sub-")) if way.startswith("sub-") else batch
    images = torch.randint(
        0, 256, (batch, 3, RESOLUTION, RESOLUTION), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )

    def forward() -> list[torch.Tensor]:
        return [values for part in images.split(size) for values in encode(part).values()]

    if way == "keep":
        assert keep_freed_memory()
    arrays = list(encode(images[:1]))
    stored = forward()
    digest = hashlib.sha256()
    for place in range(len(arrays)):
        digest.update(torch.cat(stored[place :: len(arrays)]).numpy().tobytes())
    del stored
    reset_peak()
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(repeats):
        forward()
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return {
        "images_per_s": batch * repeats / seconds,
        "faults": (after.ru_minflt - before.ru_minflt) / (batch * repeats),
        "system_share": system / (user + system),
        "peak_mb": peak_bytes() / 2**20,
        "digest": digest.hexdigest(),
    }


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Return one line of results for one model."""
    ways = [way for way in WAYS if not way.startswith("sub-") or int(way[4:]) < MODELS[model][0]]
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            found[way].append(in_own_process(__file__, "--one", model, way))
    first = found["default"][0]["digest"]
    line = {}
    for way, several in found.items():
        ratios = [
            one["images_per_s"] / base["images_per_s"] for one, base in zip(several, found["default"], strict=True)
        ]
        line[way] = {
            **{key: median_interval([one[key] for one in several]) for key in ("images_per_s", "system_share")},
            "faults_per_image": round(several[0]["faults"]),
            "peak_mb": round(max(one["peak_mb"] for one in several)),
            "speed": median_interval(ratios),
            "same_bits": all(one["digest"] == first for one in several),
        }
        print(f"{model} {way}: {show(line[way]['speed'])} of the default's speed, {line[way]}")
    batch = MODELS[model][0]
    return {"benchmark": "allocator", "model": model, "batch_size": batch, "rounds": rounds, "ways": line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="one of them; all by default, in turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(*arguments.one)))
        return
    for model in arguments.model or MODELS:
        append_line("allocator", {**measure(model, arguments.rounds), **conditions()})


if __name__ == "__main__":
    main()
