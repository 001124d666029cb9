"""Time the build: images/s of the whole job against the bare forward of the same model on the same batches.

    python benchmarks/build.py --ray                               # all three models; appends to results/build.jsonl
    python benchmarks/build.py --model vit-s --images 64 --rounds 5 --ray

Models have random weights, which take as long as any: hog; a ViT-S (dinov2-vit-s); the SD VAE. The whole job reads JPEG
files, decodes and crops them, encodes, quantises, checks and writes shards: its images/s count from the first range to
the last commit. Loading models, starting Ray and the pass over the shards that completes a component do not grow with
the number of images; with them it is the `_all` beside it. Bare forward, job in this process and job under Ray (one
worker) are timed in turn, round after round, so that a slow phase of the machine falls on all of them; the caches that
both jobs write are compared byte by byte.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conditions import append_line, conditions
from peak_memory import peak_bytes, reset_peak
from PIL import Image, ImageFilter

from repa.pipeline.building.build import run_build
from repa.pipeline.building.networks import load_model
from repa.pipeline.building.plan import BuildOptions, plan_build
from repa.pipeline.images.decode import decode_batch
from repa.pipeline.images.manifest import Manifest, scan_folder

# Encoder and autoencoder of each, and its images where none are asked for: a VAE takes seconds an image on a CPU.
MODELS = {"hog": ("hog", "none", 512), "vit-s": ("dinov2-vit-s", "none", 192), "sd-vae": (None, "sd-vae-ft-mse", 8)}
PHOTO = (500, 375)  # ImageNet's median picture
RESOLUTION = 256


def write_photos(folder: Path, num: int) -> Manifest:
    """Write `num` distinct JPEGs of a photograph's size and softness; return their manifest."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(num):
        coarse = rng.integers(0, 256, (PHOTO[1] // 15, PHOTO[0] // 15, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize(PHOTO, Image.Resampling.BICUBIC)
        grain = Image.fromarray(rng.integers(0, 256, (PHOTO[1], PHOTO[0], 3), dtype=np.uint8))
        grain = grain.filter(ImageFilter.GaussianBlur(1))
        Image.blend(picture, grain, 0.2).save(folder / f"{i:05d}.jpg", quality=90)
    return scan_folder(folder)


def options_of(
    model: str, manifest: Manifest, cache: Path, arguments: argparse.Namespace, workers: int
) -> BuildOptions:
    encoder, autoencoder, _ = MODELS[model]
    return BuildOptions(
        manifest=manifest,
        cache=cache,
        encoders=() if encoder is None else (encoder,),
        autoencoder=autoencoder,
        resolution=RESOLUTION,
        shard_samples=max(1, len(manifest) // 4),
        batch_size=arguments.batch_size,
        random_weights=True,
        device=arguments.device,
        threads=torch.get_num_threads(),
        workers=workers,
    )


def time_decode(manifest: Manifest) -> float:
    """Return images/s of reading, decoding and cropping alone, on one thread."""
    ids = manifest.sample_ids.tolist()
    started = time.perf_counter()
    decode_batch(manifest.source, ids, RESOLUTION, np.zeros(len(ids), dtype=np.int64))
    return len(ids) / (time.perf_counter() - started)


def bare_forward(options: BuildOptions) -> Callable[[], float]:
    """Return a function that gives images/s of the model alone, on the batches of the build, decoded beforehand."""
    (request,) = plan_build(options).requests
    encode, _ = load_model(request, options.device)
    ids = options.manifest.sample_ids.tolist()
    parts = [ids[start : start + options.batch_size] for start in range(0, len(ids), options.batch_size)]
    decoded = [decode_batch(options.manifest.source, p, RESOLUTION, np.zeros(len(p), dtype=np.int64)) for p in parts]
    batches = [torch.tensor(batch.images).permute(0, 3, 1, 2) for batch in decoded]

    def run() -> float:
        started = time.perf_counter()
        for images in batches:
            next(iter(encode(images).values())).cpu()  # on a GPU, waits for the forward
        return len(ids) / (time.perf_counter() - started)

    return run


def time_job(options: BuildOptions) -> dict[str, float]:
    """Return what one job takes: images/s, the same with its start and end, and peak memory in MB.

    `worker_mb` is the process that encodes: this one, or Ray's actor; `all_mb` is the sum over this one and all that
    Ray started, each at its own peak, shared pages counted in each.
    """
    peaks: dict[int, tuple[str, int]] = {}

    def look(samples: int) -> None:
        for pid, title in descendants(os.getpid()).items():
            with contextlib.suppress(OSError):  # it ended
                peaks[pid] = (title, peak_bytes(pid))

    reset_peak()
    started = time.perf_counter()
    report = run_build(options, on_start=lambda done, total: None, on_progress=look)
    seconds = time.perf_counter() - started
    assert report.num_images == len(options.manifest), report
    own = peak_bytes()
    workers = [num_bytes for title, num_bytes in peaks.values() if title.startswith("ray::_RayWorker")]
    return {
        "rate": report.num_images / report.seconds,
        "rate_all": report.num_images / seconds,
        "worker_mb": max(workers, default=own) / 2**20,
        "all_mb": (own + sum(num_bytes for _, num_bytes in peaks.values())) / 2**20,
    }


def descendants(ancestor: int) -> dict[int, str]:
    """Return the command lines of all processes below one."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_text()
    below = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return {pid: titles.get(pid, "") for pid in below - {ancestor}}


def digest_of(cache: Path) -> str:
    """Return a digest of the names and bytes of all files of a cache."""
    digest = hashlib.sha256()
    for file in sorted(path for path in cache.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(cache)}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def spread(rates: list[float]) -> dict[str, float]:
    """Return median and extremes of images/s."""
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def measure(model: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return one line of results for one model."""
    manifest = write_photos(folder / "photos", arguments.images or MODELS[model][2])
    forward = bare_forward(options_of(model, manifest, folder / "none", arguments, 0))
    forward()  # a warm-up
    jobs = {"in_process": 0} | ({"ray": 1} if arguments.ray else {})
    rates: dict[str, list[float]] = {"forward": [], "decode": []}
    memory: dict[str, dict[str, float]] = {}
    digests = set()
    for i in range(arguments.rounds):
        rates["forward"].append(forward())
        rates["decode"].append(time_decode(manifest))
        for name, workers in jobs.items():
            cache = folder / f"{name}{i}"
            took = time_job(options_of(model, manifest, cache, arguments, workers))
            rates.setdefault(name, []).append(took["rate"])
            rates.setdefault(f"{name}_all", []).append(took["rate_all"])
            memory[name] = {key: max(took[key], memory.get(name, {}).get(key, 0)) for key in ("worker_mb", "all_mb")}
            digests.add(digest_of(cache))
    assert len(digests) == 1, "the jobs wrote different bytes"
    # Ratios within a round: both sides saw the same phase of the machine.
    shares = {name: spread([j / f for j, f in zip(rates[name], rates["forward"], strict=True)]) for name in jobs}
    return {
        "benchmark": "build",
        "model": model,
        "images": len(manifest),
        "photo": list(PHOTO),
        "resolution": RESOLUTION,
        "batch_size": arguments.batch_size,
        "device": arguments.device,
        "rounds": arguments.rounds,
        "images_per_s": {name: spread(values) for name, values in rates.items()},
        "share_of_forward": shares,
        "peak_memory": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="one of them; all by default, in turn")
    parser.add_argument("--images", type=int, help="by default 512, 192 and 8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ray", action="store_true", help="time the job under Ray too, one worker")
    parser.add_argument("--out", type=Path, help="append lines here instead of results/build.jsonl")
    arguments = parser.parse_args()
    for model in arguments.model or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            line = {**measure(model, arguments, Path(folder)), **conditions()}
        print(json.dumps(line, indent=2))
        if arguments.out is None:
            append_line("build", line)
        else:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
