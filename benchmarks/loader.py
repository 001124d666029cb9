"""Compare loaders on the same samples in one run: ours, the limit of memory, and every other that is installed.

    pip install -e '.[bench]' && python benchmarks/loader.py       # appends to results/loader.jsonl
    python benchmarks/loader.py --num-samples 1024 --rounds 20 --dtype int8 --only CacheReader --only np.take

A sample is what training reads: float16 moments (8, 32, 32), tokens (256, 768) as float16 or as int8 with their scale,
float32 channel statistics, label and row. Each loader writes it in its own format, is checked once against the source
byte by byte over an epoch, and is then timed in interleaved rounds of a fixed number of batches, shuffled as well as it
can: warm, its files in the page cache as they were written; cold, put out of it, counting what is read from the disk;
and ours and the limit again from a page cache that was filled by reading: by their own reads in random order, after
which Linux holds single pages that are slower to copy out of, and by a pass in order, after which it holds larger
pieces. Rates are medians; ratios are taken within a round, with the 95 % bootstrap interval of their median.
"""

import argparse
import gc
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from conditions import append_line, conditions
from disk_cache import bytes_from_disk, evict, read_in_order, write_back
from loaders import LIMIT, OURS, Loader
from other_formats import LOADERS
from peak_memory import in_own_process
from rounds import median_interval, show
from samples import Samples, make_samples

DTYPES = ("float16", "int8")
BATCH_SIZES = (64, 256)
REFILLED = {
    "read_back": "once its reads have filled the page cache",
    "read_in_order": "once a pass in order has filled the page cache",
}
LIMIT_BAR, RIVAL_BAR, DISK_BAR = 0.90, 4.0, 1.1
SLOW_ROUNDS, COLD_ROUNDS = 3, 3
STILL_WARM = 0.01  # of a loader's files in the page cache: mapped by something, so there is no cold figure
PACKAGES = (
    "litdata",
    "webdataset",
    "mosaicml-streaming",
    "grain",
    "array-record",
    "safetensors",
    "datasets",
    "tensorstore",
    "zarrs",
)


def time_batches(loader: Loader, batch_size: int, num: int, seed: int) -> float:
    """Return samples/s of `num` batches of a newly shuffled epoch."""
    batches = loader.batches(batch_size, loader.untimed + num, seed)
    for _ in range(loader.untimed):
        next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    return num * batch_size / (time.perf_counter() - start)


