"""Stages of timm's convolutional models: which map, one forward for several, and maps that are enlarged say so."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from repa.cache_specs.errors import UsageError
from repa.cache_specs.schema import FEATURES
from repa.cache_specs.tables import resolve_encoder
from repa.pipeline.building.networks import load_networks
from repa.pipeline.building.request import ModelRequest
from repa.pipeline.models.encoders import load_encoder
from repa.pipeline.models.timm_models import TimmFeatures

ENTRY: dict[str, Any] = {
    "loader": "timm",
    "model": "resnet18",
    "options": {"layers": [1, 1, 1, 1], "channels": [8, 12, 16, 20]},
    "width": 20,
    "patch": 32,
    "input_size": 64,
    "stages": [[64, 2], [8, 4], [12, 8], [16, 16], [20, 32]],
    "prefix_tokens": 0,
    "cls_token": False,
    "output": "map",
    "tensor": "no_norm",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "antialias": True,
    "licence": "apache-2.0",
}


def entry(folder: Path, **fields: Any) -> Path:
    file = folder / "cnn.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in {**ENTRY, **fields}.items() if value is not None}))
    return file


def pictures(num: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (num, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def spec_of(request: str) -> dict[str, Any]:
    return resolve_encoder(request, resolution=64, random_weights=True).spec


def own_maps(model: Any) -> list[torch.Tensor]:
    """Return the map of each stage by the model's own parts."""
    with torch.no_grad():
        x = model.act1(model.bn1(model.conv1(pictures().float() / 127.5 - 1)))
        maps = [x]
        x = model.maxpool(x)
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            x = stage(x)
            maps.append(x)
    return maps


@pytest.mark.parametrize(("stage", "grid"), [(0, 32), (1, 16), (2, 8), (3, 4), (4, 2), (2, 3), (1, 5)])
def test_a_stage_is_the_map_at_its_stride(tmp_path: Path, stage: int, grid: int) -> None:
    encoder = load_encoder(spec_of(f"{entry(tmp_path)}:grid={grid}:stage={stage}"))
    expected = own_maps(encoder.model)[stage]
    assert encoder.spec["native_grid"] == [expected.shape[-1]] * 2
    if expected.shape[-1] != grid:
        expected = F.interpolate(expected, size=(grid, grid), mode="bilinear", align_corners=False)
    torch.testing.assert_close(encoder(pictures())[0], expected.flatten(2).mT, rtol=1e-4, atol=1e-5)


def test_an_enlarged_stage_is_between_its_neighbours(tmp_path: Path) -> None:
    encoder = load_encoder(spec_of(f"{entry(tmp_path)}:grid=4:stage=4:resize=bilinear"))
    corners = own_maps(encoder.model)[4]  # 2 x 2; places of the 4 x 4 lie at -1/4, 1/4, 3/4, 5/4 of its two
    tokens = encoder(pictures())[0].view(2, 4, 4, 20).permute(0, 3, 1, 2)
    torch.testing.assert_close(tokens[:, :, ::3, ::3], corners, rtol=1e-4, atol=1e-5)
    between = 0.75 * corners[:, :, 0, 0] + 0.25 * corners[:, :, 0, 1]
    torch.testing.assert_close(tokens[:, :, 0, 1], between, rtol=1e-4, atol=1e-5)


def test_early_and_late_stages_of_one_build_share_a_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = entry(tmp_path)
    specs = [spec_of(f"{file}:grid=4:stage={stage}") for stage in (1, 3)]
    specs += [spec_of("hog:grid=4"), spec_of(f"{file}:grid=2:stage=4"), {**specs[0], "antialias": False}]
    requests = [
        ModelRequest(kind=FEATURES, name=str(i), spec=spec, dtype="int8", precision="fp32", compressor="none")
        for i, spec in enumerate(specs)
    ]
    networks = load_networks(requests, "cpu")
    assert [[component.name for component in network.components] for network in networks] == [
        ["0", "1", "3"],
        ["2"],
        ["4"],
    ]
    calls = []
    forward = TimmFeatures.stages
    monkeypatch.setattr(TimmFeatures, "stages", lambda self, x, names: calls.append(names) or forward(self, x, names))
    shared = networks[0].encode(pictures(), networks[0].components)
    some = networks[0].encode(pictures(), networks[0].components[1:2])
    assert calls == [["1", "3", "4"], ["3"]]
    for request in requests[:2]:
        (alone,) = load_networks([request], "cpu")
        (component,) = alone.components
        for name, values in alone.encode(pictures(), alone.components)[component.path].items():
            assert torch.equal(values, shared[component.path][name])
            assert component.name == "0" or torch.equal(values, some[component.path][name])
        assert component in networks[0].components  # the same weights' digest


@pytest.mark.parametrize(
    ("request_", "fields", "said"),
    [
        (":grid=2", {"output": None, "stages": None}, "timm does not make resnet18 .*: set output: map"),
        (":grid=2", {"model": "resnet81", "stages": None}, "timm does not make resnet81 .*Unknown model"),
        (":grid=2:stage=9", {"stages": [[20, 32]] * 10}, r"no stage 9 of width 20 in timm's resnet18; its stages"),
        (":grid=2:stage=4", {"stages": [[20, 32]] * 4 + [[21, 32]]}, "no stage 4 of width 21 in timm's resnet18"),
        (":grid=4:stage=4", {"stages": [[20, 32]] * 4 + [[20, 16]]}, "2 x 2 places for 64 .* its entry says 4 x 4"),
        (":grid=4", {"input_size": None, "patch": 16}, "its map has 2 x 2 places for 64 .* says 4 x 4; a patch of 32"),
        (":grid=2:stage=0", {"output": "tokens"}, "stages are maps of loader timm or python; output is 'tokens'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_one_line(
    tmp_path: Path, request_: str, fields: dict[str, Any], said: str
) -> None:
    file = entry(tmp_path, **fields)
    with pytest.raises(UsageError, match=said) as error:
        load_encoder(spec_of(f"{file}{request_}"))
    assert "\n" not in str(error.value)


def test_every_table_of_spatial_metrics_marks_an_enlarged_map(
    tmp_path: Path, make_images: Callable[..., Any], build: Callable[..., Any], repa_cache: Callable[..., Any]
) -> None:
    make_images(tmp_path / "images", num=5)
    file = entry(tmp_path)
    asked = ["--encoder", f"{file}:grid=4:stage=4:resize=bilinear", "--encoder", f"{file}:grid=4:stage=2"]
    done = build(tmp_path / "images", tmp_path / "c", *asked, "--random-weights")
    assert done.code == 0, done.err
    done = repa_cache("metrics", tmp_path / "c", "--csv", tmp_path / "m.csv")
    large, native = "cnn-grid4-stage4-random", "cnn-grid4-stage2-random"
    assert f"features/{large}, 5 of 5 images, 4 x 4 tokens of 20, enlarged from 2 x 2" in done.out
    assert done.out.count("enlarged from 2 x 2: neighbours are alike by construction") == 1
    with (tmp_path / "m.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {"enlarged from 2 x 2" in row["reason"] for row in rows if row["encoder"] == large} == {True}
    assert not any("enlarged" in row["reason"] for row in rows if row["encoder"] == native)
    (tmp_path / "r.csv").write_text(f"encoder,fid,lds\n{large},3,1\n{native},4,2\nhog-grid4,5,3\n")
    done = repa_cache("correlate", tmp_path / "r.csv", "--metrics", tmp_path / "m.csv", "--out", tmp_path / "f.png")
    assert f"{large}: its map was enlarged from 2 x 2: neighbours are alike by construction" in done.err
