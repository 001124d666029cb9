"""The contract: shapes and file names, fingerprints and what they depend on, damaged attributes, the tables."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from repa.cache_specs.errors import CacheError, UsageError, nearest, one_line_errors
from repa.cache_specs.fingerprint import (
    canonical_json,
    manifest_fingerprint,
    transform_fingerprint,
    weights_digest,
)
from repa.cache_specs.layout import VIEWS, CacheLayout
from repa.cache_specs.schema import ComponentSpec
from repa.cache_specs.shard_index import index_bytes
from repa.cache_specs.tables import autoencoder_table, encoder_aliases, encoder_table, resolve_encoder


def a_layout(**changes: Any) -> CacheLayout:
    fields = {
        "num_samples": 600,
        "resolution": 256,
        "views": VIEWS,
        "class_names": ("a", "b"),
        "shard_samples": 256,
        "manifest_fingerprint": "m",
        "dataset_fingerprint": "d",
    }
    return CacheLayout(**{**fields, **changes})


def a_component(**changes: Any) -> ComponentSpec:
    spec = resolve_encoder("dinov2", resolution=256).spec
    fields = {"kind": "features", "name": "dinov2-vit-b", "spec": spec, "weights": "sha256:0", **changes}
    return ComponentSpec(**fields)


def test_shapes_chunks_and_file_names_are_the_documented_ones() -> None:
    arrays = {array.name: array for array in a_component(dtype="int8").arrays(a_layout())}
    assert list(arrays) == [
        *("patch_tokens", "token_scale", "channel_mean", "channel_std", "cls_token", "source_bytes", "valid")
    ]
    tokens = arrays["patch_tokens"]
    assert (tokens.shape, tokens.dtype) == ((600, 2, 256, 768), "int8")
    assert (tokens.inner, tokens.shard) == ((1, 1, 256, 768), (256, 2, 256, 768))
    assert (tokens.num_shards, tokens.inner_bytes) == (3, 256 * 768)
    assert tokens.shard_file(2) == "c.2.0.0.0"
    assert arrays["valid"].shard_file(2) == "c.2"
    assert (tokens.num_chunks(256), tokens.num_chunks(88), arrays["valid"].num_chunks(88)) == (512, 176, 1)
    assert (index_bytes(tokens), index_bytes(arrays["valid"])) == (16 * 512 + 4, 16 + 4)
    assert [a_layout().sample_range(k) for k in range(a_layout().num_ranges)] == [(0, 256), (256, 512), (512, 600)]


def test_fingerprints_are_sha256_of_documented_text() -> None:
    lines = '["a/ü.png",0]\n["b/1.png",1]\n'
    assert manifest_fingerprint(["a/ü.png", "b/1.png"], [0, 1]) == hashlib.sha256(lines.encode()).hexdigest()
    text = '{"class_names":["a","b"],"crop":"c","manifest":"m","resolution":32,"views":["identity"]}'
    found = transform_fingerprint("m", resolution=32, crop="c", views=["identity"], class_names=["a", "b"])
    assert found == hashlib.sha256(text.encode()).hexdigest()
    weights = hashlib.sha256(b'["a","float32",[1]]\n\0\0\0\0["b","int8",[]]\n\1').hexdigest()
    assert weights_digest([("a", "float32", (1,), b"\0\0\0\0"), ("b", "int8", (), b"\1")]) == weights
    with pytest.raises(ValueError, match="sort by name"):
        weights_digest([("b", "int8", (), b"\1"), ("a", "int8", (), b"\1")])
    with pytest.raises(ValueError, match="2 sample ids but 1 labels"):
        manifest_fingerprint(["a", "b"], [0])
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(float("nan"))


CHANGES: list[dict[str, Any]] = [
    {"dtype": "int8"},
    {"precision": "bf16"},
    {"weights": "sha256:1"},
    {"spec": {**resolve_encoder("dinov2", resolution=256).spec, "tensor": "before_norm"}},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_whatever_can_change_a_value_changes_the_fingerprint(change: dict[str, Any]) -> None:
    layout = a_layout()
    found = a_component().fingerprint(layout)
    assert a_component(**change).fingerprint(layout) != found
    assert a_component().difference(a_component(**change)) is not None
    assert a_component(compressor="zstd").fingerprint(layout) == found  # other bytes, the same values
    assert a_component().fingerprint(a_layout(dataset_fingerprint="e")) != found


def test_attributes_survive_json_and_damaged_ones_are_named() -> None:
    layout, component = a_layout(), a_component()
    assert CacheLayout.from_attributes(json.loads(json.dumps(layout.attributes())), "x") == layout
    attributes = json.loads(json.dumps(component.attributes(layout)))
    assert ComponentSpec.from_attributes(attributes, "x") == component
    damaged: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (CacheLayout.from_attributes, {**layout.attributes(), "format": "other"}),
        (CacheLayout.from_attributes, {**layout.attributes(), "format_version": 2}),
        (CacheLayout.from_attributes, {**layout.attributes(), "views": ["flip"]}),
        (CacheLayout.from_attributes, {**layout.attributes(), "num_samples": "many"}),
        (ComponentSpec.from_attributes, {**attributes, "dtype": "int4"}),
        (ComponentSpec.from_attributes, {key: attributes[key] for key in attributes if key != "weights"}),
    ]
    for read, values in damaged:
        with pytest.raises(CacheError, match="where/it/is"):
            read(values, "where/it/is")
    spec = {key: value for key, value in component.spec.items() if key != "grid"}
    with pytest.raises(CacheError, match="damaged spec"):
        dataclasses.replace(component, spec=spec).arrays(layout)


def test_the_tables_are_whole() -> None:
    assert encoder_aliases()["dinov2"] == "dinov2-vit-b"
    assert set(encoder_aliases().values()) <= set(encoder_table())
    for name in ("dinov2-vit-s", "dinov2-vit-b", "dinov2-vit-l", "dinov2-vit-g", "clip-vit-L", "mae-vit-l"):
        entry = encoder_table()[name]
        assert entry.tensor == ("before_norm" if name in ("clip-vit-L", "mae-vit-l") else "after_norm")
        assert resolve_encoder(name, resolution=256).spec["input_size"] == [16 * entry.patch] * 2
    assert {(entry.scale, entry.factor) for name, entry in autoencoder_table().items() if "sd-vae" in name} == {
        (0.18215, 8)
    }


def test_requests_name_their_group() -> None:
    assert resolve_encoder("hog:grid=8", resolution=32).name == "hog-grid8"
    assert resolve_encoder("dinov2", resolution=256, random_weights=True).name == "dinov2-vit-b-random"
    assert resolve_encoder("hog", resolution=256, random_weights=True).name == "hog"  # it has none


def test_errors_are_one_line_with_their_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    for error, code in ((UsageError("a\nb"), 2), (CacheError("a\nb"), 1)):
        with pytest.raises(SystemExit) as stop, one_line_errors("repa-x"):
            raise error
        assert stop.value.code == code
        assert capsys.readouterr().err == "repa-x: a b\n"
    with pytest.raises(KeyError), one_line_errors("repa-x"):
        raise KeyError("a bug keeps its traceback")
    assert nearest("dinov2-vit-x", ["dinov2-vit-b", "hog"]).startswith("did you mean 'dinov2-vit-b'?")
