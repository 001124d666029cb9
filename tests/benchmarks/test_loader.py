"""The comparison of loaders in small, and that it notices what it must: wrong bytes, a wrong order, a wrong count."""

import json
from collections.abc import Iterator
from pathlib import Path

import loader
import numpy as np
import pytest
from disk_cache import bytes_from_disk, evict
from loaders import Loader, Take
from other_formats import LOADERS
from rounds import median_interval
from samples import Rows, Samples, WrongRows, make_samples

NUM = 24


@pytest.fixture(scope="module", params=["float16", "int8"])
def samples(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    folder = tmp_path_factory.mktemp(request.param)
    return make_samples(folder, num_samples=NUM, dtype=request.param, grid=2, width=12)


class AnotherSample(Take):
    """Gives the bytes of sample i + 1 for those of i, in one field."""

    def fill(self, rows: np.ndarray, out: Rows) -> Rows:
        super().fill(rows, out)
        out["patch_tokens"][:] = self._arrays["patch_tokens"][(rows + 1) % NUM]
        return out


class OneBit(Take):
    def fill(self, rows: np.ndarray, out: Rows) -> Rows:
        super().fill(rows, out)
        out["moments"][rows == 5] *= -1
        return out


class Twice(Take):
    def order_of(self, batch_size: int, num: int, seed: int) -> np.ndarray:
        return super().order_of(batch_size, num, seed) // 2 * 2


class InOrder(Take):
    def order_of(self, batch_size: int, num: int, seed: int) -> np.ndarray:
        return np.arange(num * batch_size).reshape(num, batch_size)


class TooFew(Take):
    def batches(self, batch_size: int, num: int, seed: int) -> Iterator[Rows]:
        return super().batches(batch_size, num - 1, seed)


def epoch(samples: Samples, kind: type[Loader], folder: Path) -> None:
    tried = kind(samples, folder)
    tried.write()
    tried.open()
    try:
        samples.check_epoch(tried.batches(8, NUM // 8, 3), shuffled=tried.shuffled)
    finally:
        tried.close()


@pytest.mark.filterwarnings("default")  # what the others warn of is theirs
@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind.installed()], ids=lambda kind: kind.name)
def test_every_loader_here_gives_back_what_was_written(samples: Samples, kind: type[Loader], tmp_path: Path) -> None:
    epoch(samples, kind, tmp_path)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (AnotherSample, "patch_tokens of sample"),
        (OneBit, "moments of sample 5: "),
        (Twice, "24 rows, 12 distinct; expected 24"),
        (InOrder, "expected a shuffle"),
        (TooFew, "16 rows, 16 distinct; expected 24"),
    ],
)
def test_a_loader_that_does_not_is_found_out(samples: Samples, kind: type[Take], said: str, tmp_path: Path) -> None:
    with pytest.raises(WrongRows, match=said):
        epoch(samples, kind, tmp_path)


def test_a_record_holds_every_byte_of_a_sample(samples: Samples) -> None:
    record = samples.pack(7)
    assert len(record) == samples.row_bytes
    unpacked = samples.unpack(record)
    assert unpacked.keys() == samples.arrays.keys()
    samples.check({name: value[None] for name, value in unpacked.items()})
    with pytest.raises(WrongRows, match="moments of sample 7"):
        samples.check(
            {**{name: value[None] for name, value in unpacked.items()}, "moments": samples.arrays["moments"][6:7]}
        )


def test_a_run_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--num-samples 64 --round-samples 32 --cold-samples 32 --rounds 4 --batch-size 16 --dtype int8 --grid 4"
    only = ["--only", "np.take", "--only", "CacheReader", "--only", "safetensors", "--only", "zarr-python"]
    options = loader.parse([*arguments.split(), "--width", "32", "--dir", str(tmp_path), *only])
    line = json.loads(json.dumps(loader.run(options)))

    (found,) = line["configurations"]
    assert (found["dtype"], found["batch_size"]) == ("int8", 16)
    # row and label, moments of 8 x 8 x 8, 16 tokens of 32 channels with their scales, mean and std
    assert found["row_bytes"] == 16 + 2 * 8 * 8 * 8 + 16 * 32 + 2 * 16 + 2 * 4 * 32
    assert found["loaders"].keys() == {"np.take", "CacheReader", "safetensors", "zarr-python"}
    assert found["loaders"]["np.take"]["of_limit"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    for name, result in found["loaders"].items():
        assert result["rounds"] == (3 if name == "zarr-python" else 4)
        assert result["samples_per_s"] > 0
        assert result["of_limit"]["low"] <= result["of_limit"]["median"] <= result["of_limit"]["high"]
    assert set(line["not_installed"]) == {kind.name for kind in LOADERS if not kind.installed()}
    assert found["memory"]["peak_bytes"] > 0
    assert {bar["bar"] for bar in found["bars"]} >= {0.9, 4.0, 1.0}
    for bar in found["bars"]:
        assert bar["holds"] == (bar["found"] >= bar["bar"] if "least" in bar["what"] else bar["found"] <= bar["bar"])
    assert not list(tmp_path.iterdir())  # what was written is gone
    printed = capsys.readouterr().out
    assert "CacheReader: its bytes are those of the source" in printed
    assert printed.count("pass  CacheReader") + printed.count("FAIL  CacheReader") == len(found["bars"])


def test_cold_files_are_read_from_the_disk(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    if evict(tmp_path) > 0:
        pytest.skip("the file system of the temporary folder lives in memory")
    before = bytes_from_disk()
    mapped = np.memmap(file, mode="r")
    assert mapped.sum() == 0
    assert bytes_from_disk() - before >= 1 << 20
    assert evict(tmp_path) == 1.0  # a mapped page stays
    del mapped
    assert evict(tmp_path) == 0.0


def test_the_interval_of_a_median() -> None:
    values = np.random.default_rng(0).normal(1, 0.1, 41)
    found = median_interval(values.tolist())
    assert found["median"] == round(float(np.median(values)), 4)
    assert 0.9 < found["low"] < found["median"] < found["high"] < 1.1
    assert median_interval([2.0, 2.0, 2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}
