"""The parts of gpu_check: each is asked with its options and yields JSON-ready lines, one a measurement.

What a part measures is said in gpu_check.py. Every import that a part alone needs is its own, so that a package that is
missing costs one part and not all.
"""

import argparse
import contextlib
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

Line = dict[str, Any]
BANDWIDTH_WIDTHS = (768, 1152, 1280, 1536, 4096)
RIVALS_WIDTH = 768
NUM_SAMPLES = 1024  # 0.4 GB of float16 tokens: it stays in the page cache, as a local NVMe's hot set would
WARM_UP = 10
BLOCK = 10  # steps between two looks at the clock: a wait after each would keep the host from running ahead
BUILT = (("features", "dinov2-vit-b"), ("latents", "sd-vae-ft-mse"))
BUILD_THREADS = 4
SAMPLING_STEPS = 20
ASKED_STEPS = 250  # of the published samplers
HEADS = {"SiT-B/2": (12, 64), "SiT-XL/2": (16, 72)}


def tests(options: argparse.Namespace) -> Iterator[Line]:
    """Run the tests marked gpu, the op's first; show their output as it comes."""
    for folder in ("tests/kernels", "tests/trainer/runs"):
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "--tb=short", folder]
        root = Path(__file__).parents[1]
        with subprocess.Popen(
            command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            last = []
            for line in process.stdout:
                print(line, end="", flush=True)
                last = [*last, line.rstrip()][-30:]
        yield {"command": " ".join(command[1:]), "exit_code": process.returncode, "end": last}
        if process.returncode != 0:
            raise SystemExit(f"{folder}: pytest ended with {process.returncode}")


def bandwidth(options: argparse.Namespace) -> Iterator[Line]:
    """Time the loss against the device's copy, at RIVALS_WIDTH also compiled and eager."""
    import alignment

    if options.device == "cpu":
        yield from alignment.cpu_lines(options.rounds)
        return
    widths = sorted(BANDWIDTH_WIDTHS, key=lambda width: width != RIVALS_WIDTH)
    yield from alignment.gpu_lines(options.rounds, tuple(widths), rivals=(RIVALS_WIDTH,))


def training(options: argparse.Namespace) -> Iterator[Line]:
    """Train from a synthetic cache: eager, compiled, and eager with the loss in eager PyTorch."""
    from synthetic_cache import make_cache

    with tempfile.TemporaryDirectory() as folder:
        cache = make_cache(Path(folder, "cache"), num_samples=max(NUM_SAMPLES, options.batch_size))
        for compiled, fused in ((False, True), (True, True), (False, False)):
            yield train(cache, Path(folder, "run"), options, compiled=compiled, fused=fused)


def train(cache: Path, out: Path, options: argparse.Namespace, *, compiled: bool, fused: bool) -> Line:
    """Time blocks of steps; return medians with quartiles, data wait, peak memory and the alignment's share."""
    from repa.trainer.distributed import World
    from repa.trainer.reading.prefetch import ReadAhead, batches_ahead
    from repa.trainer.runs.run import prepare
    from repa.trainer.runs.settings import Layer, recipe_layer, resolve
    from repa.trainer.training.loop import train_step

    device = torch.device(options.device)
    values = {
        "cache": str(cache),
        "out": str(out),
        "model": options.model,
        "steps": WARM_UP + options.steps,
        "batch_size": options.batch_size,
        "compile": compiled,
        "latent_norm": "channel",
    }
    config = resolve([recipe_layer("irepa", options.model), Layer(source="gpu_check", values=values)])
    torch.compiler.reset()
    gc.collect()  # a compiled model refers to itself: that of the run before would count in this one's peak memory
    run = prepare(config, World(rank=0, size=1, device=device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    depth = batches_ahead(config.prefetch_bytes, run.batches.num_bytes)
    ahead = ReadAhead(run.batches, first=0, last=config.steps, depth=depth, device=device)
    times = []
    with loss_in_eager_pytorch(not fused), ahead:
        begun = time.perf_counter()
        train_step(run, ahead)
        synchronize(device)
        first_step_s = time.perf_counter() - begun
        for _ in range(WARM_UP - 1):
            train_step(run, ahead)
        synchronize(device)
        waited, first = ahead.waited_s, time.perf_counter()
        for done in range(0, options.steps, BLOCK):
            steps = min(BLOCK, options.steps - done)
            start = time.perf_counter()
            for _ in range(steps):
                train_step(run, ahead)
            synchronize(device)
            times.append((time.perf_counter() - start) / steps)
        data_wait = (ahead.waited_s - waited) / (time.perf_counter() - first)
    median = statistics.median(times)
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [median] * 3
    loss_s = alignment_seconds(run, fused)
    return {
        "model": config.model,
        "batch_size": config.batch_size,
        "precision": run.config.precision,
        "compile": compiled,
        "alignment": "fused" if fused else "eager",
        "first_step_s": first_step_s,
        "step_ms": 1e3 * median,
        "step_ms_quartiles": [1e3 * quartiles[0], 1e3 * quartiles[2]],
        "steps_per_s": 1 / median,
        "data_wait": data_wait,
        "alignment_ms": 1e3 * loss_s,
        "alignment_share_of_step": loss_s / median,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }


@contextlib.contextmanager
def loss_in_eager_pytorch(replaced: bool) -> Iterator[None]:
    """Let the trainer compute the alignment loss as one writes it without this project, for comparison."""
    if not replaced:
        yield
        return
    with mock.patch("repa.trainer.diffusion.losses.cosine_alignment", weighted_eager):
        yield


def weighted_eager(z: torch.Tensor, tokens: torch.Tensor, *, weight: float, **rest: Any) -> torch.Tensor:
    """Return the eager loss of benchmarks/alignment.py times `weight`, under the autocast that trainers have on."""
    import alignment

    with torch.autocast(z.device.type, torch.bfloat16):
        return weight * alignment.eager(z, tokens, **rest)


def alignment_seconds(run: Any, fused: bool) -> float:
    """Return the time of the loss alone, forward and backward, at the shapes of the run."""
    import alignment

    features = run.reader.features[0]
    tokens = features.grid[0] * features.grid[1]
    shape = (run.batches.place.micro_batch, tokens, features.width, features.dtype, torch.bfloat16)
    arguments = alignment.make_arguments(*shape, run.world.device.type)
    op = alignment.cosine_alignment if fused else alignment.eager
    step = {"op": lambda: alignment.step(op, arguments, backward=True, autocast=not fused)}
    return alignment.time_in_turn(step, run.world.device.type, rounds=5)["op"]["median_ms"] / 1e3


def building(options: argparse.Namespace) -> Iterator[Line]:
    """Encode ranges of random images, two views each, into shards in a temporary folder; the first is a warm-up."""
    from synthetic_cache import make_root

    from repa.cache_specs.tables import resolve_autoencoder, resolve_encoder
    from repa.pipeline.building.request import ModelRequest

    resolvers = {"features": resolve_encoder, "latents": resolve_autoencoder}
    shard, ranges = (256, 4) if options.device == "cuda" else (2, 2)
    for precision in ("bf16", "fp32"):
        for kind, entry in BUILT:
            model = resolvers[kind](entry, resolution=256, random_weights=True)
            request = ModelRequest(
                kind=kind, name=model.name, spec=model.spec, dtype="float16", precision=precision, compressor="none"
            )
            about = {"model": entry, "precision": precision, "views": 2, "threads": BUILD_THREADS}
            with tempfile.TemporaryDirectory() as folder:
                root = {"grid": 16, "num_views": 2, "shard_samples": shard, "num_samples": shard * (ranges + 1)}
                store = make_root(Path(folder, "cache"), **root)
                try:
                    rate = build_rate(store, request, options.device, batch_size=min(32, shard))
                except ModuleNotFoundError as error:
                    yield about | {"left_out": str(error)}
                else:
                    yield about | {"images_per_s": rate}


def build_rate(store: Any, request: Any, device: str, *, batch_size: int) -> float:
    """Return images/s of a worker that encodes and commits every range of a cache but the first, which warms it up."""
    import numpy as np

    from repa.pipeline.building.encode import Worker
    from repa.pipeline.images.decode import DecodedBatch

    layout = store.layout
    worker = Worker(store.path, layout, [request], device=device, threads=BUILD_THREADS)
    (component,) = worker.components
    store.create_component(component)
    shape = (batch_size, layout.resolution, layout.resolution, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    batch = DecodedBatch(images=images, source_bytes=np.full(batch_size, 100_000), bad={})
    begun, committing = 0.0, None
    for index in range(layout.num_ranges):
        batches = [batch] * (layout.shard_samples // batch_size)
        previous, committing = committing, worker.encode_range(index, [component.path], batches, skip_bad=False)
        if index == 1:
            begun = time.perf_counter() if previous is None else finished_at(previous)
        elif previous is not None:
            previous.result()
    assert committing is not None
    rate = (layout.num_samples - layout.shard_samples) / (finished_at(committing) - begun)
    worker.close()
    return rate


def finished_at(future: Any) -> float:
    """Return the time at which a future is done, having waited for it."""
    future.result()
    return time.perf_counter()


def sampling(options: argparse.Namespace) -> Iterator[Line]:
    """Draw latents with the SDE sampler, without guidance and decoder; count images/s at the published 250 steps."""
    from repa.trainer.diffusion.interpolant import Interpolant
    from repa.trainer.diffusion.latents import LatentNorm
    from repa.trainer.models.sit import SiT, sit_config
    from repa.trainer.objectives.velocity import VelocityField
    from repa.trainer.runs.run import settle_convolutions
    from repa.trainer.sampling.sample import SampleRequest, draw_samples
    from repa.trainer.sampling.samplers import SamplerConfig

    num = 64 if options.device == "cuda" else 2
    request = SampleRequest(num=num, sampler=SamplerConfig(sampler="sde", steps=SAMPLING_STEPS))
    field, norm = VelocityField(interpolant=Interpolant()), LatentNorm(scale=(1.0,) * 4, bias=(0.0,) * 4)
    model = SiT(sit_config(options.sampled, input_size=32, in_channels=4, num_classes=1000)).to(options.device)
    for precision in ("bf16", "fp32"):
        settle_convolutions(precision)
        times = []
        for _ in range(3):  # the first is a warm-up
            begun = time.perf_counter()
            with torch.autocast(options.device, torch.bfloat16, enabled=precision == "bf16"):
                draw_samples(model, range(num), request, field=field, norm=norm, decode=None)
            times.append(time.perf_counter() - begun)  # the latents are on the host
        step_s = min(times[1:]) / SAMPLING_STEPS
        rate = num / (step_s * ASKED_STEPS)
        about = {"model": options.sampled, "precision": precision, "batch_size": num, "sampler": "sde"}
        yield about | {"step_ms": 1e3 * step_s, f"images_per_s_of_{ASKED_STEPS}_steps": rate}


def attention(options: argparse.Namespace) -> Iterator[Line]:
    """Time attention's back ends forward and backward in bf16 at SiT's shapes; say which give the same bits twice."""
    import alignment
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    num = options.batch_size
    for model, (heads, width) in HEADS.items():
        qkv = torch.randn(num, 256, 3, heads, width, device=options.device, dtype=torch.bfloat16, requires_grad=True)
        # Forward and backward in one call: the back end is chosen at the forward.
        runs: dict[str, Callable[[], torch.Tensor]] = {}
        lines = {}

        def once(backends: list[Any], qkv: torch.Tensor = qkv) -> torch.Tensor:
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            with sdpa_kernel(backends) if backends else contextlib.nullcontext():
                mixed = scaled_dot_product_attention(query, key, value)
            return torch.autograd.grad(mixed.float().square().sum(), qkv)[0]

        named = {"default": [], "flash": [SDPBackend.FLASH_ATTENTION], "cudnn": [SDPBackend.CUDNN_ATTENTION]}
        named |= {"efficient": [SDPBackend.EFFICIENT_ATTENTION], "math": [SDPBackend.MATH]}
        for name, backends in named.items():
            try:
                lines[name] = {"same_bits_twice": torch.equal(once(backends), once(backends))}
                runs[name] = lambda backends=backends: once(backends)
            except RuntimeError as error:
                lines[name] = {"left_out": str(error).splitlines()[0]}
        times = alignment.time_in_turn(runs, options.device, options.rounds)
        for name, line in lines.items():
            yield {"model": model, "batch_size": num, "backend": name, **line, **times.get(name, {})}
        del qkv


def convolution(options: argparse.Namespace) -> Iterator[Line]:
    """Time the conv projector's forward and backward with cuDNN free to choose and bound to repeat its bits."""
    import alignment

    from repa.trainer.models.projector import ConvProjector, ProjectorConfig

    projector = ConvProjector(768, ProjectorConfig(kind="conv", out_dim=768), (16, 16)).to(options.device)
    tokens = torch.randn(options.batch_size, 256, 768, device=options.device)

    def once(deterministic: bool) -> tuple[torch.Tensor, ...]:
        torch.backends.cudnn.deterministic = deterministic
        with torch.autocast(options.device, torch.bfloat16):
            out = projector(tokens)
        return torch.autograd.grad(out.float().square().mean(), list(projector.parameters()))

    runs = {name: lambda name=name: once(name == "deterministic") for name in ("free", "deterministic")}
    times = alignment.time_in_turn(runs, options.device, options.rounds)
    for name, line in times.items():
        same = all(torch.equal(*pair) for pair in zip(runs[name](), runs[name](), strict=True))
        yield {"batch_size": options.batch_size, "algorithm": name, "same_bits_twice": same, **line}


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the time of a block of steps is its own."""
    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Part:
    """What to run, and at most how long; what parts take together is expected well below the sum."""

    run: Callable[[argparse.Namespace], Iterator[Line]]
    limit_s: float


PARTS = {
    "tests": Part(tests, 110),
    "bandwidth": Part(bandwidth, 80),
    "training": Part(training, 130),
    "building": Part(building, 70),
    "sampling": Part(sampling, 50),
    "attention": Part(attention, 40),
    "convolution": Part(convolution, 30),
}
