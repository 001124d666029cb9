"""repa-cache encoders: the table of encoders, one of them, and whether an entry of one's own is one."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ...cache_specs.errors import UsageError
from .said import JSON, say, say_json, say_report

# Of a row of the table, in the order of --json.
_FIELDS = (
    *("family", "irepa27", "loader", "model", "width", "depth", "patch", "tensor", "output", "cls_token"),
    *("params_m", "gmac", "licence"),
)


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--check", type=click.Path(path_type=Path), metavar="FILE.yaml", help="Look at an entry of your own.")
@JSON
def encoders(names: tuple[str, ...], check: Path | None, as_json: bool) -> None:
    """Print the table of encoders: names, sizes, which tensor, licence. Of those named, where the weights come from.

    \b
    repa-cache encoders
    repa-cache encoders dinov2 siglip2@irepa # all about two of them
    repa-cache encoders --check my.yaml      # what is missing or wrong in an entry of your own

    An entry (of an autoencoder too) is checked field by field; then a library's model is made without weights, for its
    shapes, and a network of Python is loaded and run on made-up pictures.
    """
    if check is not None:
        if names or as_json:
            raise UsageError("--check looks at one file of yours; leave out the names, and --json")
        _check(check)
        return
    from ...cache_specs.tables import encoders_left_out

    rows = list(_rows(names))
    if as_json:
        say_json({"encoders": rows, "left_out": dict(encoders_left_out())})
    elif names:
        say_report(*(line for row in rows for line in _about(row)))
    else:
        say_report(*_table(rows))


def _rows(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the table's rows as `--json` has them (README.md): those of `names`, or all."""
    from ...cache_specs.tables import encoder_aliases, encoder_table, read_encoder_request

    short = {name: alias for alias, name in encoder_aliases().items()}
    table = encoder_table()
    for name in [read_encoder_request(name).entry.name for name in names] or table:
        entry = table[name]
        yield {
            "name": name,
            "short": short.get(name),
            **{field: getattr(entry, field) for field in _FIELDS},
            "weights_from": entry.source if entry.has_weights else None,
        }


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line an encoder, under their licences; an asterisk marks the 27 of the iREPA study."""
    from ...cache_specs.tables import encoders_left_out

    yield f"  {'name':<31} {'short':<9} {'width':>5} {'tokens':<11} {'params M':>8} {'GMAC':>7}"
    for licence, alike in itertools.groupby(rows, key=lambda row: row["licence"]):
        yield f"licence: {licence}"
        for row in alike:
            yield (
                f"{'*' if row['irepa27'] else ' '} {row['name']:<31} {row['short'] or '':<9} {row['width']:>5} "
                f"{row['tensor']:<11} {row['params_m']:>8.1f} {row['gmac']:>7.1f}"
            )
    yield "* one of the 27 of the iREPA study"
    yield "@irepa: as the study computes it, where that is not the model's card"
    yield "repa-cache encoders NAME says more, and where its weights come from"
    for name, why in encoders_left_out().items():
        yield f"left out: {name}: {why}"


def _about(row: Mapping[str, Any]) -> Iterator[str]:
    short = f" ({row['short']})" if row["short"] else ""
    study = ", one of the 27 of the iREPA study" if row["irepa27"] else ""
    yield f"{row['name']}{short}: {row['loader']} {row['model']}, family {row['family']}{study}"
    depth = f"{row['depth']} blocks, " if row["depth"] else ""
    cls_token = ", and a class token" if row["cls_token"] else ""
    yield f"  {depth}patch {row['patch']}; {row['output']} {row['width']} wide, {row['tensor']}{cls_token}"
    yield f"  {row['params_m']:.1f} M parameters, {row['gmac']:.1f} GMAC for 256 tokens"
    yield f"  licence: {row['licence']}"
    yield f"  weights from: {row['weights_from'] or 'none needed'}"


def _check(file: Path) -> None:
    from ..checking.own_entry import check_file, field_problems

    found = field_problems(file)
    for problem in found:
        say(f"{file}: {problem}", err=True)
    if found:
        fields = "1 field is" if len(found) == 1 else f"{len(found)} fields are"
        raise UsageError(f"{file}: {fields} not as expected; cache_specs/ENCODERS.md explains them")
    say_report(*check_file(file))
