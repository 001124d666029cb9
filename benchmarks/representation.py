"""Where a small trained SiT represents best: its tokens scanned over blocks and times, by linear probe and LDS.

On what `python benchmarks/demo.py` leaves: its cache, and its runs, with and without alignment. Block 0 is what the
first block is given. Four minutes on one core, most of them the probe's.

    python benchmarks/representation.py [--demo demo] [--record]

--record appends the figures, with their conditions, to benchmarks/results/representation.jsonl.
"""

import argparse
import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

from conditions import append_line, conditions
from demo import RECIPES, run

METRICS = ("linear_probe", "lds")
TIMES = (0.0, 0.2, 0.5)


def main() -> None:
    """Scan the demo's runs and print where each figure is highest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="folder of the demo")
    parser.add_argument("--record", action="store_true", help="append a line to results/representation.jsonl")
    options = parser.parse_args()
    if not (options.demo / "cache/zarr.json").exists():
        sys.exit(f"{options.demo} holds no demo; make one with python benchmarks/demo.py --out {options.demo}")
    scans: dict[str, Any] = {}
    for recipe in RECIPES:
        figure = options.demo / f"scan-{recipe}.png"
        times = " ".join(f"--t {t:g}" for t in TIMES)
        run(f"repa-features {options.demo / recipe} --cache {options.demo / 'cache'} --scan {times} --out {figure}")
        scans[recipe] = scan_of(figure.with_suffix(".csv"))
    for recipe, scan in scans.items():
        for metric in METRICS:
            block, t = scan["highest"][metric]
            print(f"{recipe}: {metric} {scan[metric][str(t)][block]:.3f} after block {block} at t {t:g}")
    if options.record:
        steps = json.loads((options.demo / RECIPES[0] / "config.json").read_text(encoding="utf-8"))["steps"]
        command = "python benchmarks/representation.py --record"
        append_line("representation", {**conditions(), "command": command, "steps": steps, "scans": scans})


def scan_of(table: Path) -> dict[str, Any]:
    """Return by metric and time the values from block 0 on, and the (block, time) of the highest."""
    found: dict[str, Any] = {metric: {} for metric in METRICS}
    places: dict[str, list[tuple[float, int, float]]] = {metric: [] for metric in METRICS}
    for line in csv.DictReader(table.read_text(encoding="utf-8").splitlines()):
        if line["metric"] in METRICS:
            block, t = re.findall(r"-b(\d+)-t([\d.e-]+)$", line["encoder"])[0]
            found[line["metric"]].setdefault(str(float(t)), []).append(round(float(line["mean"]), 4))
            places[line["metric"]].append((float(line["mean"]), int(block), float(t)))
    highest = {metric: max(values)[1:] for metric, values in places.items()}
    return {**found, "highest": highest}


if __name__ == "__main__":
    main()
