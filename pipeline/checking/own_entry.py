"""A user's own entry looked at as a whole: every field that is wrong, then whether the network is what it says."""

from collections.abc import Iterator
from pathlib import Path

from ...cache_specs.autoencoder_entry import AutoencoderEntry
from ...cache_specs.encoder_entry import EncoderEntry
from ...cache_specs.entries import problems, read_row
from ...cache_specs.tables import ResolvedModel, read_own_file, resolve_autoencoder, resolve_encoder

RESOLUTION = 256  # of pictures, where nothing fixes what the network sees


def field_problems(file: Path) -> list[str]:
    """Return a line for each field of an entry that is unknown, missing or wrong."""
    row = read_row("--check", file)
    row.pop("name", None)
    return list(problems(AutoencoderEntry if "latent_channels" in row else EncoderEntry, row))


def check_file(file: Path) -> Iterator[str]:
    """Yield what a user's own entry is, a line an output; raise `UsageError` for the first thing that it is not.

    A library's model is made without weights, for its shapes; a network of Python is loaded and run.
    """
    entry = read_own_file(file)
    if isinstance(entry, AutoencoderEntry):
        yield from _autoencoder(file, entry)
        return
    stages: list[str | None] = [*entry.stages] or [None]
    resolved = [_resolved(file, entry, stage) for stage in stages]
    _run(entry, resolved)
    yield f"{file}: encoder {entry.name}, {entry.loader} {resolved[0].spec['model']}"
    for stage, model in zip(stages, resolved, strict=True):
        spec = model.spec
        grid, side = spec["grid"], spec["input_size"][0]
        what = "tokens" if stage is None else f"stage {stage}:"
        yield f"  {what} {grid[0]} x {grid[1]} of {spec['width']}, seeing {side} x {side} pixels"
    if entry.loader == "timm" and entry.output == "map" and not entry.stages:
        from ..models.shapes import stages_of

        yield f"  no stages declared; the model has stages: {stages_of(resolved[0].spec)}"


def _resolved(file: Path, entry: EncoderEntry, stage: str | None) -> ResolvedModel:
    """Return the request of an output at its own grid."""
    _, patch, native = entry.tap(stage)
    request = str(file) if stage is None else f"{file}:stage={stage}"
    grid = native or (entry.input_size // patch if entry.input_size else RESOLUTION // 16)
    return resolve_encoder(f"{request}:grid={grid}", resolution=RESOLUTION)


def _run(entry: EncoderEntry, resolved: list[ResolvedModel]) -> None:
    from ..models.encoders import load_encoder
    from ..models.shapes import check_shapes

    if entry.loader != "python":
        for model in resolved:
            check_shapes(model.spec, model.code)
        return
    by_input = {model.spec["input_size"][0]: [m for m in resolved if m.spec["input_size"] == model.spec["input_size"]]
                for model in resolved}  # fmt: skip
    for models in by_input.values():
        encoder = load_encoder(models[0].spec, code=models[0].code)
        if entry.stages:
            encoder.check([model.spec for model in models])


def _autoencoder(file: Path, entry: AutoencoderEntry) -> Iterator[str]:
    model = resolve_autoencoder(str(file), resolution=RESOLUTION // entry.factor * entry.factor or entry.factor)
    spec = model.spec
    if entry.loader == "python":
        from ..models.autoencoders import load_autoencoder

        load_autoencoder(spec, code=model.code)
    elif entry.loader == "diffusers":
        from ..models.autoencoders import library_class

        library_class(spec)
    scale = "no published scale" if entry.published is None else f"scale {entry.scale:g}, bias {entry.bias:g}"
    yield f"{file}: autoencoder {entry.name}, {entry.loader} {spec['model']}"
    yield f"  {entry.kind}, {entry.latent_channels} channels, {entry.factor} pixels a latent pixel; {scale}"
