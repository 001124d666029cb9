"""What a run says of its speed, by a clock that the test turns."""

import json
from types import SimpleNamespace

import pytest
import torch

from repa.trainer.reading.speed import Interval, Speed
from repa.trainer.training import reporter as reporting
from repa.trainer.training.reporter import Reporter, StepResult


def interval(*, steps: int, **seconds: float) -> Interval:
    return Interval(steps=steps, num_bytes=steps * 100_000_000, **seconds)


def speed(*, staged: bool = False, deepest: bool = False) -> Speed:
    return Speed(batch_size=256, staged=staged, deepest=deepest)


def test_a_record_has_samples_bytes_and_the_share_that_waited():
    record = speed().record(interval(steps=50, seconds=20, waited_s=1, reading_s=4))
    assert record == {"samples_per_s": 640, "read_gb_per_s": 0.25, "data_wait": 0.05}


@pytest.mark.parametrize(("log_every", "at"), [(1, 70), (7, 77), (20, 80), (50, 100), (1000, 2000)])
def test_the_bound_is_said_once_after_the_warm_up(log_every, at):
    meter = speed()
    said = []
    for step in range(log_every, 3001, log_every):
        slow = step <= 20  # the warm-up waits all the time; it must not count
        passed = interval(steps=log_every, seconds=log_every, waited_s=log_every * (1.0 if slow else 0.003))
        passed.reading_s = log_every / 50
        line = meter.bound(passed, last=False)
        if line is not None:
            said.append((step, line))
    expected = "bound by the model: 0.3 % of the time waits for data (100.0 MB/s read, 5.0 GB/s possible)"
    assert said == [(at, expected)]


@pytest.mark.parametrize(
    ("staged", "deepest", "reading_s", "remedies"),
    [
        (False, False, 5, "stage the cache on a local disk (--stage DIR) or read less (int8 tokens, fewer encoders) or "
                          "raise --prefetch-bytes"),
        (True, False, 5, "read less (int8 tokens, fewer encoders) or raise --prefetch-bytes"),
        (True, True, 5, "read less (int8 tokens, fewer encoders)"),
        (True, False, 9.9, "read less (int8 tokens, fewer encoders)"),
    ],
)  # fmt: skip
def test_a_run_bound_by_data_is_told_what_would_help(staged, deepest, reading_s, remedies):
    meter = speed(staged=staged, deepest=deepest)
    meter.bound(interval(steps=50, seconds=1, waited_s=0, reading_s=1), last=False)
    line = meter.bound(interval(steps=50, seconds=10, waited_s=4.1, reading_s=reading_s), last=False)
    possible = {5: "1.0 GB/s", 9.9: "505.1 MB/s"}[reading_s]
    start = f"bound by data: 41 % of the time waits for it, at 500.0 MB/s ({possible} while it is read); "
    assert line == start + remedies


def test_a_short_run_speaks_at_its_last_log_or_has_not_warmed_up():
    meter = speed()
    assert meter.bound(interval(steps=25, seconds=1), last=False) is None
    assert meter.bound(interval(steps=5, seconds=1, waited_s=0.06, reading_s=1), last=True).startswith("bound by data")
    assert speed().bound(interval(steps=20, seconds=1), last=True) is None


@pytest.mark.parametrize("main", [True, False])
def test_the_slowest_rank_counts_and_the_main_one_speaks(tmp_path, capsys, monkeypatch, main):
    """Rank 0 never waits, its peer waits for half of the time: every rank stands still as long."""
    asked = []

    def most(values):
        asked.append(values)
        return [max(ours, theirs) for ours, theirs in zip(values, (0.0, 5.0, 10.0), strict=True)]

    world = SimpleNamespace(is_main=main, size=2, mean=lambda values: values, most=most)
    ahead = SimpleNamespace(waited_s=0.0, reading_s=0.0, depth=2)
    run = SimpleNamespace(
        folder=tmp_path,
        world=world,
        step=0,
        config=SimpleNamespace(batch_size=8, steps=200, stage=None, logger=None),
        batches=SimpleNamespace(row_bytes=lambda step: 125_000_000),
        reader=SimpleNamespace(features=()),
        record=lambda: {"seed": 0},
    )
    monkeypatch.setattr(reporting, "_digest", lambda run: "")
    now = [100.0]
    with Reporter(run, ahead, clock=lambda: now[0]) as reporter:  # type: ignore[arg-type]  # of a run, what is used
        for _ in range(4):
            for _ in range(50):
                reporter.add(StepResult(names=("denoising_loss", "alignment_loss", "grad_norm"), values=torch.zeros(3)))
            run.step += 50
            now[0] += 10
            ahead.reading_s += 2
            reporter.log()
            now[0] += 1000  # a checkpoint is saved
            reporter.resume_clock()
    assert asked == [[10, 0, 2]] * 4
    lines = capsys.readouterr().out.splitlines()
    if not main:
        assert lines == []
        return
    (said,) = (line for line in lines if "bound" in line)
    assert said == "bound by data: 50 % of the time waits for it, at 5.0 GB/s (5.0 GB/s while it is"
    timed = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "wall_s" in line]
    assert [record["wall_s"] for record in timed] == [10, 1020, 2030, 3040]  # what is done between steps counts there
    assert timed[-1].items() >= {"samples_per_s": 40, "read_gb_per_s": 5, "data_wait": 0.5}.items()
