"""The sparse cache and the timing of a start, in small: the cache is whole, the figures are those of processes."""

import json

import numpy as np
import pytest
import start
import zarr
from synthetic_cache import make_sparse_cache

from repa.trainer.reading.reader import CacheReader


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_sparse_cache(tmp_path_factory.mktemp("sparse") / "cache", num_samples=300, grid=2, width=12)


def test_a_sparse_cache_reads_as_zeros_by_both_ways(cache):
    reader = CacheReader(cache)
    batch = reader.rows([299, 0, 256])
    batch.moments.fill_(1)
    batch = reader.rows([299, 0, 256], out=batch)
    assert not batch.moments.any()
    assert reader.valid_rows.tolist() == list(range(300))
    for file in cache.glob("*/synthetic/*/c.0*"):
        assert file.stat().st_blocks * 512 <= 16_384, (
            file
        )  # its index, its records; on a file system without holes more
    group = zarr.open_group(cache, mode="r")
    assert np.asarray(group["latents/synthetic/valid"]).all()
    for name in ("latents/synthetic/moments", "features/synthetic/patch_tokens"):
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert not np.asarray(array[250:300]).any()


def test_a_start_is_timed_beside_that_of_torch(cache, monkeypatch, tmp_path, capsys):
    written = []
    monkeypatch.setattr(start, "append_line", lambda name, line: written.append((name, line)))
    monkeypatch.setattr(start, "conditions", dict)
    monkeypatch.setattr("sys.argv", ["start.py", "--cache", str(cache), "--rounds", "1", "--batch-size", "2"])
    start.main()
    ((name, line),) = json.loads(json.dumps(written))
    assert name == "start"
    step, torch, over = (line[key]["median"] for key in ("first_step_s", "torch_s", "over_torch_s"))
    assert step == pytest.approx(torch + over, abs=1e-3)
    assert line["over_torch_mib"]["median"] > 0
    assert "over torch alone" in capsys.readouterr().out
