"""The large cache and the timing of a start, in small: the cache is whole, the figures are those of processes."""

import json

import numpy as np
import pytest
import start
import zarr
from synthetic_cache import make_large_cache

from repa.pipeline.checking.verify import verify
from repa.trainer.reading.reader import CacheReader


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_large_cache(tmp_path_factory.mktemp("large") / "cache", num_samples=600, grid=2, width=12)


def test_a_large_cache_of_few_bytes_is_whole_and_reads_the_same_by_both_ways(cache):
    assert not verify(cache, on_progress=lambda *_: None).problems
    reader = CacheReader(cache, check_reads=True)
    batch = reader.rows([599, 0, 256])
    expected = np.repeat(np.array([0, 1], np.float16), 4)[:, None, None]  # mean and deviation, 4 channels each
    assert (batch.moments.numpy() == expected).all()
    assert reader.valid_rows.tolist() == list(range(600))
    group = zarr.open_group(cache, mode="r")
    assert np.asarray(group["latents/synthetic/valid"]).all()
    for name, values in {"latents/synthetic/moments": expected, "features/synthetic/patch_tokens": 0}.items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert (np.asarray(array[250:600]) == values).all()
        first, second, last = sorted((cache / name).glob("c.*"))
        assert first.samefile(second)
        assert not first.samefile(last)


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
