"""The desktop study is laid out alike wherever it is done, and only with the weights that it names."""

import hashlib
import sys
from pathlib import Path

import pytest
import yaml

STUDY = Path(__file__).parents[2] / "benchmarks/study"


@pytest.fixture
def prepare(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    monkeypatch.delitem(sys.modules, "prepare", raising=False)
    import prepare

    return prepare


def test_a_photograph_lies_in_the_same_half_whatever_lies_beside_it(prepare, tmp_path):
    for i in range(200):
        for folder in ("all", "some")[: 1 + i % 2]:
            file = tmp_path / folder / f"class {i % 3}" / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"%d" % i)
    found = {}
    for folder in ("all", "some"):
        counts = prepare.split(tmp_path / folder, tmp_path / "of" / folder)
        halves = [sorted((tmp_path / "of" / folder / half).glob("*/*.jpg")) for half in ("train", "held_out")]
        assert [len(files) for files in halves] == list(counts)
        found[folder] = {(file.parent.name, file.name): i for i, files in enumerate(halves) for file in files}
    assert len(found["all"]) == 200
    assert 10 < sum(found["all"].values()) < 40  # one in nine
    assert found["some"].items() < found["all"].items()


def test_other_weights_are_refused_and_every_entry_holds(prepare, tmp_path):
    from repa.cache_specs.tables import resolve_encoder

    networks = yaml.safe_load((STUDY / "taps.yaml").read_text())
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("catalog.py", "nets.py", "taef2_encoder.safetensors", "taef2_decoder.safetensors"):
        (weights / name).write_bytes(b"")
    for network in networks.values():
        for name in network["files"]:
            (weights / name).write_bytes(name.encode())
    with pytest.raises(SystemExit, match="it is another file"):
        prepare.write_entries(weights, tmp_path / "refused", networks)

    for network in networks.values():
        network["files"] = {name: hashlib.sha256(name.encode()).hexdigest() for name in network["files"]}
    prepare.write_entries(weights, tmp_path / "encoders", networks)
    for name, network in networks.items():
        for stage, (width, _) in network["stages"].items():
            spec = resolve_encoder(f"{tmp_path / 'encoders' / name}.yaml:grid=8:stage={stage}", resolution=64).spec
            assert (spec["grid"], spec["width"]) == ([8, 8], width)
