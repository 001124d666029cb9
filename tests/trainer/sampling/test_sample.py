"""Noise and labels are functions of (seed, i); a file of samples is whole, continued, and refuses another request."""

import errno
import json
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repa.cache_specs.errors import JobError, UsageError
from repa.trainer.diffusion.interpolant import Interpolant
from repa.trainer.diffusion.latents import LatentNorm
from repa.trainer.distributed import World
from repa.trainer.models.sit import SiT, SiTConfig
from repa.trainer.objectives.velocity import VelocityField
from repa.trainer.sampling import sample_file
from repa.trainer.sampling.sample import (
    ImageNoise,
    SampleRequest,
    draw_samples,
    labels_of,
    parse_labels,
    save_grid,
)
from repa.trainer.sampling.sample_file import sample_to_npz
from repa.trainer.sampling.samplers import SamplerConfig

CONFIG = SiTConfig(
    name="tiny/2", input_size=4, patch_size=2, in_channels=3, hidden_size=8, depth=1, num_heads=1, num_classes=5
)
NORM = LatentNorm(scale=(2.0, 4.0, 0.5), bias=(0.5, 0.0, -1.0))
ALONE = World(rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture
def model() -> SiT:
    model = SiT(CONFIG)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def decode(latents: torch.Tensor) -> torch.Tensor:
    return ((latents + 3) * 40).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def draw(model: SiT, indices, *, decoder=None, **settings) -> np.ndarray:
    settings = {"num": 100, "sampler": SamplerConfig(steps=3)} | settings
    return draw_samples(
        model,
        indices,
        SampleRequest(**settings),
        field=VelocityField(interpolant=Interpolant()),
        norm=NORM,
        decode=decoder,
    )


def test_the_noise_of_an_image_depends_on_seed_and_index_alone():
    together = ImageNoise(range(6), 7)
    first, second = together.next((3, 4, 4)), together.next((3, 4, 4))
    alone = ImageNoise([4], 7)
    assert torch.equal(first[4:5], alone.next((3, 4, 4)))
    assert torch.equal(second[4:5], alone.next((3, 4, 4)))
    assert not torch.equal(first, second)
    assert not torch.equal(ImageNoise([4], 8).next((3, 4, 4)), first[4:5])
    many = ImageNoise(range(4000), 1).next((3, 4, 4))
    assert len(np.unique(many[:, 0, 0, 0].numpy())) > 3990
    assert abs(float(many.mean())) < 0.01
    assert abs(float(many.std()) - 1) < 0.01
    neighbours = (many[1:] * many[:-1]).mean()
    assert abs(float(neighbours)) < 0.01


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_a_sample_does_not_depend_on_its_batch(model: SiT, sampler: str):
    """Beyond the rounding of matrix products in batches of another size; see the module's docstring."""
    settings = {"sampler": SamplerConfig(sampler=sampler, steps=4, cfg_scale=1.5), "seed": 3}
    whole = draw(model, range(8), **settings)
    parts = np.concatenate([draw(model, part, **settings) for part in ([0], [1, 2, 3], [4, 5], [6, 7])])
    np.testing.assert_allclose(parts, whole, atol=1e-4)
    assert np.array_equal(draw(model, range(8), **settings), whole)
    other = draw(model, range(8), **(settings | {"seed": 4}))
    assert np.abs(other - whole).max() > 0.1


def test_latents_leave_the_models_space(model: SiT):
    """z = x / scale + bias: twice the scale halves what lies above the bias."""
    ours = draw(model, range(3))
    raw = draw_samples(
        model,
        range(3),
        SampleRequest(num=3, sampler=SamplerConfig(steps=3)),
        field=VelocityField(interpolant=Interpolant()),
        norm=LatentNorm(scale=(1, 1, 1), bias=(0, 0, 0)),
        decode=None,
    )
    assert ours.dtype == np.float32
    assert ours.shape == (3, 3, 4, 4)
    scale, bias = (np.array(numbers)[:, None, None] for numbers in (NORM.scale, NORM.bias))
    np.testing.assert_allclose(ours, raw / scale + bias, rtol=1e-6)
    np.testing.assert_array_equal(draw(model, range(3), decoder=decode), decode(torch.from_numpy(ours)).numpy())


def test_the_run_is_left_as_it_was(model: SiT):
    torch.manual_seed(5)
    before, state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for mode in (True, False):
        model.train(mode)
        seen = []
        hook = model.register_forward_hook(lambda module, inputs, output: seen.append(module.training))  # noqa: B023
        draw(model, range(2))
        hook.remove()
        assert seen
        assert not any(seen)
        assert model.training is mode
        assert all(module.training is mode for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_labels():
    balanced = SampleRequest(num=10, labels="balanced")
    assert labels_of(range(7), balanced, 5).tolist() == [0, 1, 2, 3, 4, 0, 1]
    listed = SampleRequest(num=10, labels=(3, 3, 1))
    assert labels_of([0, 1, 2, 3, 7], listed, 5).tolist() == [3, 3, 1, 3, 3]
    drawn = SampleRequest(num=10, seed=2)
    labels = labels_of(range(5000), drawn, 5)
    assert labels_of([4321], drawn, 5).item() == labels[4321]
    counts = labels.bincount(minlength=5)
    assert len(counts) == 5
    assert (counts - 1000).abs().max() < 150
    assert parse_labels("0,3,7") == (0, 3, 7)
    assert parse_labels("balanced") == "balanced"
    names = ("tench, Tinca tinca", "dog", "7", "Tinca tinca")
    assert parse_labels("DOG,2,tench, tinca tinca,Tinca tinca", names) == (1, 2, 0, 3)
    assert parse_labels("7", names) == (7,)  # a number is a number
    with pytest.raises(UsageError, match="labels: no class 'dogs'; did you mean 'dog'"):
        parse_labels("0,dogs", names)
    for text in ("dogs", "", "0,,1", "9" * 5000):
        with pytest.raises(UsageError, match="the model does not say what its classes are called; give random"):
            parse_labels(text)
    with pytest.raises(UsageError, match=r"labels: \[5, -1\] given; the model's classes are 0 to 4"):
        SampleRequest(num=1, labels=(0, 5, -1)).check_labels(5)


def test_the_label_reaches_the_model_and_not_the_noise(model: SiT):
    a, b = (draw(model, range(2), labels=(label,)) for label in (0, 1))
    assert np.abs(a - b).max() > 1e-3
    assert np.abs(a - draw(model, range(2), labels=(0,))).max() == 0


def write(
    model: SiT, out: Path, *, world: World = ALONE, batch_size: int = 4, decoder=decode, progress=None, **settings
):
    request = SampleRequest(**({"num": 22, "sampler": SamplerConfig(steps=2)} | settings))
    return sample_to_npz(
        model,
        request,
        out,
        field=VelocityField(interpolant=Interpolant()),
        norm=NORM,
        decode=decoder,
        decoder="test" if decoder else "none",
        batch_size=batch_size,
        world=world,
        progress=progress,
    )


def test_the_npz_is_what_fid_tools_read(model: SiT, tmp_path: Path):
    told: list[int] = []
    path = write(model, tmp_path / "new" / "samples.npz", progress=told.append)
    with np.load(path) as archive:
        assert archive.files == ["arr_0"]
        images = archive["arr_0"]
    assert images.dtype == np.uint8
    assert images.shape == (22, 4, 4, 3)
    expected = np.concatenate(
        [draw(model, range(k, min(k + 4, 22)), decoder=decode, sampler=SamplerConfig(steps=2)) for k in range(0, 22, 4)]
    )
    assert np.array_equal(images, expected)
    assert told == [4, 4, 4, 4, 4, 2]
    assert sorted(p.name for p in path.parent.iterdir()) == ["samples.json", "samples.npz"]
    assert json.loads((path.parent / "samples.json").read_text())["seed"] == 0


def test_without_a_decoder_latents_are_kept(model: SiT, tmp_path: Path):
    with np.load(write(model, tmp_path / "latents.npz", decoder=None, num=5)) as archive:
        latents = archive["arr_0"]
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents, draw(model, range(5), sampler=SamplerConfig(steps=2)), atol=1e-4)


class Interrupted(Exception):
    """As from the keyboard, after some batches."""


def interrupt_after(num: int):
    calls = 0

    def interrupted(latents: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += len(latents) > 1  # the row's shape is asked with one image
        if calls > num:
            raise Interrupted
        return decode(latents)

    return interrupted


def test_an_interrupted_file_continues_to_the_same_bytes(model: SiT, tmp_path: Path):
    whole = write(model, tmp_path / "whole.npz").read_bytes()
    out = tmp_path / "cut.npz"
    for batches in (2, 1, 0):
        with pytest.raises(Interrupted):
            write(model, out, decoder=interrupt_after(batches))
        assert not out.exists()
    told: list[int] = []
    drawn: list[int] = []

    def counting(latents: torch.Tensor) -> torch.Tensor:
        drawn.append(len(latents))
        return decode(latents)

    write(model, out, decoder=counting, progress=told.append)
    assert drawn == [1, 4, 4, 2]  # the row's shape, then batches 3 to 5
    assert sum(told) == 22
    assert out.read_bytes() == whole
    assert not (tmp_path / "cut.npz.partial").exists()
    drawn.clear()
    write(model, out, decoder=counting)  # done: nothing is drawn
    assert drawn == []


def test_any_number_of_ranks_writes_the_same_file_and_continues_anothers(model: SiT, tmp_path: Path, monkeypatch):
    whole = write(model, tmp_path / "whole.npz").read_bytes()
    monkeypatch.setattr(World, "wait", lambda self: None)
    out = tmp_path / "ranks.npz"
    three = [World(rank=rank, size=3, device=torch.device("cpu")) for rank in range(3)]
    with pytest.raises(Interrupted):
        write(model, out, world=three[0], decoder=interrupt_after(1))  # batch 0, not 3
    write(model, out, world=three[2])  # batches 2 and 5
    with pytest.raises(JobError, match="8 of 22 images are missing, a rank did not finish"):
        write(model, out, world=three[0])  # batch 3; 1 and 4 are rank 1's
    write(model, out)  # one rank does the rest
    assert out.read_bytes() == whole


def test_another_request_is_refused(model: SiT, tmp_path: Path):
    out = tmp_path / "a.npz"
    with pytest.raises(Interrupted):
        write(model, out, decoder=interrupt_after(1))
    with pytest.raises(UsageError, match=r"a\.npz\.partial belongs to another request: seed was 0, asked 1"):
        write(model, out, seed=1)
    with pytest.raises(UsageError, match="belongs to another request: num was 22, asked 23"):
        write(model, out, num=23)
    write(model, out)
    with pytest.raises(UsageError, match=r"a\.npz belongs to another request: sampler was .*'euler'.*asked .*'heun'"):
        write(model, out, sampler=SamplerConfig(sampler="heun", steps=2))
    with torch.no_grad():
        model.final_layer.linear.bias.add_(1)
    with pytest.raises(UsageError, match="weights_sha256 was"):
        write(model, out)
    with pytest.raises(UsageError, match=r"ends in \.npz"):
        write(model, tmp_path / "a.npy")


def test_a_full_disk_keeps_what_is_done(model: SiT, tmp_path: Path, monkeypatch):
    whole = write(model, tmp_path / "whole.npz").read_bytes()
    out, calls, write_at = tmp_path / "a.npz", 0, sample_file.write_at

    def full(descriptor: int, data: bytes, offset: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:  # the images of the third batch, half of them
            write_at(descriptor, memoryview(data).cast("B")[:50], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_at(descriptor, data, offset)

    monkeypatch.setattr(sample_file, "write_at", full)
    with pytest.raises(JobError, match=r"a\.npz cannot be written \(No space left on device\)\. Make room, then"):
        write(model, out)
    monkeypatch.undo()
    assert (tmp_path / "a.npz.partial" / "done").read_bytes() == b"\1" * 8 + b"\0" * 14
    write(model, out)
    assert out.read_bytes() == whole


def test_what_is_in_the_way_is_one_line(model: SiT, tmp_path: Path):
    with pytest.raises(UsageError, match="batch_size is 0; expected 1 or more"):
        write(model, tmp_path / "a.npz", batch_size=0)
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match=r"cannot be written \(Not a directory\)\. See that it can be written, then"):
        write(model, tmp_path / "file" / "a.npz")
    out = write(model, tmp_path / "a.npz")
    (tmp_path / "a.npz.partial").mkdir()  # a kill between the last rename and the removal
    write(model, out)
    assert not (tmp_path / "a.npz.partial").exists()
    for damage in ('{"num": 2', "[]", "", "[" * 99_999, '{"num": ' + "9" * 6000 + "}"):
        out.with_suffix(".json").write_text(damage)
        with pytest.raises(UsageError, match=r"a\.json cannot be read .*which request .*a\.npz belongs to"):
            write(model, out)


@pytest.mark.parametrize("name", ["images.npy", "done", "request.json"])
@pytest.mark.parametrize("damage", ["cut", "longer", "gone", "noise", "FIFO"])
def test_a_damaged_unfinished_file_is_refused_or_begun_again(model: SiT, tmp_path: Path, name: str, damage: str):
    whole = write(model, tmp_path / "whole.npz").read_bytes()
    out = tmp_path / "a.npz"
    with pytest.raises(Interrupted):
        write(model, out, decoder=interrupt_after(1))
    file = tmp_path / "a.npz.partial" / name
    data = file.read_bytes()
    file.unlink()
    if damage == "FIFO":
        os.mkfifo(file)
    elif damage != "gone":
        file.write_bytes({"cut": data[:-3], "longer": data + data, "noise": bytes(9)}[damage])
    if name == "request.json" and damage == "gone":
        assert write(model, out).read_bytes() == whole
    else:
        with pytest.raises(UsageError, match=r"a\.npz\.partial is damaged .*delete it|request\.json cannot be read"):
            write(model, out)


def test_nothing_is_written_through_a_link(model: SiT, tmp_path: Path):
    others, folder = tmp_path / "others", tmp_path / "samples"
    (others / "inside").mkdir(parents=True)
    (others / "request.json").write_text("of somebody else")
    folder.mkdir()
    (folder / "a.npz.partial").symlink_to(others)
    with pytest.raises(UsageError, match=r"a\.npz\.partial is a link, which is not followed: remove it"):
        write(model, folder / "a.npz")
    (folder / "a.npz.partial").unlink()
    (folder / ".a.json.partial").symlink_to(others / "request.json")
    write(model, folder / "a.npz")
    assert sorted(os.listdir(folder)) == ["a.json", "a.npz"]
    assert (others / "request.json").read_text() == "of somebody else"


def test_50000_images_need_the_memory_of_a_batch(model: SiT, tmp_path: Path, monkeypatch):
    """The drawing itself is replaced: the file's way to disk is what could grow with the number of images."""
    row = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)

    def drawn(model, indices, request, **parts):
        return np.stack([row + index for index in np.array(indices).astype(np.uint8)])

    monkeypatch.setattr(sample_file, "draw_samples", drawn)
    monkeypatch.setattr(sample_file, "_row", lambda model, norm, decode: row)
    tracemalloc.start()
    path = write(model, tmp_path / "many.npz", num=50_000, batch_size=500)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 50_000 * row.nbytes  # 38 MB
    assert peak < 2 * sample_file.COPY_BYTES + 10 * 500 * row.nbytes  # the copy holds two pieces; a few batches: 6 MB
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
        assert shape == (50_000, 16, 16, 3)
        file.seek(49_999 * row.nbytes, os.SEEK_CUR)
        assert np.array_equal(np.frombuffer(file.read(), np.uint8).reshape(row.shape), row + np.uint8(49_999 % 256))


def test_grid(tmp_path: Path):
    pictures = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((1, 32, 32, 3), 50, np.uint8)
    save_grid(pictures, tmp_path / "grids" / "grid.png", columns=3)
    sheet = np.asarray(Image.open(tmp_path / "grids" / "grid.png"))
    assert sheet.shape == (32 + 2 + 32, 3 * 32 + 2 * 2, 3)
    for index in range(5):
        top, left = index // 3 * 34, index % 3 * 34
        assert (sheet[top : top + 32, left : left + 32] == index * 50).all()
    assert (sheet[34:, 68:] == 255).all()
    assert (sheet[:, 32:34] == 255).all()
    assert [path.name for path in (tmp_path / "grids").iterdir()] == ["grid.png"]
