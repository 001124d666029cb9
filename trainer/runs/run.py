"""From settings to the parts of a run: cache, model, EMA, optimizer, batches, and the record of what they are.

Everything that the settings leave to the cache is resolved here, and everything that does not fit is refused here,
before the first step.
"""

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...cache_specs.errors import UsageError
from ...cache_specs.schema import FEATURES, LATENTS
from ...cache_specs.storage import location
from ..diffusion.latents import LatentNorm, LatentSource
from ..distributed import World, averaging, settle_buckets, wrap
from ..models.ema import EMA
from ..models.recomputing import checkpoint_activations
from ..models.sit import SiT
from ..objectives.objective import Field, Objective
from ..reading.batches import Batches
from ..reading.components import choose_component, preferred_latents
from ..reading.norm import reader_norm
from ..reading.online import Online, OnlineReader
from ..reading.reader import CacheReader
from ..reading.stage import stage_cache
from .config import RunConfig
from .held_out import ValidationData, validation_data
from .metrics import say
from .optimizer import GatedAdamW
from .parts import (
    build_model,
    make_batches,
    make_objective,
    reads_of,
    resolve_compile,
    resolve_precision,
    settle_convolutions,
)
from .settings import RESOLVED


class OpenOnline(Protocol):
    """What loads the encoders of a run whose latents are named, on the device of its rank."""

    def __call__(self, config: RunConfig, world: World, *, cls_token: bool) -> Online: ...


@dataclass(kw_only=True)
class Run:
    """The parts of one run on one rank; its state is (model, ema, optimizer, step)."""

    config: RunConfig  # with nothing left to resolve
    world: World
    reader: CacheReader
    model: SiT  # the plain module: what is averaged, stored and sampled
    wrapped: nn.Module  # the same, compiled and averaged over ranks: what is trained
    ema: EMA  # what samples are drawn from, of the first decay
    more_emas: tuple[EMA, ...]  # of the other decays
    optimizer: GatedAdamW
    objective: Objective
    batches: Batches
    norm: LatentNorm
    validation: ValidationData | None = None
    step: int = 0
    aligned: bool = True  # whether the projectors are in the graph

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def field(self) -> Field:
        """What samples of the run's model follow."""
        return self.objective.field(self.config.interpolant, self.objective.settings)

    def autocast(self) -> torch.autocast:
        """Return the context in which the model runs forward: bf16 autocast, or float32 as it is."""
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def forward(self, inputs: tuple[Tensor | None, ...]) -> tuple[Any, Sequence[Tensor]]:
        """Return the model's prediction and, while the run is aligned, each projector's tokens: one DDP forward."""
        if self.aligned:
            return self.wrapped(*inputs, return_projections=True)
        return self.wrapped(*inputs), ()

    def answers(self) -> Iterator[Tensor]:
        """Yield all that the model answers to a made-up micro-batch, as in a step."""
        with self.autocast():
            prediction, projections = self.forward(self.objective.dummy_inputs(self.batches.place.micro_batch))
        yield from prediction if isinstance(prediction, tuple) else (prediction,)
        yield from projections

    def rehearse(self) -> str | None:
        """Run what is compiled, forward and backward, once; return why it fails, on all ranks where it does on one."""
        failure = None
        try:
            with averaging(self.wrapped, last=False):  # a rank that fails must not be waited for
                settle_buckets(self.wrapped, self.answers)
            self.objective.rehearse(self.model)
            if self.world.device.type == "cuda":
                torch.cuda.synchronize(self.world.device)
        except Exception as error:  # whatever compilers raise: no C compiler, no Triton, an operation that is unknown
            cause = getattr(error, "inner_exception", error)  # Dynamo's own says only who raised it
            failure = next((line.strip() for line in str(cause).splitlines() if line.strip()), repr(cause))[:200]
        (failed,) = self.world.most([float(failure is not None)])
        return failure if not failed else failure or "it failed on another rank"

    def follow_alignment(self) -> bool:
        """Take the projectors out of the graph from alignment.stop_step or horizon on; say whether anything changed.

        They stay in the model, its checkpoints and the EMA. DistributedDataParallel is made anew, since it waits for
        every parameter's gradient that it was made with.
        """
        aligned = self.objective.alignment.acts(self.step)
        if aligned == self.aligned:
            return False
        self.aligned = aligned
        self.model.projectors.requires_grad_(aligned)
        self.wrapped = self.model  # the old wrapper goes, with its hooks, before there is a new one
        self.wrapped = wrap(self.model, self.world)
        return True

    def record(self) -> dict[str, Any]:
        """Return what is stored in config.json and in checkpoints: the settings and what the cache made of them."""
        return record(self.config, self.reader, self.norm, self.validation)


