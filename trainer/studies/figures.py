"""What a figure of an evaluation is called in full, in which direction it is better, and who must not be judged by it.

A Frechet distance is called FID only where Inception's evaluator computed it; every other is named by its space, and
figures of two spaces are two figures. A run aligned with the network in whose space it is judged has seen the judge:
its figure is biased.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher"]

_KINDS: dict[str, tuple[str, Better]] = {
    "frechet": ("Fréchet distance", "lower"),
    "precision": ("Precision", "higher"),
    "recall": ("Recall", "higher"),
}
_OWN: dict[str, tuple[str, Better]] = {
    "fid": ("FID (torch-fidelity)", "lower"),
    "inception_score": ("Inception score (torch-fidelity)", "higher"),
}
_VARIANT = re.compile(r"(:layer=\d+|-int8|-random|-layers\d+(-\d+)*|-grid\d+|@[\w.]+)$")
SETTINGS = ("step", "num")  # of an evaluation's record: not figures


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of evaluation.jsonl; `judge` is the encoder in whose space it is, `better` None where not known."""

    name: str
    title: str
    short: str  # for a table in a terminal
    better: Better | None
    judge: str | None

    def biased_for(self, encoders: Collection[str]) -> bool:
        """Say whether a run aligned with `encoders` is judged by one of their own networks."""
        return self.judge is not None and network_of(self.judge) in map(network_of, encoders)


def describe(name: str) -> Figure:
    """Return what `name` is, such as `frechet_dinov2-vit-b_mean`."""
    kind, _, space = name.partition("_")
    if name in _OWN:
        title, better = _OWN[name]
        return Figure(name=name, title=title, short=title.partition(" (")[0], better=better, judge=None)
    if kind in _KINDS and space:
        title, direction = _KINDS[kind]
        judge, _, pooling = space.rpartition("_")
        pooled = "mean tokens" if pooling == "mean" else "class token" if pooling == "cls" else pooling
        short = f"{title.partition(' ')[0]} {space.removesuffix('_mean')}"
        title = f"{title}, {judge} ({pooled})"
        return Figure(name=name, title=title, short=short, better=direction, judge=judge or None)
    words = name.replace("_", " ")
    return Figure(name=name, title=words, short=words, better="lower" if "loss" in name else None, judge=None)


@dataclass(frozen=True, kw_only=True)
class Reached:
    """The step at which a figure was first better than asked; `within` where that was its first evaluation."""

    step: float
    within: bool = False


def first_better(records: Sequence[Mapping[str, float]], figure: Figure, limit: float) -> Reached | None:
    """Return the first step at which an evaluation is under `limit` (over it, where higher is better), E@limit.

    Between two evaluations, ascending by step, it is taken from the line through both. None: it never was.
    """
    sign = -1 if figure.better == "higher" else 1
    before = None
    for record in records:
        value = record.get(figure.name)
        if not isinstance(value, int | float):
            continue
        here = (float(record["step"]), sign * (float(value) - limit))
        if here[1] < 0:
            if before is None:
                return Reached(step=here[0], within=True)
            (start, above), (end, below) = before, here
            return Reached(step=start + (end - start) * above / (above - below))
        before = here
    return None


def network_of(component: str) -> str:
    """Return the network behind a component's name: `dinov2-vit-b` of `dinov2-vit-b-grid8-int8`."""
    while (shorter := _VARIANT.sub("", component)) != component:
        component = shorter
    return component


def quality_order(name: str) -> tuple[int, str]:
    """Sort figures: FID, Frechet distances, then precision, recall and the rest."""
    kinds = ("fid", "frechet", "precision", "recall", "inception")
    place = next((i for i, kind in enumerate(kinds) if name.startswith(kind)), len(kinds))
    return place, name
