"""Numbers in a cache's metadata are looked at before anything is counted, listed or allocated by them."""

from typing import Any

import pytest

from repa.cache_specs.errors import CacheError
from repa.cache_specs.layout import CacheLayout
from repa.cache_specs.schema import ComponentSpec, component_arrays
from repa.cache_specs.tables import resolve_autoencoder, resolve_encoder

LAYOUT = CacheLayout(
    num_samples=6,
    resolution=32,
    views=("identity",),
    class_names=("a", "b"),
    shard_samples=4,
    manifest_fingerprint="m",
    dataset_fingerprint="d",
)


@pytest.mark.parametrize("name", ["num_samples", "resolution", "shard_samples"])
@pytest.mark.parametrize("value", [0, -1, 10**12, 2**70, 6.0, 6.5, "6", True, None, [6], float("inf")])
def test_counts_of_a_cache_are_whole_numbers_of_a_sensible_size(name: str, value: Any) -> None:
    assert CacheLayout.from_attributes(LAYOUT.attributes(), "cache") == LAYOUT
    with pytest.raises(CacheError, match=f"cache: damaged attributes of the root group .*{name} is"):
        CacheLayout.from_attributes({**LAYOUT.attributes(), name: value}, "cache")


@pytest.mark.parametrize(
    ("name", "value"),
    [("class_names", [1]), ("class_names", 7), ("views", 3), ("views", [[]]), ("views", ["flip"] * 9), ("crop", ...)],
)
def test_other_attributes_of_a_cache(name: str, value: Any) -> None:
    attributes = LAYOUT.attributes()
    attributes[name] = value
    if value is ...:
        del attributes[name]
    with pytest.raises(CacheError, match="damaged attributes of the root group"):
        CacheLayout.from_attributes(attributes, "cache")


@pytest.mark.parametrize(
    "change",
    [
        {"layers": list(range(100_000))},
        {"layers": [0, 0]},
        {"layers": [10**9]},
        {"layers": ["0"]},
        {"layers": 7},
        {"grid": [10**6, 10**6]},
        {"grid": [2**15, 2**15]},
        {"grid": [2]},
        {"grid": 2},
        {"grid": [2.0, 2.0]},
        {"width": 10**9},
        {"width": None},
        {"width": "9"},
    ],
)
def test_the_spec_of_an_encoder_claims_what_a_model_may_have(change: dict[str, Any]) -> None:
    spec = resolve_encoder("hog:grid=4", resolution=32).spec
    assert len(component_arrays("features", spec, "int8", LAYOUT)) == 6
    with pytest.raises(CacheError, match="damaged spec of a component of features") as refused:
        component_arrays("features", spec | change, "float16", LAYOUT)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("change", [{"latent_size": [10**9, 4]}, {"latent_size": None}, {"moment_channels": 0}])
def test_the_spec_of_an_autoencoder_claims_what_a_model_may_have(change: dict[str, Any]) -> None:
    spec = resolve_autoencoder("pixels", resolution=32).spec
    assert len(component_arrays("latents", spec, "float16", LAYOUT)) == 3
    with pytest.raises(CacheError, match="damaged spec of a component of latents"):
        component_arrays("latents", spec | change, "float16", LAYOUT)


@pytest.mark.parametrize(
    "change", [{"kind": "x"}, {"kind": []}, {"spec": 7}, {"spec": None}, {"name": 7}, {"dtype": {}}]
)
def test_attributes_of_a_component_that_are_none(change: dict[str, Any]) -> None:
    spec = resolve_encoder("hog:grid=4", resolution=32)
    component = ComponentSpec(kind="features", name=spec.name, spec=spec.spec, weights="none")
    attributes = component.attributes(LAYOUT)
    assert ComponentSpec.from_attributes(attributes, "here") == component
    with pytest.raises(CacheError, match="here: damaged attributes of the component"):
        ComponentSpec.from_attributes(attributes | change, "here")
