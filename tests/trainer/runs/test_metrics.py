"""metrics.jsonl holds each step once, whatever was interrupted."""

import errno
import json
import os

import pytest

from repa.cache_specs.errors import JobError
from repa.trainer.runs.metrics import MetricsFile, Progress


def records(first: int, last: int, value: float = 0.1) -> list[dict]:
    return [{"step": step, "denoising_loss": value} for step in range(first, last + 1)]


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_steps_after_the_checkpoint_are_cut(tmp_path):
    with MetricsFile(tmp_path, done=0) as metrics:
        metrics.write(records(1, 9))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 10, "denois')  # torn by a kill
    with MetricsFile(tmp_path, done=6) as metrics:
        metrics.write(records(7, 8, value=1 / 3))
    assert read(path) == records(1, 6) + records(7, 8, value=1 / 3)
    with MetricsFile(tmp_path, done=0):
        pass
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        *(
            b'{"step": 1}\n' + line
            for line in (
                b'{"step": 3}\n',
                b"nonsense\n",
                b'{"step": Infinity}\n',
                b'{"step": "2"}\n',
                b'{"step": 2.5}\n',
                b'{"step": 2',
                b"[" * 100_000 + b"\n",
                b'{"step": ' + b"9" * 6000 + b"}\n",
                b"\xff\n",
                b"2\n",
                b" " * (3 << 20),
            )
        ),
    ],
)
def test_a_history_with_holes_is_refused(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_bytes(damage)
    with pytest.raises(JobError, match=r"metrics.jsonl: line [12] should be step"):
        MetricsFile(tmp_path, done=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == damage


@pytest.mark.parametrize("dangling", [False, True])
def test_no_file_of_others_is_written_through_a_link(tmp_path, dangling):
    others, run = tmp_path / "others.txt", tmp_path / "run"
    run.mkdir()
    if not dangling:
        others.write_text("of somebody else")
    (run / "metrics.jsonl").symlink_to(others)
    with pytest.raises(JobError, match=r"metrics.jsonl is a link or a pipe, not a file of the run; remove it"):
        MetricsFile(run, done=0)
    assert others.exists() != dangling
    assert dangling or others.read_text() == "of somebody else"
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")  # nobody writes to it: opening it would wait for ever
    with pytest.raises(JobError, match="a link or a pipe"):
        MetricsFile(run, done=3)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_lost_file_begins_anew_and_says_so(tmp_path, capsys):
    with MetricsFile(tmp_path, done=4) as metrics:
        metrics.write(records(5, 8))
    assert "metrics.jsonl begins at step 5: the steps before it were lost" in capsys.readouterr().err
    with MetricsFile(tmp_path, done=6) as metrics:
        metrics.write(records(7, 7))
    assert read(tmp_path / "metrics.jsonl") == records(5, 7)
    with MetricsFile(tmp_path, done=3) as metrics:  # an older checkpoint is resumed
        metrics.write(records(4, 4))
    assert read(tmp_path / "metrics.jsonl") == records(4, 4)
    assert "begins at step 4" in capsys.readouterr().err


@pytest.mark.parametrize("refused", ["write", "fsync"])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, refused):
    """It stays full while the block is left: closing the file must not replace the error by its own."""
    message = (
        r"metrics.jsonl cannot be written \(No space left on device\). Make room, then continue with --resume auto"
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, refused, full)
        with pytest.raises(JobError, match=message), MetricsFile(tmp_path, done=0) as metrics:
            metrics.write(records(1, 1))


def test_what_is_not_a_file_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(JobError, match=r"metrics.jsonl cannot be written \(Is a directory\). See that it can be"):
        MetricsFile(tmp_path, done=0)


def test_without_a_terminal_a_log_is_a_line(capsys):
    with Progress(done=0, total=8) as progress:
        progress.advance(1)
        progress.log({"step": 1, "denoising_loss": 0.25, "samples_per_s": 32.0})
    assert capsys.readouterr().out.startswith("step 1/8  denoising 0.2500  32 samples/s")


@pytest.mark.parametrize("wall_s", ["null", "[]", '"x"', "1" * 400])
def test_a_time_that_is_no_number_is_named(wall_s, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "wall_s": {wall_s}}}\n')
    with pytest.raises(JobError, match="line 1 has a wall_s that is no number of seconds"):
        MetricsFile(tmp_path, done=1)
