"""What an import would write: whose latents they are, what its source looks like, which component that becomes.

What cannot be known is not made up: the spec says that the component was imported, from which layout, with which
statements of the user, and `weights` and `precision` are "unknown".
"""

import difflib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cache_specs.components import read_layout
from ...cache_specs.errors import JobError, UsageError, nearest, reason
from ...cache_specs.files.outside import read_file
from ...cache_specs.layout import CacheLayout
from ...cache_specs.schema import IMPORTED, LATENTS, UNKNOWN, ComponentSpec
from ...cache_specs.storage import location
from ...cache_specs.tables import AutoencoderEntry, autoencoder_table
from ..building.plan import resolve_layout
from ..images.formats import open_picture
from ..images.manifest import MOST_IMAGE_BYTES
from .arrow import SPLITS, STATE, ArrowSource
from .checks import Look, Reading, check_pixel_range, check_scale, check_statistics, look_at
from .edm2 import REPA_LATENTS, open_edm2, open_repa
from .lightningdit import SampledSource
from .pairs import doubt_of_pairs
from .source import BadLatent, LatentSource

LIKE_A_KNOWN_NAME = 0.85  # difflib's ratio above which an unknown autoencoder is taken for a typing error


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What `repa-cache import` is asked. None leaves a choice to the data, the table, or the cache on disk.

    `pixel_range` and `scaled_by` are statements about the data that overrule what its numbers look like.
    """

    data: Path
    cache: str | Path  # a folder, or a URL of an object store
    autoencoder: str
    layout: str | None = None
    images: Path | None = None
    labels: Path | None = None
    resolution: int | None = None
    pixel_range: tuple[float, float] | None = None
    scaled_by: float | None = None
    log_variance: bool = False
    shard_samples: int | None = None
    compressor: str = "none"
    words: tuple[str, ...] = ()  # the arguments as they were typed, for whoever goes on; none in one's own code

    def __post_init__(self) -> None:
        if self.scaled_by is not None and not 0 < self.scaled_by < float("inf"):
            raise UsageError(f"--scaled-by {self.scaled_by}: expected a number above 0")
        if self.resolution is not None and self.resolution < 1:
            raise UsageError(f"--resolution {self.resolution}: expected at least 1 pixel")


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """What an import would write, and what its source looks like."""

    source: LatentSource
    reading: Reading
    look: Look
    layout: CacheLayout
    component: ComponentSpec
    warning: str | None


def detect_layout(data: Path) -> str:
    """Return whose layout lies at `data`; raise `UsageError` where it is none, or several."""
    if data.is_file():
        found = ["edm2"] if data.suffix == ".zip" else []
    else:
        signs = {"repa": [REPA_LATENTS], "lightningdit": ["*.safetensors"], "arrow": [STATE, SPLITS]}
        found = [layout for layout, names in signs.items() if any(any(data.glob(name)) for name in names)]
        if not found and any(data.glob("[0-9]" * 5 + "/img-mean-std-*.npy")):
            raise UsageError(
                f"--data {data}: the latents of EDM2's tool, or of REPA's? Say --from edm2, or give the folder above "
                f"it, where REPA's images/ and {REPA_LATENTS}/ are"
            )
    if len(found) != 1:
        raise UsageError(
            f"--data {data}: looks like {' and '.join(found) or 'no known layout'}; say which with --from: repa (a "
            f"folder with {REPA_LATENTS}/), edm2 (a .zip), lightningdit (*.safetensors), arrow ({STATE})"
        )
    return found[0]


def open_source(options: ImportOptions) -> LatentSource:
    """List the samples of `options.data`; raise `UsageError` where it is not what its layout says."""
    if not options.data.exists():
        raise UsageError(f"--data {options.data}: no such file or folder")
    if options.images is not None and not options.images.is_dir():
        raise UsageError(f"--images {options.images}: no such folder; give that of the images that were encoded")
    layout = options.layout or detect_layout(options.data)
    data = options.data.absolute()
    images = None if options.images is None else options.images.absolute()
    if options.labels is not None and layout != "arrow":
        raise UsageError(f"--labels {options.labels}: the layout {layout} has its own labels; leave it out")
    if images is not None and layout == "lightningdit":
        raise UsageError(f"--images {images}: LightningDiT's files do not say which images they are of; leave it out")
    if layout == "repa":
        return open_repa(data, images)
    if layout == "edm2":
        return open_edm2(data, images)
    if layout == "lightningdit":
        return SampledSource(data)
    return ArrowSource(data, images, options.labels)


def plan_import(options: ImportOptions) -> ImportPlan:
    """Open the source, look at its numbers and resolve what would be written; writes nothing.

    Raises `UsageError` where an assumption about the data does not hold, `JobError` where samples cannot be read.
    """
    entry = _entry(options)
    source = open_source(options)
    reading = _reading(source, entry, options)
    side = reading.shape[-1]
    resolution = options.resolution or side * (entry.factor if entry else 0)
    if entry is not None and resolution != side * entry.factor:
        raise UsageError(
            f"--resolution {resolution}: latents of {side} x {side} are of {side * entry.factor} pixels by {entry.name}"
        )
    _check_images(source, resolution)
    look = look_at(source, reading)
    if entry is not None:
        check_scale(entry, look, stated=options.scaled_by)
        if options.pixel_range is None:
            check_pixel_range(entry, source, look)
    check_statistics(source, look)
    layout = resolve_layout(
        source.manifest,
        read_layout(location(options.cache)),
        resolution=resolution,
        shard_samples=options.shard_samples,
        flip=len(source.views) > 1,
    )
    component = _component(source, reading, entry, look, resolution, options)
    warning = doubt_of_pairs(source, reading, resolution=resolution)
    return ImportPlan(source=source, reading=reading, look=look, layout=layout, component=component, warning=warning)


def _entry(options: ImportOptions) -> AutoencoderEntry | None:
    """Return the table's entry; None for an autoencoder that only the user knows, which must say its resolution."""
    name, table = options.autoencoder, autoencoder_table()
    if name in table:
        return table[name]
    if options.resolution is None or difflib.get_close_matches(name, table, n=1, cutoff=LIKE_A_KNOWN_NAME):
        raise UsageError(
            f"unknown autoencoder {name!r}: {nearest(name, table)}. For latents of one that is not in the table, give "
            "a name of your own and --resolution, the side of the images in pixels"
        )
    if not name[:1].isalnum() or not all(c.isascii() and (c.isalnum() or c in "._-") for c in name):
        raise UsageError(f"--autoencoder {name!r}: becomes a folder's name: letters, digits and . _ - only")
    return None


