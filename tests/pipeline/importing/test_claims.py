"""What other people's files claim is looked at before it is believed: sizes, shapes, numbers, that they are files."""

import contextlib
import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from repa.cache_specs.errors import UsageError
from repa.pipeline.importing.arrow import ArrowSource
from repa.pipeline.importing.lightningdit import SampledSource
from repa.pipeline.importing.npy import FolderMembers, ZipMembers, read_npy
from repa.pipeline.importing.source import BadLatent


def npy(header: bytes, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(header))
    return np.lib.format.MAGIC_PREFIX + version + size + header + data


def header(shape: str, descr: str = "'<f4'") -> bytes:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        npy(header("(8, 4, 4)")),
        npy(header("(1000000000000,)"), bytes(9)),
        npy(header("(-4, -1)"), bytes(16)),
        npy(header("(4,)", "'|O'"), bytes(32)),
        npy(header("(4,)", "'<f999'")),
        npy(header("(4,)", "[('a', '<f4')]") + b"[" * 9000),
        npy(b"(" * 60_000),
        npy(b"9" * 9000),
        npy(b"{'descr': '<f4'}"),
        npy(b"\xff\xfe"),
        npy(header("(4,)"), bytes(16), version=b"\x09\0"),
        npy(header("(4,)"), bytes(16))[:20],
    ],
)
def test_a_npy_that_is_none_is_bad_latents(data: bytes) -> None:
    with pytest.raises(BadLatent, match=r"not a (whole|single) \.npy"):
        read_npy(data)


def test_a_npy_is_read_in_both_versions_of_its_header() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    for version in ((1, 0), (2, 0)):
        stream = io.BytesIO()
        np.lib.format.write_array(stream, values, version=version)
        np.testing.assert_array_equal(read_npy(stream.getvalue()), values)


def test_a_member_of_a_zip_that_says_it_is_large_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("small", b"x" * 100)
        archive.writestr("large", bytes(2 * 10**6))
    members = ZipMembers(tmp_path / "a.zip")
    assert members.read("small") == b"x" * 100
    with pytest.raises(BadLatent, match="says that it has 2000000 bytes unpacked, and at most 1000000 are read"):
        members.read("large", most=10**6)


def test_a_member_of_a_zip_that_says_less_than_it_has_gives_no_more_than_it_said(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(2 * 10**6))
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data.replace(struct.pack("<I", 2 * 10**6), struct.pack("<I", 500)))
    with pytest.raises(BadLatent, match="cannot be read from the zip"):
        ZipMembers(tmp_path / "a.zip").read("a", most=1000)


@pytest.mark.parametrize("place", range(0, 400, 7))
def test_a_damaged_zip_is_one_line(tmp_path: Path, place: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in "abc":
            archive.writestr(name, bytes(range(256)))
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[place % len(data)] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(data)
    try:
        members = ZipMembers(tmp_path / "a.zip")
    except UsageError:
        return
    for name in members.names:
        with contextlib.suppress(BadLatent):
            assert members.read(name) == bytes(range(256))


def of_fifo(kind: str) -> Callable[[Path], object]:
    return {
        "zip": lambda folder: ZipMembers(folder / "a"),
        "npy": lambda folder: FolderMembers(folder).read("a"),
        "safetensors": lambda folder: SampledSource(folder),
        "arrow": lambda folder: ArrowSource(folder, None, None),
    }[kind]


@pytest.mark.parametrize("kind", ["zip", "npy", "safetensors", "arrow"])
def test_a_fifo_is_waited_for_by_nobody(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / {"safetensors": "a.safetensors"}.get(kind, "a"))
    if kind == "arrow":
        (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "a"}]}')
    with pytest.raises((UsageError, BadLatent), match="it is a FIFO, not a file"):
        of_fifo(kind)(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["[" * 10**5, '{"_data_files": Infinity}', "[]", '{"_data_files": {"a": 1}}', '{"_data_files": [1]}', "\xff"],
)
def test_a_state_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match="expected a data set as save_to_disk of datasets writes it"):
        ArrowSource(tmp_path, None, None)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"latents": torch.zeros(0, 4, 2, 2), "labels": torch.zeros(0, dtype=torch.int64)}, "no rows in it"),
        ({"latents": torch.zeros(2, 4, 2, 2), "labels": torch.zeros(2, dtype=torch.bool)}, "expected whole numbers"),
        ({"latents": torch.zeros(2, 4, 2, 2), "labels": torch.zeros(2, dtype=torch.complex64)}, "expected whole"),
        ({"latents": torch.zeros(2, 4, 2, 2), "labels": torch.tensor([0, -1])}, "label -1"),
        ({"latents": torch.zeros(2, 4, 2, 2), "labels": torch.tensor([0, 2**40])}, f"label {2**40}"),
    ],
)
def test_safetensors_without_rows_or_with_odd_labels(
    tmp_path: Path, tensors: dict[str, torch.Tensor], said: str
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=said):
        SampledSource(tmp_path)


@pytest.mark.parametrize("what", [[1, 2], {"mean": 3}, {"mean": "x", "std": "y"}])
def test_statistics_that_are_none_advise_nothing_dangerous(tmp_path: Path, what: object) -> None:
    save_file(
        {"latents": torch.zeros(2, 4, 2, 2), "labels": torch.zeros(2, dtype=torch.int64)}, tmp_path / "a.safetensors"
    )
    source = SampledSource(tmp_path)
    torch.save(what, tmp_path / "latents_stats.pt")
    with pytest.raises(UsageError, match="expected mean and std"):
        source.published_statistics()
    for data in (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", b"\x80\x02cos\nsystem\n."):
        (tmp_path / "latents_stats.pt").write_bytes(data)
        with pytest.raises(UsageError, match="expected mean and std") as refused:
            source.published_statistics()
        assert "weights_only" not in str(refused.value)
