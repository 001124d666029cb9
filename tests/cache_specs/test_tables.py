"""The tables: every entry reads, names and options resolve, a user's own file is one more entry."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from repa import cache_specs
from repa.cache_specs.autoencoder_entry import AutoencoderEntry
from repa.cache_specs.encoder_entry import EncoderEntry
from repa.cache_specs.errors import UsageError
from repa.cache_specs.tables import (
    autoencoder_table,
    encoder_aliases,
    encoder_name,
    encoder_table,
    resolve_autoencoder,
    resolve_encoder,
)

OWN = """
loader: timm
model: vit_tiny_patch16_224.augreg_in21k
width: 192
patch: 16
depth: 12
prefix_tokens: 1
cls_token: true
tensor: after_norm
mean: [0.5, 0.5, 0.5]
std: [0.5, 0.5, 0.5]
interpolation: bicubic
antialias: true
licence: apache-2.0
"""


def test_the_table_has_the_study_and_every_short_name() -> None:
    table = encoder_table()
    assert len([name for name in table if "@" not in name]) == 60
    assert sum(entry.irepa27 for entry in table.values()) == 27
    assert {encoder_name(short) for short in encoder_aliases()} <= set(table)
    assert all(entry.mean is not None and entry.params_m > 0 for entry in table.values() if entry.has_weights)


def test_a_variant_departs_only_where_it_says() -> None:
    card, study = (resolve_encoder(name, resolution=256).spec for name in ("siglip2", "siglip2@irepa"))
    assert {key for key in card if card[key] != study[key]} == {"entry", "mean", "std", "options"}
    assert study["mean"] == [0.485, 0.456, 0.406]
    assert study["options"] == {"act_layer": "gelu_tanh"}
    assert resolve_encoder("siglip2@irepa", resolution=256).name == "siglip2-vit-b@irepa"
    with pytest.raises(UsageError, match="unknown encoder 'dino-vit-b@irepa'"):
        resolve_encoder("dino@irepa", resolution=256)


def test_the_grid_is_the_studys_or_the_one_asked() -> None:
    assert resolve_encoder("dinov2", resolution=256).spec["input_size"] == [224, 224]
    big = resolve_encoder("dinov2", resolution=512).spec
    assert (big["grid"], big["input_size"]) == ([32, 32], [448, 448])
    sam = resolve_encoder("sam", resolution=512).spec
    assert (sam["grid"], sam["input_size"]) == ([32, 32], [1024, 1024])
    with pytest.raises(UsageError, match="64 x 64 tokens, not 65 x 65"):
        resolve_encoder("sam:grid=65", resolution=512)
    with pytest.raises(UsageError, match="hog:grid=6"):
        resolve_encoder("hog", resolution=100)
    with pytest.raises(UsageError, match="at least 2 x 2"):
        resolve_encoder("hog", resolution=16)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ("dinov22", "did you mean 'dinov2'"),
        ("hog:gird=8", "did you mean 'grid'"),
        ("hog:grid=0", "grid is '0'"),
        ("hog:grid=a", "grid is 'a'"),
        ("hog:grid=", "grid is ''"),
        ("sift", "sift is left out: the study's is kornia's"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(request_: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        resolve_encoder(request_, resolution=256)


def test_your_own_file_is_one_more_entry(tmp_path: Path) -> None:
    file = tmp_path / "my-vit.yaml"
    file.write_text(OWN)
    resolved = resolve_encoder(f"{file}:grid=8", resolution=256, random_weights=True)
    assert resolved.name == "my-vit-grid8-random"
    assert resolved.spec["input_size"] == [128, 128]
    assert resolved.spec["antialias"] is True
    assert str(tmp_path) not in str(resolved.spec)
    file.write_text(OWN + "name: other\n")
    assert resolve_encoder(str(file), resolution=256).name == "other"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (OWN + "name: dinov2\n", "dinov2 is the table's"),
        (OWN + "name: ../up\n", "becomes a folder's"),
        (OWN + "pach: 3\n", "unknown key 'pach'; did you mean 'patch'"),
        (OWN.replace("width: 192\n", ""), "width is missing, expected a whole number from 1"),
        (OWN.replace("width: 192", "width: wide"), "width is 'wide'"),
        (OWN.replace("after_norm", "afternorm"), "tensor is 'afternorm'"),
        (OWN.replace("std: [0.5, 0.5, 0.5]\n", ""), "expected three numbers each"),
        ("- 1\n", "one encoder's fields"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_entry_is_refused_by_its_field(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "my-vit.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=said) as refused:
        resolve_encoder(str(file), resolution=256)
    assert str(file) in str(refused.value) or "encoder my-vit: " in str(refused.value)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        resolve_encoder(str(tmp_path / "none.yaml"), resolution=256)


@pytest.mark.parametrize(("cls", "place"), [(EncoderEntry, 1), (AutoencoderEntry, 2)])
def test_every_field_is_explained(cls: Any, place: int) -> None:
    text = Path(cache_specs.__file__).with_name("ENCODERS.md").read_text()
    explained: set[str] = set()
    for line in text.split("| field | what it is | default |")[place].split("\n\n")[0].splitlines():
        explained |= set(re.findall(r"`(\w+)`", line.partition(" | ")[0]))
    assert explained == set(cls.RULES)
    assert set(cls.RULES) == {field.name for field in fields(cls)} - cls.HIDDEN


def test_cost_at_another_grid_is_linear_but_for_attention() -> None:
    entry = encoder_table()["dinov2-vit-b"]
    assert entry.gmac_at(256) == pytest.approx(entry.gmac)
    # 2 L T^2 D for the two products of attention; at four times the tokens they cost sixteen times.
    attention = 2 * 12 * 256**2 * 768 / 1e9
    assert entry.gmac_at(1024) == pytest.approx(4 * (entry.gmac - attention) + 16 * attention)
    assert encoder_table()["sam-vit-b"].gmac_at(1024) == encoder_table()["sam-vit-b"].gmac


def test_an_autoencoder_divides_the_resolution_or_is_refused() -> None:
    for name, entry in autoencoder_table().items():
        side = resolve_autoencoder(name, resolution=entry.factor * 3).spec["latent_size"]
        assert side == [3, 3]
    with pytest.raises(UsageError, match="try --resolution 96"):
        resolve_autoencoder("sd-vae-ft-mse", resolution=100)
