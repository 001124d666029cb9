"""What a study found, in words: what was varied, which setting is best, and whether by more than seeds differ.

The yardstick is the seed spread: the standard deviation of single runs of one setting, pooled over the two settings
that are compared (over all of them where these have one seed each). A difference below it names no winner.
"""

import math
from collections.abc import Sequence

from .compare import Comparison, Setting, Spread
from .figures import Figure

_MOST_DIGITS = 6  # after the point
FEW_SEEDS = 3  # below it a spread is itself little more than a guess


def facts(found: Comparison) -> list[str]:
    """Return the study's facts, a sentence or two each, the main one first."""
    opening = _varied(found)
    ranked = found.ranked
    if found.quality is None or not ranked:
        return [f"{opening}. {_nothing_to_rank(found)}"]
    sentences = [f"{opening}. {_winner(found.quality, ranked, found.step)}"]
    unbiased = [one for one in ranked if not one.figures[found.quality.name].biased]
    if found.quality.judge and len(unbiased) < len(ranked):
        count = len(ranked) - len(unbiased)
        line = (
            f"Biased: {'1 setting is' if count == 1 else f'{count} settings are'} judged by the network that "
            f"{'it was' if count == 1 else 'they were'} aligned with ({found.quality.judge})"
        )
        if len(unbiased) > 1 and unbiased[0] is not ranked[0]:
            line += f". Among the others: {_winner(found.quality, unbiased, found.step)}"
        sentences.append(line.rstrip(".") + ".")
    baseline = [one for one in ranked if not one.encoders]
    if len(baseline) == 1 and ranked[0] is not baseline[0] and len(ranked) > 2:
        said = _against(found.quality, ranked, ranked[0], baseline[0], "training without alignment")
        sentences.append(f"{ranked[0].label} is {said}")
    apart = [one.label for one in found.settings if one not in ranked]
    if apart:
        sentences.append(
            f"Without {found.quality.title} at this step, and so not ranked: {', '.join(apart)}. An evaluation has one "
            f"space; --set evaluation.encoders=[NAME] gives all runs the same."
        )
    return sentences


def _varied(found: Comparison) -> str:
    runs, settings = sum(len(one.runs) for one in found.settings), len(found.settings)
    seeds = sorted({len(one.runs) for one in found.settings})
    each = "" if not seeds else f", {seeds[0]}" if len(seeds) == 1 else f", {seeds[0]} to {seeds[-1]}"
    each += "" if not seeds else f" seed{'' if seeds == [1] else 's'} each"
    names = [key.rpartition(".")[2] if key != "encoders" else "encoder" for key in found.keys]
    what = f" that differ in {_and(names)}" if names else ""
    out = len(found.left_out)
    left = f"; {out} more not compared" if out else ""
    return f"{_count(runs, 'run')} of {_count(settings, 'setting')}{what}{each}{left}"


def _nothing_to_rank(found: Comparison) -> str:
    if not found.settings:
        return "No run has finished: nothing can be compared yet."
    if found.step is None:
        return "No run was evaluated (--set evaluation.every=STEPS): there is no quality to compare."
    return f"No figure at step {found.step} has a known direction: nothing is ranked."


def _winner(figure: Figure, ranked: Sequence[Setting], step: int | None) -> str:
    best = ranked[0]
    figures = best.figures[figure.name]
    word = "Lowest" if figure.better == "lower" else "Highest"
    said = f"{word} {figure.title} at step {step}: {best.label} with {number_with_spread(figures)}"
    if len(ranked) == 1:
        return f"{said}; no other setting was judged by it."
    return f"{said}, {_against(figure, ranked, best, ranked[1], 'the next')}"


def _against(figure: Figure, ranked: Sequence[Setting], one: Setting, other: Setting, what: str) -> str:
    """Say how `one` differs from `other`, against the seed spread."""
    a, b = one.figures[figure.name], other.figures[figure.name]
    difference = abs(a.mean - b.mean)
    direction = "below" if a.mean < b.mean else "above" if a.mean > b.mean else "equal to"
    share = f" ({100 * difference / abs(b.mean):.2g} %)" if b.mean else ""
    spread, origin = seed_spread([a, b], [found.figures[figure.name] for found in ranked])
    gap = f"{rounded(difference, 2)}{share} {direction}" if difference else "equal to"
    said = f"{gap} {what}, {other.label} with {number_with_spread(b)}"
    if spread is None:
        return f"{said}. No seed was repeated, so these runs cannot say whether that is more than chance."
    few = min(len(a.values), len(b.values)) < FEW_SEEDS
    doubt = " With so few seeds the spread itself is rough." if few else ""
    if difference <= spread:
        return f"{said}: less than the seed spread of {rounded(spread, 2)}{origin}, so no winner can be named.{doubt}"
    times = f"{difference / spread:.1f} times the seed spread" if spread > 0 else "and seeds do not differ at all"
    of = f" of {rounded(spread, 2)}{origin}" if spread > 0 else ""
    return f"{said}: {times}{of}.{doubt}"


def seed_spread(compared: Sequence[Spread], all_settings: Sequence[Spread]) -> tuple[float | None, str]:
    """Return the pooled standard deviation of single runs, None where no setting has two seeds, and where it is from.

    Of the `compared` settings where one has two seeds, else of all: sqrt(sum (n - 1) s^2 / sum (n - 1)).
    """
    for settings, origin in ((compared, ""), (all_settings, " (of the other settings)")):
        freedom = sum(len(one.values) - 1 for one in settings)
        if freedom:
            squares = sum((len(one.values) - 1) * one.spread**2 for one in settings if one.spread is not None)
            return math.sqrt(squares / freedom), origin
    return None, ""


def number_with_spread(figures: Spread) -> str:
    """Return `12.3 ± 0.4 (3 seeds)`, or `12.3 (1 seed)`."""
    num = len(figures.values)
    return f"{plus_minus(figures)} ({_count(num, 'seed')})"


def plus_minus(figures: Spread) -> str:
    """Return mean and spread to the digits that the spread leaves, `12.3 ± 0.4`."""
    if figures.spread is None:
        return rounded(figures.mean)
    if figures.spread < max(10.0**-_MOST_DIGITS, 1e-9 * abs(figures.mean)):  # that of adding floats
        return f"{rounded(figures.mean)} ± 0"
    digits = min(max(0, 1 - math.floor(math.log10(figures.spread))), _MOST_DIGITS)
    return f"{figures.mean:.{digits}f} ± {figures.spread:.{digits}f}"


def rounded(value: float, significant: int = 4) -> str:
    """Return so many significant digits, written out unless the number is tiny."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = significant - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(digits, 0)}f}" if digits <= _MOST_DIGITS else f"{value:.{significant}g}"


def _count(num: int, what: str) -> str:
    return f"{num} {what}{'' if num == 1 else 's'}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
