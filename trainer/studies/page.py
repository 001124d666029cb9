"""The report as one HTML file that asks no network for anything; plotly and jinja2 are imported here and nowhere else.

Why these: jinja2 escapes whatever a run's name or a setting may hold, and the page reads as a page in its template.
plotly.js (MIT, 4.8 MB, carried by its Python package, so pip pins it and nothing is downloaded) zooms, hovers and
exports pictures on its own, and draws SVG, which prints. The page's own policy forbids every request.
"""

import json
import math
from collections.abc import Sequence
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ...cache_specs.errors import writing
from ...cache_specs.files.whole_file import write_whole
from ..runs.settings import RESOLVED
from .compare import Comparison, show
from .curves import POINTS, curve, curve_names, seconds
from .figures import SETTINGS, describe, quality_order
from .origin import about
from .pictures import SampleSheet
from .records import RunRecord
from .relations import TITLES, Interval, Relations, enlarged
from .table import BIASED_NOTE, Table
from .verdict import plus_minus

_DIGITS = 5  # of a number of a curve
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def write_page(path: Path, html: str) -> None:
    """Write the page whole; raise JobError where the disk refuses it."""
    with writing(path, then="give the same command again"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, html.encode())


def render(
    found: Comparison,
    table: Table,
    *,
    relations: Relations | None,
    relations_missing: str,
    samples: SampleSheet,
    components: dict[str, Any] | None,
    components_missing: str,
    made: str,
    command: str,
) -> str:
    """Return the page.

    `components` has `images` (data URIs or None), `captions`, `encoders` [(name, [(words, data URIs)])] and `notes`;
    where it or `relations` is None, the words beside it say why. `made` is when, `command` how.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    here = files(__package__)

    def source(name: str) -> str:
        return (here / name).read_text(encoding="utf-8")

    environment = Environment(
        loader=FunctionLoader(source), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    runs = list(found.study)
    places = {str(run.folder): place for place, run in enumerate(runs)}
    data = page_data(found, relations)
    return environment.get_template("report.html.jinja").render(
        policy=_POLICY,
        style=Markup(source("report.css")),
        plotly=Markup(get_plotlyjs()),
        scripts=[Markup(source("report_table.js")), Markup(source("report_charts.js"))],
        data=Markup(json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")),
        study=found.study.name,
        found=found,
        table=table,
        places=places,
        sections=[("settings", table.settings), ("runs", table.runs)],
        biased_note=BIASED_NOTE if any(c.biased for r in table.settings for c in r.cells.values()) else "",
        has_curves=bool(data["curves"]),
        has_quality=bool(data["quality"]),
        has_enlarged=any(point["enlarged"] for panel in data["panels"] for point in panel["points"]),
        thinned=data["thinned"],
        points=POINTS,
        relations=relations,
        relations_missing=relations_missing,
        titles=TITLES,
        interval=interval_text,
        samples=samples,
        components=components,
        components_missing=components_missing,
        origins=[(run, found.labels[str(run.folder)], about(run), config_text(run)) for run in runs],
        class_names=_class_names(runs),
        made=made,
        command=command,
        versions=", ".join(f"{name} {metadata.version(name)}" for name in ("plotly", "jinja2")),
    )


def page_data(found: Comparison, relations: Relations | None) -> dict[str, Any]:
    """Return what the page's scripts draw: runs, what toggles them, curves, figures over steps, panels."""
    runs = list(found.study)
    axes = _Axes()
    curves: dict[str, dict[int, dict[str, Any]]] = {}
    quality: dict[str, dict[int, dict[str, Any]]] = {}
    thinned = 1
    is_wall = True
    for place, run in enumerate(runs):
        at, passed, wall = seconds(run)
        is_wall = is_wall and (wall or not len(at))
        for name in curve_names([run]):
            line = curve(run, name)
            if line is None:
                continue
            thinned = max(thinned, line.most)
            kept = axes.of(line.step, at, passed) | {"y": _numbers(line.mean)}
            if line.most > 1:
                kept |= {"lo": _numbers(line.low), "hi": _numbers(line.high)}
            curves.setdefault(name, {})[place] = kept
        for name in {name for record in run.evaluations for name in record if name not in SETTINGS}:
            points = [(r["step"], r[name]) for r in run.evaluations if isinstance(r.get(name), int | float)]
            kept = axes.of(np.array([step for step, _ in points], dtype=np.float64), at, passed)
            quality.setdefault(name, {})[place] = kept | {"y": _numbers([value for _, value in points])}
    compared = {str(run.folder) for one in found.settings for run in one.runs}
    return {
        "study": found.study.name,
        "runs": [
            {
                "name": run.name,
                "label": found.labels[str(run.folder)],
                "seed": run.config.get("seed"),
                "status": run.status,
                "compared": str(run.folder) in compared,
                "batch": run.config.get("batch_size", 1),
                "settings": {key: show(run.settings[key]) for key in found.keys if key in run.settings},
            }
            for run in runs
        ],
        "keys": list(found.keys),
        "axes": axes.lists,
        "curves": {name: curves[name] for name in curve_names(runs) if name in curves},
        "quality": {name: quality[name] for name in sorted(quality, key=quality_order)},
        "titles": {name: describe(name).title for name in quality},
        "better": {name: describe(name).better for name in quality},
        "main": found.quality.name if found.quality else None,
        "wall": is_wall,
        "thinned": thinned,
        "panels": [] if relations is None else _panels(found, relations),
    }


