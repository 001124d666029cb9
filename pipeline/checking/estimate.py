"""What a cache will cost before it is built: bytes to the last one, encoder-hours from a probe, the speedup it buys.

Bytes are those of the files that a build writes. Hours come from a short measurement of each encoder's forward on this
device; one that does not fit its memory is scaled from the others by multiply-accumulates, and said to be. Speedup is a
model: cached over online, a training step of 3 SiT forwards against the same step with the frozen models in it, at
equal efficiency of the hardware.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...cache_specs.autoencoder_entry import AutoencoderEntry
from ...cache_specs.binding import pack_numbers
from ...cache_specs.encoder_entry import EncoderEntry
from ...cache_specs.errors import UsageError, nearest
from ...cache_specs.layout import DEFAULT_SHARD_SAMPLES, VIEWS, ArrayLayout, CacheLayout
from ...cache_specs.schema import FEATURES, TOKEN_DTYPES, component_arrays
from ...cache_specs.shard_index import CHECKSUM_BYTES, index_bytes, padding
from ...cache_specs.sizes import human_bytes
from ...cache_specs.tables import ResolvedModel

# Depth and width of the published SiT (arXiv 2401.08740) and of our Ti; a test holds them equal to the trainer's.
SIT_SIZES = {"Ti": (6, 128), "S": (12, 384), "B": (12, 768), "L": (24, 1024), "XL": (28, 1152)}
TABLE_RESOLUTION = 256  # of an autoencoder's gmac
FORWARDS_A_STEP = 3  # a backward costs two forwards
NAME_WIDTH = 30  # columns of the table; a longer name has a line of its own


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
    """Return the bytes of a component's shards and their numbers by storage dtype: what its kind can be stored as."""
    specs = dict.fromkeys(TOKEN_DTYPES if kind == FEATURES else TOKEN_DTYPES[:1], model.spec)
    if isinstance(model.entry, AutoencoderEntry) and not model.entry.has_weights:  # pixels
        specs["uint8"] = model.entry.resolve(resolution=cache.resolution, random_weights=False, dtype="uint8")
    sizes = {}
    for dtype, spec in specs.items():
        arrays = component_arrays(kind, spec, dtype, cache)
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


