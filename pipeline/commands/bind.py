"""repa-cache bind: what ties shards to their places, for components that were built before there was such a thing."""

import click

from ...cache_specs.errors import JobError
from .progress import Progress
from .said import say


@click.command()
@click.argument("cache", metavar="DIR|URL")
def bind(cache: str) -> None:
    """Tie the shards of components of an earlier version to their places, as they lie there now.

    \b
    repa-cache bind caches/in1k

    Reads every shard of those components once and changes none; training and verify then notice a shard that was
    replaced by another. Stopped, the same command goes on where it was. Copies that --stage made are to be made anew.
    """
    from ..checking.bind import bind_cache

    with Progress("shards") as progress:

        def told(line: str) -> None:
            progress.say(line, err=False)

        problems = list(bind_cache(cache, on_message=told, on_progress=progress.reach))
    for problem in problems:
        say(problem, err=True)
    if problems:
        raise JobError(f"{cache}: {len(problems)} components were not bound; repa-cache verify names what is damaged")
