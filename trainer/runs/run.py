"""From settings to the parts of a run: cache, model, EMA, optimizer, batches, and the record of what they are.

Everything that the settings leave to the cache is resolved here, and everything that does not fit is refused here,
before the first step.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ...cache_specs.errors import UsageError
from ...cache_specs.schema import FEATURES, LATENTS
from ...cache_specs.sizes import human_bytes
from ...cache_specs.storage import location
from ...cache_specs.tables import autoencoder_table
from ..diffusion.latents import LatentNorm, LatentSource, resolve_latent_norm
from ..distributed import World, wrap
from ..models.ema import EMA
from ..models.projector import ProjectorConfig
from ..models.sit import SiT, sit_config
from ..reading.batches import Batches, DrawSpec, Place
from ..reading.components import choose_component
from ..reading.prefetch import batches_ahead
from ..reading.reader import CacheReader
from ..reading.stage import stage_cache
from .config import RunConfig
from .optimizer import GatedAdamW


@dataclass(kw_only=True)
class Run:
    """The parts of one run on one rank; its state is (model, ema, optimizer, step)."""

    config: RunConfig  # with nothing left to resolve
    world: World
    reader: CacheReader
    model: SiT  # the plain module: what is averaged, stored and sampled
    wrapped: nn.Module  # the same, compiled and averaged over ranks: what is trained
    ema: EMA
    optimizer: GatedAdamW
    batches: Batches
    norm: LatentNorm
    step: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    def autocast(self) -> torch.autocast:
        """Return the context in which the model runs forward: bf16 autocast, or float32 as it is."""
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def record(self) -> dict[str, Any]:
        """Return what is stored in config.json and in checkpoints: the settings and what the cache made of them."""
        return record(self.config, self.reader, self.norm)


def record(config: RunConfig, reader: CacheReader, norm: LatentNorm) -> dict[str, Any]:
    """Return a resolved configuration as JSON values, under `resolved` what the settings left to the cache.

    `resolved.latents` has the autoencoder's record and the numbers of the model's input, x = (z - bias) * scale.
    """
    latents = latent_source(reader, norm).plain()
    return config.plain() | {"resolved": {"latents": latents, "class_names": list(reader.class_names)}}


def latent_source(reader: CacheReader, norm: LatentNorm) -> LatentSource:
    """Return whose latents the model is trained on."""
    latents = reader.latents
    return LatentSource(name=latents.name, spec=latents.spec, weights=latents.weights, norm=norm)


def stage(
    config: RunConfig, *, on_progress: Callable[[int, int], None], on_message: Callable[[str], None]
) -> tuple[RunConfig, Path]:
    """Copy what the run reads of its cache to `config.stage`; return the components by name, and the copy's folder.

    The copy may hold components of other caches of the same images: "the only one" is that of the run's own cache.
    Raises and calls as `stage_cache`.
    """
    assert config.stage is not None
    source = location(config.cache)
    autoencoder = config.autoencoder or choose_component(source, LATENTS, None)[0]
    encoders = config.encoders
    if config.alignment.projector != "none" and not encoders:
        encoders = (choose_component(source, FEATURES, None)[0],)
    folder = stage_cache(
        config.cache,
        config.stage,
        autoencoder=autoencoder,
        encoders=encoders,
        on_progress=on_progress,
        on_message=on_message,
    )
    return dataclasses.replace(config, autoencoder=autoencoder, encoders=encoders), folder


def open_cache(config: RunConfig, world: World, *, copy: Path | None = None) -> tuple[RunConfig, CacheReader]:
    """Open the cache of a run, or its staged copy; return the settings with nothing left to resolve, and the reader.

    Raises UsageError where the settings do not fit the cache or the number of ranks, CacheError where the cache cannot
    be used.
    """
    encoders: tuple[str, ...] | None = config.encoders or None
    if config.alignment.projector == "none":
        encoders = ()
    reader = CacheReader(
        config.cache if copy is None else copy,
        autoencoder=config.autoencoder,
        encoder=encoders,
        cls_token=False,
        check_reads=config.check_reads,
    )
    if copy is not None or config.stage is None:
        reader.rows(reader.valid_rows[:1])  # what cannot be read is said now, not when a model waits for it
    parts = world.size * config.accumulation
    if config.batch_size % parts:
        raise UsageError(
            f"batch_size {config.batch_size} is not a multiple of {world.size} ranks x {config.accumulation} "
            f"micro-batches; choose a multiple of {parts}"
        )
    resolved = dataclasses.replace(
        config,
        autoencoder=reader.latents.name,
        encoders=tuple(features.name for features in reader.features),
        precision=resolve_precision(config.precision, world.device),
    )
    return resolved, reader


def prepare(config: RunConfig, world: World, *, copy: Path | None = None) -> Run:
    """Build the parts of a run at step 0; raises as `open_cache`, and UsageError where the model does not fit."""
    config, reader = open_cache(config, world, copy=copy)
    if world.device.type == "cuda":
        settle_convolutions(config.precision)
    model = build_model(config, reader).to(world.device)
    ema = EMA(model, config.ema_decay)
    if config.compile:
        model.compile(fullgraph=True)  # in place: parameters keep their names
    norm = latent_norm(config, reader)
    return Run(
        config=config,
        world=world,
        reader=reader,
        model=model,
        wrapped=wrap(model, world),
        ema=ema,
        optimizer=GatedAdamW(model.parameters(), config.optimizer),
        batches=make_batches(config, reader, world),
        norm=norm,
    )


def make_batches(config: RunConfig, reader: CacheReader, world: World) -> Batches:
    """Return what says, for each step, which samples this rank reads and which random numbers go with them."""
    spec = DrawSpec(
        seed=config.seed,
        num_views=len(reader.views),
        latent_shape=(reader.latents.channels, *reader.latents.size),
        posterior=reader.latents.kind == "mean_std",
        interpolant=config.interpolant,
        label_dropout=config.label_dropout,
    )
    place = Place(batch_size=config.batch_size, accumulation=config.accumulation, rank=world.rank, world=world.size)
    return Batches(reader, spec, place, shuffle=config.shuffle, window=config.shuffle_window)


def build_model(config: RunConfig, reader: CacheReader) -> SiT:
    """Return SiT and its projectors for the cache, freshly initialised from the seed."""
    height, width = reader.latents.size
    if height != width:
        raise UsageError(f"{reader.path}: latents are {height} x {width}; SiT takes square ones")
    shape = sit_config(
        config.model, input_size=height, in_channels=reader.latents.channels, num_classes=reader.num_classes
    )
    for features in reader.features:
        if features.grid != shape.grid:
            raise UsageError(
                f"{reader.path}: features/{features.name} has {features.grid[0]} x {features.grid[1]} tokens; "
                f"{config.model} on latents of {height} x {width} has {shape.grid[0]} x {shape.grid[1]}. Choose a "
                f"model with another patch, or build the encoder with that grid"
            )
    alignment = config.alignment
    projectors = [
        ProjectorConfig(
            kind=alignment.projector,  # type: ignore[arg-type]  # "none" reads no features, so no entry is made
            out_dim=features.width,
            hidden_dim=alignment.hidden_dim,
            kernel_size=alignment.kernel_size,
        )
        for features in reader.features
    ]
    return SiT(shape, projectors, encoder_depth=alignment.encoder_depth if projectors else None, seed=config.seed)


def latent_norm(config: RunConfig, reader: CacheReader) -> LatentNorm:
    """Return the numbers between the cache's latents and the model's input."""
    spec = reader.latents.spec
    entry = autoencoder_table().get(spec["entry"])
    # Imported moments may be of other pixels than the published scale is for.
    published = entry.published if entry and list(entry.pixel_range) == spec["pixel_range"] else None
    if config.latent_norm == "fixed" and published is None:
        raise UsageError(
            f"latent_norm=fixed: {reader.latents.name} has no published scale in the table of autoencoders. "
            f"Train with --set latent_norm=channel"
        )
    return resolve_latent_norm(
        config.latent_norm,
        channels=reader.latents.channels,
        published=published or (1.0, 0.0),
        mean=reader.latents.mean,
        std=reader.latents.std,
        where=f"{reader.path}/latents/{reader.latents.name}",
    )


def describe(config: RunConfig, reader: CacheReader, norm: LatentNorm, world: World) -> str:
    """Return the settings as YAML, and in a few lines what they amount to."""
    with torch.device("meta"):
        model = build_model(config, reader)
    total, in_projectors = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, model.projectors))
    batches = make_batches(config, reader, world)
    ahead = batches_ahead(config.prefetch_bytes, batches.num_bytes)
    over = "; one alone is more than prefetch_bytes" if batches.num_bytes > config.prefetch_bytes else ""
    shown = record(config, reader, norm)
    del shown["resolved"]["class_names"]
    settings = yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, width=110)
    return (
        f"{settings}"
        f"model: {config.model}, {total - in_projectors:.1f} M parameters; projectors {in_projectors:.1f} M\n"
        f"data: {len(reader.valid_rows)} of {reader.num_samples} samples, {len(reader.views)} view(s), "
        f"{batches.row_bytes / 1024:.1f} KiB a sample, {batches.row_bytes * config.batch_size / 2**20:.2f} MiB a step\n"
        f"read ahead: {ahead} x {human_bytes(batches.num_bytes)} on every rank{over}"
    )


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return fp32 or bf16: `auto` is bf16 on CUDA and fp32 on the CPU."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" else "fp32"


def settle_convolutions(precision: str) -> None:
    """Have cuDNN, in this process, take algorithms that give the same bits each time, and no TF32 in an fp32 run.

    PyTorch's default for convolutions is TF32 even where matrix products are float32.
    """
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


def dummy_inputs(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """Return zeros of the shapes that the model trains on: x [b,C,H,W], t [b], y [b]."""
    num, device = run.batches.place.micro_batch, run.world.device
    x = torch.zeros(num, *run.batches.spec.latent_shape, device=device)
    return x, torch.zeros(num, device=device), torch.zeros(num, dtype=torch.int64, device=device)
