"""What the trainer borrows from `repa.pipeline`: decoders, encoders, the store, metrics, Ray, and what reports show.

The composition root: no other module of the trainer imports the pipeline, and this one does so only when a function is
called. It hands out plain callables; training itself needs none of them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache_specs.derived import TOKENS
from ...cache_specs.errors import UsageError
from ...cache_specs.schema import ComponentSpec
from ..diffusion.latents import LatentSource
from ..distributed import World
from ..evaluating.evaluation import Evaluation, Judge, Scorer, open_references, weights_of_judges
from ..reading.online import Online
from ..reading.specs import FeatureSpec
from ..runs.config import RunConfig
from ..runs.metrics import say as above_the_bar
from ..runs.run import Run, latent_source
from ..sampling.sample import Decoder
from ..studies.pictures import RealImages
from ..studies.relations import Coefficients, Interval, Metrics
from ..studies.trial import Trial, run_trial
from .said import say

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...pipeline.analysis.scan import Measures, TokenScan
    from ...pipeline.checking.recompute import Agreement
    from ...pipeline.store.token_writer import Tokens


def load_decoder(
    source: LatentSource,
    *,
    weights: Path | None,
    device: str,
    precision: str = "fp32",
    entries: Sequence[str | Path] = (),
) -> tuple[Decoder | None, str]:
    """Return the function from latents to pictures, and its name; None where diffusers is not installed.

    `precision` is that of the model whose latents they are. On CUDA pictures are decoded in TF32 beside bf16, and the
    name says so: 50,000 of them in float32 would take 20 minutes of an H100 beside 2 hours of a SiT-XL/2 (counted).
    `entries` are files of autoencoders of one's own.

    Raises UsageError where the decoder's weights cannot be had, or are not of the autoencoder that made the cache.
    """
    from ...cache_specs.schema import UNKNOWN
    from ...cache_specs.tables import code_of
    from ...pipeline.models.autoencoders import load_autoencoder

    if source.spec["loader"] == UNKNOWN:
        say(f"{source.name} is an autoencoder that only its import knows: latents are saved as they are", err=True)
        return None, "none"
    try:
        code = code_of(source.name, source.spec, entries)
        tf32 = precision == "bf16" and device.startswith("cuda") and source.spec["loader"] != "builtin"
        chosen = "tf32" if tf32 else "fp32"
        loaded = load_autoencoder(source.spec, weights=weights, precision=chosen, device=device, code=code)
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        say("diffusers is not installed: latents are saved as they are", err=True)
        return None, "none"
    if source.weights not in (None, UNKNOWN, loaded.weights):
        raise UsageError(
            f"the weights of {source.name} ({loaded.weights}) are not those that the model's latents come from "
            f"({source.weights}). Give the same ones with --autoencoder-weights (in training grid.autoencoder_weights)"
        )
    return loaded.decode, f"{source.spec['entry']} {loaded.weights}{' tf32' * tf32}"


def load_online(config: RunConfig, world: World, *, cls_token: bool) -> Online:
    """Return the encoders of a run that computes them from `config.online.data`, on the device of its rank.

    Raises UsageError where one cannot be had, is not that of the cache, or has no class token and the method takes it.
    """
    from ...pipeline.building.online import open_encoders, open_images
    from ...pipeline.commands.build import weights_of
    from ...pipeline.images.demo_data import source_of

    settings, latents = config.online, config.autoencoder
    assert settings.data is not None
    assert latents is not None
    images = open_images(config.cache, latents, source_of(settings.data), where=settings.data)
    encoders = open_encoders(
        config.cache,
        latents,
        config.encoders,
        weights=weights_of(settings.weights),
        device=str(world.device),
        entries=config.entries,
    )
    return Online(
        features=tuple(
            FeatureSpec(
                name=one.name,
                grid=tuple(one.encoder.spec["grid"]),
                width=one.encoder.spec["width"],
                dtype="float32",
                group=one.name.partition(":")[0],
                layer=one.layer,
                cls_token=bool(one.encoder.spec["cls_token"]),
            )
            for one in encoders
        ),
        stored=tuple(one.name for one in encoders if one.stored),
        fingerprints={one.name: one.fingerprint for one in encoders},
        crops=images.crops,
        encode=lambda pictures: [one.arrays(pictures, cls_token=cls_token) for one in encoders],
    )


def load_evaluation(run: Run) -> Evaluation:
    """Return the run's evaluation: everything that it needs is checked and loaded before the first step."""
    from ...pipeline.models.vectors import load_vectors

    settings, device, entries = run.config.evaluation, str(run.world.device), run.config.entries
    references = open_references(run.config)
    for reference in references:
        if reference.resolution != run.reader.resolution:
            raise UsageError(
                f"evaluation.cache {settings.cache} is of images of {reference.resolution} pixels, and this run's "
                f"samples have {run.reader.resolution}; build one of that resolution"
            )
    given = weights_of_judges([reference.name for reference in references], settings.encoder_weights)
    judges = [
        Judge(
            reference,
            load_vectors(
                reference.component,
                settings.pooling,
                layer=reference.layer,
                weights=weights,
                device=device,
                entries=entries,
            ),
        )
        for reference, weights in zip(references, given, strict=True)
    ]
    weights = None if settings.autoencoder_weights is None else Path(settings.autoencoder_weights)
    latents = latent_source(run.reader, run.norm)
    decode, decoder = load_decoder(latents, weights=weights, device=device, entries=entries)
    if decode is None:
        raise UsageError("evaluation compares pictures, and without diffusers there are none; set evaluation.every=0")
    score = _inception(run)
    return Evaluation(run, judges, decode=decode, decoder=decoder, score=score, tell=above_the_bar)