def estimate_record(
    costs: Sequence[ModelCost],
    cache: CacheLayout,
    *,
    train: tuple[str, float] | None,
    budget: int | None,
    probe: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return what `repa-cache estimate --json` prints (README.md).

    `train` is a model's name and GMAC, `probe` says where rates were measured.
    """
    forwards = cache.num_samples * cache.num_views
    sums = {dtype: sum(_stored_bytes(cost.num_bytes, dtype) for cost in costs) for dtype in TOKEN_DTYPES}
    hours = [cost.hours(forwards) for cost in costs]
    return {
        "num_images": cache.num_samples,
        "resolution": cache.resolution,
        "views": list(cache.views),
        "probe": probe,
        "components": [
            {
                "path": f"{cost.kind}/{cost.name}",
                "num_bytes": cost.num_bytes,
                "gmac": cost.gmac,
                "images_per_s": cost.images_per_s,
                "measured": cost.measured,
                "hours": None if math.isnan(each) else each,
            }
            for cost, each in zip(costs, hours, strict=True)
        ],
        "num_bytes": sums,
        "gmac": sum(cost.gmac for cost in costs),
        "hours": None if any(map(math.isnan, hours)) else sum(hours),
        "speedup": None if train is None else _speedup_record(*train, costs),
        "budget": None if budget is None else _budget_record(budget, costs),
    }


def _stored_bytes(sizes: Mapping[str, int], dtype: str) -> int:
    """Return the bytes of a component in a cache of int8 or float16: of pixels uint8 goes with int8."""
    return sizes.get(dtype, sizes.get("uint8", sizes["float16"]))


def _speedup_record(model: str, sit: float, costs: Sequence[ModelCost]) -> dict[str, Any]:
    """Return the predicted speedup of training `model` (`sit` GMAC) from the cache, by what would run online."""
    encoders = [cost.gmac for cost in costs if cost.kind == FEATURES]
    return {
        "model": model,
        "gmac": sit,
        "over_encoders": speedup(sit, encoders) if encoders else None,
        "over_all": speedup(sit, [cost.gmac for cost in costs]) if len(encoders) < len(costs) else None,
    }


def _budget_record(budget: int, costs: Sequence[ModelCost]) -> dict[str, Any]:
    """Return what fits `budget` bytes: latents first, then as many encoders as fit, in the order asked."""
    encoders = [cost for cost in costs if cost.kind == FEATURES]
    latents = sum(cost.num_bytes["float16"] for cost in costs if cost.kind != FEATURES)
    chosen = choose_dtypes(encoders, budget - latents) if latents <= budget else dict.fromkeys(c.name for c in encoders)
    kept = ((cost, chosen[cost.name]) for cost in encoders)
    used = latents + sum(cost.num_bytes[dtype] for cost, dtype in kept if dtype is not None)
    return {"num_bytes": budget, "latents_bytes": latents, "used_bytes": used, "dtypes": chosen}


def estimate_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of costs (sizes, GMAC an image, images/s and hours on one device), speedup and budget."""
    if record["probe"] is not None:
        probe = record["probe"]
        threads = f", {probe['threads']} threads" if probe["threads"] else ""
        yield (
            f"forwards measured on {probe['device']}{threads}, {probe['precision']}, batches of "
            f"{probe['batch_size']}, one device"
        )
    yield _row("", ["float16", "(u)int8", "GMAC", "images/s", "hours"])
    for one in record["components"]:
        scaled = "*" * (one["images_per_s"] is not None and not one["measured"])
        yield from _rows(one["path"], one, one["images_per_s"], scaled)
    yield from _rows("in all", record, None)
    if any(one["images_per_s"] is not None and not one["measured"] for one in record["components"]):
        yield "* scaled by GMAC from the largest of its kind that was measured"
    if record["speedup"] is not None:
        found = record["speedup"]
        yield f"{found['model']} ({found['gmac']:.2f} GMAC) trains from this cache"
        for key, online in (("over_encoders", "the encoders online"), ("over_all", "the autoencoder online too")):
            if found[key] is not None:
                yield f"  {found[key]:.2f} times as fast as with {online}"
    if record["budget"] is not None:
        yield from _budget_lines(record["budget"])


def _rows(name: str, one: Mapping[str, Any], rate: float | None, mark: str = "") -> Iterator[str]:
    sizes = [human_bytes(_stored_bytes(one["num_bytes"], dtype)) for dtype in TOKEN_DTYPES]
    if len(one["num_bytes"]) == 1:
        sizes[1] = "-"
    speed = "" if name == "in all" else "-" if rate is None else f"{rate:.2f}{mark}"
    hours = "-" if one["hours"] is None else f"{one['hours']:.1f}"
    if len(name) > NAME_WIDTH:
        yield name
        name = ""
    yield _row(name, [*sizes, f"{one['gmac']:.1f}", speed, hours])


def _row(name: str, cells: Sequence[str]) -> str:
    float16, int8, gmac, rate, hours = cells
    return f"{name:<{NAME_WIDTH}}{float16:>10}{int8:>10}{gmac:>9}{rate:>10}{hours:>9}"


def _budget_lines(found: Mapping[str, Any]) -> Iterator[str]:
    budget, latents, chosen = found["num_bytes"], found["latents_bytes"], found["dtypes"]
    if latents > budget:
        yield f"{human_bytes(budget)}: the latents alone take {human_bytes(latents)}"
        return
    fits = [f"{name} {dtype}" for name, dtype in chosen.items() if dtype is not None]
    left_out = [name for name, dtype in chosen.items() if dtype is None]
    yield f"{human_bytes(budget)} holds{' latents,' if latents else ''} {', '.join(fits) or 'no encoder'}"
    yield f"  {human_bytes(found['used_bytes'])} used, {human_bytes(budget - found['used_bytes'])} left"
    if left_out:
        yield f"  left out: {', '.join(left_out)}"
