"""What commands print: lines of 80 columns for people, one JSON object with keys that stay for programs."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repa.pipeline.checking import throughput
from repa.pipeline.commands.build import weights_of
from repa.pipeline.commands.said import WIDTH, folded

CACHE = {"cache", "num_samples", "class_names", "resolution", "views", "shard_samples", "num_ranges"}
CACHE |= {"dataset_fingerprint", "components", "fits"}
COMPONENT = {"path", "complete", "spec", "weights", "precision", "dtype", "compressor", "fingerprint", "arrays"}
COMPONENT |= {"latent_mean", "latent_std", "float16_error", "bad_files", "bound", "missing_ranges", "missing_samples"}
COMPONENT |= {"finish"}
ENCODER = {"name", "short", "family", "irepa27", "loader", "model", "width", "depth", "patch", "tensor", "output"}
ENCODER |= {"cls_token", "params_m", "gmac", "licence", "weights_from"}
ESTIMATE = {"num_images", "resolution", "views", "probe", "components", "num_bytes", "gmac", "hours", "speedup"}
ESTIMATE |= {"budget", "bounds"}
PAGE = Path(__file__).parents[3] / "pipeline/README.md"


@pytest.fixture
def place(make_images: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder, which holds `images`."""
    make_images(tmp_path / "images", num=9)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_reports_fit_80_columns(
    place: Path, build: Callable[..., Any], repa_cache: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(throughput, "fits_memory", lambda params_m, device: params_m == 0)
    names = ("webssl-vit-dino1b_full2b_224", "hog:grid=8")
    encoders = [word for name in names for word in ("--encoder", name)]
    outcomes = [
        build(Path("images"), Path("caches/photos"), "--dry-run"),
        build(Path("images"), Path("caches/photos"), "--encoder", "hog:grid=3"),
        repa_cache("verify", "caches/photos"),
        repa_cache("info", "caches/photos"),
        repa_cache("encoders"),
        repa_cache("encoders", *(row["name"] for row in json.loads(repa_cache("encoders", "--json").out)["encoders"])),
        repa_cache("estimate", *encoders, "--images", 1281167, "--model", "SiT-XL/2", "--budget", "1.3TB"),
    ]
    for cut in place.glob("caches/photos/features/*/valid/c.1"):
        cut.unlink()
    outcomes += [
        repa_cache("info", "caches/photos"),
        build(Path("images"), Path("caches/photos"), "--encoder", "hog:grid=3"),
    ]
    for outcome in outcomes:
        assert outcome.code == 0, outcome.err
        long = [line for line in (outcome.out + outcome.err).splitlines() if len(line) > WIDTH]
        assert not long
    assert "* scaled by GMAC" not in outcomes[6].out  # hog alone was measured, and costs nothing


def test_folded_lines_keep_their_words_and_commands_stay_commands() -> None:
    told = "  one " + "word " * 30
    assert " ".join(" ".join(folded(told)).split()) == " ".join(told.split())
    assert all(line.startswith("  ") for line in folded(told))
    assert folded("") == [""]
    path = "a" * 100
    assert folded(path) == [path]
    words = ["repa-cache", "build", "--data", "it's -- all", "--cache", "c" * 70, "--encoder", "x;y", "--dry-run"]
    cut = folded("    " + shlex.join(words))
    assert len(cut) == 3
    assert all(line.startswith("    ") for line in cut)
    assert all(line.endswith(" \\") for line in cut[:-1])
    assert shlex.split("".join(line.removesuffix("\\") for line in cut)) == words


def test_info_gives_programs_what_it_gives_people(
    place: Path, build: Callable[..., Any], repa_cache: Callable[..., Any]
) -> None:
    assert build(place / "images", place / "cache").code == 0
    (place / "cache/features/hog-grid4/valid/c.0").unlink()
    (place / "cache/features/hog-grid4/valid/c.2").unlink()
    done = repa_cache("info", "cache", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found.keys() == CACHE
    latents, features = found["components"]
    assert latents.keys() == features.keys() == COMPONENT
    assert (found["cache"], found["num_samples"], found["class_names"]) == ("cache", 9, ["class 0", "class 1"])
    assert (latents["complete"], latents["finish"], len(latents["latent_mean"])) == (True, None, 3)
    assert (features["complete"], features["missing_ranges"]) == (False, 2)
    assert features["missing_samples"] == [[0, 4], [8, 9]]
    assert {
        "name": "patch_tokens",
        "dtype": "float16",
        "shape": [9, 2, 16, 128],
        "num_bytes": 9 * 2 * 16 * 128 * 2,
    } in (features["arrays"])
    words = [str(place / "images") if word == "PATH" else word for word in shlex.split(features["finish"])]
    assert repa_cache(*words[1:]).code == 0
    # What does not hold is named beside what does, and is an error as without --json.
    file = place / "cache/features/hog-grid4/zarr.json"
    file.write_text(file.read_text().replace('"bilinear"', '"bicubic"'))
    done = repa_cache("info", "cache", "--json")
    assert done.code == 1
    latents, features = json.loads(done.out)["components"]
    assert latents["complete"]
    assert features.keys() == {"path", "error"}
    assert "the attributes do not match their digest" in features["error"]
    assert features["error"] in done.err
    assert "latents/pixels: complete" in repa_cache("info", "cache").out


def test_the_page_has_every_key() -> None:
    page = PAGE.read_text()
    for command, keys in (("info CACHE", CACHE | COMPONENT), ("encoders [NAME]", ENCODER), ("estimate`", ESTIMATE)):
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{command}"))
        assert {key for key in keys if f"`{key}`" not in row} == set()


def test_the_table_of_encoders_for_programs(repa_cache: Callable[..., Any]) -> None:
    found = json.loads(repa_cache("encoders", "--json").out)
    assert found.keys() == {"encoders", "left_out"}
    assert all(row.keys() == ENCODER for row in found["encoders"])
    assert sum(row["irepa27"] for row in found["encoders"]) == 27
    some = json.loads(repa_cache("encoders", "--json", "dinov2", "siglip2@irepa").out)["encoders"]
    assert [row["name"] for row in some] == ["dinov2-vit-b", "siglip2-vit-b@irepa"]
    assert some[0] in found["encoders"]
    assert "weights from: hf.co/timm/vit_base_patch14_dinov2.lvd142m" in repa_cache("encoders", "dinov2").out
    for wrong in (("dinov22",), ("dinov2", "--check", "x.yaml"), ("--json", "--check", "x.yaml")):
        assert repa_cache("encoders", *wrong).code == 2


def test_an_estimate_for_programs(repa_cache: Callable[..., Any]) -> None:
    options = ("--images", 1281167, "--encoder", "dinov2", "--encoder", "clip", "--no-probe", "--json")
    found = json.loads(repa_cache("estimate", *options, "--model", "SiT-B/2", "--budget", "500GB").out)
    assert found.keys() == ESTIMATE
    latents, dinov2, _ = found["components"]
    assert dinov2.keys() == {"path", "num_bytes", "gmac", "images_per_s", "measured", "hours"}
    assert dinov2["path"] == "features/dinov2-vit-b"
    assert dinov2["num_bytes"]["float16"] == pytest.approx(514.0e9, rel=1e-4)
    assert (dinov2["hours"], found["hours"], found["probe"]) == (None, None, None)
    assert found["num_bytes"]["float16"] == sum(one["num_bytes"]["float16"] for one in found["components"])
    assert found["speedup"]["over_encoders"] == pytest.approx(1 + (23.16 + 81.03) / (3 * 22.95), abs=0.01)
    assert found["budget"]["dtypes"] == {"dinov2-vit-b": "int8", "clip-vit-L": None}
    used = latents["num_bytes"]["float16"] + dinov2["num_bytes"]["int8"]
    assert (found["budget"]["used_bytes"], found["budget"]["num_bytes"]) == (used, 500 * 10**9)
    bare = json.loads(repa_cache("estimate", *options).out)
    assert (bare["speedup"], bare["budget"]) == (None, None)


def test_weights_go_by_the_name_of_an_encoder_or_its_file() -> None:
    pairs = ("nets/my-vit.yaml=a.pth", "DINOv2=b.pth", "SD_VAE_ft_mse=c.pth")
    found = {name: file.name for name, file in weights_of(pairs).items()}
    assert found == {"my-vit": "a.pth", "dinov2-vit-b": "b.pth", "sd-vae-ft-mse": "c.pth"}
