"""From a checkpoint file to a SiT that can be asked for velocities: ours, REPA's, iREPA's, REG's and SiT's.

Ours say what they are. A published file is a dict of model, ema, opt, args and steps, or (REPA's and SiT's download) a
bare state dict; published.py reads its architecture and its convention.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...cache_specs.errors import UsageError, option
from ..diffusion.interpolant import Interpolant
from ..diffusion.latents import LatentSource
from .architectures import make_model, recorded_config
from .checkpoint import EMA_FOLDER, FOLDER, CheckpointError, damaged, latest_checkpoint, load_checkpoint
from .jit import JiT
from .projector import ProjectorConfig
from .published import Published, bare_names, is_sit, listed, read_published, settings, short
from .published_jit import named_averages
from .sit import Convention, SiT


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A checkpoint's model and what is needed to sample from it.

    `config` is the resolved configuration of our own run, None for a published file, which does not say how its
    latents were normalised; `steps` is None for a bare state dict. `assumed` says in lines what a published file does
    not say for certain: whoever samples from it prints them.
    """

    model: SiT
    path: Path
    steps: int | None
    interpolant: Interpolant
    config: dict[str, Any] | None
    assumed: tuple[str, ...] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict)  # of what our own run was trained on

    @property
    def run(self) -> str:
        """The name of the run that it is of: its folder's, or that of a lone file."""
        folder = self.path.resolve().parent
        return folder.parent.name if folder.name in (FOLDER, EMA_FOLDER) else self.path.stem

    @property
    def method(self) -> Mapping[str, Any]:
        """What `stored_field` needs to know of its training: the run's settings; a published model's shape tells."""
        if self.config is not None:
            return self.config
        if isinstance(self.model, JiT):
            return {"objective": "jit"}
        return {"objective": "velocity" if self.model.config.cls_width is None else "reg"}

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the classes of its run's cache are called, in order; empty where nobody noted it."""
        resolved = (self.config or {}).get("resolved")
        names = resolved.get("class_names") if isinstance(resolved, Mapping) else None
        fits = isinstance(names, list) and len(names) == self.model.config.num_classes
        return tuple(map(str, names)) if fits and names else ()

    def latents(self, autoencoder: str | None) -> LatentSource:
        """Return whose latents it draws: its own record, or what the user says of a published checkpoint."""
        if self.config is not None:
            if autoencoder is not None:
                raise UsageError(f"{self.path} says itself whose latents it draws; leave out {option('--autoencoder')}")
            try:
                source = LatentSource.from_plain(self.config["resolved"]["latents"])
                numbers = torch.tensor([source.norm.scale, source.norm.bias])
                fits = numbers.shape == (2, self.model.config.in_channels) and bool(torch.isfinite(numbers).all())
            except (KeyError, TypeError, ValueError, AttributeError):
                fits = False
            if not fits:
                raise CheckpointError(damaged(self.path, "its record of whose latents it draws cannot be read"))
            return source
        if autoencoder is None and isinstance(self.model, JiT):
            autoencoder = "pixels"
        if autoencoder is None:
            raise UsageError(
                f"{self.path} does not say whose latents it draws. Name them with {option('--autoencoder')} "
                f"(REPA's and SiT's are sd-vae-ft-mse at its published scale)"
            )
        shape = self.model.config
        return LatentSource.published(autoencoder, input_size=shape.input_size, channels=shape.in_channels)


def load_model(path: str | Path, *, weights: str = "ema", convention: Convention | None = None) -> SiT:
    """Return the SiT of a checkpoint or of a run's newest one, in eval mode on the CPU, float32.

    `model(x, t, y)` is the velocity, t = 0 data, whichever `convention` a published file's weights have: "sit" (t = 1
    is data), "repa", or None for what the file tells. Raises CheckpointError where the file is damaged, refused or not
    a SiT, and UsageError for a convention of a file that says itself what it is.
    """
    return open_model(path, weights=weights, convention=convention).model


