"""Figures without a display or global state; matplotlib is imported here and nowhere else in this room."""

from pathlib import Path
from typing import Any

from ...cache_specs.errors import JobError, UsageError

DPI = 150


def new_figure(**options: Any) -> Any:
    """Return an empty matplotlib `Figure` with the Agg canvas; `options` are Figure's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, file: Path) -> None:
    """Write a figure as its file's ending says; raise `UsageError` for an unknown one, `JobError` for a full disk."""
    try:
        figure.savefig(file, dpi=DPI)
    except OSError as error:
        raise JobError(f"{file} cannot be written ({error.strerror or error}); name an --out that can") from error
    except ValueError as error:
        raise UsageError(f"--out {file}: {error}; name a .png") from error
