"""The tables of encoders and autoencoders, and how an entry and a resolution become a component's spec.

A request is a name, an alias or a user's own file, with options: `dinov2`, `siglip2@irepa`, `hog:grid=8`, `my.yaml`.
Options become part of the spec, of the fingerprint and of the group's name (`features/hog-grid8`).
"""

import contextlib
import functools
import importlib.resources
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .autoencoder_entry import AutoencoderEntry
from .derived import MethodRequest, straight_spec
from .encoder_entry import VARIANT, EncoderEntry
from .entries import OwnCode, is_file, make_entry, read_own_entry, read_row
from .errors import UsageError, nearest, option

_COLUMNS = ("model", "width", "depth", "params_m", "gmac")  # of a row of encoders.yaml
# Of a request, NAME:grid=8:layers=8,11: the option's form, and what it is to be in words.
OPTIONS = {
    "grid": (r"[0-9]+", "a whole number of tokens a side"),
    "layers": (r"[0-9]+(,[0-9]+)*", "block numbers, as in layers=8,9"),
    "stage": (r"[A-Za-z0-9_.]+", "the number or name of a stage, as in stage=2"),
    "pca": ("[1-9][0-9]{0,5}", "a number of principal components, as in pca=16"),
    "resize": ("bilinear", "bilinear, which lets a map be enlarged to the grid"),
}
RANDOM_SUFFIX = "-random"  # random weights never go by the name of the pretrained ones


@functools.cache
def packaged_table(package: str, file: str) -> dict[str, Any]:
    """Return a YAML file of a package of ours, read once; by libyaml, in a tenth of the time, where it is there."""
    text = importlib.resources.files(package).joinpath(file).read_text(encoding="utf-8")
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _table(file: str) -> dict[str, Any]:
    assert __package__
    return packaged_table(__package__, file)


@functools.cache
def encoder_table() -> dict[str, EncoderEntry]:
    """Return every encoder by name, in the table's order, each followed by its variants."""
    table = _table("encoders.yaml")
    study = set(table["irepa27"])
    entries = {}
    for family, block in table["families"].items():
        common = {key: value for key, value in block.items() if key not in ("encoders", "variants")}
        for name, (*columns, last) in block["encoders"].items():
            named = dict(zip(_COLUMNS, columns if isinstance(last, dict) else [*columns, last], strict=True))
            row = {**common, **named, **(last if isinstance(last, dict) else {})}
            table = {"family": family, "irepa27": name in study}
            entries[name] = make_entry("encoders.yaml", EncoderEntry, name, row, **table)
            for variant, departure in block.get("variants", {}).items():
                full = f"{name}{VARIANT}{variant}"
                options = {**row.get("options", {}), **departure.get("options", {})}
                changed = {**row, **departure, "options": options}
                entries[full] = make_entry("encoders.yaml", EncoderEntry, full, changed, family=family)
    return entries


@functools.cache
def autoencoder_table() -> dict[str, AutoencoderEntry]:
    """Return every autoencoder by name, in the table's order."""
    rows = _table("autoencoders.yaml")["autoencoders"]
    return {name: make_entry("autoencoders.yaml", AutoencoderEntry, name, row) for name, row in rows.items()}


def read_encoder_file(file: str | Path) -> EncoderEntry:
    """Read a user's own encoder, named by the field `name` or by the file; errors name the file and the field."""
    return read_own_entry("--encoder", Path(file), EncoderEntry, taken={*encoder_table(), *encoder_aliases()})


def read_autoencoder_file(file: str | Path) -> AutoencoderEntry:
    """Read a user's own autoencoder, as `read_encoder_file` an encoder."""
    return read_own_entry("--autoencoder", Path(file), AutoencoderEntry, taken=set(autoencoder_table()))


def encoder_aliases() -> Mapping[str, str]:
    """Return short names, each with the name that it stands for."""
    return _table("encoders.yaml")["aliases"]


def encoders_left_out() -> Mapping[str, str]:
    """Return encoders of the study that the table does not have, each with the reason."""
    return _table("encoders.yaml")["left_out"]


def encoder_name(request: str) -> str:
    """Return the table's name for a name or a short one, with or without a variant: `siglip2@irepa`."""
    name, separator, variant = request.partition(VARIANT)
    name = as_known(name, {*encoder_table(), *encoder_aliases(), *encoders_left_out()})
    return encoder_aliases().get(name, name) + separator + variant


