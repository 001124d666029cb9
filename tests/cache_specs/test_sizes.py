"""Sizes are read and written as people do."""

import pytest

from repa.cache_specs.errors import UsageError
from repa.cache_specs.sizes import human_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"), [("500GB", 500e9), ("1.5TB", 1.5e12), ("800 GiB", 800 * 2**30), ("64", 64), ("2kB", 2000)]
)
def test_sizes_are_read(text: str, size: float) -> None:
    assert parse_bytes(text, where="--budget") == size


@pytest.mark.parametrize("text", ["", "GB", "5 PB", "-1GB", "0GB", "nanGB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--prefetch-bytes .*expected"):
        parse_bytes(text, where="--prefetch-bytes")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (503_960_000_000, "504.0 GB"), (2e15, "2000.0 TB")]
)
def test_sizes_are_written(size: float, text: str) -> None:
    assert human_bytes(size) == text