class _Axes:
    """Steps and seconds of curves, each list once: runs log the same steps."""

    def __init__(self) -> None:
        self.lists: list[list[float | None]] = []
        self._places: dict[bytes, int] = {}

    def of(self, step: np.ndarray, at: np.ndarray, passed: np.ndarray) -> dict[str, Any]:
        """Return the places of `step` and, where they are known, of the seconds that the run had taken by then."""
        found = {"s": self._place(step)}
        if len(at):
            found["t"] = self._place(np.interp(step, [0, *at], [0, *passed]))
        return found

    def _place(self, values: np.ndarray) -> int:
        place = self._places.setdefault(values.tobytes(), len(self.lists))
        if place == len(self.lists):
            self.lists.append(_numbers(values))
        return place


def _panels(found: Comparison, relations: Relations) -> list[dict[str, Any]]:
    assert found.quality is not None
    main = next(iter(sorted(relations.coefficients.values(), key=lambda one: -max(c.num for c in one))), [])
    said = {one.metric: f"r = {interval_text(one.pearson)}" for one in main if one.pearson.value is not None}
    panels = []
    for name, points in relations.panels.items():
        drawn = []
        for point in points:
            figures = point.setting.figures[found.quality.name]
            drawn.append(
                {
                    "label": point.setting.label,
                    "encoder": point.setting.encoders[0],
                    "x": point.x.value,
                    "low": point.x.low,
                    "high": point.x.high,
                    "y": figures.mean,
                    "spread": figures.spread,
                    "text": plus_minus(figures),
                    "biased": figures.biased,
                    "enlarged": enlarged(point.x),
                }
            )
        panels.append({"title": TITLES.get(name, name), "said": said.get(name, ""), "points": drawn})
    return panels


def interval_text(found: Interval) -> str:
    """Return a coefficient with its interval, or why there is none."""
    if found.value is None:
        return f"– ({found.reason})"
    if found.low is None or found.high is None:
        return f"{found.value:.2f}" + (f" ({found.reason})" if found.reason else "")
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def config_text(run: RunRecord) -> str:
    """Return the run's config.json without its class names, which the page has once."""
    config = dict(run.config)
    if RESOLVED in config:
        config[RESOLVED] = {key: value for key, value in config[RESOLVED].items() if key != "class_names"}
    return json.dumps(config, indent=1, ensure_ascii=False)


def _class_names(runs: Sequence[RunRecord]) -> str:
    known = list(dict.fromkeys(run.class_names for run in runs if run.class_names))
    return "; ".join(f"{len(names)}: {', '.join(names)}" for names in known)


def _numbers(values: Any) -> list[float | None]:
    return [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in values]
