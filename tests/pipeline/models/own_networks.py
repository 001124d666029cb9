"""Networks of a user's own, written into a folder by the tests: a target, a helper, weights, the entry."""

from pathlib import Path
from typing import Any

import torch
import yaml

HELPER = """
import torch

CALLS = []

class Net(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.early = torch.nn.Conv2d(3, 8, 4, 4)
        self.late = torch.nn.Conv2d(8, width, 2, 2)

    def forward(self, pixels):
        CALLS.append(len(pixels))
        early = self.early(pixels).relu()
        return {"early": early, "late": self.late(early)}
"""
TARGET = """
from pathlib import Path

import torch

import nets

def make(width):
    net = nets.Net(width)
    net.load_state_dict(torch.load(Path(__file__).with_name("weights.pth"), weights_only=True))
    return net
"""
WIDTH = 6
ENTRY: dict[str, Any] = {
    "loader": "python",
    "target": "own.py:make",
    "files": ["nets.py", "weights.pth"],
    "options": {"width": WIDTH},
    "output": "map",
    "width": WIDTH,
    "patch": 8,
    "input_size": 16,
    "stages": {"early": [8, 4], "late": [WIDTH, 8]},
    "mean": [0.5, 0.25, 0.125],
    "std": [0.5, 0.5, 0.25],
    "interpolation": "bicubic",
    "antialias": True,
    "licence": "mit",
}


def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return weights of the helper's `Net`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "early.weight": (8, 3, 4, 4), "early.bias": (8,), "late.weight": (WIDTH, 8, 2, 2), "late.bias": (WIDTH,),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_own(folder: Path, *, source: str = TARGET, helper: str = HELPER, seed: int = 0, **fields: Any) -> Path:
    """Write the network into `folder`; return its entry's file. A field of None is left out of the entry."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "own.py").write_text(source)
    (folder / "nets.py").write_text(helper)
    torch.save(random_state(seed), folder / "weights.pth")
    entry = {key: value for key, value in {**ENTRY, **fields}.items() if value is not None}
    (folder / "mine.yaml").write_text(yaml.safe_dump(entry))
    return folder / "mine.yaml"
