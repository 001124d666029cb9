"""Show that each training method learns: train it from one small cache, and say how far its samples are from the data.

    python benchmarks/methods.py                            # every method; appends lines to results/methods.jsonl
    python benchmarks/methods.py --only meanflow --only sit --steps 200 --out methods.jsonl

The cache is built from the demo's photographs at 16 px: pixels as latents, HOG tokens as the encoder. REG needs a class
token, which HOG has not: it is given a small ViT of random weights, never trained, that this file writes. Each method
trains a SiT (JiT for the recipes of that name) of 16 tokens for the same number of steps on the same images in the same
order, without guidance. The figure is the Frechet distance between samples of its EMA and the images, in the space of
the cached HOG tokens (mean-pooled); before the first step it is that of an untrained model, the row to beat. It says
that a method learns, and not which one is better: they sample in different numbers of steps, and nothing is tuned.
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
    encoder: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


HOG, RANDOM_VIT = "hog-grid4", "random-vit-grid4"
UNGUIDED = {"meanflow.kappa": 0.0}
JIT = {"optimizer.warmup_steps": 0, "latent_norm": "fixed"}
METHODS = {
    "sit": Method(recipe="sit"),
    "irepa": Method(recipe="irepa", encoder=HOG),
    "sit-internal": Method(recipe="sit-internal"),
    "sra": Method(recipe="sra"),
    "reg": Method(recipe="reg", encoder=RANDOM_VIT),
    "reg-irepa": Method(recipe="reg-irepa", encoder=RANDOM_VIT),
    "meanflow": Method(recipe="meanflow", sampler_steps=1, settings=UNGUIDED),
    "meanflow-repa": Method(recipe="meanflow-repa", sampler_steps=1, encoder=HOG, settings=UNGUIDED),
    "meanflow-irepa": Method(recipe="meanflow-irepa", sampler_steps=1, encoder=HOG, settings=UNGUIDED),
    "jit": Method(recipe="jit", model="JiT-Ti/4", autoencoder="pixels-uint8", sampler_steps=10, settings=JIT),
    "jit-irepa": Method(
        recipe="jit-irepa", model="JiT-Ti/4", autoencoder="pixels-uint8", sampler_steps=10, encoder=HOG, settings=JIT
    ),
}
BUILDS = (  # what the methods read between them
    "--encoder hog:grid=4 --encoder random-vit.yaml:grid=4 --autoencoder pixels",
    "--encoder hog:grid=4 --autoencoder pixels --dtype uint8",
)
NETWORK = """
import torch
from torch import nn


class RandomViT(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.patches = nn.Conv2d(3, 64, 4, stride=4)
            self.cls_token = nn.Parameter(torch.randn(1, 1, 64))
            self.positions = nn.Parameter(torch.randn(1, 17, 64))
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
            )
            self.norm = nn.LayerNorm(64)

    def forward(self, x):
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patches(x).flatten(2).mT], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
"""
ENTRY = """
loader: python
target: random_vit.py:RandomViT
width: 64
patch: 4
prefix_tokens: 1
cls_token: true
mean: [0.5, 0.5, 0.5]
std: [0.5, 0.5, 0.5]
interpolation: bicubic
antialias: true
licence: mit
"""
COMMON = {
    "batch_size": 32,
    "latent_norm": "channel",
    "ema_decay": 0.98,  # after so few steps 0.9999 would still be the initial noise
    "optimizer.learning_rate": 1e-3,
    "evaluation.encoders": [HOG],
}


def build(folder: Path) -> Path:
    """Build the cache; return it."""
    program, cache = Path(sysconfig.get_path("scripts")) / "repa-cache", folder / "cache"
    (folder / "random_vit.py").write_text(NETWORK, encoding="utf-8")
    (folder / "random-vit.yaml").write_text(ENTRY, encoding="utf-8")
    for components in BUILDS:
        command = f"build --data demo --cache {cache} --resolution 16 --flip --workers 0 {components}"
        subprocess.run([str(program), *command.split()], check=True, capture_output=True, cwd=folder)
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
    if method.encoder is not None:
        values["encoders"] = [method.encoder]
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
        "encoder": method.encoder,
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
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--num", type=int, default=300, help="samples [%(default)s]")
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
            append_line("methods", line | about, options.out)


if __name__ == "__main__":
    main()
