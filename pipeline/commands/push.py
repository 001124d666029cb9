"""repa-cache push: a finished cache to a data set repository of the hub."""

import click

from .progress import Progress
from .said import say


@click.command()
@click.argument("cache", metavar="DIR")
@click.argument("target", metavar="hf://OWNER/NAME")
@click.option("--public", is_flag=True, help="Let everybody see a repository that is new. [default: private]")
def push(cache: str, target: str, public: bool) -> None:
    """Share the finished components of a cache through the Hugging Face hub.

    \b
    repa-cache push caches/in1k hf://me/in1k-tokens
    repa-train --cache hf://me/in1k-tokens --stage /local/scratch ...       # anywhere else

    Stopped, the same command goes on; after another build it adds what is new. You log in with `hf auth login`.
    """
    from ...cache_specs.sizes import human_bytes
    from ..checking.push import push as push_cache

    with Progress("bytes") as progress:
        pushed = push_cache(cache, target, public=public, on_progress=progress.reach)
    for path in pushed.left_out:
        say(f"{path}: not complete, and not pushed", err=True)
    say(
        f"{target}: {', '.join(pushed.components)}; {pushed.sent} files sent ({human_bytes(pushed.sent_bytes)}), "
        f"{pushed.kept} were there"
    )
    if pushed.place is not None:
        say(f"to train from exactly this: repa-train --cache {pushed.place} --stage DIR")
