"""Every entry of the table against the library's own model, on the meta device: nothing is computed, nothing loaded."""

from typing import Any

import pytest
import torch

from repa.cache_specs.tables import encoder_table, resolve_encoder
from repa.pipeline.models.timm_models import VGG_POOL4

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

CARDS = {name: entry for name, entry in encoder_table().items() if "@" not in name}
MILLION = 1e6


def num_params(model: torch.nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / MILLION


@pytest.mark.parametrize("name", [name for name, entry in CARDS.items() if entry.loader == "timm"])
def test_the_table_says_what_timm_says(name: str) -> None:
    import timm

    entry = CARDS[name]
    spec = resolve_encoder(name, resolution=256).spec
    sized = {"img_size": tuple(spec["input_size"])} if entry.output == "tokens" else {}
    with torch.device("meta"):
        model: Any = timm.create_model(entry.model, **sized, **entry.options)
    card = model.pretrained_cfg
    if entry.family == "vgg":
        model = model.features[:VGG_POOL4]
        assert model[-2].__class__.__name__ == "ReLU"
    elif model.num_classes:
        model.reset_classifier(0)
    assert entry.params_m == pytest.approx(num_params(model), abs=0.0051)
    if entry.output == "tokens":
        assert model.embed_dim == entry.width
        assert len(model.blocks) == entry.depth
        assert model.patch_embed.patch_size == (entry.patch, entry.patch)
        assert model.patch_embed.num_patches == spec["grid"][0] * spec["grid"][1] == 256
        assert model.num_prefix_tokens == entry.prefix_tokens
        assert (model.norm.__class__.__name__ == "Identity") == (entry.tensor == "no_norm")
        # C-RADIO's prefix holds a summary a teacher, and no class token of its own.
        assert entry.cls_token == (model.cls_token is not None and entry.family != "cradio")
    if entry.converter is None:
        hub = f"hf.co/{card['hf_hub_id']}" if card.get("hf_hub_id") else card["url"].removeprefix("https://")
        assert (entry.mean, entry.std) == (card["mean"], card["std"])
        assert (entry.licence, entry.source) == (card["license"], hub)
        assert entry.model in timm.list_pretrained()


@pytest.mark.parametrize("name", ["sam-vit-b", "sam2-vit-s", "sam2-vit-b", "sam2-vit-l", "vgg16", "dinov3-vit-s16"])
def test_tokens_of_the_real_size_have_the_tables_shape(name: str) -> None:
    import timm

    from repa.pipeline.models.timm_models import TimmFeatures

    spec = resolve_encoder(name, resolution=256).spec
    sized = {"img_size": tuple(spec["input_size"])} if spec["output"] == "tokens" else {}
    with torch.device("meta"):
        model: Any = timm.create_model(spec["model"], **sized)
        model = model.features[:VGG_POOL4] if name == "vgg16" else model
        ((tokens, prefix),) = TimmFeatures(model.eval(), spec)(torch.empty(1, 3, *spec["input_size"]))
    if spec["output"] == "map":
        side = 64 if name.startswith("sam-") else 16
        assert tokens.shape == (1, spec["width"], side, side)
        assert prefix is None
    else:
        assert tokens.shape == (1, 256, spec["width"])
        assert prefix.shape == (1, spec["prefix_tokens"], spec["width"])


@pytest.mark.parametrize("name", [name for name, entry in CARDS.items() if entry.loader == "transformers"])
def test_the_table_says_what_transformers_says(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    from repa.pipeline.models.transformers_models import dinov2_config

    spec = resolve_encoder(name, resolution=256).spec
    with torch.device("meta"):
        model = transformers.Dinov2Model(dinov2_config(spec))
    assert CARDS[name].params_m == pytest.approx(num_params(model), rel=2e-4)
    assert len(model.encoder.layer) == spec["depth"]
    assert model.config.hidden_size == CARDS[name].width
    assert model.config.patch_size == CARDS[name].patch
    assert (spec["input_size"][0] // model.config.patch_size) ** 2 == 256
    # 64 or 128 channels a head, as published
    assert spec["width"] // model.config.num_attention_heads in (64, 128)
