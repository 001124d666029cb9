"""From a model to pictures: the noise and label of each image, a batch of samples, a grid.

In: a SiT in any mode, and a request. Out: uint8 pictures, or latents where nobody decodes. The noise of image i, the
SDE's too, and its label are functions of (seed, i) alone: batch size and ranks change none of their bits. The pictures
are bit-identical for equal batches on equal hardware; in another batch size a matrix product may round differently,
which moves a float32 latent by about 1e-6 of its size and now and then a pixel by one level of 255.
"""

import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...cache_specs.errors import UsageError, nearest
from ...cache_specs.files.whole_file import write_whole
from ..diffusion.latents import LatentNorm, to_latents
from ..models.sit import SiT
from ..objectives.objective import Field
from .samplers import SamplerConfig, sample_latents

# Streams of random numbers of one seed, image by image; reading/batches.py has those that training draws from.
NOISE, LABEL = 3, 4

Decoder = Callable[[Tensor], Tensor]  # latents [B,C,h,w] float32 -> pictures [B,H,W,3] uint8


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """Which images to draw: `num` of them, from `seed`.

    `labels` is "random" (each image's own draw), "balanced" (i modulo the number of classes) or class numbers that are
    gone through again and again.
    """

    num: int
    seed: int = 0
    labels: str | tuple[int, ...] = "random"
    sampler: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        if self.num < 1:
            raise UsageError(f"num is {self.num}; expected 1 or more")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}; expected 0 or more")
        if isinstance(self.labels, str) and self.labels not in ("random", "balanced"):
            raise UsageError(f"labels is {self.labels!r}; {nearest(self.labels, ('random', 'balanced', 'a list'))}")

    def check_labels(self, num_classes: int) -> None:
        """Raise UsageError where a listed label is not a class of the model."""
        listed = () if isinstance(self.labels, str) else self.labels
        outside = [label for label in listed if not 0 <= label < num_classes]
        if outside or self.labels == ():
            raise UsageError(f"labels: {outside or 'none'} given; the model's classes are 0 to {num_classes - 1}")


def parse_labels(text: str, class_names: Sequence[str] = ()) -> str | tuple[int, ...]:
    """Return the labels that a command line names: `random`, `balanced`, or classes by number or name, `0,dog,7`.

    A whole number is a class number, whatever classes are called; a name may hold commas, and its case does not matter.
    Raises UsageError, with the nearest name, where there is no such class.
    """
    if text in ("random", "balanced"):
        return text
    places = {name.lower(): place for place, name in reversed(list(enumerate(class_names)))}
    words, labels = text.split(","), []
    while words:
        # The longest name that begins here: ImageNet's have commas in them.
        taken, label = 1, int(words[0]) if words[0].strip().isdecimal() and len(words[0]) < 20 else None
        for num in range(len(words), 0, -1) if label is None else ():
            if (label := places.get(",".join(words[:num]).strip().lower())) is not None:
                taken = num
                break
        if label is None:
            raise UsageError(f"labels: {_no_class(words[0].strip(), class_names)}")
        labels.append(label)
        words = words[taken:]
    return tuple(labels)


def _no_class(word: str, class_names: Sequence[str]) -> str:
    if not class_names:
        return f"{word!r}, and the model does not say what its classes are called; give random, balanced or 0,3,7"
    return f"no class {word!r}; {nearest(word, class_names)}. Or random, balanced, or numbers such as 0,3,7"


def labels_of(indices: Sequence[int], request: SampleRequest, num_classes: int) -> Tensor:
    """Return the labels [B] int64 of images `indices`."""
    if request.labels == "balanced":
        labels = [index % num_classes for index in indices]
    elif isinstance(request.labels, str):
        labels = [int(_stream(request.seed, index, LABEL).integers(num_classes)) for index in indices]
    else:
        labels = [request.labels[index % len(request.labels)] for index in indices]
    return torch.tensor(labels, dtype=torch.int64)


class ImageNoise:
    """Standard normal float32 numbers for a batch of images, each image's from its own stream, on the CPU.

    numpy's generators: PyTorch's seeds its CPU generator with 32 bits, so that two of 50,000 images would share their
    noise with a chance of one in four.
    """

    def __init__(self, indices: Sequence[int], seed: int) -> None:
        self._streams = [_stream(seed, index, NOISE) for index in indices]

    def next(self, shape: tuple[int, ...]) -> Tensor:
        """Draw [B, *shape]: first an image's noise at t = 1, part by part, then that of each SDE step."""
        drawn = np.empty((len(self._streams), *shape), dtype=np.float32)
        for image, stream in zip(drawn, self._streams, strict=True):
            stream.standard_normal(dtype=np.float32, out=image)
        return torch.from_numpy(drawn)


def _stream(seed: int, index: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(stream, index))))


@torch.no_grad()
def draw_samples(
    model: SiT,
    indices: Sequence[int],
    request: SampleRequest,
    *,
    field: Field,
    norm: LatentNorm,
    decode: Decoder | None,
) -> np.ndarray:
    """Draw images `indices` of a request in one batch.

    Returns pictures [B,H,W,3] uint8; without `decode`, latents [B,C,h,w] float32 as the autoencoder knows them. The
    model samples in eval mode, on its device, in the precision of the autocast that it is called under, and is left
    in the mode it was in. No global generator is drawn from.
    """
    config, device = model.config, model.pos_embed.device
    noise = ImageNoise(indices, request.seed)
    labels = labels_of(indices, request, config.num_classes).to(device)

    def draw_noise() -> tuple[Tensor, ...]:
        return tuple(noise.next(shape).to(device) for shape in field.shapes(model))

    with evaluating(model):
        start = tuple(field.noise_scale(model) * part for part in draw_noise())
        x, *_ = sample_latents(model, start, labels, request.sampler, field=field, sde_noise=draw_noise)
    return finish(x, norm, decode)


def finish(x: Tensor, norm: LatentNorm, decode: Decoder | None) -> np.ndarray:
    """Return model-space latents [B,C,H,W] as pictures [B,H,W,3] uint8, or as latents where `decode` is None."""
    scale, bias = norm.tensors(x.device)
    latents = to_latents(x, scale, bias)
    if decode is None:
        return latents.cpu().numpy()
    pictures = decode(latents)
    if pictures.dtype != torch.uint8 or pictures.shape[-1] != 3 or len(pictures) != len(x):
        raise TypeError(f"decode returned {pictures.dtype} {list(pictures.shape)}; expected uint8 [{len(x)}, H, W, 3]")
    return pictures.cpu().numpy()


@contextmanager
def evaluating(model: SiT) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def save_grid(pictures: np.ndarray, path: Path, *, columns: int) -> np.ndarray:
    """Write pictures [n,H,W,3] uint8 as one PNG, row by row, on white, with gaps of a sixteenth of a picture.

    Returns the sheet's pixels [H,W,3] uint8.
    """
    from PIL import Image

    num, height, width, _ = pictures.shape
    gap, rows = max(1, width // 16), -(-num // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    Image.fromarray(sheet).save(data, format="PNG")
    write_whole(path, data.getvalue())
    return sheet
