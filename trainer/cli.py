"""`repa-train`, `repa-sample` and `repa-cknna`: parse, resolve the settings, call one function.

The composition root: the only module of the trainer that may import `repa.pipeline`, for the decoder that turns
latents into pictures, the encoder that evaluation needs, and CKNNA, which lives beside the other encoder metrics. torch
is imported when a command runs, not for its help.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cache_specs.errors import UsageError, one_line_errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from .config import RunConfig
    from .distributed import World
    from .evaluation import Scorer
    from .latents import LatentSource
    from .pretrained import TrainedModel
    from .run import Run
    from .sample import Decoder, SampleRequest

MOST_LABEL_CHARACTERS = 60  # in a file's name, of which file systems take 255 bytes
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.command(context_settings=CONTEXT)
@click.option("--cache", metavar="DIR", help="Cache made by repa-cache build.")
@click.option("--encoder", "encoders", multiple=True, metavar="NAME", help="Encoder to align with, repeatable.")
@click.option("--autoencoder", metavar="NAME", help="Latents to train on. [default: the only ones in the cache]")
@click.option("--model", metavar="SiT-B/2", help="SiT-{Ti,S,B,L,XL}/patch.")
@click.option("--recipe", metavar="NAME", help="sit, repa, irepa or irepa-release: what trainer/recipes.yaml sets.")
@click.option("--steps", type=int, help="Optimizer steps in all. [default: 400000]")
@click.option("--batch-size", type=int, help="Samples a step, over all ranks. [default: 256]")
@click.option("--out", metavar="RUN", help="Folder of the run: config, metrics, checkpoints, grids.")
@click.option("--config", "files", multiple=True, type=click.Path(path_type=Path), help="YAML file of settings.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting; wins over --config.")
@click.option("--compile", is_flag=True, default=None, help="Compile the model (torch.compile).")
@click.option(
    "--resume", type=click.Choice(["auto"]), help="Continue the run in --out, or start it where there is none."
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
@click.option("--dry-run", is_flag=True, help="Check settings, cache and --out; say what would run; write nothing.")
def train_command(
    files: tuple[Path, ...],
    assignments: tuple[str, ...],
    resume: str | None,
    device: str | None,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Train SiT from a cache, aligned with the encoders whose tokens it holds.

    \b
    repa-train --cache caches/in1k --model SiT-B/2 --recipe irepa --out runs/irepa
    repa-train --cache caches/in1k --model SiT-B/2 --recipe irepa --out runs/irepa --resume auto
    torchrun --nproc-per-node 8 --no-python repa-train --cache caches/in1k --model SiT-XL/2 ...

    Settings: defaults < recipe < --config < --set < the flags above. The resolved ones are printed and stored as
    config.json; SIGTERM saves at the next step.
    """
    with one_line_errors("repa-train"):
        from .distributed import default_device, join

        config = resolve_flags(files, assignments, flags)
        with join(device or default_device()) as world:
            if dry_run:
                _explain(config, world, resume=resume == "auto")
            else:
                _train(config, world, resume=resume == "auto")


def resolve_flags(files: tuple[Path, ...], assignments: tuple[str, ...], flags: dict[str, Any]) -> "RunConfig":
    """Return the settings of a command line; the recipe and the model may stand in any of its sources."""
    from .config import Layer, file_layer, recipe_layer, required, resolve, set_layer

    given = {key: value for key, value in flags.items() if value not in (None, ())}
    sources = [*map(file_layer, files), set_layer(assignments), Layer(source="flags", values=given)]
    recipe = recipe_layer(required("recipe", sources), required("model", sources))
    return resolve([recipe, *sources])


def _train(config: "RunConfig", world: "World", *, resume: bool) -> None:
    from .grids import draw_training_grid
    from .loop import train
    from .resume import enter_folder
    from .run import describe, latent_source, prepare

    run = prepare(config, world)
    decode = None
    if config.grid.every and world.is_main:
        weights = None if config.grid.autoencoder_weights is None else Path(config.grid.autoencoder_weights)
        decode, _ = load_decoder(latent_source(run.reader, run.norm), weights=weights, device=str(world.device))
    evaluate = _evaluation(run) if config.evaluation.every else None
    enter_folder(run, resume=resume)
    if world.is_main:
        click.echo(describe(run.config, run.reader, run.norm, world))
    train(run, draw_grid=lambda run: draw_training_grid(run, decode), evaluate=evaluate)
    if world.is_main:
        click.echo(f"{run.folder}: {run.step} of {run.config.steps} steps done")


def _evaluation(run: "Run") -> "Callable[[Run], None]":
    """Return what the loop calls to evaluate: everything that it needs is checked and loaded before the first step."""
    from ..pipeline.vectors import load_vectors
    from .evaluation import Evaluation, open_reference
    from .run import latent_source

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
    evaluation = Evaluation(run, reference, decode=decode, decoder=decoder, encode=encode, score=score)

    def evaluate(run: "Run") -> None:
        record = evaluation.at(run)
        if record is not None:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "step")
            click.echo(f"evaluation at step {record['step']}  {figures}")

    return evaluate


