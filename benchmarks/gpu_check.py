"""make gpu-check: what only a GPU can show, in one command of under 6 minutes and one JSON file.

    python benchmarks/gpu_check.py [--out gpu_check.json]

Parts (gpu_parts.py), the most telling first, each in a process of its own, so that none takes another along:

    tests        the tests marked gpu
    bandwidth    the fused loss, and at one width its rivals, against a copy (benchmarks/alignment.py)
    training     steps/s of SiT-B/2 from a synthetic cache, recipe irepa, bf16: eager and compiled, the loss fused and
                 as a trainer writes it in eager PyTorch, with data wait and peak memory
    building     images/s of a worker with ViT-B and with the SD VAE: forward, copies, checks and shards on disk
    sampling     images/s of SiT-XL/2 in bf16 and fp32, from forward passes
    attention    each back end forward and backward at SiT's shapes, which one PyTorch takes, whether bits repeat
    convolution  the conv projector's backward pass with and without cudnn.deterministic

The file is written anew after each part, with every line that the part had given by its end, crash or limit. A part
that would not fit into what is left of --minutes is left out and named.

Needs torch >= 2.9, triton, numpy, zarr, numcodecs, google-crc32c, pyyaml, click, tqdm, pillow and pytest; zarr imports
donfig and msgspec or msgpack, by its version. Building needs timm (and torchvision) and diffusers too: without them it
says so and the rest runs. Neither ray nor network. Where wheels lie in a folder of their own, name it in PYTHONPATH:

    pip install --no-deps --target SITE WHEELS/*.whl && PYTHONPATH=SITE make gpu-check PYTHON=python3

`--device cpu --model SiT-Ti/2 --batch-size 8 --steps 2 --rounds 2` runs the same code where there is no GPU, to try
it; it proves nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from conditions import conditions
from gpu_parts import PARTS

MINUTES = 6.0  # for which the limits of the parts are set; with more minutes each has more
LEAST_S = 10  # a part that has less is not begun


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only these, repeatable")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all parts together (default: %(default)s)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--model", default="SiT-B/2", help="of the training (default: %(default)s)")
    parser.add_argument("--sampled", default="SiT-XL/2", help="model of the sampling (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each training (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of what is timed in turn (default: %(default)s)")
    parser.add_argument("--as-part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.as_part:
        with options.lines.open("a", encoding="utf-8") as file:
            for line in PARTS[options.as_part].run(options):
                print(json.dumps(line), flush=True)
                file.write(json.dumps(line) + "\n")
                file.flush()
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_check: torch finds no GPU here; --help says how to try the code without one")
    sys.exit(run(options))


def run(options: argparse.Namespace) -> int:
    """Run the parts in turn, writing the file after each; return 1 if one failed, was cut or left out."""
    started = time.monotonic()
    report: dict[str, Any] = {**conditions(("torchvision", "diffusers")), "device": options.device, "parts": {}}
    for name in options.part or PARTS:
        left_s = 60 * options.minutes - (time.monotonic() - started)
        print(f"gpu_check: {name}, {left_s:.0f} s left", flush=True)
        limit_s = PARTS[name].limit_s * options.minutes / MINUTES
        report["parts"][name] = run_part(name, min(left_s, limit_s), options)
        report["minutes"] = round((time.monotonic() - started) / 60, 2)
        write(options.out, report)
    bad = [f"{name} {part['outcome']}" for name, part in report["parts"].items() if part["outcome"] != "done"]
    print(f"{options.out}: written after {report['minutes']} minutes; {', '.join(bad) or 'every part done'}")
    return 1 if bad else 0


def run_part(name: str, limit_s: float, options: argparse.Namespace) -> dict[str, Any]:
    """Run a part in its own process for at most `limit_s`; return its outcome, seconds, and the lines it gave."""
    if limit_s < LEAST_S:
        return {"outcome": "left out: no time", "seconds": 0.0, "lines": []}
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "lines")
        passed = ("device", "model", "sampled", "batch_size", "steps", "rounds")
        command = [sys.executable, __file__, "--as-part", name, "--lines", str(lines)]
        command += [f"--{key.replace('_', '-')}={getattr(options, key)}" for key in passed]
        started = time.monotonic()
        # A session of its own, so that at its limit what it has started ends with it.
        process = subprocess.Popen(command, start_new_session=True)
        try:
            code = process.wait(limit_s)
            outcome = "done" if code == 0 else f"failed: exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"cut: more than {limit_s:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        text = lines.read_text(encoding="utf-8") if lines.exists() else ""
        return {
            "outcome": outcome,
            "seconds": round(time.monotonic() - started, 1),
            "lines": [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")],
        }


def write(out: Path, report: dict[str, Any]) -> None:
    """Replace the file by one with this report."""
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(out)


if __name__ == "__main__":
    main()
