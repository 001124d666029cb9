"""Sheets of samples, and that drawing them leaves a run as it was."""

import errno
import io
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from repa.cache_specs.errors import JobError, UsageError
from repa.trainer.evaluating import grids
from repa.trainer.models.checkpoint import load_checkpoint
from repa.trainer.sampling.sample import SampleRequest

GRID = ("--set", "grid.every=2", "--set", "grid.num=6", "--set", "grid.steps=2", "--set", "grid.cfg_scale=1.5")


def test_grids_change_nothing_in_the_run(make_cache, repa_train, tmp_path):
    cache = make_cache().path
    plain = repa_train(cache, tmp_path / "plain", "--steps", "5")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn = repa_train(cache, tmp_path / "drawn", "--steps", "5", *GRID)
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn.losses() == plain.losses()
    states = [load_checkpoint(tmp_path / name / "checkpoints/0000005.pt") for name in ("plain", "drawn")]
    for part in ("model", "ema"):
        assert all(torch.equal(states[0][part][name], states[1][part][name]) for name in states[0][part])
    sheets = sorted((tmp_path / "drawn/samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["0000002.png", "0000004.png"]
    with Image.open(sheets[0]) as sheet:
        assert sheet.size == (2 * 8 + 1, 3 * 8 + 2)  # three classes a row each, 8 px, gaps of 1
    board = EventAccumulator(str(tmp_path / "drawn/tensorboard")).Reload()
    assert [(image.step, image.width) for image in board.Images("samples")] == [(2, 17), (4, 17)]


def test_without_a_decoder_latents_are_kept_and_it_is_said(make_cache, repa_train, tmp_path, monkeypatch):
    def missing(*_args, **_options):
        raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    monkeypatch.setattr("repa.pipeline.models.autoencoders.load_autoencoder", missing)
    outcome = repa_train(make_cache().path, tmp_path / "run", "--steps", "2", *GRID)
    assert outcome.code == 0
    assert outcome.error.count("diffusers is not installed: latents are saved as they are") == 1
    latents = np.load(tmp_path / "run/samples/0000002.npy")
    assert latents.shape == (6, 3, 8, 8)
    assert latents.dtype == np.float32


def test_a_disk_that_refuses_a_grid_costs_no_steps(make_cache, repa_train, tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache, out = make_cache().path, tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        outcome = repa_train(cache, out, "--steps", "5", *GRID)
        np.savez(tmp_path / "rows.npz", np.zeros((1, 4, 4, 3), dtype=np.uint8))
        with pytest.raises(JobError, match=r"rows.png cannot be written \(No space left.*give the same command again"):
            grids.sheet_of_file(tmp_path / "rows.npz", request=SampleRequest(num=1), num_classes=3)
    assert outcome.code == 1
    assert "0000002.png cannot be written (No space left on device). Make room, then continue with" in outcome.error
    assert outcome.error.count("\n") == 1
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["0000002.pt"]
    rest = repa_train(cache, out, "--steps", "5", "--resume", "auto", *GRID)
    assert rest.losses() == repa_train(cache, tmp_path / "whole", "--steps", "5").losses()


def test_a_class_is_a_row_where_that_fits():
    assert grids.arrange([0, 1, 2, 0, 1, 2]) == ([0, 3, 1, 4, 2, 5], 2)
    assert grids.arrange([0, 1, 2, 0]) == ([0, 1, 2, 3], 2)
    assert grids.arrange(list(range(20)) * 2) == (list(range(40)), 6)
    assert grids.arrange([4]) == ([0], 1)


def test_only_the_first_rows_of_a_file_are_read(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "rows.npz", rows)
    np.testing.assert_array_equal(grids.first_rows(tmp_path / "rows.npz", 5), rows[:5])
    request = SampleRequest(num=9, labels="balanced")
    sheet = grids.sheet_of_file(tmp_path / "rows.npz", request=request, num_classes=3)
    with Image.open(sheet) as opened:
        pixels = np.asarray(opened)
    np.testing.assert_array_equal(pixels[:4, 5:9], rows[3])  # class 0: images 0, 3, 6 in the first row


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "other", "short"])
def test_a_damaged_file_of_samples_is_one_line(tmp_path, damage):
    npz, rows = tmp_path / "a.npz", np.arange(7 * 12, dtype=np.uint8).reshape(7, 2, 2, 3)
    np.savez(npz, arr_0=rows)
    np.testing.assert_array_equal(np.concatenate(list(grids.pictures_of(npz, 3))), rows)
    np.testing.assert_array_equal(grids.first_rows(npz, 4), rows[:4])
    whole = npz.read_bytes()
    if damage == "other":
        np.savez(npz, other=rows)
    elif damage == "short":
        with zipfile.ZipFile(npz, "w") as archive:
            data = io.BytesIO()
            np.save(data, rows)
            archive.writestr("arr_0.npy", data.getvalue()[:-40])
    else:
        npz.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "noise": bytes(99)}[damage])
    with pytest.raises(UsageError, match=r"a\.npz is damaged \(.*\); delete it, and it is drawn again"):
        list(grids.pictures_of(npz, 3))
