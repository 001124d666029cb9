"""A study as it lies on disk: runs, each read from the files that its training left.

In: folders of runs, or of folders of runs. Out: a record a run: settings, metrics as arrays, evaluations, samples, and
how far it came. The files are the truth, so runs started by hand are in a study too; nothing is written or locked, and
a study can be read while it trains. What is damaged is said in `notes` and costs no other run anything.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from ...cache_specs.errors import RepaError, UsageError
from ...cache_specs.files.outside import MOST_TABLE_BYTES, parse_json, read_file
from ..evaluating.evaluation import FILE as EVALUATION_FILE
from ..evaluating.evaluation import FOLDER as EVALUATION_FOLDER
from ..evaluating.grids import FOLDER as SAMPLES_FOLDER
from ..evaluating.grids import first_rows
from ..runs.metrics import METRICS_FILE
from ..runs.resume import LOCK_FOLDER
from ..runs.settings import NOT_SETTINGS, RESOLVED, flatten, used
from ..runs.stored import CONFIG_FILE, in_todays_words
from .trial import OUTCOME_FILE

DEEPEST = 3  # folders below a study in which a run is looked for
LIVE_S = 600  # a run whose lock is of another machine trains if it has written within so many seconds

Status = Literal["finished", "running", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """One finished file of samples, and the request that drew them (num, seed, labels, sampler, decoder, ...)."""

    path: Path
    request: dict[str, Any]

    @property
    def step(self) -> int:
        """The step of the weights that drew them; -1 where the file's name does not say."""
        digits = self.path.name.partition("-")[0]
        return int(digits) if digits.isdecimal() else -1

    def first(self, num: int) -> np.ndarray:
        """Return the first `num` images [n,H,W,3] uint8, or latents [n,C,h,w] float32; no more of it is read."""
        return first_rows(self.path, min(num, int(self.request["num"])))