def as_known(name: str, known: Collection[str]) -> str:
    """Return `name` as `known` has it, where only its case or its underscores differ: `DINOv2`, `SD_VAE_ft_mse`."""
    folded = name.lower().replace("_", "-")
    return folded if name not in known and folded in known else name


@dataclass(frozen=True, kw_only=True)
class EncoderRequest:
    """What `--encoder NAME[:grid=G][:layers=I,J,...][:stage=K][:resize=bilinear][:pca=K]` asks for, its values read.

    `method` is what is derived of the tokens, which themselves are not stored then.
    """

    entry: EncoderEntry
    grid: int | None
    layers: tuple[int, ...] | None
    stage: str | None = None
    resize: str | None = None
    method: MethodRequest | None = None

    @property
    def group(self) -> str:
        """The group's name for pretrained weights: `dinov2-vit-b-grid8-layers8-11`, `my-cnn-grid8-stage2`."""
        return self.source if self.method is None else f"{self.source}-{self.method.suffix}"

    @property
    def source(self) -> str:
        """The group's name of the network's own tokens."""
        name = self.entry.name if self.grid is None else f"{self.entry.name}-grid{self.grid}"
        name = name if self.layers is None else f"{name}-layers{'-'.join(map(str, self.layers))}"
        return name if self.stage is None else f"{name}-stage{self.stage}"


def read_encoder_request(request: str) -> EncoderRequest:
    """Read `NAME|FILE.yaml[:grid=G][:layers=I,J,...][:stage=K][:resize=bilinear][:pca=K]`.

    Raises `UsageError` with the nearest known name for one that is not in the table.
    """
    asked, *options = request.split(":")
    if is_file(asked):
        entry = read_encoder_file(asked)
    else:
        name = encoder_name(asked)
        if name in encoders_left_out():
            raise UsageError(f"--encoder {request}: {name} is left out: {encoders_left_out()[name]}")
        if name not in encoder_table():
            raise UsageError(f"unknown encoder {name!r}: {nearest(name, [*encoder_table(), *encoder_aliases()])}")
        entry = encoder_table()[name]
    values: dict[str, Any] = {}
    for word in options:
        key, _, value = word.partition("=")
        if key not in OPTIONS:
            raise UsageError(f"--encoder {request}: unknown option {key!r}; {nearest(key, OPTIONS)}")
        pattern, expected = OPTIONS[key]
        if not re.fullmatch(pattern, value) or (key, value) == ("grid", "0"):
            raise UsageError(f"--encoder {request}: {key} is {value!r}, expected {expected}")
        values[key] = value
    return EncoderRequest(
        entry=entry,
        grid=int(values["grid"]) if "grid" in values else None,
        layers=tuple(map(int, values["layers"].split(","))) if "layers" in values else None,
        stage=values.get("stage"),
        resize=values.get("resize"),
        method=MethodRequest(name="pca", width=int(values["pca"])) if "pca" in values else None,
    )


def stored_encoder(request: str, present: Sequence[str]) -> tuple[str, int | None] | None:
    """Return the group among `present` that a reader's `--encoder` means, and the layer picked of it.

    A request names a group as it lies (`dinov2-vit-b-int8`) or as it was asked of the build (`dinov2`, `hog:grid=8`);
    `:layer=9` at the end picks one layer of a group that holds several. None where no group matches.
    """
    name, separator, layer = request.partition(":layer=")
    if separator and not (layer.isascii() and layer.isdigit()):
        raise UsageError(f"--encoder {request}: layer is {layer!r}, expected the number of a block, as in :layer=9")
    candidates = [name]
    with contextlib.suppress(UsageError):  # the name of a group need not be one that a build understands
        candidates.append(read_encoder_request(name).group)
    # And as a network of one's own was asked for, whose file is not at hand.
    candidates.append(re.sub(":(grid|layers|stage)=([^:]+)", lambda m: f"-{m[1]}{m[2].replace(',', '-')}", name))
    picked = int(layer) if separator else None
    return next(((group, picked) for group in candidates if group in present), None)


