"""What a run will do, in a few lines, before it does it: what differs from the recipe, model, data, where it writes."""

from collections.abc import Iterator

import torch
import yaml

from ...cache_specs.sizes import human_bytes
from ..diffusion.latents import LatentNorm
from ..distributed import World
from ..objectives.choose import other_sections
from ..reading.prefetch import batches_ahead
from ..reading.reader import CacheReader
from .config import RunConfig
from .held_out import ValidationData
from .metrics import WIDTH, folded
from .parts import build_model, make_batches, make_objective
from .run import record
from .settings import RESOLVED, Layer, flatten, recipe_layer, resolve, used

# Said in lines of their own, or chosen by the cache and the machine.
SAID_ELSEWHERE = frozenset(
    {"recipe", "cache", "out", "model", "autoencoder", "encoders", "steps", "precision", "compile"}
)


def describe(
    config: RunConfig,
    reader: CacheReader,
    norm: LatentNorm,
    world: World,
    *,
    validation: ValidationData | None = None,
    step: int = 0,
    verbose: bool = False,
) -> str:
    """Return what goes on from `step`, in lines of at most 80 columns; `verbose` puts every setting before it."""
    with torch.device("meta"):
        model = build_model(config, reader)
    total, in_projectors = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, model.projectors))
    objective = make_objective(config, reader, norm, world)
    batches = make_batches(config, reader, world, objective)
    row_bytes = batches.row_bytes()
    ahead = batches_ahead(config.prefetch_bytes, batches.num_bytes)
    over = "; one alone is more than prefetch_bytes" if batches.num_bytes > config.prefetch_bytes else ""
    encoders = f", aligned with {', '.join(_aligned(config))}" if config.encoders else ""
    num_views = len(reader.views) if config.flip else 1
    minutes = "" if config.save_minutes is None else f" or {config.save_minutes:g} minutes"
    lines = [
        f"recipe: {config.recipe}{_changes(config)}",
        f"method: {config.objective}; {objective.papers}",
        *(f"our choice: {line}" for line in objective.choices(config.alignment, objective.settings)),
        f"model: {config.model}, {total - in_projectors:.1f} M parameters; projectors {in_projectors:.1f} M; "
        f"{config.precision} on {world.device.type}"
        + {True: ", compiled", False: "", "auto": ", compiled if that works"}[config.compile]
        + (f", {world.size} ranks" if world.size > 1 else ""),
        f"data: {config.cache}, {config.autoencoder}{encoders}",
        *_online(config),
        f"data: {len(batches.trained_rows)} of {reader.num_samples} samples, {num_views} view(s), "
        f"{row_bytes / 1024:.1f} KiB a sample, {row_bytes * config.batch_size / 2**20:.2f} MiB a step",
        *([] if validation is None else [_judged(config, validation)]),
        f"read ahead: {ahead} x {human_bytes(batches.num_bytes)} on every rank{over}",
        f"out: {config.out}, steps {step + 1} to {config.steps}, a checkpoint every {config.save_every} steps{minutes}",
    ]
    if verbose:
        shown = record(config, reader, norm, validation)
        del shown[RESOLVED]["class_names"]
        for section in other_sections(config.objective):
            del shown[section]
        lines.insert(0, yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, width=WIDTH).rstrip())
    return "\n".join(line if "\n" in line else folded(line) for line in lines)


def _aligned(config: RunConfig) -> Iterator[str]:
    """Yield each encoder, with what is its own."""
    for place, encoder in enumerate(config.encoders):
        own = [
            f"{word} {values[place]}"
            for word, values in (
                ("proj_coeff", config.alignment.proj_coeff),
                ("encoder_depth", config.alignment.encoder_depth),
            )
            if isinstance(values, tuple)
        ]
        yield f"{encoder} ({', '.join(own)})" if own else encoder


def _judged(config: RunConfig, validation: ValidationData) -> str:
    where = "held out" if config.validation.cache is None else f"of {config.validation.cache}"
    num = f"{len(validation.rows)} of {validation.chosen_of} samples"
    return f"validation: {num} {where}, every {config.validation.every} steps"


def _online(config: RunConfig) -> list[str]:
    """Return the line that says what an encoder online is for."""
    if config.online.data is None:
        return []
    return [
        f"online: {', '.join(config.encoders)} computed at every step from {config.online.data}; this is for "
        f"comparison with the same run from a cache, which reads them"
    ]


def _changes(config: RunConfig) -> str:
    """Return the settings that are not the recipe's own, with those."""
    needed = Layer(source="", values={"cache": config.cache, "out": config.out, "model": config.model})
    recipe = flatten(resolve([recipe_layer(config.recipe, config.model), needed]).plain())
    found = flatten(used(config.plain()))
    changed = [
        f"{key} {_plain(value)} ({_plain(recipe.get(key))})"
        for key, value in found.items()
        if key not in SAID_ELSEWHERE and value != recipe.get(key)
    ]
    return f", with {', '.join(changed)}" if changed else ""


def _plain(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
