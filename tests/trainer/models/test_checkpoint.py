"""Checkpoints are whole or absent, damage is named, and nothing but weights and plain values is unpickled."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from repa.trainer.models import checkpoint
from repa.trainer.models.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    load_own_checkpoint,
    save_checkpoint,
)
from repa.trainer.models.ema import EMA
from repa.trainer.models.projector import ProjectorConfig
from repa.trainer.models.sit import SiT, SiTConfig

CONFIG = SiTConfig(
    name="tiny/2", input_size=4, patch_size=2, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=2
)


def make_model(seed: int = 0) -> SiT:
    return SiT(CONFIG, [ProjectorConfig(kind="mlp", out_dim=6, hidden_dim=8)], encoder_depth=1, seed=seed)


def save(run: Path, steps: int, keep_last: int = 10, model: SiT | None = None) -> Path:
    model = model or make_model(steps)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # the optimizer's state is there to be stored
    return save_checkpoint(
        run,
        steps=steps,
        model=model,
        ema=EMA(model, 0.9).model,
        opt=optimizer.state_dict(),
        args={"path_type": "linear", "proj_coeff": 0.5},
        config={"interpolant": {"path": "linear"}, "resolved": {"latents": {"scale": [2.0], "bias": [0.5]}}},
        fingerprints={"latents/pixels": "ab"},
        keep_last=keep_last,
    )


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_round_trip_in_the_published_layout(tmp_path: Path):
    model = make_model()
    path = save(tmp_path, 500, model=model)
    assert path == tmp_path / "checkpoints" / "0000500.pt"
    stored = torch.load(path, weights_only=True)  # PyTorch alone, without our allow-list
    assert set(stored) == {
        "model", "ema", "opt", "args", "steps", "architecture", "config", "fingerprints"
    }  # fmt: skip
    assert stored["steps"] == 500
    assert stored["args"]["path_type"] == "linear"
    assert (stored["args"]["encoder_depth"], stored["args"]["num_classes"]) == (1, 2)
    for part in ("model", "ema"):
        assert stored[part].keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(stored[part][name], value), name
    optimizer = torch.optim.AdamW(make_model().parameters())
    optimizer.load_state_dict(stored["opt"])
    loaded = load_checkpoint(path)
    assert loaded["config"]["resolved"]["latents"] == {"scale": [2.0], "bias": [0.5]}
    assert loaded["fingerprints"] == {"latents/pixels": "ab"}
    for mmap in (False, True):
        assert torch.equal(load_checkpoint(path, mmap=mmap)["ema"]["pos_embed"], model.pos_embed)


def test_a_compiled_model_keeps_the_published_names(tmp_path: Path):
    model = make_model()
    model.compile(backend="eager")
    stored = load_checkpoint(save(tmp_path, 1, model=model))
    assert stored["model"].keys() == make_model().state_dict().keys()


def test_the_last_k_are_kept_by_steps(tmp_path: Path):
    assert latest_checkpoint(tmp_path) is None
    for steps in (2, 10, 9_999_999, 10_000_000, 11_000_000):
        path = save(tmp_path, steps, keep_last=3)
        assert latest_checkpoint(tmp_path) == path
    assert names(tmp_path) == ["10000000.pt", "11000000.pt", "9999999.pt"]


@pytest.mark.parametrize("room", [0, 100, 20_000, 60_000])
def test_a_full_disk_leaves_the_previous_one_in_force(tmp_path: Path, monkeypatch, room: int):
    before = save(tmp_path, 5)
    contents = before.read_bytes()
    assert room < len(contents)
    written, write_all = 0, checkpoint.write_all

    def full_disk(descriptor: int, data: bytes) -> None:
        nonlocal written
        if written + len(data) > room:
            write_all(descriptor, memoryview(data)[: room - written])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(descriptor, data)
        written += len(data)

    monkeypatch.setattr(checkpoint, "write_all", full_disk)
    with pytest.raises(CheckpointError, match=r"step 6 could not be written: No space left on device; 0000005\.pt"):
        save(tmp_path, 6, keep_last=1)
    monkeypatch.undo()
    assert names(tmp_path) == ["0000005.pt"]
    assert before.read_bytes() == contents
    assert latest_checkpoint(tmp_path) == before


def test_a_failed_sync_is_a_failed_save(tmp_path: Path, monkeypatch):
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(CheckpointError, match="Input/output error; there is none before it"):
        save(tmp_path, 6)
    assert names(tmp_path) == []


class Interrupting:
    """Stands in a payload, and is interrupted where it is pickled, between two writes."""

    def __reduce__(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize("room", [0, 100, 20_000, 60_000, None])
def test_an_interrupt_is_an_interrupt_and_leaves_the_previous_one_in_force(tmp_path: Path, monkeypatch, room):
    """PyTorch closes its archive all the same, and says "unexpected pos" of what was cut off."""
    before = save(tmp_path, 5)
    contents = before.read_bytes()
    written, write_all = 0, checkpoint.write_all

    def interrupted(descriptor: int, data: bytes) -> None:
        nonlocal written
        if room is not None and written + len(data) > room:
            write_all(descriptor, memoryview(data)[: room - written])
            raise KeyboardInterrupt
        write_all(descriptor, data)
        written += len(data)

    monkeypatch.setattr(checkpoint, "write_all", interrupted)
    model, parts = make_model(), {"args": {}, "config": {}, "fingerprints": {}, "keep_last": 1}
    opt = {"state": torch.zeros(9), "last": Interrupting() if room is None else None}
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, steps=6, model=model, ema=model, opt=opt, **parts)
    assert names(tmp_path) == ["0000005.pt"]
    assert before.read_bytes() == contents


def test_a_save_goes_through_no_link(tmp_path: Path):
    others, folder = tmp_path / "others", tmp_path / "checkpoints"
    others.write_text("of somebody else")
    folder.mkdir()
    for name in (".0000006.pt.partial", ".0000007.pt.partial"):  # of this step, and one that is cleared away
        (folder / name).symlink_to(others)
    path = save(tmp_path, 6)
    assert names(tmp_path) == ["0000006.pt"]
    assert not path.is_symlink()
    assert load_checkpoint(path)["steps"] == 6
    assert others.read_text() == "of somebody else"


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
import torch
from repa.trainer.models import checkpoint
from repa.trainer.models.sit import SiT, SiTConfig

write_all, written = checkpoint.write_all, 0
def die_midway(descriptor, data):
    global written
    write_all(descriptor, data)
    written += len(data)
    if written > 20_000:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.write_all = die_midway
config = SiTConfig(name="tiny/2", input_size=4, patch_size=2, in_channels=3, hidden_size=16, depth=2, num_heads=2,
                   num_classes=2)
model = SiT(config)
checkpoint.save_checkpoint(Path(sys.argv[1]), steps=6, model=model, ema=model, opt={}, args={}, config={},
                           fingerprints={}, keep_last=1)
"""