def open_model(path: str | Path, *, weights: str = "ema", convention: Convention | None = None) -> TrainedModel:
    """Return a checkpoint's model with the settings that sampling needs.

    `weights` is ema (the first average), model, or ema:DECAY of a run that keeps several; `path`, `convention` and
    errors as in `load_model`, and UsageError for weights that the file does not hold.
    """
    file = Path(path)
    if file.is_dir():
        newest = latest_checkpoint(file)
        if newest is None:
            raise CheckpointError(f"{file}: there is no checkpoint in this run yet; train it, or name a .pt file")
        file = newest
    stored = load_checkpoint(file, mmap=True)
    stored = dict(named_averages(stored, settings(stored.get("args"), file)))
    if weights not in stored and (is_sit(stored) or is_sit(stored.get("state_dict"))):
        if weights == "model":
            raise CheckpointError(
                f"{file}: a bare state dict holds one set of weights; ask for {option('--weights ema')}"
            )
        stored = {"ema": stored if is_sit(stored) else stored["state_dict"]}
    found = _weights(stored, weights, file)
    if not is_sit(found):
        names = found if isinstance(found, Mapping) else stored
        raise CheckpointError(f"{file}: holds no SiT under {weights!r} (found {listed(names)})")
    state, prefix = bare_names(found, file)
    _check_tensors(state, file)
    assumed = (f"its names without {prefix!r}",) if prefix else ()
    try:
        if "architecture" in stored:
            if convention is not None:
                flag = option("--checkpoint-convention", "convention=")
                raise UsageError(f"it says itself which way its t runs; leave out {flag}")
            built, config = _ours(stored, state, file), stored["config"]
        else:
            built = read_published(state, settings(stored.get("args"), file), file, convention=convention)
            config = None
        model = _filled(built, file)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    steps = stored.get("steps")
    return TrainedModel(
        model=model,
        path=file,
        steps=steps if type(steps) is int else None,
        interpolant=Interpolant(path=built.path),
        config=config,
        assumed=(*assumed, *built.assumed),
        fingerprints=stored["fingerprints"] if isinstance(stored.get("fingerprints"), Mapping) else {},
    )


def _weights(stored: Mapping[str, Any], weights: str, file: Path) -> Any:
    """Return the state dict that `weights` names."""
    part, _, decay = weights.partition(":")
    if part not in ("ema", "model") or (decay and part == "model"):
        raise UsageError(
            f"{option(f'--weights {weights}')}; expected ema, model, or ema:DECAY of a run that keeps several averages"
        )
    if not decay:
        return stored.get(part)
    config = stored.get("config")
    decays = config.get("ema_decay") if isinstance(config, Mapping) else None
    first = decays[0] if isinstance(decays, list) and decays else decays  # of older runs, one number
    others = stored.get("emas", {})
    if not isinstance(others, Mapping):
        raise CheckpointError(damaged(file, f"its emas are a {type(others).__name__}; expected averages by decay"))
    averages = {short(first): stored.get("ema"), **others}
    if decay not in averages:
        raise UsageError(
            f"{file} holds averages of decay {', '.join(map(short, averages))}; "
            f"{option(f'--weights ema:{decay}')} names none"
        )
    return averages[decay]


def _ours(stored: Mapping[str, Any], state: Mapping[str, Tensor], file: Path) -> Published:
    """Read the record that `save_checkpoint` leaves of what it saves."""
    try:
        record, config = stored["architecture"], stored["config"]
        built = Published(
            config=recorded_config(record),
            projectors=[ProjectorConfig(**projector) for projector in record["projectors"]],
            encoder_depth=record["encoder_depth"],
            state=state,
            path=config.get("interpolant", {}).get("path", "linear"),
            assumed=(),
        )
        Interpolant(path=built.path)
    except (UsageError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(damaged(file, f"its record of the model cannot be read ({error})")) from error
    return built


def _check_tensors(state: Mapping[str, Any], file: Path) -> None:
    """Raise CheckpointError where a weight is no plain tensor of floats, or claims more bytes than the file holds."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{file}: {short(name)} is a {type(value).__name__}; expected a tensor")
        plain = value.is_floating_point() and value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(
                f"{file}: {short(name)} is {value.dtype} {list(value.shape)} on {value.device}, not a plain tensor "
                f"of floats that the file holds whole"
            )


def _filled(built: Published, file: Path) -> SiT:
    """Return SiT with the weights of the state, all of them and no others."""
    config = built.config
    # Before a module is made of each block that a record claims.
    blocks = len({name.split(".")[1] for name in built.state if name.startswith("blocks.")})
    if blocks != config.depth:
        raise CheckpointError(f"{file}: {config.name} is said to have {config.depth} blocks; the file holds {blocks}")
    try:
        with torch.device("meta"):
            model = make_model(config, built.projectors, encoder_depth=built.encoder_depth)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes past what a tensor may have, or no numbers
        raise CheckpointError(damaged(file, f"no {config.name} can be of the sizes in its record")) from error
    expected = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: value.shape for name, value in built.state.items()}
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differing:
        each = "; ".join(
            f"{short(name)} is {_shape(found.get(name))}, expected {_shape(expected.get(name))}"
            for name in differing[:3]
        )
        looks = listed(found).rpartition("; it looks like ")
        raise CheckpointError(
            f"{file}: not the weights of {config.name} as SiT, REPA, iREPA and REG publish it: {each} "
            f"({len(differing)} names differ)" + (f". It looks like {looks[2]}" if looks[1] else "")
        )
    model.to_empty(device="cpu")
    model.load_state_dict(built.state)
    return model.eval().requires_grad_(False)


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))
