"""Autoencoders against diffusers' own distribution, and weights from files in the published form, old names too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import repa.pipeline.models.autoencoders
from repa.cache_specs.errors import UsageError
from repa.cache_specs.tables import autoencoder_table, resolve_autoencoder
from repa.pipeline.models.autoencoders import load_autoencoder

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


NARROW: dict[str, dict[str, Any]] = {
    "AutoencoderKLQwenImage": {"base_dim": 8},
    "AutoencoderTiny": {},
    "AutoencoderDC": {
        "encoder_block_out_channels": [32] * 6,
        "decoder_block_out_channels": [32] * 6,
        "encoder_layers_per_block": [0, 1, 1, 1, 1, 1],
        "decoder_layers_per_block": [0, 1, 1, 1, 1, 1],
    },
}
DIFFUSERS = {name: entry for name, entry in autoencoder_table().items() if entry.loader == "diffusers"}


def narrow_spec(name: str, *, random_weights: bool = True) -> dict[str, Any]:
    """Return a spec with the autoencoder's wiring and factor at a thousandth of its weights."""
    spec = resolve_autoencoder(name, resolution=32, random_weights=random_weights).spec
    if spec["library_class"] == "AutoencoderKL":
        narrow = {"block_out_channels": [32] * len(spec["config"]["block_out_channels"])}
    else:
        narrow = NARROW[spec["library_class"]]
    spec["config"] = {**spec["config"], **narrow}
    return spec


def sd_vae_spec(*, random_weights: bool = True) -> dict[str, Any]:
    return narrow_spec("sd-vae-ft-mse", random_weights=random_weights)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", DIFFUSERS)