def test_a_save_that_was_killed_leaves_the_previous_one_and_is_cleared_by_the_next(tmp_path: Path):
    before = save(tmp_path, 5)
    child = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)], check=False)
    assert child.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2  # the partial file is there: the kill did come midway
    assert latest_checkpoint(tmp_path) == before
    assert load_checkpoint(before)["steps"] == 5
    save(tmp_path, 6)
    assert names(tmp_path) == ["0000005.pt", "0000006.pt"]


def test_a_cut_checkpoint_is_named_with_the_way_out(tmp_path: Path):
    save(tmp_path, 4)
    path = save(tmp_path, 5)
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"0000005\.pt: the checkpoint is damaged: .*Delete it to resume from "
                                                  r"0000004\.pt") as caught:  # fmt: skip
            load_checkpoint(path)
        assert "\n" not in str(caught.value)
    (tmp_path / "checkpoints" / "0000004.pt").unlink()
    with pytest.raises(CheckpointError, match="There is none before it: delete it and start the run again"):
        load_checkpoint(path)
    elsewhere = tmp_path / "published.pt"
    elsewhere.write_bytes(whole[:1000])
    with pytest.raises(CheckpointError, match=r"published\.pt: the checkpoint is damaged: .*Fetch or copy it again"):
        load_checkpoint(elsewhere)


