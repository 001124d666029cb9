"""Lay out the study on a desktop: photographs in two halves, networks as entries, and the lines that build its caches.

    python benchmarks/study/prepare.py --material DIR --out WORK      # some seconds; prints the commands to go on with

DIR has `images/CLASS/*.jpg` (Imagenette's training photographs, 96 px) and `encoders/` (the weights that taps.yaml
names, with `catalog.py` and `nets.py`, which make the networks). WORK gets

    photos/train, photos/held_out    every ninth photograph, by a digest of its name, is held out: judges alone see it
    encoders/                        an entry a network (`loader: python`), beside its weights
"""

import argparse
import hashlib
import shlex
import shutil
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
HELD_OUT = 9  # one photograph in so many
RESOLUTION = 64
GRID = 8  # tokens a side, one a latent pixel: models of patch 1
JUDGES = ("efficientnet_lite0:stage=blocks.4", "alike_l:stage=block3")
CONTROLS = (f"hog:grid={GRID}",)
PIXELS = {"interpolation": "bicubic", "antialias": True}


def split(images: Path, photos: Path) -> tuple[int, int]:
    """Copy photographs into photos/train and photos/held_out; return how many went where."""
    counts = {"train": 0, "held_out": 0}
    for file in sorted(images.glob("*/*.jpg")):
        digest = hashlib.sha256(file.name.encode()).digest()
        half = "train" if digest[0] % HELD_OUT else "held_out"
        place = photos / half / file.parent.name / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            shutil.copyfile(file, place)
        counts[half] += 1
    return counts["train"], counts["held_out"]


def write_entries(weights: Path, encoders: Path, networks: dict[str, Any]) -> None:
    """Copy weights and sources, and write an entry a network; raise SystemExit for a file that is another."""
    encoders.mkdir(parents=True, exist_ok=True)
    taef2 = {f"taef2_{part}.safetensors": None for part in ("encoder", "decoder")}
    for name in ("catalog.py", "nets.py"):
        shutil.copyfile(weights / name, encoders / name)
    shutil.copyfile(HERE / "taps.py", encoders / "taps.py")
    for name, expected in [item for network in networks.values() for item in network["files"].items()]:
        found = hashlib.sha256((weights / name).read_bytes()).hexdigest()
        if found != expected:
            raise SystemExit(f"{weights / name} has sha256 {found}; expected {expected}: it is another file")
        shutil.copyfile(weights / name, encoders / name)
    for name in taef2:
        shutil.copyfile(weights / name, encoders / name)
    for name, network in networks.items():
        entry = {
            "loader": "python",
            "target": "taps.py:load",
            "files": ["catalog.py", "nets.py", *network["files"]],
            "options": {"network": name, "taps": list(network["stages"])},
            "output": "map",
            "stages": network["stages"],
            "width": next(iter(network["stages"].values()))[0],
            "patch": next(iter(network["stages"].values()))[1],
            "licence": network["licence"],
            **PIXELS,
        }
        (encoders / f"{name}.yaml").write_text(yaml.safe_dump(entry, sort_keys=False))
    autoencoder = {
        "loader": "python",
        "target": "taps.py:Taef2",
        "files": ["catalog.py", "nets.py", *taef2],
        "kind": "sample",
        "latent_channels": 32,
        "factor": 8,
        "pixel_range": [0, 1],
        "scale": 1.0,
        "bias": 0.0,
        "licence": "mit",
    }
    (encoders / "taef2.yaml").write_text(yaml.safe_dump(autoencoder, sort_keys=False))


def build_command(work: Path, half: str, encoders: list[str]) -> str:
    """Return the line that builds one half's cache."""
    words = ["repa-cache", "build", "--data", work / "photos" / half, "--cache", work / half]
    words += ["--resolution", RESOLUTION, "--autoencoder", work / "encoders" / "taef2.yaml"]
    return shlex.join(map(str, words + [word for encoder in encoders for word in ("--encoder", encoder)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--material", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="WORK")
    options = parser.parse_args()
    work, networks = options.out, yaml.safe_load((HERE / "taps.yaml").read_text(encoding="utf-8"))
    write_entries(options.material / "encoders", work / "encoders", networks)
    train, held_out = split(options.material / "images", work / "photos")
    print(f"{train} photographs to train on, {held_out} held out; {len(networks)} networks")
    taps = [f"{name}:stage={stage}" for name, network in networks.items() for stage in network["stages"]]

    def entries(names: list[str]) -> list[str]:
        return [str(work / "encoders" / name.replace(":", f".yaml:grid={GRID}:", 1)) for name in names]

    print(build_command(work, "train", [*entries([tap for tap in taps if tap not in JUDGES]), *CONTROLS]))
    print(build_command(work, "held_out", entries(list(JUDGES))))


if __name__ == "__main__":
    main()
