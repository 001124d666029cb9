"""repa-cache reference: the cache's own pictures, for evaluators of samples."""

from pathlib import Path

import click

from ...cache_specs.errors import UsageError
from .progress import Progress
from .said import say_report


@click.command()
@click.argument("cache", metavar="DIR|URL")
@click.option("--data", metavar="PATH|demo", help="The images. [default: the cache's latents, where they are pixels]")
@click.option("--num", type=int, metavar="N", help="Pictures drawn at random, the same in every run. [default: all]")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE.npz")
def reference(cache: str, data: str | None, num: int | None, out: Path) -> None:
    """Write a cache's own pictures as a reference batch for ADM's evaluator: uint8 [N, R, R, 3].

    \b
    repa-cache reference caches/photos --data photos --out photos.npz
    python guided-diffusion/evaluations/evaluator.py photos.npz samples.npz

    Cropped as for the build, without mirrors. Figures against it compare your runs with each other; those of papers for
    ImageNet are against the file that is published with the evaluator, which is another one.
    """
    from ...cache_specs.sizes import human_bytes
    from ..analysis.reference import write_reference
    from ..images.demo_data import source_of

    if out.suffix != ".npz":
        raise UsageError(f"--out {out}: expected a name that ends in .npz")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: no folder {out.parent}; make it, or name another")
    source = None if data is None else source_of(data)
    with Progress("images") as progress:
        written = write_reference(cache, out, source=source, num=num, on_progress=progress.reach)
    say_report(f"{out}: {written} pictures of {cache}, uint8, {human_bytes(out.stat().st_size)}")