def _reading(source: LatentSource, entry: AutoencoderEntry | None, options: ImportOptions) -> Reading:
    """Return how rows are read, by the first of them; raise `UsageError` where the autoencoder has no such latents."""
    where, first = source.where, source.manifest.sample_ids[0]
    try:
        shape = source.read(0).shape
    except BadLatent as error:
        raise JobError(f"{where}: {first}: {error}") from error
    if options.log_variance and source.kind != "moments":
        raise UsageError(f"--log-variance: {where} holds sampled latents, which have no variance; leave it out")
    if len(shape) != 4 or shape[2] != shape[3] or 0 in shape or (source.kind == "moments" and shape[1] % 2):
        planes = "2C, h, h] (mean, then standard deviation" if source.kind == "moments" else "C, h, h] (one sample"
        raise UsageError(f"--data {where}: {first} is {list(shape[1:])}; expected [{planes})")
    reading = Reading(
        shape=shape, kind=source.kind, scaled_by=options.scaled_by or 1.0, log_variance=options.log_variance
    )
    no_posterior = entry is not None and entry.kind == "sample" and source.kind == "moments"
    if entry is not None and (entry.latent_channels != reading.channels or no_posterior):
        kind = "moments" if entry.kind == "mean_std" else "a sample"
        raise UsageError(
            f"--data {where}: {first} has {source.kind} of {reading.channels} channels; {entry.name} gives {kind} of "
            f"{entry.latent_channels}. Name the autoencoder that made them with --autoencoder"
        )
    return reading


def _check_images(source: LatentSource, resolution: int) -> None:
    """Raise `UsageError` where images that were cropped before the encoding are not of its resolution."""
    if source.image_root is None or source.layout == "arrow":  # the study crops as it reads
        return
    size = len(source.manifest)
    for row in sorted({0, size // 2, size - 1}):
        file = source.image_root / str(source.manifest.sample_ids[row])
        try:
            with open_picture(io.BytesIO(read_file(file, most=MOST_IMAGE_BYTES))) as image:
                found = image.size
        except Exception as error:  # a damaged header raises what it likes
            raise UsageError(
                f"{file}: not an image ({reason(error)}); mend it, or name the images with --images"
            ) from error
        if found != (resolution, resolution):
            raise UsageError(
                f"{file}: {found[0]} x {found[1]} pixels, and the latents are of {resolution} x {resolution}; "
                "expected the images that they were made of; name these with --images"
            )


def _component(
    source: LatentSource,
    reading: Reading,
    entry: AutoencoderEntry | None,
    look: Look,
    resolution: int,
    options: ImportOptions,
) -> ComponentSpec:
    spec: dict[str, Any] = {
        "entry": options.autoencoder,
        "loader": UNKNOWN,
        "model": UNKNOWN,
        "library_class": None,
        "config": {},
        "random_weights": False,
    }
    pixel_range = options.pixel_range or source.pixel_range
    name = options.autoencoder
    if entry is not None:
        spec |= entry.resolve(resolution=resolution, random_weights=False)
        pixel_range = pixel_range or entry.pixel_range
        if pixel_range != entry.pixel_range:
            name += "-pixels" + "".join(f"{end:g}" for end in pixel_range)
    spec |= {
        "kind": "mean_std" if reading.kind == "moments" else "sample",
        "latent_channels": reading.channels,
        "moment_channels": reading.shape[1],
        "latent_size": list(reading.shape[2:]),
        "pixel_range": None if pixel_range is None else list(pixel_range),
        IMPORTED: {
            "layout": source.layout,
            "images": source.image_root is not None,
            "scaled_by": reading.scaled_by,
            "log_variance": reading.log_variance,
            "looked_at": f"sha256:{look.digest}",
        },
    }
    return ComponentSpec(
        kind=LATENTS,
        name=name,
        spec=spec,
        weights=UNKNOWN,
        precision=UNKNOWN,
        compressor=options.compressor,  # type: ignore[arg-type]  # checked in ComponentSpec.__post_init__
    )