def test_a_flipped_byte_is_found(tmp_path: Path):
    path = save(tmp_path, 5)
    whole = path.read_bytes()
    value = make_model().pos_embed.detach().numpy().tobytes()
    place = whole.index(value) + 7  # in a weight, where PyTorch itself does not look
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    torch.load(path, weights_only=True)
    with pytest.raises(CheckpointError, match=r"damaged: the checksum of .*data/\d+ does not match"):
        load_checkpoint(path)


class Malicious:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path):
    witness = tmp_path / "ran"
    path = tmp_path / "evil.pt"
    torch.save({"ema": Malicious(witness)}, path)
    with pytest.raises(CheckpointError, match=r"evil\.pt: refused, it holds more than tensors.*mkdir") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(pickle.dumps({"ema": Malicious(witness)}, protocol=2))
    with pytest.raises(CheckpointError, match=r"evil\.pt"):
        load_checkpoint(path)
    assert not witness.exists()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2702012345\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            LFS,
            r"it is a Git LFS pointer, not the file of 2,702,012,345 bytes that it stands for\. Fetch that",
        ),
        (LFS.replace(b"2702012345", b"9" * 6000), "it is a Git LFS pointer, not the file that it stands for"),
        (b"/annex/objects/SHA256E-s12--ab.pt\n", "it is a git-annex pointer"),
        (b"\n<!DOCTYPE html><html>Log in", "it is a web page"),
        (b"", "damaged: .*Fetch or copy it again"),
        (b"\x80\x02" + b"(" * 99_999, "damaged: it ends early"),
        (b"\x80\x02K\x01.", "damaged"),
        (b"PK\x05\x06\xff\xff\x07\x00" + b"\xff" * 14, "damaged"),
    ],
)
def test_what_lies_there_instead_is_said(tmp_path: Path, data: bytes, message: str):
    path = tmp_path / "a.pt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"a\.pt: .*{message}") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_archives_that_are_none_or_claim_too_much(tmp_path: Path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", b"")
    with pytest.raises(CheckpointError, match=r"it is a zip archive, but not one that torch\.save writes"):
        load_checkpoint(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("a/data/0", bytes(99_000_000))
    with pytest.raises(CheckpointError, match=r"it claims 99,000,000 bytes and has \d\d,\d{3}\."):
        load_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:  # as torch.jit.save writes
        for name in ("a/data.pkl", "a/code/__torch__.py", "a/constants.pkl"):
            archive.writestr(name, b"")
    with pytest.raises(CheckpointError, match="it is a TorchScript program"):
        load_checkpoint(path)
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.pt: it is no regular file"):
        load_checkpoint(tmp_path / "folder.pt")


def test_a_pickle_of_nested_lists_is_one_line(tmp_path: Path):
    """What PyTorch says of it begins with the advice to unpickle without any check."""
    path = save(tmp_path, 5)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for pickled in (b"\x80\x02" + b"]" * 500_000 + b".", b"\x80\x02\x8c\x01a\x93.", b"\x80\x02U\xffa.", b"."):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, pickled if name.endswith("data.pkl") else data)
        with pytest.raises(CheckpointError, match=r"0000005\.pt: ") as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("part", ["config", "fingerprints", "model", "ema", "opt", "steps"])
def test_a_resume_needs_every_part(tmp_path: Path, part: str):
    path = save(tmp_path, 5)
    stored = torch.load(path, weights_only=True)
    assert load_own_checkpoint(path)["steps"] == 5
    for value in ([], -1, None):
        torch.save(stored | {part: value}, path)
        with pytest.raises(CheckpointError, match=rf"damaged: it holds no {part} that could be resumed\."):
            load_own_checkpoint(path)
    del stored["config"]
    torch.save(stored, path)
    with pytest.raises(CheckpointError, match="is not a checkpoint of repa-train; it cannot be resumed"):
        load_own_checkpoint(path)


def test_a_folder_with_a_checkpoints_name_is_none(tmp_path: Path):
    (tmp_path / "checkpoints" / "0000009.pt").mkdir(parents=True)
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path) != save(tmp_path, 5, keep_last=1)
    assert names(tmp_path) == ["0000005.pt", "0000009.pt"]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"none\.pt: there is no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"holds a list; expected a dict"):
        load_checkpoint(tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello\n")
    with pytest.raises(CheckpointError, match=r"text\.pt"):
        load_checkpoint(tmp_path / "text.pt")
