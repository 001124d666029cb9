"""What the trainer borrows from `repa.pipeline`: decoders, encoders, Inception and CKNNA.

The composition root: no other module of the trainer imports the pipeline, and this one does so only when a function is
called. It hands out plain callables; training itself needs none of them.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...cache_specs.errors import UsageError
from ..diffusion.latents import LatentSource
from ..evaluating.evaluation import Evaluation, Scorer, open_reference
from ..runs.run import Run, latent_source
from ..sampling.sample import Decoder

if TYPE_CHECKING:
    from torch import Tensor


def load_decoder(source: LatentSource, *, weights: Path | None, device: str) -> tuple[Decoder | None, str]:
    """Return the function from latents to pictures, and its name; None where diffusers is not installed.

    Raises UsageError where the decoder's weights cannot be had, or are not of the autoencoder that made the cache.
    """
    from ...cache_specs.schema import UNKNOWN
    from ...pipeline.models.autoencoders import load_autoencoder

    if source.spec["loader"] == UNKNOWN:
        click.echo(
            f"{source.name} is an autoencoder that only its import knows: latents are saved as they are", err=True
        )
        return None, "none"
    try:
        loaded = load_autoencoder(source.spec, weights=weights, device=device)
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        click.echo("diffusers is not installed: latents are saved as they are", err=True)
        return None, "none"
    if source.weights not in (None, UNKNOWN, loaded.weights):
        raise UsageError(
            f"the weights of {source.name} ({loaded.weights}) are not those that the model's latents come from "
            f"({source.weights}). Give the same ones with --autoencoder-weights (in training grid.autoencoder_weights)"
        )
    return loaded.decode, f"{source.spec['entry']} {loaded.weights}"


def load_evaluation(run: Run) -> Evaluation:
    """Return the run's evaluation: everything that it needs is checked and loaded before the first step."""
    from ...pipeline.models.vectors import load_vectors

    settings, device = run.config.evaluation, str(run.world.device)
    reference = open_reference(run.config)
    weights = [
        None if file is None else Path(file) for file in (settings.encoder_weights, settings.autoencoder_weights)
    ]
    encode = load_vectors(
        reference.component, settings.pooling, layer=reference.layer, weights=weights[0], device=device
    )
    decode, decoder = load_decoder(latent_source(run.reader, run.norm), weights=weights[1], device=device)
    if decode is None:
        raise UsageError("evaluation compares pictures, and without diffusers there are none; set evaluation.every=0")
    score = _inception(run)
    return Evaluation(run, reference, decode=decode, decoder=decoder, encode=encode, score=score, tell=click.echo)


def _inception(run: Run) -> Scorer | None:
    """Return the function that gives FID and Inception score of a file of samples, or say once why there is none."""
    from ...pipeline.models.inception import RealImages, inception_figures, manifest_of, why_not

    settings = run.config.evaluation
    weights = None if settings.inception_weights is None else Path(settings.inception_weights)
    reason = why_not(weights)
    if weights is None or reason is not None:
        if run.world.is_main:
            click.echo(f"no FID and no Inception score: {reason}; the samples are .npz files for the field's own tools")
        return None
    data, resolution = settings.inception_data, run.reader.resolution
    real = None if data is None else RealImages(manifest_of(data), resolution)
    return lambda npz: inception_figures(npz, weights=weights, real=real, device=str(run.world.device))


def cknna(a: "Tensor", b: "Tensor", k: int) -> float:
    """Return CKNNA of two sets of vectors [n, D] of the same images, with k neighbours."""
    from ...pipeline.analysis.cknna import cknna

    return cknna(a, b, k)
