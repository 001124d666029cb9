"""SiT, the diffusion transformer that is trained: noisy latents, times and labels in, velocity out.

Scalable Interpolant Transformers (arXiv 2401.08740) on DiT's adaLN-Zero blocks (arXiv 2212.09748), with REPA's
projectors tapping the tokens after block `encoder_depth`. Parameter names and shapes are those of the published
checkpoints (trainer/models/checkpoint.py). Nothing here is random after construction: labels come already dropped.

Shapes: B batch, C channels, T = (input_size / patch_size)^2 tokens in row-major order, D width, E encoder width.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ...cache_specs.errors import UsageError, nearest
from .blocks import FinalLayer, LabelEmbedder, Modulation, PatchEmbed, SiTBlock, TimestepEmbedder, sincos_pos_embed
from .names import read_name
from .projector import Projector, ProjectorConfig, make_projector, tap_depths

# depth, width, heads. SiT publishes S to XL; Ti is ours, for machines without a GPU: at 64 tokens a step of 32 samples
# is about 15 GFLOP.
SIZES = {
    "Ti": (6, 128, 2),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}

Convention = Literal["repa", "sit"]


@dataclass(frozen=True, kw_only=True)
class SiTConfig:
    """The shape of a SiT. `input_size` is the latent's side; `num_classes` does not count the null class.

    Two fields are for weights that SiT's own code has trained. Its `convention` "sit" has data at t = 1 and
    noise at t = 0, so these weights know the time 1 - t and answer with the negative of our velocity; the embedding of
    t is not linear, so no other weights would do it. `learn_sigma` gives it twice the output channels: the first half
    is the velocity, nothing reads the second. `SiT.forward` obeys both, so that no caller has to.
    """

    name: str
    input_size: int
    patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int
    mlp_ratio: float = 4.0
    second_time: bool = False  # a second embedder, of the time h that the answer reaches back (MeanFlow)
    convention: Convention = "repa"
    learn_sigma: bool = False
    cls_width: int | None = None  # of a class token that is denoised beside the latents (REG)
    middle_head: int | None = None  # block, from 1, after which a second head answers the velocity too (internal)

    def __post_init__(self) -> None:
        for field in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
            if getattr(self, field) < 1:
                raise UsageError(f"{self.name}: {field} is {getattr(self, field)}; expected 1 or more")
        if self.cls_width is not None and self.cls_width < 1:
            raise UsageError(
                f"{self.name}: cls_width is {self.cls_width}; expected 1 or more, or null for no class token"
            )
        if self.convention not in get_args(Convention):
            raise UsageError(
                f"{self.name}: convention is {self.convention!r}; {nearest(str(self.convention), get_args(Convention))}"
            )
        if self.input_size % self.patch_size:
            raise UsageError(
                f"{self.name}: patches of {self.patch_size} do not divide latents of {self.input_size}x"
                f"{self.input_size}. Choose a model whose patch does, such as {self.name.split('/')[0]}/1"
            )
        if self.hidden_size % (4 * self.num_heads):
            raise UsageError(
                f"{self.name}: hidden_size is {self.hidden_size}; expected a multiple of 4 x {self.num_heads} heads"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.input_size // self.patch_size, self.input_size // self.patch_size

    @property
    def out_channels(self) -> int:
        """Channels of what the last layer answers."""
        return self.in_channels * (2 if self.learn_sigma else 1)


def sit_config(name: str, *, input_size: int, in_channels: int, num_classes: int, **extras: Any) -> SiTConfig:
    """Return the configuration of a model by name, "SiT-{Ti,S,B,L,XL}/patch" with any patch; `extras` are its fields.

    Raises UsageError for an unknown name, with the nearest known one, or a patch that does not divide `input_size`.
    """
    row, patch = read_name(name, "SiT", SIZES, usual_patch=2)
    depth, hidden_size, num_heads = row
    return SiTConfig(
        name=name,
        input_size=input_size,
        patch_size=patch,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        num_classes=num_classes,
        **extras,
    )


class SiT(nn.Module):
    """SiT with any number of projectors, which share one forward pass.

    Weights are drawn on the CPU from generators of their own, SiT's from (seed, 0), projector k's from (seed, k + 1),
    a second time embedder's from (seed, 0, 0), a class token's from (seed, 0, 1): adding them changes no weight of SiT.
    The global generator is untouched. Under `torch.device("meta")` only shapes are made.

    `encoder_depth` is the block after which the projectors read, or one for each. Raises UsageError where projectors
    are asked for without one from 1 to the model's depth.
    """

    def __init__(
        self,
        config: SiTConfig,
        projectors: Sequence[ProjectorConfig] = (),
        *,
        encoder_depth: int | Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        depths = tap_depths(encoder_depth, len(projectors), model=config.name, blocks=config.depth)
        self.config = config
        self.projector_configs = tuple(projectors)
        self.encoder_depth = depths[0] if len(set(depths)) == 1 else depths or encoder_depth
        self._depths = depths  # of the projectors, one each
        self._num_extra = 0 if config.cls_width is None else 1  # tokens before those of the patches
        shapes_only = torch.get_default_device().type == "meta"
        with torch.device("meta"):  # PyTorch's own initialisation would draw from the global generator
            self.x_embedder = PatchEmbed(config.in_channels, config.hidden_size, config.patch_size)
            self.t_embedder = TimestepEmbedder(config.hidden_size)
            # Called r_embedder as in public code of MeanFlow, where too it is fed t - r.
            self.r_embedder = TimestepEmbedder(config.hidden_size) if config.second_time else None
            self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size)
            cls_width = config.cls_width
            self.cls_projectors2 = None if cls_width is None else nn.Linear(cls_width, config.hidden_size)
            self.wg_norm = None if cls_width is None else nn.LayerNorm(config.hidden_size, eps=1e-6)
            # A parameter, though never trained: so it is in the published checkpoints and in the EMA.
            self.pos_embed = nn.Parameter(
                torch.empty(1, self._num_extra + math.prod(config.grid), config.hidden_size), requires_grad=False
            )
            self.blocks = nn.ModuleList(
                SiTBlock(config.hidden_size, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
            )
            self.projectors = nn.ModuleList(
                make_projector(config.hidden_size, projector, config.grid) for projector in projectors
            )
            self.final_layer = FinalLayer(config.hidden_size, config.patch_size**2 * config.out_channels, cls_width)
            answer, middle = config.patch_size**2 * config.in_channels, config.middle_head is not None
            self.middle_layer = FinalLayer(config.hidden_size, answer) if middle else None
        if not shapes_only:
            self._allocate()
            self._initialize(seed)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens, h and w; T = h * w."""
        return self.config.grid

    @property
    def null_label(self) -> int:
        """The label that stands for no class."""
        return self.config.num_classes

    def _allocate(self) -> None:
        """Give every parameter memory on the CPU: `to_empty` without its import of sympy, half a second."""
        for module in self.modules():
            for name, shape in list(module.named_parameters(recurse=False)):
                memory = torch.empty(shape.shape, dtype=shape.dtype)
                module.register_parameter(name, nn.Parameter(memory, requires_grad=shape.requires_grad))

    @torch.no_grad()
    def _initialize(self, seed: int) -> None:
        """Set every parameter: xavier-uniform Linear layers, normal(0.02) embeddings, zero gates and output."""
        generator = torch.Generator().manual_seed(_derived_seed(seed, 0))
        added = ("projectors", "r_embedder", "cls_projectors2", "final_layer.linear_cls", "middle_layer")
        trunk = (module for name, module in self.named_modules() if not name.startswith(added))
        for module in trunk:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        proj = self.x_embedder.proj
        nn.init.xavier_uniform_(proj.weight.view(proj.out_channels, -1), generator=generator)  # as a Linear's
        if proj.bias is not None:
            nn.init.zeros_(proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02, generator=generator)
        self.t_embedder.initialize(generator)
        if self.r_embedder is not None:
            self.r_embedder.initialize(torch.Generator().manual_seed(_derived_seed(seed, 0, 0)))
        for module in self.modules():
            if isinstance(module, Modulation):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)
        nn.init.zeros_(self.final_layer.linear.weight)
        for zero in () if self.middle_layer is None else self.middle_layer.linear.parameters():
            nn.init.zeros_(zero)
        self.pos_embed.zero_()  # of a class token it stays so
        self.pos_embed[0, self._num_extra :] = torch.from_numpy(sincos_pos_embed(self.config.hidden_size, self.grid))
        if self.cls_projectors2 is not None and self.wg_norm is not None and self.final_layer.linear_cls is not None:
            generator = torch.Generator().manual_seed(_derived_seed(seed, 0, 1))
            nn.init.xavier_uniform_(self.cls_projectors2.weight, generator=generator)
            nn.init.ones_(self.wg_norm.weight)
            for zero in (self.cls_projectors2.bias, self.wg_norm.bias, *self.final_layer.linear_cls.parameters()):
                nn.init.zeros_(zero)
        for index, projector in enumerate(cast(Iterable[Projector], self.projectors)):
            projector.initialize(torch.Generator().manual_seed(_derived_seed(seed, index + 1)))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        h: Tensor | None = None,
        cls_token: Tensor | None = None,
        *,
        return_projections: bool = False,
    ) -> Any:
        """Return the velocity at x_t, and on request each projector's tokens, all from one call (one module for DDP).

        x is [B,C,H,W]; t [B] in [0, 1]; y [B] int64 in [0, num_classes], labels already dropped. The velocity is
        [B,C,H,W] and the projections are a tuple of [B,T,E], in the dtype that autocast gives them. With a second time
        embedder the answer is the mean velocity from t - h to t, h [B] in [0, t]; None is 0, the velocity at t itself.
        A model with a class token takes it noised as x is, [B,cls_width], and answers both their velocities, a pair;
        one with a middle head answers the last layer's velocity and that head's.
        """
        x, conditioning = self._embed(x, t, y, h, cls_token)
        projections: dict[int, Tensor] = {}
        middle: Tensor | None = None
        for depth, block in enumerate(self.blocks, start=1):
            x = block(x, conditioning)
            if return_projections:
                projections.update(self._project(x, depth))
            if self.middle_layer is not None and depth == self.config.middle_head:
                middle = self._unpatchify(self.middle_layer(x, conditioning)[0])
        patches, cls_velocity = self.final_layer(x, conditioning)
        velocity, second = self._unpatchify(patches), cls_velocity if middle is None else middle
        if self.config.learn_sigma:
            velocity = velocity[:, : self.config.in_channels]
        if self.config.convention == "sit":  # dx/dt = -dx/d(1 - t)
            velocity, second = -velocity, None if second is None else -second
        answer = velocity if second is None else (velocity, second)
        return (answer, tuple(projections[k] for k in sorted(projections))) if return_projections else answer

    def tokens_after(self, depth: int, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the tokens [B,T,D] after block `depth`, from 1, and run no later one; inputs as of `forward`."""
        x, conditioning = self._embed(x, t, y)
        for block in islice(self.blocks, depth):
            x = block(x, conditioning)
        return x

    def _embed(
        self, x: Tensor, t: Tensor, y: Tensor, h: Tensor | None = None, cls_token: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens before the first block, a class token first, and the conditioning [B,D]."""
        assert (cls_token is None) == (self.config.cls_width is None), f"{self.config.name} and its class token"
        x = self.x_embedder(x)
        if cls_token is not None and self.cls_projectors2 is not None and self.wg_norm is not None:
            x = torch.cat([self.wg_norm(self.cls_projectors2(cls_token)).unsqueeze(1), x], dim=1)
        t = 1 - t if self.config.convention == "sit" else t
        conditioning = self.t_embedder(t) + self.y_embedder(y)
        if self.r_embedder is not None:
            conditioning = conditioning + self.r_embedder(torch.zeros_like(t) if h is None else h)
        else:
            assert h is None, f"{self.config.name} has no second time embedder"
        return x + self.pos_embed, conditioning

    def _project(self, x: Tensor, depth: int) -> Iterator[tuple[int, Tensor]]:
        """Yield each projector's place and tokens that reads after block `depth`, as its `of` says which."""
        extra = self._num_extra
        for index, (projector, config) in enumerate(zip(self.projectors, self.projector_configs, strict=True)):
            if self._depths[index] == depth:
                yield index, projector({"all": x, "patches": x[:, extra:], "cls": x[:, :extra]}[config.of])

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """Put patches [B,T, patch * patch * C], rows, columns, then (output) channels, together to [B,C,H,W]."""
        patch = self.config.patch_size
        images = patches.unflatten(1, self.grid).unflatten(-1, (patch, patch, -1))  # [B,h,w,p,p,C]
        return images.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _derived_seed(seed: int, *stream: int) -> int:
    """Return a generator's seed: streams of one seed, and the same stream of neighbouring seeds, are unrelated."""
    return int(np.random.SeedSequence(seed, spawn_key=stream).generate_state(1)[0])
