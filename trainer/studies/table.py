"""The table of a study: a row a setting with its seeds' mean and spread, and a row a run; as text and as JSON.

One structure for the terminal, for programs and for the page. Runs that are not compared stand in rows of their own,
with the reason, and no mean has them in it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...cache_specs.errors import UsageError
from .compare import Comparison, Setting, Spread, at_step, show
from .curves import VALIDATION, last, speeds
from .figures import first_better
from .records import RunRecord
from .verdict import facts, plus_minus, rounded

BIASED = "†"  # beside a figure whose judge is a network that the run was aligned with
E_NOTE = (
    "E@k: the first step at which an evaluation is better than k, by the line between two evaluations; "
    "≤ where that is the first one, a mean over seeds only where all of them got there"
)
LONGEST = 48  # characters of a cell in a terminal
BIASED_NOTE = f"{BIASED} biased: the judge is a network that the run was aligned with or trained on"


@dataclass(frozen=True, kw_only=True)
class Column:
    """`kind`: setting, figure, cost or state; `better` of a figure; `key` is what JSON and CSV call it."""

    key: str
    title: str
    kind: str
    better: str | None = None
    short: str = ""  # for a terminal, where it is not the title


@dataclass(frozen=True, kw_only=True)
class Cell:
    """`text` as it is shown, `value` as it is sorted and exported (None: empty); `spread` over seeds where known."""

    text: str
    value: float | str | None = None
    spread: float | None = None
    biased: bool = False


@dataclass(kw_only=True)
class Row:
    """One setting or one run; `cells` by the columns' keys."""

    name: str
    cells: dict[str, Cell]
    runs: list[str] = field(default_factory=list)  # folders
    reason: str = ""  # why it is not compared


@dataclass(kw_only=True)
class Table:
    """`settings` best first, each with its `runs`; `left_out` are the runs that are not compared."""

    columns: list[Column]
    settings: list[Row]
    runs: list[Row]
    left_out: list[Row]
    facts: list[str]
    notes: list[str]


def make_table(found: Comparison, *, under: Sequence[float] = ()) -> Table:
    """Return the table of a comparison, with a column of E@k, the step at which quality got under k, for each `under`.

    Raises UsageError for an `under` where there is no quality.
    """
    if under and found.quality is None:
        raise UsageError("--under: no compared run was evaluated, so that there is no quality to get under anything")
    judged = any(last(run, VALIDATION) is not None for run in found.study)
    columns = [Column(key=key, title=_title(key), kind="setting") for key in found.keys]
    columns += [
        Column(key=figure.name, title=figure.title, kind="figure", better=figure.better, short=figure.short)
        for figure in found.figures
    ]
    columns += [_reach_column(found, limit) for limit in under]
    columns += [
        Column(key="seeds", title="Seeds", kind="state"),
        Column(key="steps", title="Steps", kind="state"),
        *([Column(key=VALIDATION, title="Validation loss", kind="state")] if judged else []),
        Column(key="samples_per_s", title="Samples/s", kind="cost"),
        Column(key="data_wait", title="Data wait", kind="cost"),
        Column(key="train_s", title="Time of steps", kind="cost"),
    ]
    if any("wall_s" in speeds(run) for run in found.study):
        columns.append(Column(key="wall_s", title="Wall time", kind="cost"))
    settings = [_setting_row(found, one) for one in found.settings]
    runs = [_run_row(found, run, one) for one in found.settings for run in one.runs]
    for limit in under:
        key = _reach_column(found, limit).key
        for one, row in zip(found.settings, settings, strict=True):
            row.cells[key] = _reach_cell(found, one, one.runs, limit)
        of_runs = [(one, run) for one in found.settings for run in one.runs]
        for (one, run), row in zip(of_runs, runs, strict=True):
            row.cells[key] = _reach_cell(found, one, [run], limit)
    notes = [*found.notes, *([E_NOTE] if under else [])]
    left_out = [_run_row(found, run, None, reason) for run, reason in found.left_out]
    return Table(columns=columns, settings=settings, runs=runs, left_out=left_out, facts=facts(found), notes=notes)


def _title(key: str) -> str:
    return {"encoders": "Encoder", "recipe": "Recipe", "model": "Model"}.get(key, key)


def _setting_row(found: Comparison, one: Setting) -> Row:
    cells = {key: _setting_cell(one.differing[key]) for key in found.keys}
    for name, spread in one.figures.items():
        cells[name] = Cell(
            text=plus_minus(spread) + BIASED * spread.biased,
            value=spread.mean,
            spread=spread.spread,
            biased=spread.biased,
        )
    cells["seeds"] = Cell(text=str(len(one.runs)), value=float(len(one.runs)))
    steps = [run.steps for run in one.runs]
    cells["steps"] = Cell(text=f"{max(steps):,}", value=float(max(steps)))
    cells |= _validation(one.runs) | _costs([speeds(run) for run in one.runs])
    return Row(name=one.label, cells=cells, runs=[str(run.folder) for run in one.runs])


def _run_row(found: Comparison, run: RunRecord, one: Setting | None, reason: str = "") -> Row:
    settings = run.settings if one is None else one.differing
    cells = {key: _setting_cell(settings[key]) for key in found.keys if key in settings}
    seed = run.config.get("seed")
    cells["seeds"] = Cell(text=f"seed {seed}" if seed is not None else "", value=seed)
    cells["steps"] = Cell(text=f"{run.steps:,}", value=float(run.steps))
    if one is not None:
        record = at_step(run, found.step) or {}
        for name, spread in one.figures.items():
            if isinstance(value := record.get(name), int | float):
                text = rounded(value) + BIASED * spread.biased
                cells[name] = Cell(text=text, value=float(value), biased=spread.biased)
    cells |= _validation([run]) | _costs([speeds(run)])
    return Row(name=run.name, cells=cells, runs=[str(run.folder)], reason=reason)


