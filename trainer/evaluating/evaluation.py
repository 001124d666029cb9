"""Evaluation while a run trains: samples of the EMA with fixed noise, and how far they are from the data.

In: a run and plain callables, to decode latents and to encode pictures as the cache's vectors were made. Out: a line an
evaluated step in RUN/evaluation.jsonl, and the samples as an .npz for the field's own tools. Nothing in the run
changes: noise and labels have streams of their own, and the EMA is only read.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...cache_specs.errors import JobError, UsageError
from ...cache_specs.files.outside import MOST_TABLE_BYTES, read_text
from ...cache_specs.files.whole_file import write_whole
from ..distributed import Stopped
from ..runs.config import RunConfig
from ..runs.run import Run
from ..sampling.sample import Decoder, SampleRequest
from ..sampling.sample_file import sample_to_npz
from .frechet import check_number, frechet_distance, precision_recall
from .grids import pictures_of
from .reference import Reference

FILE = "evaluation.jsonl"
FOLDER = "evaluation"

Encoder = Callable[[np.ndarray], np.ndarray]  # pictures [B,H,W,3] uint8 -> vectors [B,E] float32, as in the cache
Scorer = Callable[[Path], dict[str, float]]  # the .npz of samples -> figures of the field's own tools, by name


@dataclass(frozen=True)
class Judge:
    """An encoder in whose space samples are compared with the data: the real vectors, and how pictures get theirs."""

    reference: Reference
    encode: Encoder


def open_references(config: RunConfig) -> list[Reference]:
    """Return the vectors of real images that `config.evaluation` compares with, one a judge.

    Judges are the named encoders, the run's own where it has one, or the only one in the cache; the images are those of
    `evaluation.cache`, or of the run's. Raises UsageError where there are no more samples, real or generated, than a
    judge is wide.
    """
    settings, own = config.evaluation, config.encoders[0] if len(config.encoders) == 1 else None
    cache = settings.cache or config.cache
    if len(set(settings.encoders)) != len(settings.encoders):
        raise UsageError(f"evaluation.encoders names one twice: {', '.join(settings.encoders)}")
    references = []
    for encoder in settings.encoders or (own if settings.cache is None else None,):
        reference = Reference(
            cache,
            autoencoder=config.autoencoder,
            encoder=encoder,
            pooling=settings.pooling,
            latents=settings.cache is None,
        )
        check_number(settings.num, reference.width, f"evaluation.num in the space of {reference.name}")
        check_number(min(settings.num_real, len(reference.valid_rows)), reference.width, f"real images in {cache}")
        references.append(reference)
    return references


def weights_of_judges(judges: Sequence[str], given: Sequence[str]) -> list[Path | None]:
    """Return each judge's local weights: of one, FILE; of several, NAME=FILE. Raises UsageError for another."""
    files: dict[str, str] = {}
    for word in given:
        name, equals, file = word.partition("=")
        if name in judges and equals:
            files[name] = file
        elif len(judges) == len(given) == 1:
            files[judges[0]] = word
        else:
            raise UsageError(
                f"evaluation.encoder_weights: {word!r} is of no judge; expected NAME=FILE, NAME one of "
                f"{', '.join(judges)}"
            )
    return [Path(files[name]) if name in files else None for name in judges]


def check_evaluation(config: RunConfig) -> None:
    """Raise UsageError where an evaluation cannot be made, as far as that shows before a network is loaded."""
    settings, names = config.evaluation, [reference.name for reference in open_references(config)]
    files = [("encoder_weights", file) for file in weights_of_judges(names, settings.encoder_weights)]
    files += [(name, getattr(settings, name)) for name in ("autoencoder_weights", "inception_weights")]
    for name, file in files:
        if file is not None and not Path(file).is_file():
            raise UsageError(f"evaluation.{name}={file}: no such file")