def _inception(run: "Run") -> "Scorer | None":
    """Return the function that gives FID and Inception score of a file of samples, or say once why there is none."""
    from ..pipeline.inception import RealImages, inception_figures, manifest_of, why_not

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


def _explain(config: "RunConfig", world: "World", *, resume: bool) -> None:
    from .resume import check_folder
    from .run import describe, latent_norm, open_cache, record

    config, reader = open_cache(config, world)
    norm = latent_norm(config, reader)
    stored = check_folder(Path(config.out), record(config, reader, norm), reader, resume=resume)
    if world.is_main:
        click.echo(describe(config, reader, norm, world))
        click.echo(f"start: step {stored['steps'] if stored else 0}")
        click.echo("dry run: nothing was trained or written")


@click.command(context_settings=CONTEXT)
@click.argument("checkpoint", metavar="RUN|CHECKPOINT", type=click.Path(path_type=Path))
@click.option("--num", type=int, default=64, show_default=True, help="Images to draw.")
@click.option("--steps", type=int, default=50, show_default=True, help="Steps of the sampler.")
@click.option("--sampler", default="euler", show_default=True, metavar="euler|heun|sde")
@click.option("--cfg-scale", type=float, default=1.0, show_default=True, help="Classifier-free guidance; 1 is none.")
@click.option("--guidance-low", type=float, default=0.0, show_default=True, help="Guide where t is at least this.")
@click.option("--guidance-high", type=float, default=1.0, show_default=True, help="Guide where t is at most this.")
@click.option("--labels", default="random", show_default=True, metavar="random|balanced|0,3,7")
@click.option("--weights", type=click.Choice(["ema", "model"]), default="ema", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="The .npz. [default: RUN/samples, named by the request]")
@click.option("--batch-size", type=int, default=64, show_default=True, help="Images at a time, on each rank.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
@click.option("--autoencoder", metavar="NAME", help="Of a published checkpoint, which does not say: sd-vae-ft-mse.")
@click.option("--autoencoder-weights", type=click.Path(path_type=Path), help="Local weights of the decoder.")
def sample_command(checkpoint: Path, **options: Any) -> None:
    """Draw samples from a run or a checkpoint: an .npz for FID tools (arr_0, uint8 NHWC) and a grid PNG.

    \b
    repa-sample runs/irepa --num 64 --labels balanced
    repa-sample runs/irepa --num 50000 --sampler sde --steps 250 --cfg-scale 1.8 --guidance-high 0.7
    torchrun --nproc-per-node 8 --no-python repa-sample runs/irepa --num 50000

    Image i depends on the seed and i only. Interrupted, the same command goes on where it was.
    """
    with one_line_errors("repa-sample"):
        from .distributed import default_device, join

        with join(options.pop("device") or default_device()) as world:
            _sample(checkpoint, world, **options)


def _sample(checkpoint: Path, world: "World", **options: Any) -> None:
    import torch

    from .grids import sheet_of_file
    from .metrics import Progress
    from .pretrained import open_model
    from .sample import SampleRequest, parse_labels
    from .sample_file import sample_to_npz
    from .samplers import SamplerConfig

    names = ("sampler", "steps", "cfg_scale", "guidance_low", "guidance_high")
    request = SampleRequest(
        num=options["num"],
        seed=options["seed"],
        labels=parse_labels(options["labels"]),
        sampler=SamplerConfig(**{name: options[name] for name in names}),
    )
    trained = open_model(checkpoint, weights=options["weights"])
    model = trained.model.to(world.device)
    latents = latents_of(trained, options["autoencoder"])
    decode, decoder = load_decoder(latents, weights=options["autoencoder_weights"], device=str(world.device))
    precision = options["precision"]
    with (
        torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bf16"),
        Progress(done=0, total=request.num, unit="image", shown=world.is_main) as progress,
    ):
        npz = sample_to_npz(
            model,
            request,
            options["out"] or samples_file(trained, request, options["weights"], precision),
            interpolant=trained.interpolant,
            norm=latents.norm,
            decode=decode,
            decoder=decoder,
            batch_size=options["batch_size"],
            world=world,
            about={"precision": precision},
            progress=progress.advance,
        )
    if world.is_main:
        click.echo(f"{request.num} samples: {npz}")
        click.echo(f"grid: {sheet_of_file(npz, request=request, num_classes=model.config.num_classes)}")


@click.command(context_settings=CONTEXT)
@click.argument("checkpoint", metavar="RUN|CHECKPOINT", type=click.Path(path_type=Path))
@click.option("--cache", type=click.Path(path_type=Path), required=True, help="Its latents and its encoder's tokens.")
@click.option("--encoder", metavar="NAME", help="[default: the only one in the cache]")
@click.option("--depth", "depths", type=int, multiple=True, help="Block, from 1; repeatable. [default: all]")
@click.option("--t", "times", type=float, multiple=True, default=[0.5], show_default=True, help="Time; repeatable.")
@click.option("--num", type=int, default=10_000, show_default=True, help="Images.")
@click.option("--k", type=int, default=10, show_default=True, help="Neighbours.")
@click.option("--weights", type=click.Choice(["ema", "model"]), default="ema", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
def cknna_command(checkpoint: Path, **options: Any) -> None:
    """Measure whether SiT's layers and an encoder agree on who is near whom (CKNNA, mean-pooled tokens).

    \b
    repa-cknna runs/irepa --cache caches/in1k --encoder dinov2-vit-b --depth 4 --depth 8 --t 0.5
    """
    with one_line_errors("repa-cknna"):
        _cknna(checkpoint, **options)


def _cknna(checkpoint: Path, *, cache: Path, encoder: str | None, **options: Any) -> None:
    import torch

    from ..pipeline.cknna import cknna
    from .distributed import default_device
    from .layers import pooled_layers
    from .pretrained import open_model
    from .reader import CacheReader
    from .reference import Reference

    trained = open_model(checkpoint, weights=options["weights"])
    latents = latents_of(trained, None)
    model = trained.model.to(options["device"] or default_device())
    reader = CacheReader(cache, autoencoder=latents.name, encoder=())
    reference = Reference(cache, autoencoder=latents.name, encoder=encoder, pooling="mean")
    rows = reference.some_rows(options["num"], seed=0)
    vectors = torch.from_numpy(reference.vectors(rows))
    depths = options["depths"] or tuple(range(1, model.config.depth + 1))
    untrained = "  UNTRAINED ENCODER: no result" if reference.component.spec["random_weights"] else ""
    click.echo(f"{trained.path}: CKNNA with {reference.name}, k = {options['k']}, {len(rows)} images{untrained}")
    for t in options["times"]:
        layers = pooled_layers(
            model, reader, rows, t=t, depths=depths, norm=latents.norm, interpolant=trained.interpolant
        )
        for depth, tokens in layers.items():
            click.echo(f"  t {t:g}  after block {depth:>2}  {cknna(tokens, vectors, options['k']):.4f}")


def train() -> None:
    """Entry point of repa-train."""
    train_command(prog_name="repa-train")


def latents_of(trained: "TrainedModel", autoencoder: str | None) -> "LatentSource":
    """Return whose latents a checkpoint draws: its own record, or what the user says of a published one."""
    from .latents import LatentSource

    if trained.config is not None:
        if autoencoder is not None:
            raise UsageError(f"{trained.path} says itself whose latents it draws; leave out --autoencoder")
        return LatentSource.from_plain(trained.config["resolved"]["latents"])
    if autoencoder is None:
        raise UsageError(
            f"{trained.path} does not say whose latents it draws. Name them with --autoencoder (REPA's and SiT's are "
            f"sd-vae-ft-mse at its published scale)"
        )
    shape = trained.model.config
    return LatentSource.published(autoencoder, input_size=shape.input_size, channels=shape.in_channels)


def load_decoder(source: "LatentSource", *, weights: Path | None, device: str) -> tuple["Decoder | None", str]:
    """Return the function from latents to pictures, and its name; None where diffusers is not installed.

    Raises UsageError where the decoder's weights cannot be had, or are not of the autoencoder that made the cache.
    """
    from ..cache_specs.schema import UNKNOWN
    from ..pipeline.autoencoders import load_autoencoder

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


def samples_file(trained: "TrainedModel", request: "SampleRequest", weights: str, precision: str) -> Path:
    """Return where samples go by default: RUN/samples, or beside a lone checkpoint, named by what was asked."""
    sampler = request.sampler
    labels = request.labels if isinstance(request.labels, str) else "-".join(map(str, request.labels))
    if len(labels) > MOST_LABEL_CHARACTERS:
        labels = f"{len(request.labels)}labels{hashlib.sha256(labels.encode()).hexdigest()[:12]}"
    name = f"{trained.path.stem}-{weights}-{precision}-{sampler.sampler}{sampler.steps}-cfg{sampler.cfg_scale:g}"
    if sampler.cfg_scale > 1:
        name += f"-t{sampler.guidance_low:g}to{sampler.guidance_high:g}"
    folder = trained.path.parent
    run = folder.parent if folder.name == "checkpoints" else folder
    return run / "samples" / f"{name}-{labels}-seed{request.seed}-{request.num}.npz"


def sample() -> None:
    """Entry point of repa-sample."""
    sample_command(prog_name="repa-sample")


def cknna() -> None:
    """Entry point of repa-cknna."""
    cknna_command(prog_name="repa-cknna")


if __name__ == "__main__":
    train()
