"""Which runs are the same but for their seed, what differs between the others, and how good each is.

In: runs. Out: one `Setting` a combination of settings, with mean and spread of every figure over its seeds. Only
finished runs that were evaluated alike (equal step, number of samples, sampler) are compared; the others are listed
with the reason.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...cache_specs.errors import UsageError, nearest
from ..runs.config import MAY_CHANGE
from .figures import SETTINGS, Figure, describe, quality_order
from .records import RunRecord, Study

# A run's place, what a resume may change, and the seed make no other setting. `steps`, a target, does, and so does
# where tokens are computed from instead of read.
_NO_SETTING = (MAY_CHANGE - {"steps", "online.data"}) | {"seed", "out", "cache", "logger"}
_FIRST = ("recipe", "model", "encoders")
# Beside step and number of samples.
_EVALUATED_ALIKE = ("cache", "num_real", "pooling", "neighbours", "sampler", "steps", "cfg_scale")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over seeds: mean, and sample standard deviation where there are two or more."""

    values: tuple[float, ...]
    biased: bool = False  # the judge is a network that these runs were aligned with or trained on

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def spread(self) -> float | None:
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None


@dataclass(kw_only=True)
class Setting:
    """Runs that differ in their seed alone. `differing` has the values of the settings that differ in the study."""

    label: str
    differing: dict[str, Any]
    encoders: tuple[str, ...]
    runs: list[RunRecord] = field(default_factory=list)  # compared: finished, evaluated alike, one a seed
    figures: dict[str, Spread] = field(default_factory=dict)


@dataclass(kw_only=True)
class Comparison:
    """A study compared: `settings` best first by `quality`, at `step`; `left_out` are runs with the reason."""

    study: Study
    keys: tuple[str, ...]  # settings that differ
    figures: tuple[Figure, ...]
    quality: Figure | None
    step: int | None
    settings: list[Setting]
    left_out: list[tuple[RunRecord, str]]
    labels: dict[str, str]  # of every run, by folder
    notes: list[str]

    @property
    def ranked(self) -> list[Setting]:
        """The settings with a quality figure, best first."""
        return [one for one in self.settings if self.quality and self.quality.name in one.figures]


def compare(study: Study, *, quality: str | None = None, step: int | None = None) -> Comparison:
    """Compare the runs of a study at `step` (the last of most runs, if None) by `quality` (the most common, if None).

    Raises UsageError where no run has that figure, or was evaluated at that step.
    """
    notes = list(study.notes)
    used = {str(run.folder): used_settings(run) for run in study}
    keys = differing_keys(list(used.values()))
    values = {folder: tuple(found.get(key) for key in keys) for folder, found in used.items()}
    labels = dict(zip(values, short_labels(list(values.values()), keys), strict=True))
    finished = [run for run in study if run.status == "finished"]
    evaluated = [run for run in finished if run.evaluations]
    step = _step(evaluated or [run for run in study if run.evaluations], step)
    alike = Counter(how for run in evaluated if (how := _how(run, step)) is not None).most_common(1)
    settings: dict[tuple[Any, ...], Setting] = {}
    left_out: list[tuple[RunRecord, str]] = []
    for run in study:
        notes.extend(run.notes)
        reason = _why_not(run, step, alike[0][0] if alike else None)
        if reason:
            left_out.append((run, reason))
            continue
        place = values[str(run.folder)]
        differing = dict(zip(keys, place, strict=True))
        one = settings.setdefault(
            place, Setting(label=labels[str(run.folder)], differing=differing, encoders=encoders_of(run))
        )
        same = next((other for other in one.runs if other.config.get("seed") == run.config.get("seed")), None)
        if same is not None:
            left_out.append((run, f"the same settings and seed as {same.name}"))
            continue
        one.runs.append(run)
    for one in settings.values():
        one.figures = _figures(one, step)
    known = sorted({name for one in settings.values() for name in one.figures}, key=quality_order)
    described = tuple(map(describe, known))
    chosen = _quality(described, list(settings.values()), quality, study)
    caches = {str(run.config.get("cache")) for run in study if run.config}
    if len(caches) > 1:
        notes.append(f"the runs read {len(caches)} caches, {_some(caches)}: compare the fingerprints of their data")
    found = Comparison(
        study=study, keys=keys, figures=described, quality=chosen, step=step, settings=list(settings.values()),
        left_out=left_out, labels=labels, notes=list(dict.fromkeys(notes)),
    )  # fmt: skip
    if chosen is not None:
        sign = -1 if chosen.better == "higher" else 1
        found.settings.sort(
            key=lambda one: sign * one.figures[chosen.name].mean if chosen.name in one.figures else float("inf")
        )
    return found


def used_settings(run: RunRecord) -> dict[str, Any]:
    """Return the settings that shape what the run computes."""
    return {key: value for key, value in run.settings.items() if key not in _NO_SETTING}


