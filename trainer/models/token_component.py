"""What a trained model's tokens are as a component of a cache: named, described, and of which latents they may be made.

A component is named by run, step, block and time, `irepa-s500-b4-t0.2`; its fingerprint has the digest of the weights,
the latents' own fingerprint and all that the input depends on. Neither the run's place nor its name is in it.
"""

import re
from typing import Literal

from ...cache_specs.derived import TOKENS, TOKENS_LOADER
from ...cache_specs.errors import UsageError
from ...cache_specs.schema import FEATURES, LATENTS, UNKNOWN, ComponentSpec
from ...cache_specs.tables import encoder_aliases, encoder_table
from ..diffusion.latents import LatentSource
from ..reading.reader import CacheReader
from .layer_tokens import LayerTokens
from .pretrained import TrainedModel


def token_component(
    trained: TrainedModel,
    reader: CacheReader,
    tokens: LayerTokens,
    block: int,
    *,
    name: str | None,
    average: str,
    digest: str,
    dtype: Literal["float16", "int8"],
    precision: Literal["fp32", "bf16"],
    compressor: Literal["none", "zstd", "blosc"],
) -> ComponentSpec:
    """Return the component of the tokens after `block`; `digest` is of the weights, which are the run's `average`.

    Raises UsageError for a name that no component may have.
    """
    model, source = trained.model, f"{LATENTS}/{reader.latents.name}"
    name = name or token_name(trained, block, tokens.t, average)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._=-]*", name):
        raise UsageError(f"--name {name!r}: expected letters, digits and any of . _ = -")
    if name in {*encoder_table(), *encoder_aliases()}:
        raise UsageError(f"--name {name}: that is an encoder of the table; choose another")
    return ComponentSpec(
        kind=FEATURES,
        name=name,
        spec={
            "entry": TOKENS_LOADER,
            "loader": TOKENS_LOADER,
            "model": model.config.name,
            "width": model.config.hidden_size,
            "grid": list(model.grid),
            "cls_token": False,
            "random_weights": False,
            TOKENS: {
                "from": source,
                "fingerprint": reader.fingerprints[source],
                "average": average,
                "block": block,
                **tokens.identity(),
            },
        },
        weights=digest,
        dtype=dtype,
        precision=precision,
        compressor=compressor,
    )


def token_name(trained: TrainedModel, block: int, t: float, average: str) -> str:
    """Return how the tokens of a block and time are called: `irepa-s500-b4-t0.2`."""
    step = "" if trained.steps is None else f"-s{trained.steps}"
    which = "" if average == "ema" else f"-{average.replace(':', '')}"
    return f"{re.sub(r'[^A-Za-z0-9._=-]+', '-', trained.run)}{step}{which}-b{block}-t{t:g}"


def check_latents(trained: TrainedModel, latents: LatentSource, reader: CacheReader) -> list[str]:
    """Return what is to be said where a model saw other images, or never trained its null label.

    Raises UsageError where the cache's latents are not of the autoencoder that the model's are of.
    """
    here = reader.latents
    for key in ("entry", "model", "pixel_range", "latent_channels", "latent_size"):
        if latents.spec.get(key) != here.spec.get(key):
            raise UsageError(
                f"{reader.path}: latents/{here.name} are not those that {trained.path} was trained on: {key} is "
                f"{here.spec.get(key)}, the model's {latents.spec.get(key)}. Name a cache of the same latents"
            )
    if len({latents.weights, here.weights} - {None, UNKNOWN}) > 1:
        raise UsageError(
            f"{reader.path}: latents/{here.name} are of other weights ({here.weights}) than those that {trained.path} "
            f"was trained on ({latents.weights}). Name a cache of the same latents"
        )
    said = []
    if trained.fingerprints.get("dataset") not in (None, reader.fingerprints["dataset"]):
        said.append(f"{trained.path} was trained on other images than those of {reader.path}, on the same latents")
    return said + untrained_null(trained)


def untrained_null(trained: TrainedModel) -> list[str]:
    """Return what is to be said where a model never trained its null label, under which tokens are taken."""
    if trained.config is None or trained.config.get("label_dropout") != 0:
        return []
    return [
        f"{trained.path} was trained with label_dropout 0: its null label, under which tokens are taken, is as it was "
        f"drawn"
    ]
