"""`repa-features --scan`: many blocks and times of one model measured, in one pass over the images a time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .said import say

if TYPE_CHECKING:
    from ..models.layer_tokens import LayerTokens
    from ..models.pretrained import TrainedModel
    from ..reading.reader import CacheReader

NUM_IMAGES = 10_000
TIMES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)


def scan(
    trained: "TrainedModel",
    reader: "CacheReader",
    tokens_at: Callable[[float], "LayerTokens"],
    blocks: Sequence[int],
    times: Sequence[float],
    options: dict[str, Any],
) -> None:
    """Measure every block at every time; print, and write a table and a figure. The cache is only read."""
    from ..models.token_component import token_name
    from ..runs.metrics import Progress
    from .borrowed import measured_rows, token_scan

    blocks, at = sorted(set(blocks)), [tokens_at(t) for t in sorted(set(times))]
    rows = measured_rows(reader.valid_rows, options["num"] or NUM_IMAGES)
    file = options["out"] or _default_file(trained, options["weights"])
    step = "" if trained.steps is None else f", step {trained.steps}"
    found, empty = token_scan(
        f"{trained.run}: {trained.model.config.name}{step}, {len(rows)} images",
        trained.model.grid,
        labels=reader.labels[rows],
        class_names=reader.class_names,
        folds=options["folds"],
        neighbours=options["neighbours"],
    )
    for words in filter(None, (found.reason, *found.left_out)):
        say(f"left out of the probe: {words}", err=True)
    say(f"{trained.path}: {len(rows)} images of {reader.path}; t 0 is data, block 0 before the first")
    for tokens in at:
        places = {block: empty() for block in blocks}
        with Progress(done=0, total=len(rows), unit="image") as progress:
            for start in range(0, len(rows), options["batch_size"]):
                part = rows[start : start + options["batch_size"]]
                for block, values in tokens.read(part, 0, blocks).items():
                    places[block].add(values)
                progress.advance(len(part))
        for block in blocks:
            name = token_name(trained, block, tokens.t, options["weights"])
            figures = found.finish(block, tokens.t, name, places.pop(block))
            say(f"  block {block:>2}  t {tokens.t:<5g}" + "".join(f"  {key} {value}" for key, value in figures.items()))
    for metric in ("linear_probe", "lds"):
        if place := found.best(metric):
            say(f"highest {metric}: block {place[0]} at t {place[1]:g}")
    table = found.write(file)
    say(f"{file}; every figure: {table}")


def _default_file(trained: "TrainedModel", weights: str) -> Path:
    """Return RUN/scan/STEP-WEIGHTS.png; for a lone checkpoint the folder is beside it."""
    folder = trained.path.parent
    run = folder.parent if folder.name in ("checkpoints", "ema") else folder
    return run / "scan" / f"{trained.path.stem}-{weights.replace(':', '')}.png"
