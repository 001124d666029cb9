"""`repa-train`: parse, resolve the settings, call one function. torch is imported when it runs, not for its help."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...cache_specs.errors import UsageError, one_line_errors
from .said import run_command, say

if TYPE_CHECKING:
    from ..distributed import World
    from ..runs.config import RunConfig

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.command(context_settings=CONTEXT)
@click.option("--cache", metavar="DIR|URL", help="Cache made by repa-cache build: a folder, s3://bucket/prefix.")
@click.option("--stage", metavar="DIR", help="Copy what is read to a local disk first; all runs share the copy.")
@click.option("--encoder", "encoders", multiple=True, metavar="NAME", help="Encoder to align with, repeatable.")
@click.option("--online", multiple=True, metavar="NAME", help="Encoder to compute at each step, for comparison.")
@click.option("--data", metavar="PATH|demo", help="The images that --online computes from.")
@click.option("--autoencoder", metavar="NAME", help="Latents to train on. [default: the only ones in the cache]")
@click.option("--model", metavar="SiT-B/2", help="SiT-{Ti,S,B,L,XL}/patch.")
@click.option("--recipe", metavar="NAME", help="sit, repa, irepa, meanflow, reg, sra, ... (trainer/runs/recipes.yaml).")
@click.option("--init", metavar="RUN|FILE", help="Begin with the weights of a run or a published checkpoint.")
@click.option("--steps", help="Optimizer steps in all. [default: 400000]")
@click.option("--until", type=click.IntRange(min=1), help="Save and end after this step; --steps stays.")
@click.option("--batch-size", type=int, help="Samples a step, over all ranks. [default: 256]")
@click.option("--lr", type=float, help="optimizer.learning_rate [default: 1e-4]")
@click.option("--gamma", help="alignment.gamma, 0 to 1 or none. [default: the recipe's]")
@click.option("--seed", type=int, help="Of weights, order and noise. [default: 0]")
@click.option("--val-fraction", metavar="0.05", help="Hold out this share of the samples, and log the loss on them.")
@click.option("--val-data", metavar="CACHE", help="Or log the loss on another cache, of the same networks.")
@click.option("--out", metavar="RUN", help="Folder of the run: config, metrics, checkpoints, grids.")
@click.option("--config", "files", multiple=True, type=click.Path(path_type=Path), help="YAML file of settings.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting; wins over --config.")
@click.option("--shuffle", metavar="global|blocks", help="Blocks: by shards, for slow disks and object stores.")
@click.option("--prefetch-bytes", metavar="SIZE", help="Bound of what is read ahead. [default: 512MB]")
@click.option("--check-reads", is_flag=True, default=None, help="Verify the checksum of every row that is read.")
@click.option("--compile/--no-compile", default=None, help="torch.compile the model. [default: on CUDA, if it works]")
@click.option(
    "--resume",
    is_flag=False,
    flag_value="auto",
    metavar="[auto|RUN]",
    help="Continue the run in --out, or start it where there is none; or continue RUN, with its own settings.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
@click.option("--dry-run", is_flag=True, help="Check settings, cache and --out; say what would run; write nothing.")
@click.option("--verbose", is_flag=True, help="Print every setting, not only those that differ from the recipe's.")
@click.option("--settings", is_flag=True, help="Show all settings, their defaults and meanings, and exit.")
def train_command(
    files: tuple[Path, ...],
    assignments: tuple[str, ...],
    resume: str | None,
    until: int | None,
    device: str | None,
    dry_run: bool,
    verbose: bool,
    settings: bool,
    **flags: Any,
) -> None:
    """Train SiT from a cache, aligned with the encoders whose tokens it holds.

    \b
    repa-train --cache caches/in1k --model SiT-B/2 --recipe irepa --out runs/irepa
    repa-train --resume runs/irepa
    torchrun --nproc-per-node 8 --no-python -- repa-train --cache caches/in1k --model SiT-XL/2 ...

    Settings: defaults < recipe < --config < --set < the flags above; --settings shows them all. What is resolved is
    stored as config.json. Ctrl-C and SIGTERM save at the next step; a second Ctrl-C aborts.
    """
    with one_line_errors("repa-train"):
        if settings:
            from ..runs.catalogue import as_text

            say(as_text())
            return
        from ..distributed import default_device, join
        from ..runs.loggers import find_logger

        config = resolve_flags(files, assignments, flags, resume=resume)
        find_logger(config.logger)  # that it cannot be had is said before anything is read
        with join(device or default_device()) as world:
            if dry_run:
                _explain(config, world, resume=resume is not None, verbose=verbose)
            else:
                _train(config, world, resume=resume is not None, until=until, verbose=verbose)


def resolve_flags(
    files: tuple[Path, ...], assignments: tuple[str, ...], flags: dict[str, Any], *, resume: str | None = None
) -> "RunConfig":
    """Return the settings of a command line; the recipe and the model may stand in any of its sources.

    At a resume, of --out where it is `auto` and else of the run that it names, the run's own settings stand in for
    defaults and recipe.
    """
    from ..runs.settings import Layer, file_layer, recipe_layer, required, resolve, set_layer
    from ..runs.stored import named_run, stored_layer

    online = flags.get("online")
    if online and flags.get("encoders"):
        raise UsageError("--encoder reads tokens and --online computes them; name all encoders with one of the two")
    if flags.get("data") and not online and resume is None:
        raise UsageError("--data is what --online computes encoders from; add --online NAME, or leave it out")
    names = {"lr": "optimizer.learning_rate", "gamma": "alignment.gamma", "online": "encoders", "data": "online.data"}
    names |= {"val_fraction": "validation.fraction", "val_data": "validation.cache"}
    given = {names.get(key, key): value for key, value in flags.items() if value not in (None, ())}
    if resume not in (None, "auto"):
        given = named_run(Path(resume), given)
    sources = [*map(file_layer, files), set_layer(assignments), Layer(source="flags", values=given)]
    own = None if resume is None else stored_layer(Path(required("out", sources)))
    begun = own is not None
    if own is None:
        own = recipe_layer(required("recipe", sources), required("model", sources))
    config = resolve([own, *sources])
    if begun and config.compile == "auto":  # what it chose when the run began
        config = resolve([own, *sources, Layer(source="the run", values={"compile": own.values["compile"]})])
    if online and config.online.data is None:
        raise UsageError("--online computes encoders from the images of the cache; name their folder with --data")
    return config


def _train(config: "RunConfig", world: "World", *, resume: bool, until: int | None, verbose: bool) -> None:
    from ..evaluating.grids import draw_training_grid
    from ..rows.open_files import raise_limit
    from ..runs.describe import describe
    from ..runs.metrics import WIDTH
    from ..runs.resume import enter_folder
    from ..runs.run import latent_source, prepare
    from ..training.loop import train
    from .borrowed import load_decoder, load_evaluation, load_online

    raise_limit()  # a global shuffle comes by every shard: thousands of files
    copy = None
    if config.stage is not None:
        _checked(config, world, resume=resume)  # what would be refused is so before hours of copying
        config, copy = _staged(config, world)
    run = prepare(config, world, copy=copy, online=load_online)
    decode = None
    if config.grid.every and world.is_main:
        weights = None if config.grid.autoencoder_weights is None else Path(config.grid.autoencoder_weights)
        latents, device = latent_source(run.reader, run.norm), str(world.device)
        decode, _ = load_decoder(latents, weights=weights, device=device, entries=config.entries)
    evaluation = load_evaluation(run) if config.evaluation.every else None
    with enter_folder(run, resume=resume):
        if world.is_main:
            parts = (run.config, run.reader, run.norm, world)
            say(describe(*parts, validation=run.validation, step=run.step, verbose=verbose))
        train(run, until=until, draw_grid=lambda run: draw_training_grid(run, decode), evaluation=evaluation)
    if world.is_main:
        done = f"{run.folder}: {run.step} of {run.config.steps} steps done"
        command = f"repa-train --resume {shlex.quote(str(run.folder))}"
        if run.step < run.config.steps:  # a command to copy is never broken
            fits = len(done) + len(command) + len("; go on with ") <= WIDTH
            done = f"{done}; go on with{' ' if fits else chr(10) + '  '}{command}"
        say(done)


def _staged(config: "RunConfig", world: "World") -> tuple["RunConfig", Path]:
    """Copy what the run reads, a line a tenth: whichever rank copies, all others of its machine wait."""
    from ...cache_specs.sizes import human_bytes
    from ..runs.run import stage

    tenths = {0}  # told already, of one component

    def tell(done: int, total: int) -> None:
        if done == 0:
            tenths.intersection_update({0})
        elif (tenth := 10 * done // total) not in tenths:
            tenths.add(tenth)
            say(f"staged {human_bytes(done)} of {human_bytes(total)}")

    return stage(config, on_progress=tell, on_message=lambda line: say(line) if world.is_main else None)


def _explain(config: "RunConfig", world: "World", *, resume: bool, verbose: bool) -> None:
    described, step = _checked(config, world, resume=resume, verbose=verbose)
    if world.is_main:
        say(described)
        say(f"start: step {step}")
        say("dry run: nothing was trained or written")


def _checked(config: "RunConfig", world: "World", *, resume: bool, verbose: bool = False) -> tuple[str, int]:
    """Check settings, cache and folder, writing nothing; return what would run, and from which step on."""
    import torch

    from ..evaluating.evaluation import check_evaluation
    from ..reading.norm import reader_norm
    from ..runs.describe import describe
    from ..runs.held_out import validation_data
    from ..runs.parts import build_model
    from ..runs.resume import check_folder
    from ..runs.run import open_cache, record
    from ..runs.start import check_weights
    from .borrowed import load_online

    config, reader = open_cache(config, world, online=load_online)
    norm = reader_norm(reader, config.latent_norm)
    validation = validation_data(config, reader)
    stored = check_folder(Path(config.out), record(config, reader, norm, validation), reader, resume=resume)
    step = stored["steps"] if stored else 0
    if stored is None and config.init is not None:
        with torch.device("meta"):
            shapes = build_model(config, reader)
        check_weights(config.init, shapes, norm)
    if config.evaluation.every:
        check_evaluation(config)
    return describe(config, reader, norm, world, validation=validation, step=step, verbose=verbose), step


def train() -> None:
    """Entry point of repa-train."""
    if os.environ.get("REPA_DIE_WITH_PARENT"):  # a run of a study; so do its ranks, whom torchrun would leave alive
        from ..studies.trial import die_with_parent

        die_with_parent()
    run_command(train_command, "repa-train", aborted="aborted; --resume RUN goes on from its last checkpoint")


if __name__ == "__main__":
    train()
