"""Time the training step fed by a cache: against the same step on tensors in memory, and with the encoder online.

    python benchmarks/step.py                            # two models, two encoders; appends to results/step.jsonl
    python benchmarks/step.py --recipe reg --model SiT-Ti/2 --encoder dinov2-vit-s               # by another method
    python benchmarks/step.py --model SiT-S/2 --encoder dinov2-vit-b --batch-size 256 --steps 10         # on a GPU

The step is the trainer's own `train_step` on one model; only what hands it micro-batches differs:

    cached     `ReadAhead`: rows of a synthetic cache read, and random numbers drawn, by one thread beside the step
    in memory  micro-batches read before the clock starts: a step that never waits for data
    online     the same, and the frozen encoder's forward on images in memory: tokens, and their statistics, as built

Rounds of all three are interleaved; ratios are taken within a round. Online here has neither to read and decode images
nor to encode latents, as both would have to be done in a training without a cache: the speedup is a lower bound. The
prediction counts multiply-accumulates, as `repa-cache estimate` does, and the projector's beside those of SiT's blocks.
Peak memory is of a process of its own.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from conditions import append_line, conditions
from peak_memory import in_own_process, peak_bytes
from rounds import median_interval, show
from synthetic_cache import make_cache

from repa.cache_specs.schema import FEATURES
from repa.cache_specs.tables import ResolvedModel, resolve_encoder
from repa.pipeline.checking.estimate import model_costs, planned_layout, sit_gmac, speedup
from repa.pipeline.models.encoders import load_encoder
from repa.trainer.distributed import World, default_device
from repa.trainer.reading.batches import MicroBatch
from repa.trainer.reading.prefetch import ReadAhead, batches_ahead, map_tensors
from repa.trainer.rows.row_batch import FeatureBatch
from repa.trainer.runs.parts import reads_of
from repa.trainer.runs.run import Run, prepare
from repa.trainer.runs.settings import Layer, recipe_layer, resolve
from repa.trainer.training.loop import train_step

MODELS = ("SiT-Ti/2", "SiT-S/2")
ENCODERS = ("dinov2-vit-s", "dinov2-vit-b")
RESOLUTION = 256
LOSS_BAR = 0.03
HELD = 4  # micro-batches in memory, in turn
SETTLE_S = 0.05  # for the thread to fill the last buffer of a round, so that it does not read in the next one's time
MEMORY_STEPS = 2


class Source(Protocol):
    """What `train_step` takes micro-batches from."""

    def next(self) -> MicroBatch: ...


class InMemory:
    """Micro-batches that were read beforehand, on the training device."""

    def __init__(self, batches: list[MicroBatch]) -> None:
        self._batches = batches
        self._served = 0

    def next(self) -> MicroBatch:
        batch = self._batches[self._served % len(self._batches)]
        self._served += 1
        return batch


class Online:
    """The same, their features computed by the frozen encoder when they are asked for."""

    def __init__(self, batches: InMemory, encoder: ResolvedModel, run: Run, images: int) -> None:
        self._batches = batches
        device = run.world.device
        self._encode = load_encoder(encoder.spec, precision=run.config.precision, device=device.type)
        self._with_cls = reads_of(run.config).cls_token
        generator = torch.Generator().manual_seed(0)
        shape = (images, 3, RESOLUTION, RESOLUTION)
        self._images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)

    def next(self) -> MicroBatch:
        batch = self._batches.next()
        tokens, cls_token = self._encode(self._images)
        features = FeatureBatch(
            tokens=tokens.half(),
            channel_mean=tokens.mean(1),
            channel_std=tokens.std(1),
            token_scale=None,
            cls_token=cls_token.half() if self._with_cls and cls_token is not None else None,
        )
        return replace(batch, data=replace(batch.data, features=[features]))


class Steps:
    """One model on one device, and its steps from any source."""

    def __init__(self, model: str, cache: Path, options: argparse.Namespace) -> None:
        values = {
            "cache": str(cache),
            "out": str(cache.parent / "run"),
            "model": model,
            "steps": 10**9,
            "batch_size": options.batch_size,
            "latent_norm": "channel",
        }
        config = resolve([recipe_layer(options.recipe, model), Layer(source="benchmarks/step.py", values=values)])
        self.run = prepare(config, World(rank=0, size=1, device=torch.device(options.device)))
        self.losses = torch.empty(0)  # of the last step

    def read_ahead(self) -> ReadAhead:
        config, device = self.run.config, self.run.world.device
        depth = batches_ahead(config.prefetch_bytes, self.run.batches.num_bytes)
        return ReadAhead(self.run.batches, first=0, last=config.steps, depth=depth, device=device)

    @property
    def projector_gmac(self) -> float:
        """1e9 multiply-accumulates of the projector's forward for one image: each weight once a token."""
        (features,) = self.run.reader.features
        weights = sum(weight.numel() for weight in self.run.model.projectors.parameters())
        return weights * math.prod(features.grid) * 1e-9

    def in_memory(self) -> InMemory:
        with self.read_ahead() as ahead:
            return InMemory([map_tensors(ahead.next(), torch.clone) for _ in range(HELD)])

    def take(self, source: Any, num: int) -> float:
        """Run `num` steps; return their seconds, the device's work included."""
        self._wait()
        start = time.perf_counter()
        for _ in range(num):
            self.losses = train_step(self.run, source).values
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.run.world.device.type == "cuda":
            torch.cuda.synchronize()


