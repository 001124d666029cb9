"""make demo: photographs -> cache -> two training runs -> samples, with the commands that a user would type.

Builds one cache (autoencoder pixels, encoder hog, both views), trains recipes sit and irepa from it with identical
initial SiT weights, data order and noise, samples both from the EMA, and draws a sample grid a run beside real crops
and one figure of the loss curves. Curves are shown as they are. Nothing is downloaded.

    python benchmarks/demo.py [--out demo] [--record]

--record appends the figures, with their conditions, to benchmarks/results/demo.jsonl.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
from conditions import append_line, conditions

CONFIG = "benchmarks/demo.yaml"
RECIPES = ("sit", "irepa")
NUM_CLASSES = 11
PER_CLASS = 8
LAST_STEPS = 50  # final losses are means over so many steps


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of everything the demo makes")
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results/demo.jsonl")
    options = parser.parse_args()
    started = time.monotonic()
    out, cache = options.out, options.out / "cache"
    if (cache / "zarr.json").exists():
        shutil.rmtree(out)
    elif out.exists() and any(out.iterdir()):
        sys.exit(f"demo: {out} holds other things; name a new folder with --out")

    built = run(
        f"repa-cache build --data demo --cache {cache} --encoder hog:grid=8 --autoencoder pixels --resolution 32 --flip"
    )
    run(f"repa-cache verify {cache}")
    figures: dict[str, float] = {"build images/s": float(re.findall(r"\(([\d.]+) images/s\)", built)[0])}
    for recipe in RECIPES:
        folder = out / recipe
        run(f"repa-train --cache {cache} --recipe {recipe} --config {CONFIG} --out {folder}")
        run(f"repa-sample {folder} --num {NUM_CLASSES * PER_CLASS} --labels balanced --steps 25 --cfg-scale 2")
        figures |= {f"{recipe}: {name}": value for name, value in final_figures(folder).items()}

    pictures = [sample_picture(cache, out / recipe, out / f"samples-{recipe}.png") for recipe in RECIPES]
    pictures.append(loss_picture(out, out / "loss.png"))
    figures["minutes in all"] = (time.monotonic() - started) / 60

    print()
    for name, value in figures.items():
        print(f"{name:<34} {value:.4g}")
    print(f"\ncache     {cache}\nruns      {', '.join(str(out / recipe) for recipe in RECIPES)}")
    print("pictures  " + ", ".join(map(str, pictures)))
    if options.record:
        append_line("demo", {**conditions(), "command": "python benchmarks/demo.py --record", "figures": figures})


def run(command: str) -> str:
    """Print a command, run it, and return what it wrote to stdout; stop the demo where it fails."""
    print(f"\n$ {command}", flush=True)
    program, *arguments = shlex.split(command)
    path = Path(sysconfig.get_path("scripts")) / program
    with subprocess.Popen([str(path), *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(f"demo: stopped, the command above failed with exit code {process.returncode}")
    return "".join(lines)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, one a step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def final_figures(folder: Path) -> dict[str, float]:
    """Return the last losses (means over 50 steps), and medians over the run's logs of speed and data wait."""
    records = metrics(folder)
    figures = {
        name.replace("_", " "): float(np.mean([record[name] for record in records[-LAST_STEPS:]]))
        for name in ("denoising_loss", "alignment_loss")
        if name in records[-1]
    }
    logs = [record for record in records if "samples_per_s" in record]
    figures["train samples/s"] = float(np.median([record["samples_per_s"] for record in logs]))
    figures["share of time waiting for data"] = float(np.median([record["data_wait"] for record in logs]))
    return figures


def sample_picture(cache: Path, folder: Path, file: Path) -> Path:
    """Draw one row a class: real crops, then samples of the EMA."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt
    import zarr

    root = zarr.open_group(cache, mode="r")
    names, labels = root.attrs["class_names"], root["label"][:]
    (samples_file,) = sorted(folder.glob("samples/*.npz"))
    samples = np.load(samples_file)["arr_0"]
    order = np.arange(len(samples)) % len(names)  # --labels balanced
    figure, axes = plt.subplots(len(names), 2, figsize=(8.2, 6.2), width_ratios=[1, 1], layout="constrained")
    for row, name in enumerate(names):
        rows = np.flatnonzero(labels == row)[:PER_CLASS].tolist()
        pixels = np.stack([root["latents/pixels/moments"][i, 0] for i in rows]).astype(np.float32)
        real = ((pixels.transpose(0, 2, 3, 1) + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
        for axis, images in zip(axes[row], (real, samples[order == row]), strict=True):
            axis.imshow(np.concatenate(list(images), axis=1), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(name.split("_")[0], rotation=0, ha="right", va="center", fontsize=8)
    axes[0, 0].set_title("photographs (crops)", fontsize=9)
    axes[0, 1].set_title(f"samples, recipe {folder.name}", fontsize=9)
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file


def loss_picture(out: Path, file: Path) -> Path:
    """Draw the losses of both runs: each step faint, the running mean on top."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    window = 25
    for recipe, colour in zip(RECIPES, ("tab:blue", "tab:orange"), strict=True):
        records = metrics(out / recipe)
        for axis, name in ((left, "denoising_loss"), (right, "alignment_loss")):
            if name not in records[0]:
                continue
            values = np.array([record[name] for record in records])
            axis.plot(np.arange(1, len(values) + 1), values, color=colour, alpha=0.2, linewidth=0.8)
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            axis.plot(np.arange(window, len(values) + 1), smooth, color=colour, label=recipe)
    for axis, title in ((left, "denoising loss"), (right, "alignment loss (-1 is aligned)")):
        axis.set(xlabel="step", title=title)
        axis.legend(frameon=False)
    left.set_yscale("log")
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file


if __name__ == "__main__":
    main()