def warm_rates(loaders: list[Loader], batch_size: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return samples/s by loader and round. Every round has the loaders in another order; slow ones sit most out."""
    rates: dict[str, list[float]] = {loader.name: [] for loader in loaders}
    in_turn = random.Random(0)
    for seed in range(-1, options.rounds):  # the first is a warm-up
        for loader in in_turn.sample(loaders, len(loaders)):
            if loader.slow and seed >= SLOW_ROUNDS:
                continue
            num = 1 if loader.slow else options.round_samples // batch_size
            rate = time_batches(loader, batch_size, num, seed + 1)
            if seed >= 0:
                rates[loader.name].append(rate)
    return rates


def cold_reads(loader: Loader, batch_size: int, options: argparse.Namespace) -> dict[str, float] | None:
    """Return samples/s from the disk, and bytes read there over bytes returned, medians of rounds.

    None where the files cannot be put out of the page cache, because the loader still has them mapped.
    """
    num = 1 if loader.slow else max(1, options.cold_samples // batch_size)
    rates, shares = [], []
    for seed in range(1 if loader.slow else COLD_ROUNDS):
        if evict(loader.folder) > STILL_WARM:
            return None
        loader.open()
        before, start = bytes_from_disk(), time.perf_counter()
        for _ in loader.batches(batch_size, num, seed):
            pass
        rates.append(num * batch_size / (time.perf_counter() - start))
        shares.append((bytes_from_disk() - before) / (num * batch_size * loader.samples.row_bytes))
        loader.close()
    return {
        "samples_per_s": round(statistics.median(rates), 1),
        "read_over_returned": round(statistics.median(shares), 4),
    }


def compare_warm(loaders: list[Loader], batch_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the results of one dtype and batch size from files as they were written."""
    for loader in loaders:
        loader.open()
    rates = warm_rates(loaders, batch_size, options)
    for loader in loaders:
        loader.close()
    gc.collect()
    results: dict[str, dict[str, Any]] = {}
    for loader in loaders:
        own = rates[loader.name]
        result: dict[str, Any] = {"order": loader.order, "rounds": len(own)}
        result["samples_per_s"] = round(statistics.median(own), 1)
        if LIMIT in rates:
            result["of_limit"] = over(own, rates[LIMIT])
        if loader.rival and OURS in rates:
            result["ours_over_it"] = over(rates[OURS], own)
        results[loader.name] = result
    found: dict[str, Any] = {"batch_size": batch_size, "row_bytes": loaders[0].samples.row_bytes, "loaders": results}
    if OURS in results:
        script = Path(__file__).with_name("reader_memory.py")
        found["memory"] = in_own_process(str(script), loaders[0].samples.cache, batch_size)
    return found


def compare_cold(loaders: list[Loader], found: dict[str, Any], options: argparse.Namespace) -> None:
    """Add to the warm results those from the disk, and those from a page cache that was filled by reading."""
    for loader in loaders:
        found["loaders"][loader.name]["cold"] = cold_reads(loader, found["batch_size"], options)
    both = [loader for loader in loaders if loader.name in (LIMIT, OURS)]
    if len(both) == 2:
        for state in REFILLED:
            refilled = compare_refilled(both, state, found["batch_size"], options)
            if refilled is not None:
                found[state] = refilled


def compare_refilled(
    both: list[Loader], state: str, batch_size: int, options: argparse.Namespace
) -> dict[str, Any] | None:
    """Return the results of ours and the limit with their files put out of the page cache and read into it again.

    None where they cannot be put out of it, as for `cold_reads`.
    """
    for loader in both:
        if evict(loader.folder) > STILL_WARM:
            return None
    for loader in both:
        if state == "read_in_order":
            read_in_order(loader.folder)
        loader.open()
        for _ in loader.batches(batch_size, len(loader.samples) // batch_size, 0):
            pass
    rates = warm_rates(both, batch_size, options)
    for loader in both:
        loader.close()
    return {
        "samples_per_s": round(statistics.median(rates[OURS]), 1),
        "of_limit": over(rates[OURS], rates[LIMIT]),
    }


def over(rates: list[float], others: list[float]) -> dict[str, float]:
    """Return the median of the ratios of rounds, and its interval; slow loaders have fewer rounds."""
    return median_interval([rate / other for rate, other in zip(rates, others, strict=False)])


def bars(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what was promised, found, and whether it holds, for what was measured of it."""
    judged: list[dict[str, Any]] = []
    ours = found["loaders"].get(OURS)
    if ours is None:
        return judged
    if "of_limit" in ours:
        judged.append(_bar(f"of {LIMIT}, at least", LIMIT_BAR, ours["of_limit"]["median"], at_least=True))
    for state in [state for state in REFILLED if state in found]:
        what = f"of {LIMIT} {REFILLED[state]}, at least"
        judged.append(_bar(what, LIMIT_BAR, found[state]["of_limit"]["median"], at_least=True))
    rivals = {name: r["ours_over_it"] for name, r in found["loaders"].items() if "ours_over_it" in r}
    if rivals:
        best = min(rivals, key=lambda name: rivals[name]["median"])
        what = f"times {best}, the best of {len(rivals)}, at least"
        judged.append(_bar(what, RIVAL_BAR, rivals[best]["median"], at_least=True))
    if ours.get("cold") and ours["cold"]["read_over_returned"] > 0:  # a tmpfs has no disk to read from
        judged.append(
            _bar("bytes read over returned, at most", DISK_BAR, ours["cold"]["read_over_returned"], at_least=False)
        )
    memory = found["memory"]
    most = memory["prefetch_bytes"] + memory["batch_bytes"]
    judged.append(
        _bar("peak memory over prefetch bound + one batch, at most", 1.0, memory["peak_bytes"] / most, at_least=False)
    )
    return judged


def _bar(what: str, bar: float, value: float, *, at_least: bool) -> dict[str, Any]:
    return {"what": what, "bar": bar, "found": round(value, 4), "holds": value >= bar if at_least else value <= bar}


def table(dtype: str, found: dict[str, Any], options: argparse.Namespace) -> str:
    """Return the results of one dtype and batch size as a table, the fastest first."""
    lines = [
        f"\n{dtype} tokens, batches of {found['batch_size']}, {found['row_bytes'] / 1024:.1f} KiB a sample, rounds of "
        f"{options.round_samples} samples",
        f"{'':<20} {'order':<21} {'rounds':>6} {'samples/s':>9} {'GB/s':>6} {f'of {LIMIT}, 95 % interval':>26} "
        f"{'cold samples/s':>14} {'read/returned':>13}",
    ]
    for name, result in sorted(found["loaders"].items(), key=lambda item: -item[1]["samples_per_s"]):
        rate, cold = result["samples_per_s"], result.get("cold")
        tail = (
            f"{cold['samples_per_s']:>14,.0f} {cold['read_over_returned']:>13.2f}" if cold else f"{'-':>14} {'-':>13}"
        )
        ratio = show(result["of_limit"], ".3f") if "of_limit" in result else "-"
        lines.append(
            f"{name:<20} {result['order']:<21} {result['rounds']:>6} {rate:>9,.0f} "
            f"{rate * found['row_bytes'] / 1e9:>6.2f} {ratio:>26} {tail}"
        )
    lines += [
        f"{OURS} {when}: {found[state]['samples_per_s']:,.0f} samples/s, "
        f"{show(found[state]['of_limit'], '.3f')} of {LIMIT}"
        for state, when in REFILLED.items()
        if state in found
    ]
    lines += [
        f"{'pass' if bar['holds'] else 'FAIL'}  {OURS}: {bar['found']:.3f} {bar['what']} {bar['bar']}"
        for bar in found["bars"]
    ]
    return "\n".join(lines)


def prepare(samples: Samples, folder: Path, options: argparse.Namespace) -> list[Loader]:
    """Write the samples for every loader that is asked for and installed, and check what each gives back."""
    loaders = []
    for kind in LOADERS:
        if kind.installed() and (not options.only or kind.name in options.only):
            loader = kind(samples, folder)
            loader.write()
            write_back(loader.folder)  # now, and not while something is timed
            loader.open()
            batch_size = options.batch_size[0]
            if loader.slow:
                for batch in loader.batches(batch_size, 1, 0):
                    samples.check(batch)
            else:
                epoch = loader.batches(batch_size, len(samples) // batch_size, 0)
                samples.check_epoch(epoch, shuffled=loader.shuffled)
            loader.close()
            loaders.append(loader)
            print(f"{loader.name}: its bytes are those of the source", flush=True)
    samples.release()
    return loaders


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Return the line of results; print the tables."""
    started = time.monotonic()
    configurations = []
    for dtype in options.dtype:
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            samples = make_samples(
                Path(folder), num_samples=options.num_samples, dtype=dtype, grid=options.grid, width=options.width
            )
            loaders = prepare(samples, Path(folder), options)
            # All that is warm before anything is put out of memory
            of_dtype = [compare_warm(loaders, batch_size, options) for batch_size in options.batch_size]
            for found in of_dtype:
                if not options.no_cold:
                    compare_cold(loaders, found, options)
                found["bars"] = bars(found)
                print(table(dtype, found, options), flush=True)
                configurations.append({"dtype": dtype, **found})
    missing = [kind.name for kind in LOADERS if not kind.installed()]
    print("not installed: " + ", ".join(missing) if missing else "every loader was there")
    return {
        "benchmark": "loader",
        "num_samples": options.num_samples,
        "grid": options.grid,
        "width": options.width,
        "round_samples": options.round_samples,
        "cold_samples": options.cold_samples,
        "not_installed": missing,
        "configurations": configurations,
        "minutes": round((time.monotonic() - started) / 60, 2),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=2048, help="0.4 MB each, once a format [%(default)s]")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="of the tokens; both by default")
    parser.add_argument("--batch-size", type=int, action="append", help="64 and 256 by default")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--round-samples", type=int, default=512)
    parser.add_argument("--cold-samples", type=int, default=512)
    parser.add_argument("--no-cold", action="store_true", help="leave the page cache alone")
    parser.add_argument("--only", choices=[kind.name for kind in LOADERS], action="append")
    parser.add_argument("--grid", type=int, default=16, help="tokens a side [%(default)s]")
    parser.add_argument("--width", type=int, default=768, help="of a token [%(default)s]")
    parser.add_argument("--dir", type=Path, help="where to put a temporary folder")
    parser.add_argument("--out", type=Path, help="append the line here instead of results/loader.jsonl")
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or DTYPES
    options.batch_size = options.batch_size or BATCH_SIZES
    return options


def main() -> None:
    options = parse()
    line = {**run(options), **conditions(PACKAGES)}
    append_line("loader", line, options.out)


if __name__ == "__main__":
    main()