def time_rounds(steps: Steps, sources: dict[str, Source], options: argparse.Namespace) -> dict[str, list[float]]:
    """Return seconds a step by source and round; the order of the sources turns every round."""
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    names = list(sources)
    for name in names:
        steps.take(sources[name], options.steps)  # a warm-up
    for i in range(options.rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            if name == "online" and i >= options.online_rounds:
                continue
            time.sleep(SETTLE_S)
            seconds[name].append(steps.take(sources[name], options.steps) / options.steps)
    return seconds


def measure(model: str, encoder: ResolvedModel, cache: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return one line of results, for one model and encoder."""
    steps = Steps(model, cache, options)
    in_memory = steps.in_memory()
    with steps.read_ahead() as ahead:
        online = Online(in_memory, encoder, steps.run, options.batch_size)
        sources: dict[str, Any] = {"cached": ahead, "in_memory": in_memory, "online": online}
        seconds = time_rounds(steps, sources, options)
        waited = ahead.waited_s
    cached, memory = seconds["cached"], seconds["in_memory"]
    lost = median_interval([1 - m / c for c, m in zip(cached, memory, strict=True)])
    ratio = median_interval([o / c for c, o in zip(cached, seconds["online"], strict=False)])
    (cost,) = model_costs([(FEATURES, encoder)], planned_layout(num_images=1, resolution=RESOLUTION, flip=False), {})
    trained = sit_gmac(model, latent_size=steps.run.model.config.input_size) + steps.projector_gmac
    return {
        "benchmark": "step",
        "recipe": options.recipe,
        "model": model,
        "encoder": encoder.entry.name,
        "device": options.device,
        "precision": steps.run.config.precision,
        "batch_size": options.batch_size,
        "steps_a_round": options.steps,
        "rounds": {name: len(taken) for name, taken in seconds.items()},
        "steps_per_s": {name: round(1 / statistics.median(taken), 4) for name, taken in seconds.items()},
        "lost_to_data": lost,
        "holds": lost["median"] <= LOSS_BAR,
        "data_wait": round(waited / (sum(cached) * options.steps), 6),
        "speedup": ratio,
        "predicted_speedup": round(speedup(trained, [cost.gmac]), 4),
    }


def peak_memory(source: str, model: str, encoder: ResolvedModel, options: argparse.Namespace) -> dict[str, int | None]:
    """Return the peak memory in bytes of this process, which has taken a few steps from one source."""
    steps = Steps(model, options.cache, options)
    if source == "cached":
        with steps.read_ahead() as ahead:
            steps.take(ahead, MEMORY_STEPS)
    else:
        steps.take(Online(steps.in_memory(), encoder, steps.run, options.batch_size), MEMORY_STEPS)
    on_device = torch.cuda.max_memory_allocated() if options.device == "cuda" else None
    return {"host_bytes": peak_bytes(), "device_bytes": on_device}


def text(line: dict[str, Any]) -> str:
    """Return a line as a reader wants it."""
    rates = line["steps_per_s"]
    memory = {name: max(found.values(), key=lambda b: b or 0) / 2**20 for name, found in line["peak_memory"].items()}
    return (
        f"{line['recipe']}, {line['model']}, {line['encoder']}, batches of {line['batch_size']} on {line['device']}, "
        f"steps/s: cached {rates['cached']:.3f}, in memory {rates['in_memory']:.3f}, online {rates['online']:.3f}\n"
        f"  {'pass' if line['holds'] else 'FAIL'}  lost to data {show(line['lost_to_data'], '.1%')}, at most "
        f"{LOSS_BAR:.0%}; waited {line['data_wait']:.2%} of the time\n"
        f"  speedup over the encoder online {show(line['speedup'])}, predicted {line['predicted_speedup']:.2f}\n"
        f"  peak memory {memory['cached']:,.0f} MiB cached, {memory['online']:,.0f} MiB online"
    )


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one line a model and encoder; print them."""
    lines = []
    for name in options.encoder:
        encoder = resolve_encoder(name, resolution=RESOLUTION, random_weights=True)
        grid, width = encoder.spec["grid"][0], encoder.spec["width"]
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            kinds = {"grid": grid, "width": width, "cls_token": encoder.spec["cls_token"]}
            cache = make_cache(Path(folder) / "cache", num_samples=options.num_samples, **kinds)
            for model in options.model:
                line = measure(model, encoder, cache, options)
                line["peak_memory"] = {}
                for source in ("cached", "online"):
                    asked = ["--peak-of", source, "--cache", cache, "--model", model, "--encoder", name]
                    asked += [
                        "--recipe",
                        options.recipe,
                        "--batch-size",
                        options.batch_size,
                        "--device",
                        options.device,
                    ]
                    line["peak_memory"][source] = in_own_process(__file__, *asked)
                print(text(line), flush=True)
                lines.append(line)
    return lines


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help=f"by default {' and '.join(MODELS)}")
    parser.add_argument("--encoder", action="append", help=f"by default {' and '.join(ENCODERS)}")
    parser.add_argument("--recipe", default="irepa", help="one that reads an encoder [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1, help="a round; 10 or more on a GPU [%(default)s]")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--online-rounds", type=int, default=7)
    parser.add_argument("--num-samples", type=int, default=512, help="of the synthetic cache [%(default)s]")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default_device())
    parser.add_argument("--dir", type=Path, help="where to put a temporary folder")
    parser.add_argument("--out", type=Path, help="append lines here instead of to results/step.jsonl")
    parser.add_argument("--peak-of", choices=["cached", "online"], help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.model = options.model or MODELS
    options.encoder = options.encoder or ENCODERS
    return options


def main() -> None:
    options = parse()
    if options.peak_of is not None:
        encoder = resolve_encoder(options.encoder[0], resolution=RESOLUTION, random_weights=True)
        print(json.dumps(peak_memory(options.peak_of, options.model[0], encoder, options)))
        return
    about = conditions()
    for line in run(options):
        line |= about
        append_line("step", line, options.out)


if __name__ == "__main__":
    main()
