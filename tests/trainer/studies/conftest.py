"""A study of tiny SiTs that were really trained and evaluated, runs written by hand where their figures matter, and a
headless Chromium (benchmarks/chromium.py).
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from repa.trainer.commands.ablate import ablate_command
from repa.trainer.commands.train import train_command
from repa.trainer.models.sit import SIZES
from repa.trainer.runs.settings import Layer, recipe_layer, resolve
from repa.trainer.studies import ablation, schedule, trial
from repa.trainer.studies.probe import Cost
from repa.trainer.studies.trial import Trial

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from chromium import Chromium, found_program

JUDGE = "hog-grid4"


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 140 small pictures in pixel space with HOG tokens (E = 128), built by repa-cache."""
    from PIL import Image

    from repa.pipeline.commands.cache import cli

    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(140):
        file = folder / "images" / ("class one", "<b>two</b>")[i % 2].replace("/", "") / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    command = ["build", "--data", str(folder / "images"), "--cache", str(folder / "cache"), "--workers", "0"]
    options = ["--encoder", "hog:grid=4", "--autoencoder", "pixels", "--resolution", "16"]
    assert CliRunner().invoke(cli, [*command, *options], catch_exceptions=False).exit_code == 0
    return folder / "cache"


@pytest.fixture(scope="session")
def trained_study(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four finished runs (sit and irepa, two seeds each), evaluated at steps 3 and 6, and one that was not finished."""
    from repa.trainer.commands.train import train_command

    study = tmp_path_factory.mktemp("trained") / "study"
    common = ["--cache", str(photographs), "--model", "SiT-Ti/4", "--batch-size", "8", "--device", "cpu"]
    settings = ["log_every=2", "alignment.encoder_depth=1", "ema_decay=0.1", "evaluation.every=3", "evaluation.num=130"]
    settings += ["evaluation.steps=2", "evaluation.batch_size=65", f"evaluation.encoders={JUDGE}"]
    runs = [("sit", 0, 6), ("sit", 1, 6), ("irepa", 0, 6), ("irepa", 1, 6), ("irepa", 2, 3)]
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "Ti", (2, 32, 2))
        torch.set_num_threads(1)
        for recipe, seed, steps in runs:
            out = study / f"{recipe}-seed{seed}"
            words = [f"--set={setting}" for setting in (*settings, f"seed={seed}")]
            command = [*common, *words, "--recipe", recipe, "--steps", str(steps), "--out", str(out)]
            train_command.main(command, standalone_mode=False)
    torch.set_num_threads(threads)
    unfinished = study / "irepa-seed2" / "config.json"  # its target was raised after it had been trained
    unfinished.write_text(json.dumps(json.loads(unfinished.read_text()) | {"steps": 6}))
    return study


def write_run(
    folder: Path,
    *,
    evaluations: Sequence[dict[str, Any]] = (),
    steps: int = 10,
    done: int | None = None,
    recipe: str = "irepa",
    metrics: Callable[[int], dict[str, float]] = lambda step: {"denoising_loss": 1.0 / step},
    **settings: Any,
) -> Path:
    """Write a run's folder by hand: its config as repa-train resolves it, `done` logged steps, evaluations."""
    values = {"cache": "caches/x", "out": str(folder), "model": "SiT-Ti/2", "steps": steps, **settings}
    values |= {"evaluation.every": 5} if evaluations else {}
    config = resolve([recipe_layer(recipe, "SiT-Ti/2"), Layer(source="test", values=values)]).plain()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"resolved": {"class_names": ["a", "b"]}}))
    lines = [{"step": step, **metrics(step)} for step in range(1, (steps if done is None else done) + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluations:
        (folder / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    return folder


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """Return `write_run`."""
    return write_run


STUDY = """
base: {{cache: {cache}, model: SiT-Ti/2, steps: {steps}, batch_size: 8, latent_norm: channel,
        alignment.encoder_depth: 1, log_every: 2}}
grid: {{recipe: [sit, irepa], alignment.gamma: {gammas}}}
seeds: [0]
"""


@pytest.fixture
def study(make_cache, tmp_path):
    """Return a function that writes the file of a study of one baseline and some gammas."""
    cache = make_cache().path

    def write(*, gammas: str = "[0, 0.6]", steps: int = 4, cache: Path = cache) -> Path:
        file = tmp_path / "study.yaml"
        file.write_text(STUDY.format(cache=cache, steps=steps, gammas=gammas))
        return file

    return write


@pytest.fixture
def repa_ablate(small_sit, monkeypatch, capsys):
    """Return a function that runs repa-ablate, whose runs train in this process: (study, out, *arguments)."""
    trained: list[str] = []

    def train_here(given: Trial, stop=lambda: False) -> int:
        trained.append(Path(given.folder).name)
        code = 0
        try:
            train_command.main(given.command()[3:], standalone_mode=False)
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        trial._note(Path(given.folder), code)
        return code

    monkeypatch.setattr(schedule, "run_trial", train_here)
    monkeypatch.setattr(trial, "last_line", lambda log: "the last line")
    monkeypatch.setattr(ablation, "probe", lambda settings, **_: Cost(step_s=0.5, peak_bytes=10**9, row_bytes=100))

    def run(study: Path, out: Path, *arguments: str):
        trained.clear()
        capsys.readouterr()
        code = 0
        try:
            ablate_command.main(
                [str(study), "--out", str(out), "--device", "cpu", "--serial", *arguments], standalone_mode=False
            )
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        printed = capsys.readouterr()
        return code, printed.out + printed.err, list(trained)

    return run


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """Yield a browser; skip the test, and say so, where this machine has none."""
    program = found_program()
    if program is None:
        pytest.skip("no Chromium (apt-get install chromium): the report is not tried in a browser")
    with Chromium(program, tmp_path_factory.mktemp("profile")) as running:
        yield running
