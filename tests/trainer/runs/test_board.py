"""TensorBoard's events of a run, read back by its own library: scalars, settings, figures, sheets."""

import errno
import os
import sys
import threading

import numpy as np
import pytest

from repa.cache_specs.errors import JobError
from repa.trainer.runs.board import TensorBoard


def records(first: int, last: int, value: float = 0.1) -> list[dict]:
    return [{"step": step, "denoising_loss": value} for step in range(first, last + 1)]


def full(*_args, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return events


def test_a_full_disk_under_tensorboard_is_one_line(tmp_path, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    before = set(threading.enumerate())
    board = TensorBoard(tmp_path, done=0)
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", full)
        patch.setattr(RecordWriter, "flush", full)
        patch.setattr(threading, "excepthook", lambda _: None)  # TensorBoard's thread would print its traceback
        with pytest.raises(JobError, match=r"tensorboard cannot be written \(No space left on device\)"), board:
            board.write(records(1, 3))
        for thread in set(threading.enumerate()) - before:
            thread.join()
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match="tensorboard cannot be written"):
        TensorBoard(tmp_path / "file", done=0)


def test_tensorboard_holds_the_scalars_and_is_not_needed(tmp_path, monkeypatch, capsys):
    with TensorBoard(tmp_path, done=0) as board:
        board.write(records(1, 3))
    events = events_of(tmp_path)
    assert [event.step for event in events.Scalars("denoising_loss")] == [1, 2, 3]
    assert events.Scalars("denoising_loss")[0].value == pytest.approx(0.1)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with TensorBoard(tmp_path / "other", done=0) as board:
        board.write(records(1, 1))
    assert "tensorboard is not installed" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_tensorboards_folder_is_not_entered_through_a_link(tmp_path):
    pytest.importorskip("tensorboard")
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "tensorboard").symlink_to(other)
    with pytest.raises(JobError, match="tensorboard is a link, not a folder of the run; remove it"):
        TensorBoard(tmp_path, done=0)
    assert not list(other.iterdir())
    (tmp_path / "tensorboard").unlink()
    with TensorBoard(tmp_path, done=0) as board:
        board.write(records(1, 1))
    assert list((tmp_path / "tensorboard").iterdir())


def test_settings_figures_and_sheets_are_there(tmp_path):
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    settings = {"seed": 3, "flip": True, "optimizer.clip": None, "encoders": ["a", "b"], "model": "SiT-B/2"}
    with TensorBoard(tmp_path, done=0, settings=settings, figures=["frechet_toy"]) as board:
        board.write(records(1, 2))
        board.evaluated({"step": 2, "num": 130, "frechet_toy": 7.5})
        board.drawn(2, pixels)
    events = events_of(tmp_path)
    (figure,) = events.Scalars("evaluation/frechet_toy")
    assert (figure.step, figure.value) == (2, 7.5)
    assert "evaluation/num" not in events.Tags()["scalars"]
    (sheet,) = events.Images("samples")
    assert (sheet.step, sheet.height, sheet.width) == (2, 2, 3)

    def stored(tag: str, which: str):
        content = events.summary_metadata[tag].plugin_data.content
        return getattr(plugin_data_pb2.HParamsPluginData.FromString(content), which)

    started = stored(metadata.SESSION_START_INFO_TAG, "session_start_info").hparams
    assert {key: value.string_value for key, value in started.items() if value.string_value} == {
        "optimizer.clip": "none",
        "encoders": "a, b",
        "model": "SiT-B/2",
    }
    assert (started["seed"].number_value, started["flip"].number_value) == (3, 1)  # as the library has truth
    metrics = stored(metadata.EXPERIMENT_TAG, "experiment").metric_infos
    assert [info.name.tag for info in metrics] == ["denoising_loss", "evaluation/frechet_toy"]
