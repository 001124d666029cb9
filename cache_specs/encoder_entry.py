"""One row of encoders.yaml, and how it and a resolution become the spec of a component.

The spec is the whole record: everything that can change a token, and all that a worker needs to load the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import UsageError

TABLE_TOKENS = 256  # the table's gmac is at a 16 x 16 grid
VARIANT = "@"


@dataclass(frozen=True, kw_only=True)
class EncoderEntry:
    """One encoder, or one variant of it; the fields are explained at the head of encoders.yaml."""

    name: str
    loader: Literal["timm", "transformers", "builtin"]
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
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    positions: Literal["library", "published"] = "library"
    converter: Literal["mocov3"] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    weights_from: str | None = None
    params_m: float = 0.0
    gmac: float = 0.0
    irepa27: bool = False

    def __post_init__(self) -> None:
        choices: dict[str, tuple[object, ...]] = {
            "loader": ("timm", "transformers", "builtin"),
            "tensor": ("after_norm", "before_norm", "no_norm"),
            "output": ("tokens", "map"),
            "interpolation": ("bicubic", "bilinear"),
            "positions": ("library", "published"),
            "converter": (None, "mocov3"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UsageError(f"encoder {self.name}: {name} is {getattr(self, name)!r}, expected one of {known}")
        for name in ("width", "patch"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"encoder {self.name}: {name} is {value!r}, expected a whole number from 1")
        if (self.mean is None) != (self.std is None) or any(
            not isinstance(v, tuple) or len(v) != 3 for v in (self.mean, self.std) if v is not None
        ):
            raise UsageError(f"encoder {self.name}: mean {self.mean}, std {self.std}: expected three numbers each")

    @property
    def has_weights(self) -> bool:
        return self.loader != "builtin"

    @property
    def source(self) -> str:
        """Where the weights come from, for a person to read."""
        if not self.has_weights:
            return "-"
        return self.weights_from or f"hf.co/{'timm/' if self.loader == 'timm' else ''}{self.model}"

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
        self, *, resolution: int, grid: int | None, layers: tuple[int, ...] | None, random_weights: bool
    ) -> dict[str, Any]:
        """Return the spec of this encoder's tokens for square images of `resolution` pixels.

        `grid` tokens a side; by default resolution / 16, the study's 16 x 16 at 256 and 32 x 32 at 512. The model sees
        `grid * patch` pixels a side, or its one input size; a weight-free encoder sees the image as it is. `layers`
        are blocks counted from 0; None is the last one's tokens.
        """
        side = self._grid_side(resolution, grid)
        if layers is not None:
            self._check_layers(layers)
        input_size = resolution if not self.has_weights else self.input_size or side * self.patch
        return {
            "entry": self.name,
            "loader": self.loader,
            "model": self.model,
            "options": dict(self.options),
            "width": self.width,
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
            "random_weights": bool(random_weights and self.has_weights),
        }

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
        largest = None if self.input_size is None else self.input_size // self.patch
        if largest is not None and side > largest:
            raise UsageError(
                f"--encoder {self.name} sees {self.input_size} pixels whatever the image: it has {largest} x {largest} "
                f"tokens, not {side} x {side}; ask for --encoder {self.name}:grid={largest} or fewer"
            )
        return side

    def _check_layers(self, layers: tuple[int, ...]) -> None:
        if self.depth is None or self.output == "map":
            raise UsageError(f"--encoder {self.name}: its layers are not tokens of one grid; leave out layers=")
        if list(layers) != sorted(set(layers)) or layers[-1] >= self.depth:
            raise UsageError(
                f"--encoder {self.name}:layers={','.join(map(str, layers))}: expected blocks 0 to {self.depth - 1} in "
                "ascending order, each once"
            )
