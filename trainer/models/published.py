"""What a checkpoint of SiT's, REPA's, iREPA's or REG's own code says of its model: settings, names, shapes, time.

All share DiT's parameter names. SiT's counts t backwards, 1 is data, and has its last layer answer twice the channels
(willisma/SiT: transport/, models.py `learn_sigma`); the others count it as we do. `args` tells them apart by its words,
the shapes by their channels. What neither tells is assumed, and said.

SiT's sampler guides only the first three channels of a latent; ours guides all of them.
"""

import argparse
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from ...cache_specs.errors import option
from ..diffusion.interpolant import PathName
from .checkpoint import CheckpointError
from .projector import ProjectorConfig
from .published_jit import is_jit, jit_shape
from .sit import SIZES, Convention, SiTConfig

REPA_ENCODER_DEPTH = 8  # REPA's default; it stands in `args`, which a bare state dict lacks
SIT_PATHS: dict[str, PathName] = {"Linear": "linear", "GVP": "cosine"}  # the words of SiT's own code
REPA_PATHS: dict[str, PathName] = {"linear": "linear", "cosine": "cosine"}
DATA_AT: dict[Convention, str] = {"sit": "t = 1 is data, as in SiT's own code", "repa": "t = 0 is data, as in REPA's"}
CLS_HEAD = "final_layer.linear_cls.weight"  # of REG, which denoises a class token too
MOST_NAME_CHARACTERS = 60
WRAPPERS = r"(?:module\.|_orig_mod\.|model\.|net\.)*"  # what modules around a model put before its names

