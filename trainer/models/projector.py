"""The trainable map from SiT's hidden states [B,T,D] to an encoder's feature space [B,T,E].

mlp is REPA's (arXiv 2410.06940, section 3.2), conv is iREPA's (arXiv 2512.10794, section 4), linear is the least one
could do, mlp2 is SRA's (arXiv 2505.02831). Parameter names are the published ones: `{0,2,4}.*` for the MLP, as REPA's
generation script loads it strictly, and `projection_layer.*` for conv and linear, as in iREPA's checkpoints.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ...cache_specs.errors import UsageError, nearest

ProjectorKind = Literal["mlp", "conv", "linear", "mlp2"]
TokensOf = Literal["all", "patches", "cls"]


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """One projector: its kind, E = `out_dim`, and what only its kind reads."""

    kind: ProjectorKind
    out_dim: int
    hidden_dim: int = 2048  # mlp
    kernel_size: int = 3  # conv
    of: TokensOf = "all"  # which tokens it reads where a class token stands before the patches (REG)

    def __post_init__(self) -> None:
        if self.kind not in get_args(ProjectorKind):
            raise UsageError(f"projector kind is {self.kind!r}; {nearest(str(self.kind), get_args(ProjectorKind))}")
        if self.of not in get_args(TokensOf):
            raise UsageError(f"projector of is {self.of!r}; {nearest(str(self.of), get_args(TokensOf))}")
        if min(self.out_dim, self.hidden_dim) < 1:
            raise UsageError(f"projector out_dim {self.out_dim}, hidden_dim {self.hidden_dim}; expected 1 or more")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise UsageError(f"projector kernel_size is {self.kernel_size}; expected an odd number, to keep the grid")


class _Layers(nn.Sequential):
    """Linear layers and SiLU; xavier-uniform weights and zero biases, as SiT initialises its own."""

    def initialize(self, generator: torch.Generator) -> None:
        """Set every parameter from `generator`."""
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, generator=generator)
                nn.init.zeros_(layer.bias)


class MLPProjector(_Layers):
    """Linear, SiLU, Linear, SiLU, Linear."""

    def __init__(self, hidden_size: int, config: ProjectorConfig) -> None:
        super().__init__(
            nn.Linear(hidden_size, config.hidden_dim),
            nn.SiLU(),
            nn.Linear(config.hidden_dim, config.hidden_dim),
            nn.SiLU(),
            nn.Linear(config.hidden_dim, config.out_dim),
        )


class TwoLayerProjector(_Layers):
    """Linear(D, 2D), SiLU, Linear(2D, E)."""

    def __init__(self, hidden_size: int, config: ProjectorConfig) -> None:
        super().__init__(nn.Linear(hidden_size, 2 * hidden_size), nn.SiLU(), nn.Linear(2 * hidden_size, config.out_dim))


class LinearProjector(nn.Module):
    """One Linear; xavier-uniform weights and zero bias, as iREPA's code initialises it."""

    def __init__(self, hidden_size: int, config: ProjectorConfig) -> None:
        super().__init__()
        self.projection_layer = nn.Linear(hidden_size, config.out_dim)

    def initialize(self, generator: torch.Generator) -> None:
        """Set every parameter from `generator`."""
        nn.init.xavier_uniform_(self.projection_layer.weight, generator=generator)
        nn.init.zeros_(self.projection_layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [B,T,E] of tokens [B,T,D]."""
        return self.projection_layer(tokens)


class ConvProjector(nn.Module):
    """One convolution over the token grid, zero-padded, no activation; PyTorch's own initialisation, as iREPA's.

    A [B,T,D] tensor is a channels-last image as it lies in memory, so both changes of layout are views: the weight is
    kept channels-last, and the output comes back as [B,T,E] without a copy (measured on the CPU; on a device whose
    convolution answers in another layout, `reshape` would copy and change nothing else).
    """

    def __init__(self, hidden_size: int, config: ProjectorConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        k = config.kernel_size
        self.projection_layer = nn.Conv2d(hidden_size, config.out_dim, k, padding=k // 2)
        self.projection_layer.to(memory_format=torch.channels_last)

    def initialize(self, generator: torch.Generator) -> None:
        """Set every parameter from `generator`."""
        weight, bias = self.projection_layer.weight, self.projection_layer.bias
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        if bias is not None:
            bound = 1 / math.sqrt(weight[0].numel())
            nn.init.uniform_(bias, -bound, bound, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [B,T,E] of tokens [B,T,D], T row-major over the grid."""
        num, num_tokens, _ = tokens.shape
        image = tokens.unflatten(1, self.grid).permute(0, 3, 1, 2)  # [B,D,h,w], strides channels-last
        return self.projection_layer(image).permute(0, 2, 3, 1).reshape(num, num_tokens, -1)


def tap_depths(depth: int | Sequence[int] | None, num: int, *, model: str, blocks: int) -> tuple[int, ...]:
    """Return the block, from 1, after which each of `num` projectors reads; `depth` is one for all, or one for each.

    Raises UsageError where the model has no such block, or not every projector has one.
    """
    depths = [depth] * num if depth is None or isinstance(depth, int) else list(depth)
    if len(depths) != num:
        raise UsageError(f"encoder_depth names {len(depths)} blocks; expected one, or one for each of {num} projectors")
    for found in depths:
        if type(found) is not int or not 1 <= found <= blocks:
            raise UsageError(
                f"{model} has {blocks} blocks; encoder_depth is {found}. Choose the block after which the projectors "
                f"read, from 1 to {blocks}"
            )
    return tuple(found for found in depths if found is not None)


Projector = MLPProjector | TwoLayerProjector | LinearProjector | ConvProjector


def make_projector(hidden_size: int, config: ProjectorConfig, grid: tuple[int, int]) -> Projector:
    """Return the projector that `config` describes, for SiT of width `hidden_size` and a token grid (h, w)."""
    if config.kind == "mlp":
        return MLPProjector(hidden_size, config)
    if config.kind == "mlp2":
        return TwoLayerProjector(hidden_size, config)
    if config.kind == "linear":
        return LinearProjector(hidden_size, config)
    return ConvProjector(hidden_size, config, grid)
