"""What a cache will cost before it is built: bytes to the last one, encoder-hours from a probe, the speedup it buys.

Bytes are those of the files that a build writes. Hours come from a short measurement of each encoder's forward on this
device; one that does not fit its memory is scaled from the others by multiply-accumulates, and said to be. Speedup is a
model: cached over online, a training step of 3 SiT forwards against the same step with the frozen models in it, at
equal efficiency of the hardware.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...cache_specs.binding import pack_numbers
from ...cache_specs.encoder_entry import EncoderEntry
from ...cache_specs.errors import UsageError, nearest
from ...cache_specs.layout import DEFAULT_SHARD_SAMPLES, VIEWS, ArrayLayout, CacheLayout
from ...cache_specs.schema import FEATURES, STORAGE_DTYPES, component_arrays
from ...cache_specs.shard_index import CHECKSUM_BYTES, index_bytes, padding
from ...cache_specs.sizes import human_bytes
from ...cache_specs.tables import ResolvedModel

# Depth and width of the published SiT (arXiv 2401.08740) and of our Ti; a test holds them equal to the trainer's.
SIT_SIZES = {"Ti": (6, 128), "S": (12, 384), "B": (12, 768), "L": (24, 1024), "XL": (28, 1152)}
TABLE_RESOLUTION = 256  # of an autoencoder's gmac
FORWARDS_A_STEP = 3  # a backward costs two forwards


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """One model of the cache to be: `num_bytes` by storage dtype, `gmac` an image, `images_per_s` of its forward.

    `kind` is latents or features. `measured` is False where images_per_s is scaled from another model's by GMAC; it is
    None where none was measured.
    """

    kind: str
    name: str
    num_bytes: dict[str, int]
    gmac: float
    images_per_s: float | None
    measured: bool

    def hours(self, num_images: int) -> float:
        """Return the hours that one device takes for `num_images` forwards, NaN where nothing was measured."""
        return math.nan if self.images_per_s is None else num_images / self.images_per_s / 3600


def planned_layout(*, num_images: int, resolution: int, flip: bool) -> CacheLayout:
    """Return the layout of a cache that is not there: sizes depend on counts alone, not on names."""
    if num_images < 1:
        raise UsageError(f"--images {num_images}: expected 1 or more")
    return CacheLayout(
        num_samples=num_images,
        resolution=resolution,
        views=VIEWS if flip else VIEWS[:1],
        class_names=(),
        shard_samples=DEFAULT_SHARD_SAMPLES,
        manifest_fingerprint="",
        dataset_fingerprint="",
    )


def array_bytes(layout: ArrayLayout) -> int:
    """Return the bytes of an array's shard files, uncompressed: chunks, checksums, zeros between, the indexes."""
    whole, rest = divmod(layout.shape[0], layout.shard[0])
    chunks = whole * math.prod(layout.chunks_per_shard) + (layout.num_chunks(rest) if rest else 0)
    stored = layout.inner_bytes + CHECKSUM_BYTES
    gaps = (chunks - layout.num_shards) * padding(stored)
    return chunks * stored + gaps + layout.num_shards * index_bytes(layout)


def component_bytes(kind: str, model: ResolvedModel, cache: CacheLayout) -> dict[str, int]:
    """Return the bytes of a component's shards and their numbers by storage dtype; latents are float16 alone."""
    dtypes = STORAGE_DTYPES if kind == FEATURES else STORAGE_DTYPES[:1]
    sizes = {}
    for dtype in dtypes:
        arrays = component_arrays(kind, model.spec, dtype, cache)
        numbers = cache.num_ranges * len(pack_numbers([0] * len(arrays)))
        sizes[dtype] = sum(map(array_bytes, arrays)) + numbers
    return sizes