def _reach_column(found: Comparison, limit: float) -> Column:
    assert found.quality is not None
    return Column(
        key=f"steps_to_{found.quality.name}_{limit:g}",
        title=f"E@{limit:g}, {found.quality.title}",
        kind="figure",
        better="lower",
        short=f"E@{limit:g}",
    )


def _reach_cell(found: Comparison, one: Setting, runs: Sequence[RunRecord], limit: float) -> Cell:
    """Return the steps to `limit` over seeds: a mean only where all of them got there."""
    quality = found.quality
    if quality is None or quality.name not in one.figures:
        return Cell(text="")
    biased = one.figures[quality.name].biased
    all_ = [first_better(run.evaluations, quality, limit) for run in runs]
    steps = [reached.step for reached in all_ if reached is not None]
    mark = BIASED * biased
    if not steps:
        return Cell(text=f"not by {max(run.evaluations[-1]['step'] for run in runs):,}{mark}", biased=biased)
    within = "≤ " if any(reached is not None and reached.within for reached in all_) else ""
    mean, spread = float(np.mean(steps)), float(np.std(steps, ddof=1)) if len(steps) > 1 else None
    text = f"{within}{mean:,.0f}" + ("" if spread is None else f" ± {spread:,.0f}")
    if len(steps) < len(runs):
        return Cell(text=f"{text} ({len(steps)} of {len(runs)} seeds){mark}", biased=biased)
    return Cell(text=text + mark, value=mean, spread=spread, biased=biased)


def _setting_cell(value: Any) -> Cell:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(text=show(value), value=value if numeric else show(value))


def _validation(runs: Sequence[RunRecord]) -> dict[str, Cell]:
    """Return the last loss of each run on what it never trained on, mean and spread; methods differ in what it is."""
    values = tuple(value for run in runs if (value := last(run, VALIDATION)) is not None)
    if not values:
        return {}
    found = Spread(values=values)
    return {VALIDATION: Cell(text=plus_minus(found), value=found.mean, spread=found.spread)}


def _costs(found: Sequence[dict[str, float]]) -> dict[str, Cell]:
    cells = {}
    for key, text in (("samples_per_s", _rate), ("data_wait", _share), ("train_s", duration), ("wall_s", duration)):
        values = [one[key] for one in found if key in one]
        if values:
            cells[key] = Cell(text=text(float(np.mean(values))), value=float(np.mean(values)))
    return cells


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """Return `2 d 3 h`, `1 h 05 min`, `3 min 20 s` or `12 s`."""
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{seconds:.0f} s" if whole >= 10 else f"{seconds:.1f} s"


def as_text(table: Table, *, width: int) -> Iterator[str]:
    """Yield the table as lines of a terminal of `width` columns: facts, settings, then what is not compared.

    Where it is too wide, the settings go first, which the label names, then the last columns; the first figure stays.
    """
    yield from table.facts
    if table.settings:
        yield ""
        columns = [column for column in table.columns if any(column.key in row.cells for row in table.settings)]
        figures = [column for column in columns if column.kind == "figure"][:1]
        while len(_lines(columns, table.settings)[0]) > width and columns != figures:
            settings = [column for column in columns if column.kind == "setting"]
            last = settings or [column for column in columns if column not in figures]
            columns.remove(last[-1])
        yield from _lines(columns, table.settings)
    if any(cell.biased for row in table.settings for cell in row.cells.values()):
        yield BIASED_NOTE
    if table.left_out:
        yield ""
        yield "not compared:"
        yield from (f"  {row.name}: {row.reason}" for row in table.left_out)
    yield from (f"note: {note}" for note in table.notes)


def _lines(columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """Return header and rows, numbers flush right, two blanks between columns; the header is padded to full width."""
    cells = [["setting", *(column.short or column.title for column in columns)]]
    cells += [[row.name, *(row.cells[c.key].text if c.key in row.cells else "" for c in columns)] for row in rows]
    cells = [[text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…" for text in line] for line in cells]
    widths = [max(len(line[place]) for line in cells) for place in range(len(cells[0]))]
    to_left = [True, *(column.kind == "setting" for column in columns)]
    return [
        "  ".join(
            text.ljust(size) if left else text.rjust(size)
            for text, size, left in zip(line, widths, to_left, strict=True)
        )
        for line in cells
    ]


def as_json(table: Table) -> dict[str, Any]:
    """Return the table for programs: JSON values, a figure as mean, spread (null for one seed) and whether biased."""
    return {
        "facts": table.facts,
        "notes": table.notes,
        "columns": [vars(column) for column in table.columns],
        "settings": [_plain(row) for row in table.settings],
        "runs": [_plain(row) for row in table.runs],
        "left_out": [_plain(row) for row in table.left_out],
    }


def _plain(row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {"name": row.name, "runs": row.runs}
    values |= {"reason": row.reason} if row.reason else {}
    for key, cell in row.cells.items():
        values[key] = cell.value
        if cell.spread is not None:
            values[f"{key}_spread"] = cell.spread
        if cell.biased:
            values[f"{key}_biased"] = True
    return values