def test_the_table_says_what_the_library_says(name: str) -> None:
    import diffusers
    from torch.utils.flop_counter import FlopCounterMode

    entry = DIFFUSERS[name]
    film = entry.library_class == "AutoencoderKLQwenImage"
    with torch.device("meta"):
        model = getattr(diffusers, entry.library_class)(**entry.config).eval()
        with FlopCounterMode(display=False) as counter:
            encoded = model.encode(torch.empty(1, 3, *(1,) * film, 256, 256))
    assert entry.params_m == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=0.0051)
    assert entry.gmac == pytest.approx(counter.get_total_flops() / 2e9, abs=0.0051)
    if entry.kind == "mean_std":
        latent = encoded.latent_dist.mean[:, :, 0] if film else encoded.latent_dist.mean
    else:
        latent = encoded.latents if entry.library_class == "AutoencoderTiny" else encoded.latent
    assert latent.shape == (1, entry.latent_channels, 256 // entry.factor, 256 // entry.factor)
    # Published and tuned: a scale and bias of both, or of neither.
    assert (entry.published is None) == name.startswith("e2e")


@pytest.mark.parametrize("name", ["taesd", "taef1", "dc-ae-f32c32"])
def test_a_deterministic_autoencoder_stores_the_latent_itself(name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    spec = narrow_spec(name)
    autoencoder = load_autoencoder(spec)
    moments = autoencoder.encode(images)
    side = 64 // DIFFUSERS[name].factor
    assert (moments.shape, moments.dtype) == ((2, DIFFUSERS[name].latent_channels, side, side), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(moments, autoencoder.model.encoder(images.float() / 127.5 - 1), rtol=1e-4, atol=1e-5)
    assert autoencoder.decode(moments).shape == (2, 64, 64, 3)
    state = {key: tensor + 0.01 for key, tensor in autoencoder.model.state_dict().items() if tensor.is_floating_point()}
    state = {**autoencoder.model.state_dict(), **state}
    save_file(state, tmp_path / "w.safetensors")
    loaded = load_autoencoder(narrow_spec(name, random_weights=False), weights=tmp_path / "w.safetensors")
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.model.state_dict().items())


def test_moments_are_mean_and_std_of_the_posterior(images: torch.Tensor) -> None:
    autoencoder = load_autoencoder(sd_vae_spec())
    moments = autoencoder.encode(images)
    assert (moments.shape, moments.dtype) == ((2, 8, 4, 4), torch.float32)
    with torch.no_grad():
        posterior = autoencoder.model.encode(images.float() / 127.5 - 1).latent_dist
    torch.testing.assert_close(moments[:, :4], posterior.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments[:, 4:], (0.5 * posterior.logvar).exp(), rtol=1e-4, atol=1e-5)
    assert (moments[:, 4:] > 0).all()


@pytest.mark.parametrize("name", ["e2e-vavae", "e2e-invae", "e2e-qwenimage-vae"])
def test_the_16_fold_and_the_film_autoencoders_give_moments_and_pictures(name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    autoencoder = load_autoencoder(narrow_spec(name))
    moments = autoencoder.encode(images)
    channels, side = DIFFUSERS[name].latent_channels, 64 // DIFFUSERS[name].factor
    assert moments.shape == (2, 2 * channels, side, side)
    model, pixels = autoencoder.model, images.float() / 127.5 - 1
    with torch.no_grad():  # past the library's own encode: the layers, one after the other
        if name == "e2e-qwenimage-vae":
            raw = model.quant_conv(model.encoder(pixels[:, :, None]))[:, :, 0]
            decoded = model.decoder(model.post_quant_conv(moments[:, :channels, None]))[:, :, 0]
        else:
            raw = model.quant_conv(model.encoder(pixels))
            decoded = model.decoder(model.post_quant_conv(moments[:, :channels]))
            # attention at the lowest level, and nowhere above it but in the middle
            assert [hasattr(block, "attentions") for block in model.encoder.down_blocks] == [False] * 4 + [True]
    torch.testing.assert_close(moments[:, :channels], raw[:, :channels], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments[:, channels:], (0.5 * raw[:, channels:]).exp(), rtol=1e-4, atol=1e-5)
    pictures = autoencoder.decode(moments[:, :channels])
    assert (pictures.shape, pictures.dtype) == ((2, 64, 64, 3), torch.uint8)
    np.testing.assert_allclose(pictures, (decoded.clamp(-1, 1) + 1).permute(0, 2, 3, 1) * 127.5, atol=0.51)

    state = {key: tensor + 0.01 for key, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    loaded = load_autoencoder(narrow_spec(name, random_weights=False), weights=tmp_path / "w.safetensors")
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.model.state_dict().items())
    gone = next(iter(state))
    del state[gone]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=f"does not fit {name}: .*{gone}"):
        load_autoencoder(narrow_spec(name, random_weights=False), weights=tmp_path / "w.safetensors")


def test_decoding_gives_pictures(images: torch.Tensor) -> None:
    autoencoder = load_autoencoder(sd_vae_spec())
    latents = autoencoder.encode(images)[:, :4]
    pictures = autoencoder.decode(latents)
    assert (pictures.shape, pictures.dtype) == ((2, 32, 32, 3), torch.uint8)
    with torch.no_grad():
        expected = (autoencoder.model.decode(latents).sample.clamp(-1, 1) + 1) * 127.5
    np.testing.assert_allclose(pictures, expected.permute(0, 2, 3, 1), atol=0.51)


def test_pixels_come_back_exactly(images: torch.Tensor) -> None:
    pixels = load_autoencoder(resolve_autoencoder("pixels", resolution=32).spec)
    latents = pixels.encode(images)
    assert latents.min() >= -1
    assert latents.max() <= 1
    np.testing.assert_array_equal(pixels.decode(latents.half()), images.permute(0, 2, 3, 1))


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("form", ["safetensors", "bin", "old names", "folder"])
def test_published_files_give_the_same_weights(form: str, tmp_path: Path, images: torch.Tensor) -> None:
    from safetensors.torch import save_file

    random = load_autoencoder(sd_vae_spec())
    state = {name: tensor + 0.01 for name, tensor in random.model.state_dict().items()}
    if form == "old names":  # as the published sd-vae-ft-mse and -ema spell their attention
        renamed = {}
        for name, tensor in state.items():
            new = next((n for n in OLD_NAMES if f"attentions.0.{n}." in name), None)
            renamed[name.replace(f"{new}.", f"{OLD_NAMES[new]}.") if new else name] = tensor
        assert renamed.keys() != state.keys()
        save_file(renamed, file := tmp_path / "w.safetensors")
    elif form == "bin":
        torch.save(state, file := tmp_path / "w.bin")
    elif form == "folder":
        random.model.load_state_dict(state)
        random.model.save_pretrained(file := tmp_path / "w")
    else:
        save_file(state, file := tmp_path / "w.safetensors")
    loaded = load_autoencoder(sd_vae_spec(random_weights=False), weights=file)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert loaded.weights.startswith("sha256:")
    random.model.load_state_dict(state)
    assert loaded.weights == repa.pipeline.models.weights.digest_of(random.model)


def test_weights_that_cannot_be_had_or_do_not_fit(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(UsageError, match=r"stabilityai/sd-vae-ft-mse could not be had .*--weights.*--random-weights"):
        load_autoencoder(sd_vae_spec(random_weights=False))
    save_file({"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3), "else": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"w.safetensors: does not fit sd-vae-ft-mse: .*names differ"):
        load_autoencoder(sd_vae_spec(random_weights=False), weights=tmp_path / "w.safetensors")
    (tmp_path / "text.pth").write_text("these are no weights")
    with pytest.raises(UsageError, match=r"text.pth: does not fit sd-vae-ft-mse"):
        load_autoencoder(sd_vae_spec(random_weights=False), weights=tmp_path / "text.pth")
    with pytest.raises(UsageError, match="pixels has no weights"):
        load_autoencoder(resolve_autoencoder("pixels", resolution=32).spec, weights=tmp_path / "w.safetensors")
