"""Train from a cache and with the encoder online, and say how far the losses of the two are apart.

    python benchmarks/online.py                                  # HOG; appends a line to results/online.jsonl
    python benchmarks/online.py --encoder my.yaml:grid=4 --tokens 4 --weights my=my.safetensors

One cache of the demo's photographs holds the encoder's tokens as float16 and as int8, in two views. The same run, with
pixels as latents, is trained three times: from each, and by `repa-train --online` with the encoder
computed at every step. All three see the same samples, views, noise and times: what differs is the rounding of the
cache, and float32 sums in batches of another size. Reported is how far a step's losses are from those online.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from conditions import append_line, conditions

from repa.trainer.commands.borrowed import load_online
from repa.trainer.distributed import default_device, join
from repa.trainer.runs.resume import enter_folder
from repa.trainer.runs.run import prepare
from repa.trainer.runs.settings import Layer, recipe_layer, resolve
from repa.trainer.training.loop import train

LOSSES = ("denoising_loss", "alignment_loss")


def build(folder: Path, options: argparse.Namespace) -> Path:
    """Build the cache; return it."""
    program, cache = Path(sysconfig.get_path("scripts")) / "repa-cache", folder / "cache"
    common = ["build", "--data", options.data, "--cache", cache, "--resolution", options.resolution, "--flip"]
    common += ["--workers", 0, "--encoder", options.encoder]
    common += [word for pair in options.weights for word in ("--weights", pair)]
    for more in (["--autoencoder", "pixels"], ["--dtype", "int8"]):
        subprocess.run([str(word) for word in (program, *common, *more)], check=True, capture_output=True)
    return cache


def learn(
    cache: Path, folder: Path, values: dict[str, Any], options: argparse.Namespace
) -> tuple[list[dict[str, float]], float]:
    """Train one run; return its records, and its seconds a step."""
    model = f"SiT-Ti/{options.resolution // options.tokens}"
    common = {
        "cache": str(cache),
        "out": str(folder),
        "model": model,
        "steps": options.steps,
        "save_every": options.steps,
        "batch_size": options.batch_size,
        "latent_norm": "channel",
        "optimizer.learning_rate": 1e-3,
    }
    layers = [Layer(source="benchmarks/online.py", values=part) for part in (common, values)]
    with join(options.device) as world, contextlib.redirect_stdout(None):
        run = prepare(resolve([recipe_layer(options.recipe, model), *layers]), world, online=load_online)
        with enter_folder(run, resume=False):
            started = time.perf_counter()
            train(run)
            seconds = time.perf_counter() - started
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(records) == options.steps, "it was stopped"
    return records, seconds / options.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo", help="folder of images [%(default)s]")
    parser.add_argument("--encoder", default="hog:grid=8", help="as in repa-cache build [%(default)s]")
    parser.add_argument("--weights", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--recipe", default="irepa")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8, help="a side, the encoder's grid [%(default)s]")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default_device())
    parser.add_argument("--out", type=Path, help="append the line here instead of to results/online.jsonl")
    options = parser.parse_args()
    about = conditions()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cache = build(folder, options)
        float16, int8 = sorted(path.name for path in (cache / "features").iterdir() if path.is_dir())
        asked = {"encoders": [options.encoder], "online.data": options.data, "online.weights": options.weights}
        online, step_s = learn(cache, folder / "online", asked, options)
        line: dict[str, Any] = {
            "benchmark": "online",
            "encoder": float16,
            "model": f"SiT-Ti/{options.resolution // options.tokens}",
            "recipe": options.recipe,
            "resolution": options.resolution,
            "batch_size": options.batch_size,
            "steps": options.steps,
            "step_s": {"online": step_s},
            "apart": {},
            "last_losses": {loss: online[-1][loss] for loss in LOSSES},
        }
        for dtype, name in (("float16", float16), ("int8", int8)):
            cached, line["step_s"][dtype] = learn(cache, folder / dtype, {"encoders": [name]}, options)
            for loss in LOSSES:
                pairs = [(a[loss], b[loss]) for a, b in zip(cached, online, strict=True)]
                # Against the loss itself, and as it is: a cosine begins near 0, where a share says little.
                share, plain = [abs(a - b) / abs(b) for a, b in pairs], [abs(a - b) for a, b in pairs]
                line["apart"][f"{dtype} {loss}"] = {
                    "largest_relative": max(share),
                    "median_relative": statistics.median(share),
                    "largest_absolute": max(plain),
                }
                print(
                    f"{dtype:<8} {loss:<15} relative: largest {max(share):.1e}, median {statistics.median(share):.1e}; "
                    f"absolute: largest {max(plain):.1e}",
                    flush=True,
                )
    print(", ".join(f"{name} {1000 * seconds:.0f} ms a step" for name, seconds in line["step_s"].items()))
    append_line("online", line | about, options.out)


if __name__ == "__main__":
    main()
