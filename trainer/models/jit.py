"""JiT, a transformer on pixels: noised images, times and labels in, the clean image out (arXiv 2511.13720).

SiT's adaLN-Zero blocks with RMSNorm, SwiGLU, normalised and rotated queries and keys, patches embedded through a
bottleneck, and 32 class tokens that stand before the patches from block `class_tokens_at` on, and are cut off before
the final layer. Parameter names and shapes are those of the published checkpoints, whose weights know the time
1 - t: `forward` gives it to them. Projectors read the patches' tokens alone.

Shapes: B batch, C channels, T tokens of patches, D width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...cache_specs.errors import UsageError
from .blocks import Modulation, modulate
from .names import read_name
from .projector import Projector, ProjectorConfig
from .sit import SiT, SiTConfig, _derived_seed, sincos_pos_embed

# depth, width, heads, bottleneck, block that the class tokens come before, dropout. The paper has B, L and H; Ti is
# ours, of SiT-Ti's depth and width.
SIZES = {
    "Ti": (6, 128, 2, 32, 2, 0.0),
    "B": (12, 768, 12, 128, 4, 0.0),
    "L": (24, 1024, 16, 128, 8, 0.0),
    "H": (32, 1280, 16, 256, 10, 0.2),
}

NUM_CLASS_TOKENS = 32
ROPE_BASE = 10_000.0
_MASK, _FACTOR = 2**31 - 1, 0x7FEB352D  # their product fits int64


@dataclass(frozen=True, kw_only=True)
class JiTConfig(SiTConfig):
    """The shape of a JiT; `input_size` is the image's side. Blocks and channels as SiT's are counted."""

    bottleneck: int
    class_tokens_at: int  # the block, from 0, that they come before
    dropout: float = 0.0  # in the middle half of the blocks

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bottleneck < 1:
            raise UsageError(f"{self.name}: bottleneck is {self.bottleneck}; expected 1 or more")
        if not 0 <= self.class_tokens_at < self.depth:
            raise UsageError(
                f"{self.name}: class_tokens_at is {self.class_tokens_at}; expected a block from 0 to {self.depth - 1}"
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"{self.name}: dropout is {self.dropout}; expected 0 <= dropout < 1")


def jit_config(name: str, *, input_size: int, in_channels: int, num_classes: int, **extras: Any) -> JiTConfig:
    """Return the configuration of a model by name, "JiT-{Ti,B,L,H}/patch" with any patch; raises as `sit_config`."""
    row, patch = read_name(name, "JiT", SIZES, usual_patch=16)
    depth, hidden_size, num_heads, bottleneck, class_tokens_at, dropout = row
    return JiTConfig(
        name=name,
        input_size=input_size,
        patch_size=patch,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        num_classes=num_classes,
        bottleneck=bottleneck,
        class_tokens_at=class_tokens_at,
        dropout=dropout,
        **extras,
    )


class JiT(SiT):
    """A SiT to whoever holds it, but for what it answers: the clean image at x_t, and not a velocity.

    Weights are drawn as SiT's are, from generators of their own.
    """

    config: JiTConfig

    def __init__(
        self,
        config: JiTConfig,
        projectors: Sequence[ProjectorConfig] = (),
        *,
        encoder_depth: int | Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        shapes_only = torch.get_default_device().type == "meta"
        width, heads, quarter = config.hidden_size, config.num_heads, config.depth // 4
        with torch.device("meta"):
            super().__init__(config, projectors, encoder_depth=encoder_depth)
            # Its own parts take the places of SiT's.
            self.add_module("x_embedder", _BottleneckEmbed(config))
            self.in_context_posemb = nn.Parameter(torch.empty(1, NUM_CLASS_TOKENS, width))
            inner = int(int(width * config.mlp_ratio) * 2 / 3)
            dropouts = [config.dropout if quarter <= i < 3 * quarter else 0.0 for i in range(config.depth)]
            self.add_module("blocks", nn.ModuleList(_Block(width, heads, inner, dropout) for dropout in dropouts))
            self.add_module("final_layer", _FinalLayer(width, config.patch_size**2 * config.in_channels))
        if not shapes_only:
            self._allocate()
            self._initialize(seed)

    @torch.no_grad()
    def _initialize(self, seed: int) -> None:
        """Set every parameter as SiT's: xavier-uniform layers, normal(0.02) embeddings, zero gates and output."""
        generator = torch.Generator().manual_seed(_derived_seed(seed, 0))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith("projectors"):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)  # a convolution as a Linear
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, _RMSNorm):
                nn.init.ones_(module.weight)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02, generator=generator)
        self.t_embedder.initialize(generator)
        nn.init.normal_(self.in_context_posemb, std=0.02, generator=generator)
        for module in self.modules():
            if isinstance(module, Modulation):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)
        nn.init.zeros_(self.final_layer.linear.weight)
        self.pos_embed.copy_(torch.from_numpy(sincos_pos_embed(self.config.hidden_size, self.grid)))
        for index, projector in enumerate(cast(Iterable[Projector], self.projectors)):
            projector.initialize(torch.Generator().manual_seed(_derived_seed(seed, index + 1)))

    def forward(  # type: ignore[override]  # beyond the first three, inputs are each method's own
        self, x: Tensor, t: Tensor, y: Tensor, seeds: Tensor | None = None, *, return_projections: bool = False
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Return the clean image at x_t, and on request each projector's tokens; inputs and shapes as of SiT's.

        `seeds` [B] int64 say which units are dropped in training, where the size has dropout; None drops nothing.
        """
        num_patches = self.pos_embed.shape[1]
        x = self.x_embedder(x) + self.pos_embed
        labels = self.y_embedder(y)
        conditioning = self.t_embedder(1 - t) + labels
        head = self.config.hidden_size // self.config.num_heads
        rotation = rope_tables(self.grid, head, num_before=NUM_CLASS_TOKENS, device=x.device)
        patches_only = tuple(table[NUM_CLASS_TOKENS:] for table in rotation)
        projections: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            if index == self.config.class_tokens_at:
                x = torch.cat([(labels.unsqueeze(1) + self.in_context_posemb).to(x.dtype), x], dim=1)
            places = rotation if index >= self.config.class_tokens_at else patches_only
            dropped = None if seeds is None or not self.training else mixed(seeds ^ index)
            x = block(x, conditioning, places, dropped)
            if return_projections:
                projections.update(self._project(x[:, -num_patches:], index + 1))
        clean = self._unpatchify(self.final_layer(x[:, -num_patches:], conditioning))
        return (clean, tuple(projections[k] for k in sorted(projections))) if return_projections else clean


class _BottleneckEmbed(nn.Module):
    """Cut images into patches, map each to a few channels and those to the width: [B,C,H,W] -> [B,T,D].

    Both maps are kept as the convolutions that the published checkpoints hold.
    """

    def __init__(self, config: JiTConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj1 = nn.Conv2d(config.in_channels, config.bottleneck, self.patch_size, self.patch_size, bias=False)
        self.proj2 = nn.Conv2d(config.bottleneck, config.hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.unflatten(3, (-1, self.patch_size)).unflatten(2, (-1, self.patch_size))  # [B,C,h,p,w,p]
        patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B,T, C * p * p]
        return F.linear(F.linear(patches, self.proj1.weight.flatten(1)), self.proj2.weight.flatten(1), self.proj2.bias)


class _RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension, in float32, and scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, eps=1e-6).to(x.dtype)


class _Attention(nn.Module):
    """Multi-head self-attention [B,T,D] -> [B,T,D], queries and keys normalised, then rotated by their places."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_norm = _RMSNorm(width // num_heads)
        self.k_norm = _RMSNorm(width // num_heads)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: tuple[Tensor, ...]) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B,T,3,heads,D/heads]
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = (
            rotated(norm(part).float(), *rotation).to(value.dtype)
            for norm, part in ((self.q_norm, query), (self.k_norm, key))
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class _SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x) on every token, w1 and w2 in one product; `inner` values between."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * inner)
        self.w3 = nn.Linear(inner, width)

    def forward(self, x: Tensor, dropout: float, seeds: Tensor | None) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(dropped(F.silu(gate) * value, dropout, seeds))


class _Block(nn.Module):
    """Attention and SwiGLU, each behind a modulated RMSNorm and a gate that starts at zero."""

    def __init__(self, width: int, num_heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm1 = _RMSNorm(width)
        self.attn = _Attention(width, num_heads)
        self.norm2 = _RMSNorm(width)
        self.mlp = _SwiGLU(width, inner)
        self.adaLN_modulation = Modulation(width, 6)

    def forward(self, x: Tensor, conditioning: Tensor, rotation: tuple[Tensor, ...], seeds: Tensor | None) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(conditioning)
        attended = self.attn(modulate(self.norm1(x), shift_attn, scale_attn), rotation)
        x = x + gate_attn * dropped(attended, self.dropout, seeds)
        inner_seeds = None if seeds is None else mixed(seeds)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp), self.dropout, inner_seeds)


class _FinalLayer(nn.Module):
    """Map tokens to patches of the clean image: [B,T,D] -> [B,T, patch * patch * C]."""

    def __init__(self, width: int, out_dim: int) -> None:
        super().__init__()
        self.norm_final = _RMSNorm(width)
        self.linear = nn.Linear(width, out_dim)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(conditioning)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def rope_tables(grid: tuple[int, int], head: int, *, num_before: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [num_before + T, head] float32 of each token's place (RoPE, arXiv 2104.09864).

    Neighbouring channels are a pair, turned by place * base^(-2i/(head/2)); the first half of a head turns by the row,
    the second by the column. The `num_before` tokens before the patches are not turned.
    """
    powers = torch.arange(0, head // 2, 2, dtype=torch.float32, device=device) / (head // 2)
    frequencies = ROPE_BASE**-powers
    rows, columns = (torch.arange(side, dtype=torch.float32, device=device) for side in grid)
    by_row = torch.outer(rows, frequencies).repeat_interleave(grid[1], dim=0)
    by_column = torch.outer(columns, frequencies).repeat(grid[0], 1)
    angles = torch.cat([by_row, by_column], dim=1).repeat_interleave(2, dim=1)
    angles = F.pad(angles, (0, 0, num_before, 0))
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [..., T, head] with each pair of channels turned by its token's angle; cos and sin are [T, head]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


def dropped(x: Tensor, share: float, seeds: Tensor | None) -> Tensor:
    """Return x [B,T,W] with a `share` of its values zero and the others scaled up; `seeds` [B] alone say which.

    A hash of seed and place, as nothing global is drawn: the same on every device, compiled or not, and after a resume.
    """
    if seeds is None or share == 0:
        return x
    places = torch.arange(x.shape[1] * x.shape[2], device=x.device).view(1, *x.shape[1:])
    kept = mixed(mixed(seeds).view(-1, 1, 1) ^ places) >= share * 2**31
    return x * (kept / (1 - share)).to(x.dtype)


def mixed(numbers: Tensor) -> Tensor:
    """Return int64 numbers scattered over [0, 2^31), each a function of its low 31 bits (xor, shift, multiply)."""
    numbers = numbers & _MASK
    for shift in (16, 15, 16):
        numbers = ((numbers ^ (numbers >> shift)) * _FACTOR) & _MASK
    return numbers ^ (numbers >> 16)