def record(
    config: RunConfig, reader: CacheReader, norm: LatentNorm, validation: ValidationData | None
) -> dict[str, Any]:
    """Return a resolved configuration as JSON values, under `resolved` what the settings left to the cache.

    `resolved.latents` has the autoencoder's record and the numbers of the model's input, x = (z - bias) * scale;
    `resolved.validation` the fingerprints of another cache that the run is judged by.
    """
    resolved = {"latents": latent_source(reader, norm).plain(), "class_names": list(reader.class_names)}
    if validation is not None and validation.reader is not reader:
        resolved["validation"] = dict(validation.reader.fingerprints)
    return config.plain() | {RESOLVED: resolved}


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
    autoencoder = choose_component(source, LATENTS, config.autoencoder or _own_latents(config))[0]
    encoders = config.encoders
    if reads_of(config).patch_tokens and not encoders:
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


def _own_latents(config: RunConfig) -> str | None:
    """Return the latents that the run's method is made for, of those in its cache; None leaves it to the cache."""
    return preferred_latents(location(config.cache), reads_of(config).latents)


def open_cache(
    config: RunConfig, world: World, *, copy: Path | None = None, online: OpenOnline | None = None
) -> tuple[RunConfig, CacheReader]:
    """Open the cache of a run, or its staged copy; return the settings with nothing left to resolve, and the reader.

    `online` loads the encoders of a run that computes them.

    Raises UsageError where the settings do not fit the cache or the number of ranks, CacheError where the cache cannot
    be used.
    """
    reads = reads_of(config)
    encoders: tuple[str, ...] | None = (config.encoders or None) if reads.patch_tokens else ()
    reader: CacheReader
    if config.online.data is None:
        reader = CacheReader(
            config.cache if copy is None else copy,
            autoencoder=config.autoencoder or _own_latents(config),
            encoder=encoders,
            cls_token=reads.cls_token,
            check_reads=config.check_reads,
        )
    elif online is None:
        raise UsageError("online.data: encoders are computed by repa-train alone; leave it out, and read the cache")
    else:
        asked = config.autoencoder or _own_latents(config)
        autoencoder = choose_component(location(config.cache), LATENTS, asked)[0]
        loaded = online(dataclasses.replace(config, autoencoder=autoencoder), world, cls_token=reads.cls_token)
        reader = OnlineReader(config.cache, loaded, autoencoder=autoencoder, check_reads=config.check_reads)
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
        # Computed ones as they were asked for: a cache that gets them later would call them otherwise.
        encoders=config.encoders if config.online.data else tuple(features.name for features in reader.features),
        precision=resolve_precision(config.precision, world.device),
        compile=resolve_compile(config.compile, world.device),
    )
    return resolved, reader


def prepare(config: RunConfig, world: World, *, copy: Path | None = None, online: OpenOnline | None = None) -> Run:
    """Build the parts of a run at step 0; raises as `open_cache`, and UsageError where the model does not fit.

    Whether the model is compiled is found out here, where the settings leave it open: on one made-up step, with a line.
    """
    config, reader = open_cache(config, world, copy=copy, online=online)
    if world.device.type == "cuda":
        settle_convolutions(config.precision)
    if config.compile != "auto":
        return _assembled(config, reader, world)
    run = _assembled(dataclasses.replace(config, compile=True), reader, world)
    started = time.monotonic()
    failure = run.rehearse()
    if world.is_main:
        took = f"{time.monotonic() - started:.0f} s to a first step"
        say(f"compiled, {took}" if failure is None else f"not compiled, which costs speed alone: {failure}")
    if failure is None:
        return run
    del run
    gc.collect()  # a compiled model refers to itself
    torch.compiler.reset()
    return _assembled(dataclasses.replace(config, compile=False), reader, world)


def _assembled(config: RunConfig, reader: CacheReader, world: World) -> Run:
    """Return the parts of a run whose settings leave nothing open."""
    model = build_model(config, reader).to(world.device)
    ema, *more_emas = (EMA(model, decay) for decay in config.ema_decay)
    if config.activation_checkpointing:
        checkpoint_activations(model)
    if config.compile:
        model.compile(fullgraph=True)  # in place: parameters keep their names
    norm = reader_norm(reader, config.latent_norm)
    objective = make_objective(config, reader, norm, world)
    return Run(
        config=config,
        world=world,
        reader=reader,
        model=model,
        wrapped=wrap(model, world),
        ema=ema,
        more_emas=tuple(more_emas),
        optimizer=GatedAdamW(model.parameters(), config.optimizer),
        objective=objective,
        batches=make_batches(config, reader, world, objective),
        norm=norm,
        validation=validation_data(config, reader),
        aligned=bool(model.projectors),
    )
