"""The parts of SiT: embeddings of patches, times and labels, the adaLN-Zero block, the final layer.

DiT's blocks (arXiv 2212.09748) under the names of the published checkpoints. Shapes: B batch, T tokens, D width.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_FREQUENCIES = 256  # of the timestep embedding, half of them cosines


class PatchEmbed(nn.Module):
    """Cut latents into patches and embed each: [B,C,H,W] -> [B,T,D], contiguous.

    The layer is kept as the convolution that the published checkpoints hold and computed as a product of patches:
    a convolution answers [B,D,h,w], whose transpose would leave every block's tokens strided (2 to 5 % more CPU time
    a step of SiT-Ti/4).
    """

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.unflatten(3, (-1, self.patch_size)).unflatten(2, (-1, self.patch_size))  # [B,C,h,p,w,p]
        patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B,T, C * p * p]
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Embed times in [0, 1]: [B] -> [B,D]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(NUM_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def initialize(self, generator: torch.Generator) -> None:
        """Draw the weights, normal with deviation 0.02, and set the biases to zero."""
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02, generator=generator)
                nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor) -> Tensor:
        half = NUM_FREQUENCIES // 2
        powers = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * torch.exp(-math.log(10_000) * powers)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class LabelEmbedder(nn.Module):
    """Look labels up, [B] -> [B,D]; row `num_classes` is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        # nn.Embedding() would draw its rows: on meta, where SiT is made, that imports torch's compiler (1.8 s).
        rows = torch.empty(num_classes + 1, hidden_size)
        self.embedding_table = nn.Embedding.from_pretrained(rows, freeze=False)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention, [B,T,D] -> [B,T,D]; query, key and value in one product."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B,T,3,heads,D/heads]
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, GELU (tanh), Linear on every token."""

    def __init__(self, hidden_size: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner)
        self.fc2 = nn.Linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Modulation(nn.Sequential):
    """SiLU and Linear: the conditioning [B,D] as `num` vectors [B,1,D] each (adaLN-Zero, arXiv 2212.09748)."""

    def __init__(self, hidden_size: int, num: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(hidden_size, num * hidden_size))
        self.num = num

    def forward(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        return super().forward(conditioning).unsqueeze(1).chunk(self.num, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (1 + scale) + shift; x is [B,T,D], the others [B,1,D]."""
    return x * (1 + scale) + shift


class SiTBlock(nn.Module):
    """Attention and MLP, each behind a modulated LayerNorm and a gate that starts at zero."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = Modulation(hidden_size, 6)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(conditioning)
        x = x + gate_attn * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Map tokens to patches of velocity: [B,T,D] -> [B,T, out_dim], out_dim = patch * patch * C.

    With `cls_width` a class token stands before them, [B,1+T,D], and is mapped to its own velocity [B, cls_width].
    """

    def __init__(self, hidden_size: int, out_dim: int, cls_width: int | None = None) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, out_dim)
        self.linear_cls = None if cls_width is None else nn.Linear(hidden_size, cls_width)
        self.adaLN_modulation = Modulation(hidden_size, 2)

    def forward(self, x: Tensor, conditioning: Tensor) -> tuple[Tensor, Tensor | None]:
        shift, scale = self.adaLN_modulation(conditioning)
        x = modulate(self.norm_final(x), shift, scale)
        if self.linear_cls is None:
            return self.linear(x), None
        return self.linear(x[:, 1:]), self.linear_cls(x[:, 0])


def sincos_pos_embed(hidden_size: int, grid: tuple[int, int]) -> np.ndarray:
    """Return MAE's fixed 2-D embedding (arXiv 2111.06377) as [T, hidden_size] float64, T row-major over the grid.

    The first half of the channels encodes the column, the second the row; in each, sines come before cosines.
    """
    num_frequencies = hidden_size // 4
    frequencies = 10_000.0 ** -(np.arange(num_frequencies) / num_frequencies)
    rows, columns = np.divmod(np.arange(math.prod(grid)), grid[1])
    angles = [np.outer(position, frequencies) for position in (columns, rows)]
    return np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))], axis=1)
