"""`repa-features`: a trained SiT as an encoder of a cache's images, its tokens a component like any other's."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...cache_specs.errors import JobError, UsageError, expand_home, one_line_errors
from .checkpoint import checkpoint_options, open_checkpoint
from .said import say
from .scan import TIMES, scan
from .train import CONTEXT

if TYPE_CHECKING:
    from ..models.layer_tokens import LayerTokens
    from ..models.pretrained import TrainedModel
    from ..reading.reader import CacheReader

DEPTH_SHARE, TIME = 0.7, 0.2  # published measurements of such models peak at 0.5 to 0.7 of the depth, t about 0.2
NUM_VERIFIED = 64


@click.command(context_settings=CONTEXT)
@checkpoint_options
@click.option("--cache", metavar="DIR|URL", required=True, help="Its latents are read, its features/ written to.")
@click.option(
    "--layer", "--depth", "layers", type=int, multiple=True, metavar="L",
    help="Block, from 1; in a scan repeatable, 0 before the first.  [default: 0.7 of the depth; in a scan all]",
)  # fmt: skip
@click.option(
    "--t", "--time", "times", type=float, multiple=True, metavar="T",
    help="Time, 0 data to 1 noise; in a scan repeatable.  [default: 0.2; in a scan 0 0.1 0.2 0.3 0.5 0.7]",
)  # fmt: skip
@click.option("--scan", "scanned", is_flag=True, help="Measure blocks and times by probe and LDS; store no tokens.")
@click.option("--verify", "verified", is_flag=True, help="Derive samples of what is stored again, and compare.")
@click.option("--num-samples", "--num", "num", type=int, help="Images of a scan (10000) or of --verify (64).")
@click.option("--folds", type=int, default=5, show_default=True, help="Of the scan's probe.")
@click.option("--neighbours", type=int, default=20, show_default=True, help="k of the scan's k-NN.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE.png",
    help="The scan's figure; its table lies beside it as .csv.  [default: RUN/scan/STEP-WEIGHTS.png]",
)  # fmt: skip
@click.option("--name", metavar="NAME", help="Of the component.  [default: RUN-sSTEP-bL-tT]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the noise, with row and view.")
@click.option("--dtype", type=click.Choice(["float16", "int8"]), default="float16", show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--compressor", type=click.Choice(["none", "zstd", "blosc"]), default="none", show_default=True)
@click.option("--batch-size", type=int, default=64, show_default=True, help="Images at a time: memory and speed.")
@click.option("--autoencoder", metavar="NAME", help="Of a published checkpoint, which does not say: sd-vae-ft-mse.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
def features_command(checkpoint: Path, **options: Any) -> None:
    """Give a cache the tokens of a trained SiT as an encoder's, or scan for the block and time that represent best.

    \b
    repa-features runs/irepa --cache caches/in1k --scan
    repa-features runs/irepa --cache caches/in1k --layer 8 --t 0.2
    repa-train --cache caches/in1k --encoder irepa-s400000-b8-t0.2 --recipe irepa --out runs/next

    Input is the latents' posterior mean noised to t (0 data, 1 noise; the noise is a function of seed, row and view),
    under the null label. Killed, the same command goes on where it was and leaves the same bytes.
    """
    with one_line_errors("repa-features"):
        try:
            _features(checkpoint, **options)
        except KeyboardInterrupt:
            say("stopped; the same command goes on where it was", err=True)
            sys.exit(130)


def _features(
    checkpoint: Path, *, cache: str, layers: tuple[int, ...], times: tuple[float, ...], **options: Any
) -> None:
    _check_options(layers, times, options)
    from ..distributed import default_device
    from ..models.layer_tokens import LayerTokens
    from ..models.layers import check_depths
    from ..models.token_component import check_latents
    from ..objectives.choose import stored_field
    from ..reading.reader import CacheReader
    from ..runs.run import settle_convolutions

    device = options["device"] or default_device()
    if device == "cuda":
        settle_convolutions(options["precision"])
    trained = open_checkpoint(checkpoint, options)
    latents = trained.latents(options["autoencoder"])
    reader = CacheReader(cache, autoencoder=latents.name, encoder=())
    for line in check_latents(trained, latents, reader):
        say(line, err=True)
    model = trained.model.to(device)
    field = stored_field(trained.method, trained.interpolant)

    def tokens_at(t: float, seed: int = options["seed"], precision: str = options["precision"]) -> LayerTokens:
        return LayerTokens(
            model,
            reader,
            t=t,
            norm=latents.norm,
            interpolant=trained.interpolant,
            noise_scale=field.noise_scale(model),
            seed=seed,
            precision=precision,
        )

    depth = model.config.depth
    if options["scanned"]:
        blocks = layers or range(depth + 1)
        check_depths(model, blocks, first=0)
        scan(trained, reader, tokens_at, blocks, times or TIMES, options)
    elif options["verified"]:
        _verify(trained, reader, tokens_at, options)
    else:
        block = layers[0] if layers else max(1, round(DEPTH_SHARE * depth))
        check_depths(model, [block])
        _store(trained, reader, tokens_at(times[0] if times else TIME), block, options)


def _check_options(layers: Sequence[int], times: Sequence[float], options: dict[str, Any]) -> None:
    """Raise UsageError for options that do not go together, or for a number that is none."""
    scanned, verified = options["scanned"], options["verified"]
    if scanned and verified:
        raise UsageError("--scan stores nothing that --verify could derive again; give one of them")
    if verified and (layers or times):
        raise UsageError("--verify takes block and time from what is stored; leave out --layer and --t")
    if not scanned and (len(layers) > 1 or len(times) > 1):
        raise UsageError("a component has one --layer and one --t; --scan measures several, or call once for each")
    if options["num"] is not None and not (scanned or verified):
        raise UsageError("--num is of --scan and --verify; a component has every sample")
    for name, least in (("batch_size", 1), ("seed", 0), ("num", 1)):
        if options[name] is not None and options[name] < least:
            raise UsageError(f"--{name.replace('_', '-')} {options[name]}: expected {least} or more")


def _store(
    trained: "TrainedModel", reader: "CacheReader", tokens: "LayerTokens", block: int, options: dict[str, Any]
) -> None:
    """Write the component, or what is missing of it."""
    from ..models.token_component import token_component
    from ..runs.metrics import Progress
    from .borrowed import model_digest, write_tokens

    component = token_component(
        trained,
        reader,
        tokens,
        block,
        name=options["name"],
        average=options["weights"],
        digest=model_digest(trained.model),
        dtype=options["dtype"],
        precision=options["precision"],
        compressor=options["compressor"],
    )
    with contextlib.ExitStack() as shown:
        bars: list[Progress] = []
        written = write_tokens(
            str(reader.path),
            component,
            partial(tokens.every_view, depth=block),
            batch_size=options["batch_size"],
            on_start=lambda done, total: bars.append(
                shown.enter_context(Progress(done=done, total=total, unit="image"))
            ),
            on_progress=lambda num: bars[0].advance(num),
        )
    encoder = component.path.partition("/")[2]
    height, width = trained.model.grid
    say(
        f"{reader.path}: {component.path}: {f'{written} samples written' if written else 'all there'}, {height} x "
        f"{width} tokens of {component.spec['width']}, {component.spec['model']} after block {block} at t {tokens.t:g}"
    )
    say(f"align another model with it: repa-train --cache {reader.path} --encoder {encoder}")


def _verify(
    trained: "TrainedModel",
    reader: "CacheReader",
    tokens_at: Callable[[float, int, str], "LayerTokens"],
    options: dict[str, Any],
) -> None:
    """Derive samples of every component of these weights again; raise where they are not what is stored."""
    from ..models.token_component import token_component
    from .borrowed import compare_tokens, model_digest, token_components

    digest = model_digest(trained.model)
    stored = token_components(str(reader.path))
    ours = [component for component in stored if component.weights == digest]
    if not ours:
        others = ", ".join(component.name for component in stored)
        raise UsageError(
            f"{reader.path} holds no tokens of {trained.path} ({options['weights']}, {digest[:15]}); "
            + (f"it holds {others}. Name the checkpoint that they are of" if others else "derive them first")
        )
    problems: list[str] = []
    for component in ours:
        made = component.spec["tokens"]
        tokens = tokens_at(made["t"], made["seed"], component.precision)
        again = token_component(
            trained,
            reader,
            tokens,
            made["block"],
            name=component.name,
            average=made["average"],
            digest=digest,
            dtype=component.dtype,  # type: ignore[arg-type]  # of tokens it is never uint8
            precision=component.precision,  # type: ignore[arg-type]  # of tokens it is never unknown
            compressor=component.compressor,
        )
        if difference := component.difference(again):
            problems.append(f"{component.path}: {difference}")
            continue
        found = compare_tokens(
            str(reader.path),
            component,
            partial(tokens.every_view, depth=made["block"]),
            num=options["num"] or NUM_VERIFIED,
        )
        problems += found.problems
        say(
            f"{component.path}: {found.num_samples} samples derived again, cosine to what is stored: mean "
            f"{found.mean:.6f}, min {found.min:.6f}"
        )
    for problem in problems:
        say(problem, err=True)
    if problems:
        raise JobError(
            f"{reader.path}: {len(problems)} differences between what is stored and what {trained.path} gives"
        )


def features() -> None:
    """Entry point of repa-features."""
    expand_home()
    features_command(prog_name="repa-features")