@dataclass(kw_only=True)
class RunRecord:
    """One run: its folder, its settings as config.json has them, and what its training left."""

    folder: Path
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)  # what could not be read, a line each

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that have an effect, by dotted key in today's words, lists as tuples."""
        try:
            config = in_todays_words(self.config, source=str(self.folder))
        except RepaError:  # of a version that has other settings: as they are
            config = self.config
        plain = used({key: value for key, value in config.items() if key not in NOT_SETTINGS})
        return {key: tuple(value) if isinstance(value, list) else value for key, value in flatten(plain).items()}

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.config.get(RESOLVED, {}).get("class_names", ()))

    @cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        """metrics.jsonl by column: `step` [n] int64, the others [n] float64, NaN at steps that lack them."""
        return _columns(_lines(self.folder / METRICS_FILE, self.notes))

    @property
    def steps(self) -> int:
        """Steps done."""
        done = self.metrics["step"]
        return int(done[-1]) if len(done) else 0

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The records of evaluation.jsonl, ascending by step: `step`, `num` and a figure an entry."""
        return sorted(_lines(self.folder / EVALUATION_FILE, self.notes), key=lambda record: record["step"])

    @cached_property
    def samples(self) -> list[Samples]:
        """Files of samples, of evaluations first, each with its request; by step."""
        found = []
        for folder in (EVALUATION_FOLDER, SAMPLES_FOLDER):
            for path in sorted((self.folder / folder).glob("*.npz")):
                request = _json(path.with_suffix(".json"), self.notes)
                if isinstance(request.get("num"), int) and isinstance(request.get("sampler"), dict):
                    found.append(Samples(path=path, request=request))
        return found

    @cached_property
    def grids(self) -> dict[int, Path]:
        """Sheets of samples that the run drew while it trained, by step."""
        sheets = (self.folder / SAMPLES_FOLDER).glob("*.png")
        return {int(path.stem): path for path in sorted(sheets) if path.stem.isdecimal()}

    @cached_property
    def status(self) -> Status:
        """finished: all steps done; running: its folder is locked; failed, stopped: as its outcome says, or killed."""
        if self.config and self.steps >= self.config["steps"]:
            return "finished"
        if self._trains():
            return "running"
        return "failed" if self._outcome.get("status") == "failed" else "stopped"

    @property
    def reason(self) -> str:
        """Why the run has not done all its steps, where its outcome says."""
        known = self.status in ("failed", "stopped")
        return str(self._outcome.get("reason", "")) if known else ""

    @cached_property
    def _outcome(self) -> dict[str, Any]:
        path = self.folder / OUTCOME_FILE
        return _json(path, self.notes) if path.exists() else {}

    def _trains(self) -> bool:
        # Seen, not tried: to try the lock would be to hold it for a moment, in which a run that starts is refused.
        lock = self.folder / LOCK_FOLDER / "lock"
        try:
            inode = lock.stat().st_ino
        except OSError:
            return False
        try:
            if any(line.split()[5].endswith(f":{inode}") for line in Path("/proc/locks").read_text().splitlines()):
                return True
        except (OSError, IndexError):
            pass
        try:
            return time.time() - os.stat(self.folder / METRICS_FILE).st_mtime < LIVE_S
        except OSError:
            return False


@dataclass(frozen=True, kw_only=True)
class Study(Sequence[RunRecord]):
    """Runs in the order of their folders; `notes` says what else was found there and left out."""

    folders: tuple[Path, ...]
    runs: tuple[RunRecord, ...]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.folders[0].resolve().name if len(self.folders) == 1 else f"{len(self.runs)} runs"

    def __len__(self) -> int:
        return len(self.runs)

    @overload
    def __getitem__(self, index: int) -> RunRecord: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[RunRecord, ...]: ...
    def __getitem__(self, index: int | slice) -> RunRecord | tuple[RunRecord, ...]:
        return self.runs[index]

    def __iter__(self) -> Iterator[RunRecord]:
        return iter(self.runs)


def load(*folders: Path | str) -> Study:
    """Return the runs in `folders`: each is a run, or holds runs up to three folders deep.

    Raises UsageError where a folder is missing or no run is found in it.
    """
    runs: dict[Path, RunRecord] = {}
    notes: list[str] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; expected a run of repa-train, or a folder of runs")
        found = list(_runs(folder, DEEPEST, notes))
        if not found:
            said = f": {notes[-1]}" if notes else ""
            raise UsageError(
                f"{folder} holds no run (a folder with {CONFIG_FILE}){said}. Name the --out of repa-train, or the "
                f"folder above several"
            )
        runs |= {run.folder.resolve(): run for run in found}
    return Study(folders=tuple(map(Path, folders)), runs=tuple(runs.values()), notes=tuple(notes))


def _runs(folder: Path, depth: int, notes: list[str]) -> Iterator[RunRecord]:
    config = folder / CONFIG_FILE
    if config.exists() or (folder / OUTCOME_FILE).exists():
        wrong: list[str] = []
        settings = _json(config, wrong) if config.exists() else {}
        missing = sorted({"recipe", "model", "steps", "batch_size"} - settings.keys()) if config.exists() else []
        if wrong or missing or not isinstance(settings.get("steps", 0), int):
            notes.extend(
                wrong or [f"{config} is not of a run of repa-train: it has no {', '.join(missing) or 'steps'}"]
            )
            return
        yield RunRecord(folder=folder, config=settings)
        return
    if depth:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                yield from _runs(path, depth - 1, notes)


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    """Return an object of a JSON file, empty and with a note where there is none or it is damaged."""
    try:
        loaded = parse_json(read_file(path, most=MOST_TABLE_BYTES))
    except (OSError, ValueError) as error:
        notes.append(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})")
        return {}
    if not isinstance(loaded, dict):
        notes.append(f"{path} holds a {type(loaded).__name__}; expected an object")
        return {}
    return loaded


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines up to the first that is damaged, which is noted.

    A last line without its end is being written, or was cut by a kill: it is left out without a word.
    """
    try:
        data = read_file(path, most=MOST_TABLE_BYTES)
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{path} cannot be read ({error.strerror})")
        return []
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    try:
        records = json.loads(b"[" + b",".join(lines) + b"]")  # at once: a third of the time of one by one
        if len(records) == len(lines) and all(map(_is_record, records)):
            return records
    except (ValueError, RecursionError):
        pass
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not _is_record(record):
            notes.append(f"{path}: line {number} is damaged; it and what follows are left out")
            break
        records.append(record)
    return records


def _is_record(record: Any) -> bool:
    return isinstance(record, dict) and type(record.get("step")) is int and abs(record["step"]) < 2**63


def _columns(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    names = sorted({name for record in records for name in record if name != "step"})
    columns = {"step": np.array([record["step"] for record in records], dtype=np.int64)}
    for name in names:
        values = (record.get(name) for record in records)
        columns[name] = np.array([v if isinstance(v, int | float) else np.nan for v in values], dtype=np.float64)
    return columns
