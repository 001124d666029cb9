"""From settings and a cache to the parts of a run: method, model, batches, and the numbers between latents and model.

Everything that does not fit is refused here, before the first step.
"""

import torch

from ...cache_specs.errors import UsageError
from ..diffusion.latents import LatentNorm
from ..distributed import World
from ..models.architectures import make_model, model_config
from ..models.sit import SiT
from ..objectives.choose import objective_class, settings_of
from ..objectives.objective import Given, Objective, Reads
from ..reading.batches import Batches, Place
from ..reading.draws import DrawSpec
from ..reading.reader import CacheReader
from .config import Compile, RunConfig
from .held_out import split
from .start import conventions


def reads_of(config: RunConfig) -> Reads:
    """Return what the run's method reads of each row of the cache."""
    return objective_class(config.objective).reads(config.alignment)


def make_objective(config: RunConfig, reader: CacheReader, norm: LatentNorm, world: World) -> Objective:
    """Return the run's method."""
    given = Given(
        latent_shape=(reader.latents.channels, *reader.latents.size),
        latent_kind=reader.latents.kind,
        norm=norm,
        num_views=len(reader.views) if config.flip else 1,
        features=reader.features,
        null_label=reader.num_classes,
        label_dropout=config.label_dropout,
        interpolant=config.interpolant,
        alignment=config.alignment,
        micro_batch=config.batch_size // (config.accumulation * world.size),
        accumulation=config.accumulation,
        precision=config.precision,
        compile=config.compile is True,
        device=world.device,
    )
    return objective_class(config.objective)(given, settings_of(config))


def make_batches(config: RunConfig, reader: CacheReader, world: World, objective: Objective) -> Batches:
    """Return what says, for each step, which samples this rank reads and which random numbers go with them."""
    spec = DrawSpec(seed=config.seed, draws=objective.draws())
    later = None
    if reader.features and config.alignment.end is not None and not reads_of(config).cls_token:
        bare = CacheReader(
            str(reader.path), autoencoder=reader.latents.name, encoder=(), check_reads=config.check_reads
        )
        later = (config.alignment.end, bare)
    place = Place(batch_size=config.batch_size, accumulation=config.accumulation, rank=world.rank, world=world.size)
    rows = split(config, reader).training
    return Batches(reader, spec, place, shuffle=config.shuffle, window=config.shuffle_window, later=later, rows=rows)


def build_model(config: RunConfig, reader: CacheReader) -> SiT:
    """Return the network and its projectors for the cache, freshly initialised from the seed."""
    height, width = reader.latents.size
    if height != width:
        raise UsageError(f"{reader.path}: latents are {height} x {width}; models take square ones")
    method = objective_class(config.objective)
    shape = model_config(
        config.model,
        architecture=method.architecture,
        input_size=height,
        in_channels=reader.latents.channels,
        num_classes=reader.num_classes,
        **method.model_extras(reader.features, settings_of(config)),
        **conventions(config.init, config.out),
    )
    for features in reader.features:
        if features.grid != shape.grid:
            raise UsageError(
                f"{reader.path}: features/{features.name} has {features.grid[0]} x {features.grid[1]} tokens; "
                f"{config.model} on latents of {height} x {width} has {shape.grid[0]} x {shape.grid[1]}. Choose a "
                f"model with another patch, or build the encoder with that grid"
            )
    projectors = method.projectors(config.alignment, reader.features, shape, settings_of(config))
    depth = config.alignment.encoder_depth if projectors else None
    return make_model(shape, projectors, encoder_depth=depth, seed=config.seed)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return fp32 or bf16: `auto` is bf16 on CUDA and fp32 on the CPU."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" else "fp32"


def resolve_compile(choice: Compile, device: torch.device) -> Compile:
    """Return the choice; `auto` stays so on CUDA, until a first step has shown whether it works, and is False else."""
    return choice if choice != "auto" or device.type == "cuda" else False


def settle_convolutions(precision: str) -> None:
    """Have cuDNN, in this process, take algorithms that give the same bits each time, and no TF32 in an fp32 run.

    PyTorch's default for convolutions is TF32 even where matrix products are float32.
    """
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
