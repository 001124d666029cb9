"""`repa-sample`: parse, load a model and its decoder, draw. torch is imported when it runs, not for its help."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...cache_specs.errors import one_line_errors
from .checkpoint import check_name, checkpoint_options, open_checkpoint
from .said import run_command, say
from .train import CONTEXT

if TYPE_CHECKING:
    from ..distributed import World
    from ..models.pretrained import TrainedModel
    from ..sampling.sample import SampleRequest

MOST_SAID = 10  # classes by name, of those asked for
MOST_LABEL_CHARACTERS = 60  # in a file's name, of which file systems take 255 bytes


@click.command(context_settings=CONTEXT)
@checkpoint_options
@click.option("--num-samples", "--num", "num", type=int, default=64, show_default=True, help="Images to draw.")
@click.option("--steps", type=int, default=50, show_default=True, help="Steps of the sampler.")
@click.option("--sampler", default="euler", show_default=True, metavar="euler|heun|sde")
@click.option("--cfg-scale", type=float, default=1.0, show_default=True, help="Classifier-free guidance; 1 is none.")
@click.option("--guidance-low", type=float, default=0.0, show_default=True, help="Guide where t is at least this.")
@click.option("--guidance-high", type=float, default=1.0, show_default=True, help="Guide where t is at most this.")
@click.option("--cls-cfg-scale", type=float, help="Guidance of REG's class token; 1 is none. [default: --cfg-scale]")
@click.option("--internal-guidance", type=float, default=1.0, help="Away from the model's middle head; 1 is none.")
@click.option(
    "--labels",
    default="random",
    show_default=True,
    metavar="random|balanced|0,dog,7",
    help="Or classes, by number or name.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="The .npz. [default: RUN/samples, named by the request]")
@click.option("--batch-size", type=int, default=64, show_default=True, help="Images at a time, on each rank.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="[default: bf16 on CUDA, fp32 on a CPU]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
@click.option("--autoencoder", metavar="NAME", help="Of a published checkpoint, which does not say: sd-vae-ft-mse.")
@click.option("--autoencoder-weights", type=click.Path(path_type=Path), help="Local weights of the decoder.")
@click.option("--entry", "entries", multiple=True, metavar="FILE.yaml", help="File of an autoencoder of your own.")
def sample_command(checkpoint: Path, **options: Any) -> None:
    """Draw samples from a run or a checkpoint: an .npz for FID tools (arr_0, uint8 NHWC) and a grid PNG.

    \b
    repa-sample runs/irepa --num-samples 64 --labels balanced
    repa-sample runs/irepa --num-samples 16 --labels "golden retriever,3"
    repa-sample runs/irepa --num-samples 50000 --sampler sde --steps 250 --cfg-scale 1.8 --guidance-high 0.7
    repa-sample runs/irepa-internal --internal-guidance 1.4
    repa-sample SiT-XL-2-256.pt --autoencoder sd-vae-ft-ema --checkpoint-convention sit
    torchrun --nproc-per-node 8 --no-python -- repa-sample runs/irepa --num-samples 50000

    Image i depends on the seed and i only. Interrupted, the same command goes on where it was.
    """
    with one_line_errors("repa-sample"):
        from ..distributed import default_device, join

        with join(options.pop("device") or default_device()) as world:
            _sample(checkpoint, world, **options)


def _sample(checkpoint: Path, world: "World", **options: Any) -> None:
    import torch

    from ..evaluating.grids import sheet_of_file
    from ..objectives.choose import stored_field
    from ..runs.metrics import Progress, folded
    from ..runs.parts import resolve_precision, settle_convolutions
    from ..sampling.sample import SampleRequest, parse_labels
    from ..sampling.sample_file import sample_to_npz
    from ..sampling.samplers import SamplerConfig
    from .borrowed import load_decoder

    check_name(options["out"] or checkpoint)
    fields = ("sampler", "steps", "cfg_scale", "guidance_low", "guidance_high", "cls_cfg_scale", "internal_guidance")
    sampler = SamplerConfig(**{name: options[name] for name in fields})
    trained = open_checkpoint(checkpoint, options, shown=world.is_main)
    request = SampleRequest(
        num=options["num"],
        seed=options["seed"],
        labels=parse_labels(options["labels"], trained.class_names),
        sampler=sampler,
    )
    names = trained.class_names
    if world.is_main and names and not isinstance(request.labels, str):
        request.check_labels(len(names))
        asked = sorted(set(request.labels))
        more = f" and {len(asked) - MOST_SAID} more" if len(asked) > MOST_SAID else ""
        say(folded(f"classes: {', '.join(f'{label} {names[label]}' for label in asked[:MOST_SAID])}{more}"))
    model = trained.model.to(world.device)
    latents = trained.latents(options["autoencoder"])
    precision = resolve_precision(options["precision"] or "auto", world.device)
    local = {"weights": options["autoencoder_weights"], "entries": options["entries"]}
    decode, decoder = load_decoder(latents, device=str(world.device), precision=precision, **local)
    if world.device.type == "cuda":
        settle_convolutions(precision)
    with (
        torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bf16"),
        Progress(done=0, total=request.num, unit="image", shown=world.is_main) as progress,
    ):
        npz = sample_to_npz(
            model,
            request,
            options["out"] or samples_file(trained, request, options["weights"], precision),
            field=stored_field(trained.method, trained.interpolant),
            norm=latents.norm,
            decode=decode,
            decoder=decoder,
            batch_size=options["batch_size"],
            world=world,
            about={"precision": precision},
            progress=progress.advance,
        )
    if world.is_main:
        say(f"{request.num} samples: {npz}")
        say(f"grid: {sheet_of_file(npz, request=request, num_classes=model.config.num_classes)}")


def samples_file(trained: "TrainedModel", request: "SampleRequest", weights: str, precision: str) -> Path:
    """Return where samples go by default: RUN/samples, or beside a lone checkpoint, named by what was asked."""
    sampler = request.sampler
    labels = request.labels if isinstance(request.labels, str) else "-".join(map(str, request.labels))
    if len(labels) > MOST_LABEL_CHARACTERS:
        labels = f"{len(request.labels)}labels{hashlib.sha256(labels.encode()).hexdigest()[:12]}"
    which = weights.replace(":", "")
    name = f"{trained.path.stem}-{which}-{precision}-{sampler.sampler}{sampler.steps}-cfg{sampler.cfg_scale:g}"
    if sampler.cfg_scale > 1 or sampler.internal_guidance > 1:
        name += f"-t{sampler.guidance_low:g}to{sampler.guidance_high:g}"
    if sampler.internal_guidance > 1:
        name += f"-ig{sampler.internal_guidance:g}"
    if sampler.cls_cfg_scale is not None:
        name += f"-cls{sampler.cls_cfg_scale:g}"
    folder = trained.path.parent
    run = folder.parent if folder.name == "checkpoints" else folder
    return run / "samples" / f"{name}-{labels}-seed{request.seed}-{request.num}.npz"


def sample() -> None:
    """Entry point of repa-sample."""
    run_command(sample_command, "repa-sample", aborted="stopped; the same command goes on where it was")