def pick_layer(where: str, stored: Sequence[int | None], layer: int | None) -> int | None:
    """Return the layer to read of a group that holds `stored` ones; raise `UsageError` where that is not clear."""
    if layer is None and len(stored) == 1:
        return stored[0]
    if layer not in stored or layer is None:
        name = where.rpartition("/")[2]
        if tuple(stored) == (None,):
            raise UsageError(f"{where} holds the last layer's tokens alone; leave out :layer={layer}")
        raise UsageError(
            f"{where} holds layers {', '.join(map(str, stored))}; pick one, as in "
            f"{option(f'--encoder {name}:layer={stored[-1]}')}"
        )
    return layer


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A request turned into a group's name, a table entry and a spec; `code` of a network of one's own."""

    name: str
    entry: EncoderEntry | AutoencoderEntry
    spec: dict[str, Any]
    code: OwnCode | None = None


def resolve_encoder(
    request: str, *, resolution: int, random_weights: bool = False, default_grid: int | None = None
) -> ResolvedModel:
    """Resolve what `read_encoder_request` reads for images of `resolution`.

    Without `:grid=G` it is `default_grid`, without that resolution / 16.
    """
    asked = read_encoder_request(request)
    code = asked.entry.code()
    spec = asked.entry.resolve(
        resolution=resolution,
        grid=default_grid if asked.grid is None else asked.grid,
        layers=asked.layers,
        stage=asked.stage,
        resize=asked.resize,
        random_weights=random_weights,
        code=code,
    )
    name = asked.source + RANDOM_SUFFIX * spec["random_weights"]
    if asked.method is not None:
        name, spec = f"{name}-{asked.method.suffix}", straight_spec(asked.method, f"features/{name}", spec)
    return ResolvedModel(name=name, entry=asked.entry, spec=spec, code=code)


def resolve_autoencoder(
    name: str, *, resolution: int, random_weights: bool = False, dtype: str = "float16"
) -> ResolvedModel:
    """Resolve an autoencoder's name or file; raise `UsageError` with the nearest known one."""
    table = autoencoder_table()
    name = as_known(name, table)
    if not is_file(name) and name not in table:
        raise UsageError(f"unknown autoencoder {name!r}: {nearest(name, table)}")
    entry = read_autoencoder_file(name) if is_file(name) else table[name]
    code = entry.code()
    spec = entry.resolve(resolution=resolution, random_weights=random_weights, code=code, dtype=dtype)
    return ResolvedModel(name=entry.name + RANDOM_SUFFIX * spec["random_weights"], entry=entry, spec=spec, code=code)


def code_of(where: str, spec: Mapping[str, Any], entries: Sequence[str | Path]) -> OwnCode | None:
    """Return the code behind a component's `spec`, None for a library's model: found among the files of `--entry`.

    A cache names a user's network and the digests of its files, and never causes an import: whoever wants it to run
    gives its entry. Raises `UsageError` beginning with `where` where it is not among `entries`, or is another one by
    now, naming what differs.
    """
    if spec["loader"] != "python":
        return None
    name, encoder = spec["entry"], "grid" in spec
    for file in entries:
        entry = read_own_file(file)
        if entry.name != name or isinstance(entry, EncoderEntry) != encoder:
            continue
        code = entry.code()
        if isinstance(entry, EncoderEntry):
            asked = {key: spec.get(key) for key in ("stage", "resize")}
            side, grid = spec["input_size"][0], spec["grid"][0]
            fresh = entry.resolve(resolution=side, grid=grid, layers=None, random_weights=False, code=code, **asked)
        else:
            side = spec["latent_size"][0] * entry.factor
            fresh = entry.resolve(resolution=side, random_weights=False, code=code)
        for key in sorted({*spec, *fresh} - {"files"}):
            if spec.get(key) != fresh.get(key):
                raise UsageError(f"{where}: {file} is another one by now: {key} was {spec.get(key)}, is {fresh[key]}")
        for key in sorted({*spec["files"], *fresh["files"]}):
            if spec["files"].get(key) != fresh["files"].get(key):
                raise UsageError(f"{where}: {key} of {file} is not the one that it was built with (another sha256)")
        return code
    raise UsageError(f"{where} is of a network of your own; give its file, --entry {name}.yaml")


def read_own_file(file: str | Path) -> EncoderEntry | AutoencoderEntry:
    """Read the file of `--entry` or `--check`: an autoencoder where it has latent channels, else an encoder."""
    row = read_row("--entry", Path(file))
    return read_autoencoder_file(file) if "latent_channels" in row else read_encoder_file(file)
