"""Who else is told of a run, beside metrics.jsonl and TensorBoard: Weights & Biases, or a function of the user's own.

    logger=wandb                 the library, where it is installed; project, entity, mode by its own WANDB_ variables
    logger=my_logger.py:open     a function of a file
    logger=package.module:open   a function of a package that can be imported

The function is called once, when training begins or goes on, on the first rank alone, with one `Told`; it returns a
function that takes a list of records, dicts by name with a "step" in each: every step at each log, and an evaluation's
figures. If that has a `close`, it is called at the end. A step that runs again after a kill is told again.

Telling is no part of training: what fails here is said once and left out from there, and metrics.jsonl has everything.
"""

import functools
import importlib
import importlib.util
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ...cache_specs.errors import UsageError, reason
from ...cache_specs.files.outside import MOST_SETTINGS_BYTES, parse_json, read_file
from ...cache_specs.files.whole_file import write_whole
from .metrics import Record, say

WANDB = "wandb"
WANDB_FILE = "wandb.json"  # {"id": ...}, in the run's folder: a resume goes on with the same run there


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a logger is told of a run: its folder, its settings as JSON values, its digest, and the steps done."""

    folder: Path
    config: Mapping[str, Any]
    digest: str
    step: int


Tell = Callable[[Sequence[Record]], object]
Open = Callable[[Told], Tell]


def find_logger(name: str | None) -> Open | None:
    """Return what opens the logger of this name, None for none.

    A user's module is imported. Raises UsageError where there is no such library, file, module or function.
    """
    if name is None:
        return None
    if name == WANDB:
        if importlib.util.find_spec(WANDB) is None:
            raise UsageError("logger=wandb: wandb is not installed; pip install wandb, or leave logger out")
        return _open_wandb
    module, colon, function = name.rpartition(":")
    if not colon or not module or not function:
        raise UsageError(f"logger is {name!r}; expected wandb, FILE.py:function or package.module:function")
    try:
        found = getattr(_imported(module), function)
    except (Exception, SystemExit) as error:  # whatever the user's own code raises as it is imported
        raise UsageError(f"logger={name}: {type(error).__name__}: {reason(error)}") from error
    if not callable(found):
        raise UsageError(f"logger={name}: a {type(found).__name__}; expected a function that takes what a run is")
    return found


@functools.cache  # checked before the training, called when it begins
def _imported(module: str) -> Any:
    if not module.endswith(".py"):
        return importlib.import_module(module)
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class Logger:
    """The logger of a run while it trains; it never stops the training."""

    def __init__(self, name: str | None, told: Told) -> None:
        self._name = name
        self._tell: Tell | None = None
        find = find_logger(name)
        if find is not None:
            self._guarded(lambda: setattr(self, "_tell", find(told)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        close = getattr(self._tell, "close", None)
        if close is not None:
            self._guarded(close)

    def write(self, records: Sequence[Record]) -> None:
        """Tell the records of some steps."""
        tell = self._tell
        if tell is not None:
            self._guarded(lambda: tell([dict(record) for record in records]))

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            self._tell = None
            say(f"logger={self._name} failed ({type(error).__name__}: {reason(error)}); it is left out from here on")


class _Wandb:
    """Records as history of a run of Weights & Biases."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def __call__(self, records: Sequence[Record]) -> None:
        for record in records:
            self._run.log({name: value for name, value in record.items() if name != "step"}, step=int(record["step"]))

    def close(self) -> None:
        self._run.finish()


def _open_wandb(told: Told) -> Tell:
    """Begin or go on with a run there; its id lies in the run's folder, where the library's own files go, too."""
    import wandb

    config = {**told.config, "run_digest": told.digest}
    name, folder = told.folder.resolve().name, str(told.folder)
    run = wandb.init(id=_wandb_id(told.folder), resume="allow", dir=folder, name=name, config=config)
    return _Wandb(run)


def _wandb_id(folder: Path) -> str:
    file = folder / WANDB_FILE
    try:
        found = parse_json(read_file(file, most=MOST_SETTINGS_BYTES))["id"]
    except FileNotFoundError:
        found = secrets.token_hex(8)
        write_whole(file, (json.dumps({"id": found}) + "\n").encode())
    if not isinstance(found, str) or not found.isalnum():
        raise UsageError(f"{file} holds no id; write it anew, or remove it to begin another run there")
    return found
