"""`repa-cknna`: how far the layers of a trained SiT agree with an encoder's vectors."""

from pathlib import Path
from typing import Any

import click

from ...cache_specs.errors import one_line_errors
from .checkpoint import checkpoint_options, open_checkpoint
from .said import run_command, say
from .train import CONTEXT


@click.command(context_settings=CONTEXT)
@checkpoint_options
@click.option("--cache", metavar="DIR|URL", required=True, help="Its latents and its encoder's tokens.")
@click.option("--encoder", metavar="NAME", help="[default: the only one in the cache]")
@click.option("--depth", "depths", type=int, multiple=True, help="Block, from 1; repeatable. [default: all]")
@click.option(
    "--time", "--t", "times", type=float, multiple=True, default=[0.5], show_default=True, help="Time; repeatable."
)
@click.option("--num-samples", "--num", "num", type=int, default=10_000, show_default=True, help="Images.")
@click.option("--k", type=int, default=10, show_default=True, help="Neighbours.")
@click.option("--autoencoder", metavar="NAME", help="Of a published checkpoint, which does not say: sd-vae-ft-mse.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
def cknna_command(checkpoint: Path, **options: Any) -> None:
    """Measure whether SiT's layers and an encoder agree on who is near whom (CKNNA, mean-pooled tokens).

    \b
    repa-cknna runs/irepa --cache caches/in1k --encoder dinov2-vit-b --depth 4 --depth 8 --time 0.5

    Layers are taken under the null label: a true one lies in every token, and would be measured with them.
    """
    with one_line_errors("repa-cknna"):
        _cknna(checkpoint, **options)


def _cknna(checkpoint: Path, *, cache: str, encoder: str | None, **options: Any) -> None:
    import torch

    from ..distributed import default_device
    from ..evaluating.reference import Reference
    from ..models.layers import pooled_layers
    from ..models.token_component import untrained_null
    from ..objectives.choose import stored_field
    from ..reading.reader import CacheReader
    from ..runs.run import settle_convolutions
    from .borrowed import cknna

    device = options["device"] or default_device()
    if device == "cuda":
        settle_convolutions("fp32")
    trained = open_checkpoint(checkpoint, options)
    for line in untrained_null(trained):
        say(line, err=True)
    latents = trained.latents(options["autoencoder"])
    model = trained.model.to(device)
    takes_cls = model.config.cls_width is not None  # then of the encoder that it was trained with
    own = (trained.config or {}).get("encoders") or encoder
    reader = CacheReader(cache, autoencoder=latents.name, encoder=own if takes_cls else (), cls_token=takes_cls)
    reference = Reference(cache, autoencoder=latents.name, encoder=encoder, pooling="mean")
    rows = reference.some_rows(options["num"], seed=0)
    vectors = torch.from_numpy(reference.vectors(rows))
    field = stored_field(trained.method, trained.interpolant)
    depths = options["depths"] or tuple(range(1, model.config.depth + 1))
    untrained = "  UNTRAINED ENCODER: no result" if reference.component.spec["random_weights"] else ""
    say(f"{trained.path}: CKNNA with {reference.name}, k = {options['k']}, {len(rows)} images{untrained}")
    for t in options["times"]:
        layers = pooled_layers(
            model,
            reader,
            rows,
            t=t,
            depths=depths,
            norm=latents.norm,
            interpolant=trained.interpolant,
            noise_scale=field.noise_scale(model),
        )
        for depth, tokens in layers.items():
            say(f"  t {t:g}  after block {depth:>2}  {cknna(tokens, vectors, options['k']):.4f}")


def cknna() -> None:
    """Entry point of repa-cknna."""
    run_command(cknna_command, "repa-cknna", aborted="stopped")
