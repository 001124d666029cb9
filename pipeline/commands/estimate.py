"""repa-cache estimate: bytes, hours and speedup of a cache before it is built."""

from typing import TYPE_CHECKING, Any

import click

from ...cache_specs.errors import UsageError
from ...cache_specs.schema import FEATURES, LATENTS, PRECISIONS
from .said import JSON, say, say_json, say_report

if TYPE_CHECKING:
    from ...cache_specs.layout import CacheLayout
    from ...cache_specs.tables import ResolvedModel
    from ..checking.estimate import ModelCost


@click.command()
@click.option("--encoder", "encoders", multiple=True, metavar="NAME", help="Encoder, repeatable: dinov2, hog:grid=8.")
@click.option("--images", "num_images", type=int, required=True, help="Images of the data set: 1281167 for ImageNet.")
@click.option("--autoencoder", default="sd-vae-ft-mse", show_default=True, metavar="NAME", help="Or none.")
@click.option("--resolution", type=int, default=256, show_default=True, help="Side of the centre crop in pixels.")
@click.option("--flip", is_flag=True, help="With the horizontal mirror as a second view.")
@click.option("--model", metavar="NAME", help="SiT to train, for the speedup: SiT-B/2.")
@click.option("--budget", metavar="SIZE", help="Say what fits: 500GB, 1.5TB.")
@click.option("--batch-size", type=int, help="Images a forward pass of the probe. [default: 8; on a GPU a build's]")
@click.option(
    "--precision",
    type=click.Choice(("auto", *PRECISIONS)),
    default="auto",
    show_default=True,
    help="Of the probe; auto: what a build on this device takes.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
@click.option("--probe/--no-probe", default=True, help="Measure each model for about two seconds, or leave hours out.")
@JSON
def estimate(
    encoders: tuple[str, ...],
    num_images: int,
    autoencoder: str,
    resolution: int,
    flip: bool,
    model: str | None,
    budget: str | None,
    batch_size: int | None,
    precision: str,
    device: str | None,
    probe: bool,
    as_json: bool,
) -> None:
    """Say what a cache would cost: bytes by dtype, encoder-hours here, the speedup of training from it.

    \b
    repa-cache estimate --encoder dinov2 --encoder clip --images 1281167 --model SiT-B/2 --budget 500GB

    Speedup counts multiply-accumulates, at equal efficiency of the hardware: 3 SiT forwards a step, with the frozen
    models or without.
    """
    from ...cache_specs.sizes import parse_bytes
    from ...cache_specs.tables import resolve_autoencoder, resolve_encoder
    from ..building.grids import default_grid
    from ..checking.bounds import bound_line
    from ..checking.estimate import estimate_lines, estimate_record, model_costs, planned_layout, sit_gmac

    if batch_size is not None and batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: expected at least 1")
    limit = None if budget is None else parse_bytes(budget, where="--budget")
    layout = planned_layout(num_images=num_images, resolution=resolution, flip=flip)
    latent_size = resolution // 8  # of the SD VAE, where no autoencoder says otherwise
    models: list[tuple[str, ResolvedModel]] = []
    if autoencoder != "none":
        latents = resolve_autoencoder(autoencoder, resolution=resolution)
        latent_size = latents.spec["latent_size"][0]
        models = [(LATENTS, latents)]
    grid = default_grid(resolution, [latent_size] if models else [])
    for name in dict.fromkeys(encoders):
        models.append((FEATURES, resolve_encoder(name, resolution=resolution, default_grid=grid)))
    if not models:
        raise UsageError("nothing to estimate: name at least one --encoder or an --autoencoder")
    train = None if model is None else (model, sit_gmac(model, latent_size=latent_size))
    where, rates = _measure(models, resolution, batch_size, precision, device) if probe else (None, {})
    costs = model_costs(models, layout, rates)
    record = estimate_record(costs, layout, train=train, budget=limit, probe=where)
    record["bounds"] = bounds = _bounds(models, costs, layout) if probe else None
    if as_json:
        say_json(record)
    else:
        say_report(*estimate_lines(record), *([] if bounds is None else [bound_line(bounds, num_images)]))


def _bounds(
    models: "list[tuple[str, ResolvedModel]]", costs: "list[ModelCost]", layout: "CacheLayout"
) -> dict[str, float | None]:
    """Return what bounds a build here, after a second of decoding and of writing into the temporary folder."""
    import os

    from ...cache_specs.schema import component_arrays
    from ..checking.bounds import Machine, bounds, decode_rate, write_rate

    arrays = [array for kind, model in models for array in component_arrays(kind, model.spec, "float16", layout)]
    largest = max(arrays, key=lambda array: array.inner_bytes * array.shape[0])
    machine = Machine(
        cores=len(os.sched_getaffinity(0)), decode=decode_rate(layout.resolution), write=write_rate(largest)
    )
    return bounds(costs, layout, machine)


def _measure(
    models: "list[tuple[str, ResolvedModel]]",
    resolution: int,
    batch_size: int | None,
    precision: str,
    device: str | None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return where models are measured, and images/s by name of those that fit this device's memory."""
    import torch

    from ..building.resources import images_a_pass
    from ..checking.throughput import PROBE_IMAGES, fits_memory, measure

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = batch_size or (PROBE_IMAGES if device == "cpu" else images_a_pass(device, resolution))
    options = {"resolution": resolution, "batch_size": batch_size, "precision": precision, "device": device}
    say(f"measuring {len(models)} models on {device}, about two seconds each", err=True)
    rates = {
        model.name: measure(kind, model, **options)  # type: ignore[arg-type]  # mixed values of keywords
        for kind, model in models
        if fits_memory(model.entry.params_m, device)
    }
    threads = torch.get_num_threads() if device == "cpu" else None
    return {"device": device, "threads": threads, "precision": precision, "batch_size": batch_size}, rates