def _inception(run: Run) -> Scorer | None:
    """Return the function that gives FID and Inception score of a file of samples, or say once why there is none."""
    from ...pipeline.models.inception import RealImages, inception_figures, manifest_of, why_not

    settings = run.config.evaluation
    weights = None if settings.inception_weights is None else Path(settings.inception_weights)
    reason = why_not(weights)
    if weights is None or reason is not None:
        if run.world.is_main:
            say(f"no FID and no Inception score: {reason}; the samples are .npz files for the field's own tools")
        return None
    data, resolution = settings.inception_data, run.reader.resolution
    real = None if data is None else RealImages(manifest_of(data), resolution)
    return lambda npz: inception_figures(npz, weights=weights, real=real, device=str(run.world.device))


def cknna(a: "Tensor", b: "Tensor", k: int) -> float:
    """Return CKNNA of two sets of vectors [n, D] of the same images, with k neighbours."""
    from ...pipeline.analysis.cknna import cknna

    return cknna(a, b, k)


def run_on_ray(
    trials: Sequence[Trial],
    *,
    address: str | None,
    gpus: float,
    on_done: Callable[[Trial, int], None],
    stop: Callable[[], bool],
) -> None:
    """Do the runs of a study as Ray tasks, each with its threads and `gpus`, on a cluster or on this machine."""
    from ...pipeline.building.ray_tasks import run_tasks

    cpus = float(max((trial.threads for trial in trials), default=1))
    run_tasks(run_trial, trials, address=address, cpus=cpus, gpus=gpus, on_done=on_done, stop=stop)


def encoder_metrics(files: Sequence[Path]) -> Metrics:
    """Return what CSVs of `repa-cache metrics` and `probe` say of encoders, tokens as stored; later files win."""
    from ...pipeline.analysis.results import estimates

    found: dict[str, dict[str, Interval]] = {}
    for file in files:
        for encoder, figures in estimates(file).items():
            intervals = {
                name: Interval(value=one.value, low=one.low, high=one.high, reason=one.reason)
                for name, one in figures.items()
            }
            found.setdefault(encoder, {}).update(intervals)
    return found


def correlate_quality(
    names: Sequence[str], quality_name: str, quality: np.ndarray, metrics: Mapping[str, np.ndarray]
) -> list[Coefficients]:
    """Return the correlation of each metric [n] with quality [n] over encoders, as `repa-cache correlate` has it."""
    from ...pipeline.analysis.correlate import correlate, range_without
    from ...pipeline.analysis.results import Results

    results = Results(names=list(names), quality_name=quality_name, quality=quality, metrics=dict(metrics))
    return [
        Coefficients(
            metric=one.metric,
            num=one.pearson.num,
            pearson=Interval(**{key: getattr(one.pearson, key) for key in ("value", "low", "high", "reason")}),
            spearman=Interval(**{key: getattr(one.spearman, key) for key in ("value", "low", "high", "reason")}),
            without=range_without(one) if one.pearson.value is not None else "",
        )
        for one in correlate(results)
        if one.metric in metrics
    ]


def real_images(cache: str, **source: Any) -> RealImages:
    """Return the function from labels to real images of a cache; `source` is data, autoencoder, weights."""
    from ...pipeline.analysis.gallery import images_by_label

    return lambda labels: images_by_label(cache, labels, **source)


def component_pictures(
    cache: str, encoders: Sequence[str], num: int, *, gamma: float, **source: Any
) -> tuple[np.ndarray | None, list[str], dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """Return what encoders of a cache see in `num` images; see `pipeline.analysis.gallery`."""
    from ...pipeline.analysis.gallery import component_pictures

    return component_pictures(cache, encoders, num, gamma=gamma, **source)


def model_digest(model: "nn.Module") -> str:
    """Return what identifies a model's weights in a component."""
    from ...pipeline.models.weights import digest_of

    return digest_of(model)


def write_tokens(
    cache: str,
    component: ComponentSpec,
    tokens: "Tokens",
    *,
    batch_size: int,
    on_start: Callable[[int, int], None],
    on_progress: Callable[[int], None],
) -> int:
    """Write a component of a model's tokens into a cache; return how many samples were missing of it."""
    from ...pipeline.store.store import CacheStore
    from ...pipeline.store.token_writer import source_of
    from ...pipeline.store.token_writer import write_tokens as write

    store = CacheStore.open(cache)
    source = source_of(store, component.spec[TOKENS]["from"])
    return write(store, component, source, tokens, batch_size=batch_size, on_start=on_start, on_progress=on_progress)


def token_components(cache: str) -> list[ComponentSpec]:
    """Return the finished components of a cache that are tokens of a model of the trainer's."""
    from ...pipeline.store.store import CacheStore

    store = CacheStore.open(cache)
    found = [component for path in store.components() if (component := store.opened(path)) and component.complete]
    return [one.spec for one in found if one.spec.tokens]


def compare_tokens(cache: str, component: ComponentSpec, tokens: "Tokens", *, num: int) -> "Agreement":
    """Compare `num` samples of a component with what `tokens` gives."""
    from ...pipeline.checking.recompute import compare_tokens as compare
    from ...pipeline.store.store import CacheStore

    return compare(CacheStore.open(cache), component, tokens, num=num)


def measured_rows(rows: np.ndarray, num: int) -> np.ndarray:
    """Return `num` of these samples, or all of them where there are fewer: those that `repa-cache probe` takes."""
    from ...pipeline.analysis.features import draw_rows

    return draw_rows(rows, num)


def token_scan(title: str, grid: tuple[int, int], **options: Any) -> "tuple[TokenScan, Callable[[], Measures]]":
    """Return what figures of tokens are gathered in, and the function that makes an empty place of it."""
    from ...pipeline.analysis.scan import Measures, TokenScan

    return TokenScan(title, **options), lambda: Measures(grid)
