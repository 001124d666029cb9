"""One row of encoders.yaml, and how it and a resolution become the spec of a component.

The spec is the whole record: everything that can change a token, and all that a worker needs to load the model.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from .entries import (
    COUNT,
    FILES,
    FLAG,
    KEYWORDS,
    NUMBER,
    TEXT,
    THREE,
    WHOLE,
    OwnCode,
    Rule,
    Ruled,
    check_fields,
    one_of,
    optional,
    read_own_code,
    stages_by_name,
)
from .errors import UsageError, nearest

TABLE_TOKENS = 256  # the table's gmac is at a 16 x 16 grid
VARIANT = "@"
RESIZES = ("bilinear",)


def _is_stage(value: Any) -> bool:
    return isinstance(value, Sequence) and 2 <= len(value) <= 3 and all(WHOLE.holds(number) for number in value)


RULES: dict[str, Rule] = {
    "loader": one_of("timm", "transformers", "builtin", "python"),
    "model": TEXT,
    "target": optional(TEXT),
    "files": FILES,
    "width": WHOLE,
    "patch": WHOLE,
    "stages": Rule(
        holds=lambda value: (
            isinstance(value, Mapping | list | tuple)
            and all(re.fullmatch(r"[A-Za-z0-9_.]+", str(name)) for name in stages_by_name(value))
            and all(map(_is_stage, stages_by_name(value).values()))
        ),
        words="[width, patch] a stage, in a list or by name (letters, digits, _ and .)",
    ),
    "prefix_tokens": COUNT,
    "cls_token": FLAG,
    "tensor": one_of("after_norm", "before_norm", "no_norm"),
    "interpolation": one_of("bicubic", "bilinear"),
    "antialias": FLAG,
    "licence": TEXT,
    "depth": optional(WHOLE),
    "output": one_of("tokens", "map"),
    "input_size": optional(WHOLE),
    "native_grid": optional(WHOLE),
    "mean": optional(THREE),
    "std": optional(THREE),
    "positions": one_of("library", "published"),
    "converter": one_of(None, "mocov3"),
    "options": KEYWORDS,
    "weights_from": optional(TEXT),
    "params_m": NUMBER,
    "gmac": NUMBER,
}


@dataclass(frozen=True, kw_only=True)
class EncoderEntry(Ruled):
    """One encoder, or one variant of it; the fields are explained in ENCODERS.md.

    `folder` is where a file of the user's lies, None for the table's own.
    """

    RULES: ClassVar = RULES
    HIDDEN: ClassVar = frozenset({"name", "family", "irepa27", "folder"})  # in no row of a file
    # A network of Python gives what it gives, without a library's norm or class token, where it does not say otherwise.
    IMPLIED: ClassVar = {"prefix_tokens": 0, "cls_token": False, "tensor": "no_norm"}

    name: str
    loader: Literal["timm", "transformers", "builtin", "python"]
    model: str
    width: int
    patch: int
    prefix_tokens: int
    cls_token: bool
    tensor: Literal["after_norm", "before_norm", "no_norm"]
    interpolation: Literal["bicubic", "bilinear"]
    antialias: bool
    licence: str
    family: str = "own"
    depth: int | None = None
    output: Literal["tokens", "map"] = "tokens"
    input_size: int | None = None
    native_grid: int | None = None
    stages: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    positions: Literal["library", "published"] = "library"
    converter: Literal["mocov3"] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    weights_from: str | None = None
    target: str | None = None
    files: tuple[str, ...] = ()
    folder: Path | None = None
    params_m: float = 0.0
    gmac: float = 0.0
    irepa27: bool = False

    def __post_init__(self) -> None:
        what = f"encoder {self.name}"
        check_fields(what, self, RULES)
        if (self.mean is None) != (self.std is None) or (self.std is not None and 0 in self.std):
            raise UsageError(f"{what}: mean {self.mean}, std {self.std}: expected three numbers each, no std of 0")
        if self.loader != "python" and (self.target or self.files):
            raise UsageError(f"{what}: target and files are of loader: python, not of {self.loader}")
        if self.native_grid is not None and self.input_size is None:
            raise UsageError(f"{what}: native_grid is that of one input size; name it, input_size: PIXELS")
        if self.stages and (self.output != "map" or self.loader not in ("timm", "python")):
            raise UsageError(f"{what}: stages are maps of loader timm or python; output is {self.output!r}, not 'map'")
        if self.cls_token and self.prefix_tokens < 1:
            raise UsageError(f"{what}: cls_token is true, so prefix_tokens must be 1 or more")

    @property
    def has_weights(self) -> bool:
        return self.loader != "builtin"

    @property
    def source(self) -> str:
        """Where the weights come from, for a person to read."""
        if not self.has_weights:
            return "-"
        return self.weights_from or f"hf.co/{'timm/' if self.loader == 'timm' else ''}{self.model}"

    def code(self) -> OwnCode | None:
        """Read the files of `loader: python`, None for any other; raise `UsageError` for one that is not there."""
        if self.loader != "python" or self.target is None:
            return None
        return read_own_code(f"encoder {self.name}", self.folder or Path(), self.target, self.files)

    def gmac_at(self, tokens: int) -> float:
        """Return 1e9 multiply-accumulates an image of `tokens` patch tokens, from the table's figure at 256.

        Attention's two products grow with the square of the tokens, all else linearly; a model of fixed input costs
        the same at any grid.
        """
        if self.input_size is not None:
            return self.gmac
        attention = 2 * (self.depth or 0) * self.width * 1e-9
        ratio = tokens / TABLE_TOKENS
        return (self.gmac - attention * TABLE_TOKENS**2) * ratio + attention * tokens**2

    def resolve(
        self,
        *,
        resolution: int,
        grid: int | None,
        layers: tuple[int, ...] | None,
        random_weights: bool,
        stage: str | None = None,
        resize: str | None = None,
        code: OwnCode | None = None,
    ) -> dict[str, Any]:
        """Return the spec of this encoder's tokens for square images of `resolution` pixels.

        `grid` tokens a side; by default resolution / 16, the study's 16 x 16 at 256 and 32 x 32 at 512. The model sees
        `grid * patch` pixels a side, or its one input size; a weight-free encoder sees the image as it is. `layers`
        are blocks counted from 0; None is the last one's tokens. `stage` names one of the maps of a network that has
        several; a map that is smaller than the grid is enlarged only where `resize` says how. `code` is what `code()`
        gave.
        """
        width, patch, native_grid = self.tap(stage)
        side = self._grid_side(resolution, grid)
        if layers is not None:
            self._check_layers(layers)
        input_size = resolution if not self.has_weights else self.input_size or side * patch
        spec = {
            "entry": self.name,
            "loader": self.loader,
            "model": self.model,
            "options": dict(self.options),
            "width": width,
            "depth": self.depth,
            "grid": [side, side],
            "input_size": [input_size, input_size],
            "prefix_tokens": self.prefix_tokens,
            "cls_token": self.cls_token,
            "output": self.output,
            "tensor": self.tensor,
            "layers": None if layers is None else list(layers),
            "mean": None if self.mean is None else list(self.mean),
            "std": None if self.std is None else list(self.std),
            "interpolation": self.interpolation,
            "antialias": self.antialias,
            "positions": self.positions,
            "converter": self.converter,
            "weights_from": self.weights_from,
            "random_weights": bool(random_weights and self.has_weights and self.loader != "python"),
        }
        # Keys that only these have: the fingerprints of all others stay what they were.
        if code is not None:
            spec |= {"model": code.target, "files": dict(code.digests)}
        if stage is not None:
            spec["stage"] = stage
        native = native_grid or input_size // patch
        if code is not None or stage is not None or (resize is not None and native < side):
            self._check_native(native, side, resize)
            spec |= {"native_grid": [native, native], "resize": resize if native < side else None}
        else:
            self._check_fixed_input(side)
        return spec

    def tap(self, stage: str | None) -> tuple[int, int, int | None]:
        """Return width, patch and native grid (None: input over patch) of a stage, or of the one output."""
        if stage is None:
            return self.width, self.patch, self.native_grid
        if stage not in self.stages:
            known = nearest(stage, self.stages) if self.stages else "it declares no stages: [[width, patch], ...]"
            raise UsageError(f"--encoder {self.name}:stage={stage}: no such stage; {known}")
        width, patch, *native = self.stages[stage]
        return width, patch, native[0] if native else None

    def _check_native(self, native: int, side: int, resize: str | None) -> None:
        if native == side:
            return
        sizes = f"--encoder {self.name}: {native} x {native} is the network's own grid, not {side} x {side}"
        if self.output != "map":
            raise UsageError(f"{sizes}; tokens are never resized: ask for :grid={native}, or change input_size")
        if native < side and resize is None:
            raise UsageError(
                f"{sizes}. Ask for :grid={native} or fewer, or for :resize=bilinear: neighbours of an enlarged map are "
                "alike by construction, and tables of spatial metrics then say so"
            )

    def _grid_side(self, resolution: int, grid: int | None) -> int:
        if grid is None and resolution % 16:
            raise UsageError(
                f"--encoder {self.name} at resolution {resolution}: a token grid of resolution / 16 is not whole; "
                f"name one, --encoder {self.name}:grid={max(1, round(resolution / 16))}"
            )
        side = resolution // 16 if grid is None else grid
        if side < 2:
            raise UsageError(
                f"--encoder {self.name} at resolution {resolution}: a grid of {side} x {side}; spatial statistics "
                f"need at least 2 x 2, so name one: --encoder {self.name}:grid=8"
            )
        return side

    def _check_fixed_input(self, side: int) -> None:
        largest = None if self.input_size is None else self.input_size // self.patch
        if largest is not None and side > largest:
            raise UsageError(
                f"--encoder {self.name} sees {self.input_size} pixels whatever the image: it has {largest} x {largest} "
                f"tokens, not {side} x {side}; ask for --encoder {self.name}:grid={largest} or fewer"
            )

    def _check_layers(self, layers: tuple[int, ...]) -> None:
        if self.depth is None or self.output == "map":
            raise UsageError(f"--encoder {self.name}: its layers are not tokens of one grid; leave out layers=")
        if list(layers) != sorted(set(layers)) or layers[-1] >= self.depth:
            raise UsageError(
                f"--encoder {self.name}:layers={','.join(map(str, layers))}: expected blocks 0 to {self.depth - 1} in "
                "ascending order, each once"
            )
