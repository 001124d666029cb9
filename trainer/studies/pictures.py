"""Samples of a study's settings from the same noise, and what encoders see, as pictures that a page can hold.

Sample i of two runs is from the same noise and label where seed, number of classes and the request are equal, so a row
a setting is drawn from runs of one seed, and column i shows one noise. Small pictures are stored as they are (PNG),
larger ones as JPEG of at most SIDE pixels: a page of 24 settings of 256 px stays below 2 MB.
"""

import base64
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...cache_specs.errors import RepaError
from ..sampling.sample import SampleRequest, labels_of
from .compare import Comparison
from .records import RunRecord, Samples

COLUMNS = 10  # samples of a setting
MOST_ROWS = 24  # settings shown, the best ones
SIDE = 128  # pixels a picture
_EXACT = 64  # pixels up to which nothing is lost

RealImages = Callable[[Sequence[int]], np.ndarray]  # labels [n] -> real pictures [n,H,W,3] uint8


@dataclass(kw_only=True)
class SampleRow:
    """Pictures of one setting, or the real ones; `name` is its label."""

    name: str
    run: str
    pictures: list[str]  # data URIs, by column


@dataclass(kw_only=True)
class SampleSheet:
    """Rows of pictures from the same noise; `captions` [columns] are their classes."""

    title: str = ""
    how: str = ""  # sampler, steps, guidance
    captions: list[str] = field(default_factory=list)
    rows: list[SampleRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def sample_sheet(found: Comparison, real: RealImages | None, why_not_real: str = "") -> SampleSheet:
    """Return samples of every compared setting, with real images of the same classes in the first row."""
    sheet = SampleSheet()
    candidates = {
        one.label: [(run, samples) for run in one.runs if (samples := _of_step(run, found.step)) is not None]
        for one in found.settings
    }
    # The seed and way of drawing that most settings have samples of, the smallest seed among equals.
    alike = Counter(
        how for runs in candidates.values() for how in dict.fromkeys(_noise(run, samples) for run, samples in runs)
    )
    if not alike:
        sheet.notes.append(
            f"No finished run has pictures at step {found.step}"
            if found.step is not None
            else "No finished run has pictures: --set evaluation.every=STEPS draws some"
        )
        return sheet
    chosen = min(alike, key=lambda how: (-alike[how], how[0]))
    seed, num_classes = chosen[0], chosen[1]
    sheet.title = f"From the same noise (seed {seed}) at step {found.step}"
    matches = {
        label: match
        for label, runs in candidates.items()
        if (match := next(((run, samples) for run, samples in runs if _noise(run, samples) == chosen), None))
    }
    num = min([COLUMNS, *(int(samples.request["num"]) for _, samples in matches.values())])
    for label, (run, samples) in list(matches.items())[:MOST_ROWS]:
        pictures = [picture(image) for image in samples.first(num)]
        sheet.rows.append(SampleRow(name=label, run=run.name, pictures=pictures))
    missing = [label for label in candidates if label not in matches]
    if missing:
        sheet.notes.append(f"without samples from this noise: {', '.join(missing)}")
    if len(matches) > MOST_ROWS:
        sheet.notes.append(f"the best {MOST_ROWS} of {len(matches)} settings are shown")
    run, samples = next(iter(matches.values()))
    sampler = samples.request["sampler"]
    sheet.how = f"{sampler.get('sampler')}, {sampler.get('steps')} steps, guidance {sampler.get('cfg_scale', 1):g}"
    labels, names = _labels(samples, num, num_classes), run.class_names
    sheet.captions = [names[label] if label < len(names) else f"class {label}" for label in labels]
    if real is None:
        sheet.notes.append(f"no real images beside them: {why_not_real}" if why_not_real else "")
    else:
        try:
            pictures = [picture(image) for image in real(labels)]
            sheet.rows.insert(0, SampleRow(name="real images of these classes", run="", pictures=pictures))
        except RepaError as error:
            sheet.notes.append(f"no real images beside them: {error}")
    sheet.notes = [note for note in sheet.notes if note]
    return sheet


def _of_step(run: RunRecord, step: int | None) -> Samples | None:
    """Return the run's samples at `step` (its last ones where None) that are pictures, not latents."""
    found = [one for one in run.samples if one.request.get("decoder") != "none" and step in (None, one.step)]
    return found[0] if step is not None and found else max(found, key=lambda one: one.step, default=None)


def _noise(run: RunRecord, samples: Samples) -> tuple[int, int, str]:
    """Return what two files of samples must share for row i to be from the same noise and label."""
    request = samples.request
    how = {key: request[key] for key in ("labels", "sampler") if key in request}
    return int(request.get("seed", 0)), len(run.class_names), repr(how)


def _labels(samples: Samples, num: int, num_classes: int) -> list[int]:
    asked: Any = samples.request.get("labels", "random")
    labels = asked if isinstance(asked, str) else tuple(asked)
    request = SampleRequest(num=num, seed=int(samples.request.get("seed", 0)), labels=labels)
    return labels_of(range(num), request, num_classes).tolist()


def picture(image: np.ndarray) -> str:
    """Return a picture [H,W,3] uint8 as a data URI: PNG up to 64 pixels, else JPEG of at most 128."""
    from PIL import Image

    drawn = Image.fromarray(np.ascontiguousarray(image))
    buffer = io.BytesIO()
    if max(drawn.size) <= _EXACT:
        drawn.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        drawn.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        drawn.save(buffer, format="JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def component_map(colours: np.ndarray) -> str:
    """Return three components [h,w,3] in [0, 1] as a picture of a pixel a token."""
    return picture((255 * colours).round().astype(np.uint8))