def encoders_of(run: RunRecord) -> tuple[str, ...]:
    return tuple(run.config.get("encoders") or ())


def seen_by(run: RunRecord) -> tuple[str, ...]:
    """Return the networks whose output the run was trained to give, or aligned with: judges that it has seen."""
    return (*encoders_of(run), str(run.config.get("autoencoder") or "").removeprefix("features/"))


def differing_keys(settings: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return the keys with two values or more among those that have them, recipe, model and encoders first.

    What only some methods look at, with one value in all of these, is told by the recipe.
    """
    keys = {key for one in settings for key in one}
    differ = [key for key in keys if len({repr(one[key]) for one in settings if key in one}) > 1]
    return tuple(sorted(differ, key=lambda key: (_FIRST.index(key) if key in _FIRST else len(_FIRST), key)))


def short_labels(values: Sequence[tuple[Any, ...]], keys: Sequence[str]) -> list[str]:
    """Return a label for each of `values`, of the settings that tell it from the others alone.

    A setting stands in a label where runs that agree in those before it differ in it, so that labels differ where
    settings do: "sit", "irepa · gamma 0.3", "irepa · gamma 0.6".
    """
    words: list[list[str]] = [[] for _ in values]
    for place, key in enumerate(keys):
        for index, row in enumerate(values):
            like = [other for other in values if other[:place] == row[:place]]
            if len({repr(other[place]) for other in like}) > 1:
                text = show(row[place])
                words[index].append(text if key in _FIRST else f"{key.rpartition('.')[2]} {text}")
    return [" · ".join(parts) if parts else "all runs" for parts in words]


def show(value: Any) -> str:
    """Return a setting's value as people write it."""
    if value is None:
        return "none"
    if isinstance(value, tuple | list):
        return " + ".join(map(show, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def at_step(run: RunRecord, step: int | None) -> dict[str, Any] | None:
    """Return the run's evaluation at `step`."""
    return next((record for record in reversed(run.evaluations) if record["step"] == step), None)


def _how(run: RunRecord, step: int | None) -> tuple[Any, ...] | None:
    """Return what two evaluations must have in common to be compared."""
    record = at_step(run, step)
    settings = (run.settings.get(f"evaluation.{name}") for name in _EVALUATED_ALIKE)
    return None if record is None else (record.get("num"), *settings)


def _step(runs: Sequence[RunRecord], asked: int | None) -> int | None:
    counts = Counter(step for run in runs for step in {record["step"] for record in run.evaluations})
    if asked is not None and asked not in counts:
        known = ", ".join(map(str, sorted(counts))) or "none"
        raise UsageError(f"--step {asked}: no run was evaluated there; evaluated steps: {known}")
    most = max(counts.values(), default=0)
    return asked if asked is not None else max((step for step in counts if 2 * counts[step] > most), default=None)


def _why_not(run: RunRecord, step: int | None, alike: tuple[Any, ...] | None) -> str:
    if run.status != "finished":
        done = f"{run.status} at step {run.steps} of {run.config.get('steps', '?')}"
        return f"{done}: {run.reason}" if run.reason else done
    if step is None:
        return ""  # nothing was evaluated anywhere: the runs are listed by their settings
    how = _how(run, step)
    if how is None:
        last = f"last at step {run.evaluations[-1]['step']}" if run.evaluations else "never evaluated"
        return f"not evaluated at step {step} ({last})"
    if how != alike:
        assert alike is not None
        names = ("num", *_EVALUATED_ALIKE)
        other = [f"{n} {show(a)}, not {show(b)}" for n, a, b in zip(names, how, alike, strict=True) if a != b]
        return f"evaluated otherwise: {'; '.join(other)}"
    return ""


def _figures(one: Setting, step: int | None) -> dict[str, Spread]:
    records = [record for run in one.runs if (record := at_step(run, step)) is not None]
    found: dict[str, Spread] = {}
    for name in {name for record in records for name in record if name not in SETTINGS}:
        values = tuple(float(r[name]) for r in records if isinstance(r.get(name), int | float) and np.isfinite(r[name]))
        if values:
            found[name] = Spread(values=values, biased=describe(name).biased_for(seen_by(one.runs[0])))
    return found


def _quality(
    described: Sequence[Figure], settings: Sequence[Setting], asked: str | None, study: Study
) -> Figure | None:
    """Return the figure to rank by: the asked one, or the one that judges the most settings, unbiased ones first."""
    by_name = {figure.name: figure for figure in described}
    if asked is not None:
        if asked not in by_name:
            raise UsageError(f"--quality {asked}: no compared run of {study.name} has it; {nearest(asked, by_name)}")
        return by_name[asked]

    def worth(figure: Figure) -> tuple[int, int, int]:
        have = [one.figures[figure.name] for one in settings if figure.name in one.figures]
        return len(have), sum(not found.biased for found in have), -described.index(figure)

    known = [figure for figure in described if figure.better is not None]
    return max(known, key=worth, default=None)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
