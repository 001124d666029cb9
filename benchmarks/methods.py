"""Show that each training method learns: train it from one small cache, and say how far its samples are from the data.

    python benchmarks/methods.py                            # every method; appends lines to results/methods.jsonl
    python benchmarks/methods.py --only meanflow --only sit --steps 200 --out methods.jsonl

The cache is built from the demo's photographs at 16 px: pixels as latents, HOG tokens as the encoder. Each method
trains a SiT of 16 tokens for the same number of steps on the same images in the same order, without guidance. The
figure is the Frechet distance between samples of its EMA and the images, in the space of the cached encoder (HOG,
mean-pooled); before the first step it is that of an untrained model, the row to beat. It says that a method learns, and
not which one is better: they sample in different numbers of steps, and nothing is tuned.
"""

import argparse
import contextlib
import json
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conditions import append_line, conditions

from repa.trainer.commands.borrowed import load_evaluation
from repa.trainer.distributed import default_device, join
from repa.trainer.evaluating.evaluation import FILE, read_records
from repa.trainer.runs.resume import enter_folder
from repa.trainer.runs.run import prepare
from repa.trainer.runs.settings import Layer, recipe_layer, resolve
from repa.trainer.training.loop import train

LAST_STEPS = 50  # final losses are means over so many steps


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row: a recipe, how its samples are drawn, and the settings in which it departs from the common ones."""

    recipe: str
    sampler_steps: int = 25
    model: str = "SiT-Ti/4"
    autoencoder: str = "pixels"
    settings: Mapping[str, Any] = field(default_factory=dict)


METHODS = {
    "sit": Method(recipe="sit"),
    "irepa": Method(recipe="irepa"),
    "meanflow": Method(recipe="meanflow", sampler_steps=1, settings={"meanflow.kappa": 0.0}),
    "meanflow-repa": Method(recipe="meanflow-repa", sampler_steps=1, settings={"meanflow.kappa": 0.0}),
    "meanflow-irepa": Method(recipe="meanflow-irepa", sampler_steps=1, settings={"meanflow.kappa": 0.0}),
}
BUILDS = (  # what the methods read between them
    "--encoder hog:grid=4 --autoencoder pixels",
)
COMMON = {
    "batch_size": 32,
    "latent_norm": "channel",
    "ema_decay": 0.99,  # after so few steps 0.9999 would still be the initial noise
    "optimizer.learning_rate": 1e-3,
    "evaluation.encoders": ["hog-grid4"],
}


def build(folder: Path) -> Path:
    """Build the cache; return it."""
    program, cache = Path(sysconfig.get_path("scripts")) / "repa-cache", folder / "cache"
    for components in BUILDS:
        command = f"build --data demo --cache {cache} --resolution 16 --flip --workers 0 {components}"
        subprocess.run([str(program), *command.split()], check=True, capture_output=True)
    return cache


def learn(name: str, cache: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train one method; return its line."""
    method = METHODS[name]
    values = {
        "cache": str(cache),
        "out": str(folder / name),
        "model": method.model,
        "autoencoder": method.autoencoder,
        "steps": options.steps,
        "save_every": options.steps,
        "evaluation.every": options.steps,
        "evaluation.num": options.num,
        "evaluation.steps": method.sampler_steps,
    }
    layers = [Layer(source="benchmarks/methods.py", values=part) for part in (COMMON, values, method.settings)]
    with join(options.device) as world, contextlib.redirect_stdout(None):
        run = prepare(resolve([recipe_layer(method.recipe, method.model), *layers]), world)
        evaluation = load_evaluation(run)
        with enter_folder(run, resume=False):
            evaluation.at(run, lambda: False)
            started = time.perf_counter()
            train(run)
            seconds = time.perf_counter() - started
            evaluation.at(run, lambda: False)
    before, after = (
        next(value for key, value in record.items() if key.startswith("frechet_"))
        for record in read_records(run.folder / FILE)
    )
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = records[-LAST_STEPS:]
    losses = [loss for loss in last[-1] if loss.endswith("_loss")]
    return {
        "benchmark": "methods",
        "method": name,
        "model": method.model,
        "steps": options.steps,
        "batch_size": run.config.batch_size,
        "sampler_steps": method.sampler_steps,
        "samples": options.num,
        "space": run.config.evaluation.encoders[0],
        "frechet_untrained": before,
        "frechet": after,
        "losses": {loss: sum(record[loss] for record in last) / len(last) for loss in losses},
        "train_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=METHODS, help="by default all")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--num", type=int, default=1000, help="samples [%(default)s]")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default_device())
    parser.add_argument("--out", type=Path, help="append lines here instead of to results/methods.jsonl")
    options = parser.parse_args()
    about = conditions()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cache = build(folder)
        print(f"{'method':<16} {'sampler steps':>13} {'untrained':>10} {'trained':>8}")
        for name in options.only or METHODS:
            line = learn(name, cache, folder, options)
            print(
                f"{name:<16} {line['sampler_steps']:>13} {line['frechet_untrained']:>10.5f} {line['frechet']:>8.5f}",
                flush=True,
            )
            if options.out is None:
                append_line("methods", line | about)
            else:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line | about) + "\n")


if __name__ == "__main__":
    main()
