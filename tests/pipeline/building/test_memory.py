"""What is freed is not faulted in again while a build encodes, and goes back when it ends."""

import platform
import resource

import pytest
import torch

from repa.pipeline.building.memory import freed_memory_kept

BLOCK = 2**24  # float32 values, 64 MB


def faults() -> int:
    """Return how many pages five blocks, one after the other, fault in."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(BLOCK)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator that is set is glibc's")
def test_blocks_that_were_freed_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    pages = 4 * BLOCK // resource.getpagesize()
    with freed_memory_kept("cpu"):
        faults()
        assert faults() < pages
    assert faults() > 4 * pages
    with freed_memory_kept("cuda"):
        assert faults() > 4 * pages
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")  # a user's own setting stands
    with freed_memory_kept("cpu"):
        assert faults() > 4 * pages