def sit_gmac(model: str, *, latent_size: int) -> float:
    """Return 1e9 multiply-accumulates of a SiT's forward for one image, blocks alone (22.95 for SiT-B/2 at 256 px)."""
    size, slash, patch = model.removeprefix("SiT-").partition("/")
    if not (model.startswith("SiT-") and size in SIT_SIZES and slash and patch.isdecimal() and int(patch) > 0):
        raise UsageError(f"unknown model {model!r}; {nearest(model, [f'SiT-{name}/2' for name in SIT_SIZES])}")
    if latent_size % int(patch):
        raise UsageError(f"--model {model}: a latent of {latent_size} is not a whole number of patches of {patch}")
    depth, width = SIT_SIZES[size]
    tokens = (latent_size // int(patch)) ** 2
    return depth * (12 * width**2 * tokens + 2 * tokens**2 * width) * 1e-9


def speedup(sit: float, frozen: Iterable[float]) -> float:
    """Return how much longer a step of `sit` GMAC takes with `frozen` GMAC of encoders beside it."""
    step = FORWARDS_A_STEP * sit
    return (step + sum(frozen)) / step


def choose_dtypes(models: Sequence[ModelCost], budget: int) -> dict[str, str | None]:
    """Return the dtype by name in which each encoder fits `budget` bytes, None for those that are left out.

    As many as fit, in the order asked; then float16 where there is room, in the order asked.
    """
    chosen: dict[str, str | None] = {}
    left = budget
    for model in models:
        smallest = min(model.num_bytes, key=lambda dtype: model.num_bytes[dtype])
        fits = model.num_bytes[smallest] <= left
        chosen[model.name] = smallest if fits else None
        left -= model.num_bytes[smallest] if fits else 0
    for model in models:
        dtype = chosen[model.name]
        if dtype is not None and (more := model.num_bytes["float16"] - model.num_bytes[dtype]) <= left:
            chosen[model.name] = "float16"
            left -= more
    return chosen


def model_costs(
    models: Sequence[tuple[str, ResolvedModel]], cache: CacheLayout, rates: Mapping[str, float]
) -> list[ModelCost]:
    """Return what each model, given with its kind, costs in `cache`; `rates` is images/s by name where measured."""
    gmac = {model.name: _gmac(model, cache.resolution) for _, model in models}
    costs = []
    for kind, model in models:
        # GMAC a second on the largest model of this kind that could be measured: convolutions run at another rate.
        alike = [(gmac[other.name], rates[other.name]) for k, other in models if k == kind and other.name in rates]
        largest, rate = max(alike, default=(0.0, 0.0))
        scaled = largest * rate / gmac[model.name] if largest and gmac[model.name] else None
        costs.append(
            ModelCost(
                kind=kind,
                name=model.name,
                num_bytes=component_bytes(kind, model, cache),
                gmac=gmac[model.name],
                images_per_s=rates.get(model.name, scaled),
                measured=model.name in rates,
            )
        )
    return costs


def _gmac(model: ResolvedModel, resolution: int) -> float:
    if isinstance(model.entry, EncoderEntry):
        grid = model.spec["grid"]
        return model.entry.gmac_at(grid[0] * grid[1])
    return model.entry.gmac * (resolution / TABLE_RESOLUTION) ** 2


def cost_lines(costs: Sequence[ModelCost], cache: CacheLayout) -> Iterator[str]:
    """Yield the table of costs: sizes, GMAC an image, images/s and hours on one device."""
    forwards = cache.num_samples * cache.num_views
    yield f"{'':<40} {'float16':>10} {'int8':>10} {'GMAC':>8} {'images/s':>9} {'hours':>9}"
    for cost in costs:
        mark = "" if cost.measured or cost.images_per_s is None else " (scaled by GMAC)"
        int8 = human_bytes(cost.num_bytes["int8"]) if "int8" in cost.num_bytes else "-"
        rate = "-" if cost.images_per_s is None else f"{cost.images_per_s:.2f}"
        hours = "-" if cost.images_per_s is None else f"{cost.hours(forwards):.1f}"
        yield (
            f"{cost.kind + '/' + cost.name:<40} {human_bytes(cost.num_bytes['float16']):>10} {int8:>10} "
            f"{cost.gmac:>8.1f} {rate:>9} {hours:>9}{mark}"
        )
    total = {dtype: sum(c.num_bytes.get(dtype, c.num_bytes["float16"]) for c in costs) for dtype in STORAGE_DTYPES}
    all_hours = sum(cost.hours(forwards) for cost in costs)
    yield (
        f"{'in all':<40} {human_bytes(total['float16']):>10} {human_bytes(total['int8']):>10} "
        f"{sum(cost.gmac for cost in costs):>8.1f} {'':>9} {'-' if math.isnan(all_hours) else f'{all_hours:.1f}':>9}"
    )


def speedup_line(model: str, sit: float, costs: Sequence[ModelCost]) -> str:
    """Return the predicted speedup of training `model` (`sit` GMAC) from the cache, by what would run online."""
    encoders = [cost.gmac for cost in costs if cost.kind == FEATURES]
    said = [f"{speedup(sit, encoders):.2f} over the encoders online"] if encoders else []
    if len(encoders) < len(costs):
        said.append(f"{speedup(sit, [cost.gmac for cost in costs]):.2f} over the autoencoder online too")
    return f"{model} ({sit:.2f} GMAC) from this cache: {', '.join(said)}"


def budget_lines(budget: int, costs: Sequence[ModelCost]) -> Iterator[str]:
    """Yield what fits `budget` bytes: latents first, then as many encoders as fit, in the order asked."""
    latents = sum(cost.num_bytes["float16"] for cost in costs if cost.kind != FEATURES)
    if latents > budget:
        yield f"{human_bytes(budget)}: the latents alone take {human_bytes(latents)}"
        return
    chosen = choose_dtypes([cost for cost in costs if cost.kind == FEATURES], budget - latents)
    used = latents + sum(c.num_bytes[d] for c in costs if c.kind == FEATURES and (d := chosen[c.name]) is not None)
    fits = [f"{name} {dtype}" for name, dtype in chosen.items() if dtype is not None]
    left_out = [name for name, dtype in chosen.items() if dtype is None]
    yield f"{human_bytes(budget)} holds{' latents,' if latents else ''} {', '.join(fits) or 'no encoder'}"
    yield f"  {human_bytes(used)} used, {human_bytes(budget - used)} left"
    if left_out:
        yield f"  left out: {', '.join(left_out)}"
