"""What an .npz claims of its rows is held against the file."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repa.cache_specs.files.npz import open_rows

ROWS = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def packed(path: Path, header: dict[str, Any], data: bytes, name: str = "arr_0.npy") -> Path:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, header)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, stream.getvalue() + data)
    return path


def test_rows_lie_where_it_says(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, ROWS)
    stream, rows = open_rows(path)
    with stream:
        stream.seek(rows.offset)
        assert stream.read()[: ROWS.nbytes] == ROWS.tobytes()
    assert (rows.shape, rows.dtype, rows.row_bytes) == (ROWS.shape, ROWS.dtype, 12)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (10**9, 3, 4)},
        {"shape": (2**32, 2**32)},
        {"shape": (2**62, 4)},
        {"shape": (-2, -3, 4)},
        {"shape": (0, 3, 4)},
        {"shape": ()},
        {"shape": (1, 3, 4)},
        {"descr": "<f8"},
        {"descr": "|O"},
        {"descr": "|V0"},
        {"descr": "x" * 9000},
        {"fortran_order": True},
    ],
)
def test_a_header_that_claims_other_rows_than_there_are(change: dict[str, Any], tmp_path: Path) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": ROWS.shape}
    open_rows(packed(tmp_path / "a.npz", header, ROWS.tobytes()))[0].close()
    with pytest.raises(ValueError, match=r".") as refused:
        open_rows(packed(tmp_path / "a.npz", header | change, ROWS.tobytes()))
    assert len(str(refused.value)) < 400


def test_a_member_that_claims_more_than_the_file_holds(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.npz", {"descr": "|u1", "fortran_order": False, "shape": (2**31, 1)}, b"")
    data = bytearray(path.read_bytes())
    size = 2**31 + 128
    for place in (18, 22, data.rindex(b"PK\1\2") + 20, data.rindex(b"PK\1\2") + 24):
        data[place : place + 4] = size.to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"2147483648 bytes, and \d+ are there"):
        open_rows(path)


def test_what_is_no_file_of_rows(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "compressed.npz", ROWS)
    np.savez(tmp_path / "other.npz", other=ROWS)
    (tmp_path / "text.npz").write_text("text")
    for name in ("compressed", "other", "text"):
        with pytest.raises(ValueError, match=r"compressed|no item named|not a zip file"):
            open_rows(tmp_path / f"{name}.npz")
    os.mkfifo(tmp_path / "fifo.npz")
    with pytest.raises(OSError, match="FIFO"):
        open_rows(tmp_path / "fifo.npz")