class Evaluation:
    """Compares a run's samples with the data, in the space of each judge; the real vectors are read once.

    Every rank calls `at`; all of them draw samples, rank 0 encodes them and writes.
    """

    def __init__(
        self,
        run: Run,
        judges: Sequence[Judge],
        *,
        decode: Decoder,
        decoder: str,
        score: Scorer | None = None,
        tell: Callable[[str], object] = print,
    ) -> None:
        self._score = score
        self._tell = tell
        self._decode = decode
        self._decoder = decoder
        settings = run.config.evaluation
        self._judges = [
            (judge, judge.reference.vectors(judge.reference.some_rows(settings.num_real, run.config.seed)))
            for judge in judges
        ]
        self._request = SampleRequest(
            num=settings.num,
            seed=run.config.seed,
            sampler=settings.sampler_config(),
        )

    def missing(self, run: Run) -> bool:
        """Say, on all ranks alike, whether this step is to be evaluated and has no record: a run ended over it."""
        if run.step == 0 or run.step % run.config.evaluation.every:
            return False
        steps = [record["step"] for record in read_records(run.folder / FILE)] if run.world.is_main else [run.step]
        return run.world.most([float(run.step not in steps)]) != [0.0]

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of what is compared, in the space of each judge."""
        spaces = [judge.reference.space for judge, _ in self._judges]
        return tuple(f"{kind}_{space}" for space in spaces for kind in ("frechet", "precision", "recall"))

    def at(self, run: Run, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Evaluate the EMA at this step, write the record, tell it in a line and return it; rank 0 does.

        `stop` is asked often; where it says so, the step stays without its record, and what was drawn is kept.
        """
        record = None
        try:
            npz = self._draw(run, stop)
            if run.world.is_main:
                record = self._record(run, npz, stop)
                write_record(run.folder / FILE, record)
                figures = "  ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "step")
                self._tell(f"evaluation at step {run.step}  {figures}")
        except Stopped:
            if run.world.is_main:
                self._tell(f"evaluation at step {run.step} stopped; --resume auto goes on with it")
        return record

    def _record(self, run: Run, npz: Path, stop: Callable[[], bool]) -> dict[str, float]:
        """Return the figures of the samples in `npz`; raise Stopped where `stop` says so."""
        settings = run.config.evaluation
        vectors: list[list[np.ndarray]] = [[] for _ in self._judges]
        for pictures in pictures_of(npz, settings.batch_size):
            if stop():
                raise Stopped
            for (judge, _), found in zip(self._judges, vectors, strict=True):
                found.append(judge.encode(pictures))
        record: dict[str, float] = {"step": run.step, "num": sum(map(len, vectors[0]))}
        for (judge, real), found in zip(self._judges, vectors, strict=True):
            record |= compare(real, np.concatenate(found), space=judge.reference.space, neighbours=settings.neighbours)
        return record | ({} if self._score is None else self._score(npz))

    def _draw(self, run: Run, stop: Callable[[], bool]) -> Path:
        sampler = self._request.sampler
        name = f"{run.step:07d}-{sampler.sampler}{sampler.steps}-cfg{sampler.cfg_scale:g}-{self._request.num}.npz"
        with torch.autocast(run.world.device.type, torch.bfloat16, enabled=run.config.precision == "bf16"):
            return sample_to_npz(
                run.ema.model,
                self._request,
                run.folder / FOLDER / name,
                field=run.field,
                norm=run.norm,
                decode=self._decode,
                decoder=self._decoder,
                batch_size=run.config.evaluation.batch_size,
                world=run.world,
                about={"precision": run.config.precision},
                stop=stop,
            )


def compare(real: np.ndarray, generated: np.ndarray, *, space: str, neighbours: int) -> dict[str, float]:
    """Return the figures of `generated` [N, E] beside `real` [M, E], each named by the space that they lie in."""
    precision, recall = precision_recall(real[: len(generated)], generated, neighbours)
    return {
        f"frechet_{space}": frechet_distance(real, generated),
        f"precision_{space}": precision,
        f"recall_{space}": recall,
    }


def read_records(file: Path) -> list[dict[str, Any]]:
    """Return the records of `file`, none where there is no such file. Raises UsageError where it is damaged."""
    try:
        lines = read_text(file, most=MOST_TABLE_BYTES).splitlines() if file.exists() else []
        return [record for line in lines if (record := json.loads(line))["step"] >= 0]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{file} is damaged ({error!r}); move it away, then continue with --resume auto") from error


def write_record(file: Path, record: dict[str, Any]) -> None:
    """Put `record` after the lines of earlier steps: a step that is run again after a resume is not there twice."""
    kept = [earlier for earlier in read_records(file) if earlier["step"] < record["step"]]
    try:
        write_whole(file, "".join(f"{json.dumps(line)}\n" for line in [*kept, record]).encode())
    except OSError as error:
        raise JobError(
            f"{file} cannot be written ({error.strerror}); make room, then continue with --resume auto"
        ) from error