# What else is found in files of weights, by a name that it has and SiT has not.
OTHERS = {
    r"transformer_blocks\.": "a transformer of diffusers",
    r"mlp\.w12\.|feat_rope|norm1\.weight$": "LightningDiT or another DiT with SwiGLU, RMSNorm or RoPE",
    r"[qk]_norm\.": "a model with normalised queries and keys (qk_norm)",
    r"(input|down)_blocks\.": "a U-Net",
    r"post_quant_conv|quant_conv\.|decoder\.": "an autoencoder",
    r"cls_token|patch_embed\.": "an image encoder (ViT)",
    r"param_groups": "an optimizer's state",
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published model: what to build, its weights under our names, and in words what was assumed of it."""

    config: SiTConfig
    projectors: list[ProjectorConfig]
    encoder_depth: int | Sequence[int] | None
    state: Mapping[str, Tensor]
    path: PathName
    assumed: tuple[str, ...]


def read_published(
    state: Mapping[str, Tensor], args: Mapping[str, Any], file: Path, *, convention: Convention | None
) -> Published:
    """Read a published state dict, whose names `bare_names` has cleared; `convention` is what the user says of it.

    Raises CheckpointError for a model that answers no velocity, or is not SiT.
    """
    if is_jit(state):
        return _read_jit(state, args, file, convention)
    path = _path(args, file)
    state = {_our_name(name): value for name, value in state.items()}
    config = _shape(state, args, file)
    projectors = _projectors(state)
    encoder_depth = args.get("encoder_depth", REPA_ENCODER_DEPTH) if projectors else None
    if encoder_depth is not None and type(encoder_depth) is not int:
        raise CheckpointError(f"{file}: args.encoder_depth is {short(encoder_depth)}; expected a number of a block")
    told, by = _told_convention(args, config, projectors)
    chosen = convention or told or "repa"
    other = "repa" if chosen == "sit" else "sit"
    flag = option(f"--checkpoint-convention {other}", f"convention={other!r}")
    if convention is not None:
        why = f"as {option('--checkpoint-convention', 'convention=')} says" + (
            f", against {by}" if told == other else ""
        )
    elif told is not None:
        why = f"told by {by}; where that is wrong, give {flag}"
    else:
        why = f"assumed, for nothing in it says; was it trained by the other code, give {flag}"
    unsaid = "" if path else "; the path, of which nothing is said, is taken for linear"
    return Published(
        config=dataclasses.replace(config, convention=chosen),
        projectors=projectors,
        encoder_depth=encoder_depth,
        state=state,
        path=path or "linear",
        assumed=(f"{DATA_AT[chosen]} ({why}){unsaid}",),
    )


def _read_jit(
    state: Mapping[str, Tensor], args: Mapping[str, Any], file: Path, convention: Convention | None
) -> Published:
    """Read a state dict of JiT's own code, whose t runs one way alone: `JiT.forward` knows it."""
    if convention is not None:
        flag = option("--checkpoint-convention", "convention=")
        raise CheckpointError(f"{file}: JiT's weights know one convention; leave out {flag}")
    state = {_our_name(name): value for name, value in state.items()}
    config, projectors = jit_shape(state, file), _projectors(state)
    depth = args.get("encoder_depth", config.class_tokens_at) if projectors else None
    if depth is not None and type(depth) is not int:
        raise CheckpointError(f"{file}: args.encoder_depth is {short(depth)}; expected a number of a block")
    said = (f"{config.name} by its shapes, on pixels; noise and clip as published",)
    return Published(
        config=config, projectors=projectors, encoder_depth=depth, state=state, path="linear", assumed=said
    )


def settings(args: Any, file: Path) -> Mapping[str, Any]:
    """Return the `args` of a published file as a mapping, empty where there are none."""
    if isinstance(args, argparse.Namespace):
        return vars(args)
    if args is not None and not isinstance(args, Mapping):
        raise CheckpointError(
            f"{file}: its args are a {type(args).__name__}; expected settings by name, a dict or an argparse.Namespace"
        )
    return args or {}


def bare_names(state: Mapping[str, Any], file: Path) -> tuple[dict[str, Any], str]:
    """Return a state dict without what wrappers put before its names, and these prefixes ("" where there were none)."""
    found = re.compile(rf"({WRAPPERS})pos_embed")
    prefix = next((match[1] for name in state if isinstance(name, str) and (match := found.fullmatch(name))), "")
    compiled = "_orig_mod."  # also within, where parts were compiled
    bare = {str(name).removeprefix(prefix).replace(compiled, ""): value for name, value in state.items()}
    if len(bare) != len(state):
        raise CheckpointError(f"{file}: without {prefix or compiled!r} two of its names are one; it holds two models")
    return bare, prefix or (compiled if any(compiled in str(name) for name in state) else "")


def is_sit(state: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether this is a mapping by the names of SiT, wrapped or not."""
    return isinstance(state, Mapping) and any(
        isinstance(name, str) and re.fullmatch(rf"{WRAPPERS}pos_embed", name) for name in state
    )


def listed(names: Iterable[Any]) -> str:
    """Return names for one line: all of a few, else how many, the first three, and what they look like."""
    texts = [str(name) for name in names]
    shown = ", ".join(map(short, texts[:3]))
    if len(texts) > 3:
        shown = f"{len(texts):,} names, {shown}, ..."
    kind = next((kind for word, kind in OTHERS.items() if any(re.search(word, text) for text in texts)), None)
    return (shown or "nothing") + (f"; it looks like {kind}" if kind else "")


def short(value: Any) -> str:
    """Return a name or a value of a file for one line: printable, and cut where it is long."""
    try:
        text = str(value) if isinstance(value, str) and str(value).isprintable() else repr(value)
    except (ValueError, RecursionError):  # more digits than Python writes out, or more brackets
        text = f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= MOST_NAME_CHARACTERS else f"{text[:MOST_NAME_CHARACTERS]}..."


def _path(args: Mapping[str, Any], file: Path) -> PathName | None:
    """Return the path that `args` names, None where it names none; refuse what answers no velocity on a known path."""
    model = args.get("model")
    if isinstance(model, str) and model.startswith("DiT"):
        raise CheckpointError(
            f"{file}: args.model is {short(model)}: DiT predicts noise at 1,000 discrete steps; models here "
            f"answer a velocity, as SiT's do"
        )
    prediction = args.get("prediction")
    if prediction not in (None, "v", "velocity"):
        raise CheckpointError(
            f"{file}: args.prediction is {short(prediction)}; samplers here integrate a velocity. Take a checkpoint "
            f"that was trained with prediction velocity (REPA's v)"
        )
    word = args.get("path_type")
    path = (SIT_PATHS | REPA_PATHS).get(word) if isinstance(word, str) else None
    if word is not None and path is None:
        raise CheckpointError(
            f"{file}: args.path_type is {short(word)}; known are linear and cosine (SiT's Linear and GVP)"
        )
    return path


def _told_convention(
    args: Mapping[str, Any], config: SiTConfig, projectors: list[ProjectorConfig]
) -> tuple[Convention | None, str]:
    """Return what the file tells of its convention, None for nothing, and by what."""
    for key, sit, repa in (("path_type", [*SIT_PATHS], [*REPA_PATHS]), ("prediction", ["velocity"], ["v"])):
        if args.get(key) in sit:
            return "sit", f"args.{key} {args[key]}"
        if args.get(key) in repa:
            return "repa", f"args.{key} {args[key]}"
    if config.learn_sigma:
        return "sit", (
            f"its {config.out_channels} output channels, the first half of them the velocity (DiT's files have these "
            f"shapes too, but predict noise, and cannot be sampled here)"
        )
    if config.cls_width is not None:
        return "repa", "its class token (REG)"
    if projectors:
        return "repa", "its projectors"
    return None, ""


def _our_name(name: str) -> str:
    """Return a parameter's name here: iREPA's code keeps an MLP one level deeper than REPA's."""
    head, _, rest = name.partition(".projection_layer.")
    return f"{head}.{rest}" if rest and rest[0].isdecimal() else name


def _shape(state: Mapping[str, Tensor], args: Mapping[str, Any], file: Path) -> SiTConfig:
    """Read the architecture off the shapes; the heads come from the size of the same depth and width."""
    try:
        hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        num_labels, _ = state["y_embedder.embedding_table.weight"].shape
        num_outputs, _ = state["final_layer.linear.weight"].shape
        _, num_tokens, _ = state["pos_embed"].shape
        cls_width, _ = state[CLS_HEAD].shape if CLS_HEAD in state else (None, None)
    except KeyError as error:
        raise CheckpointError(f"{file}: not a SiT: it has no {error.args[0]} (found {listed(state)})") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not a SiT: a weight has another number of dimensions") from error
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    size = next((name for name, (d, width, _) in SIZES.items() if (d, width) == (depth, hidden_size)), None)
    if size is None:
        raise CheckpointError(
            f"{file}: depth {depth} and width {hidden_size} are none of the sizes {', '.join(SIZES)}, "
            f"and shapes do not tell the number of heads"
        )
    if args.get("num_classes") == num_labels:
        raise CheckpointError(f"{file}: trained without label dropout, it has no null class; SiT here needs one")
    return SiTConfig(
        name=f"SiT-{size}/{patch_size}",
        input_size=math.isqrt(max(0, num_tokens - (cls_width is not None))) * patch_size,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=SIZES[size][2],
        num_classes=num_labels - 1,
        learn_sigma=num_outputs == 2 * in_channels * patch_size**2,
        cls_width=cls_width,
    )


def _projectors(state: Mapping[str, Tensor]) -> list[ProjectorConfig]:
    """Tell each projector's kind from its names and the rank of its weight."""
    projectors = []
    for index in range(len({name.split(".")[1] for name in state if name.startswith("projectors.")})):
        last = state.get(f"projectors.{index}.4.weight")
        only = state.get(f"projectors.{index}.projection_layer.weight")
        if last is not None and last.dim() == 2:
            projectors.append(ProjectorConfig(kind="mlp", out_dim=last.shape[0], hidden_dim=last.shape[1]))
        elif only is not None and only.dim() == 4:
            projectors.append(ProjectorConfig(kind="conv", out_dim=only.shape[0], kernel_size=only.shape[2]))
        elif only is not None and only.dim() == 2:
            projectors.append(ProjectorConfig(kind="linear", out_dim=only.shape[0]))
    return projectors
