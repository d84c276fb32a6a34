"""Power calculation for a study: the smallest detectable difference, and the seeds and prompts needed.

The test is intervals.estimate's, of a mean over seeds and prompts that are both random. The variance of the difference
between two arms has three components (seeds, prompts, residual), which a pilot of two or more seeds estimates.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from parts.cli import InputError, print_table
from recipes.study.analysis import MEASURED, score_wins
from recipes.study.intervals import t_quantile
from recipes.study.measures import limits_of, other_measures, runs_by_arm
from recipes.study.results import open_results

POWER, LEVEL = 0.8, 0.05
COUNTS = {"seeds": range(2, 10**4 + 1), "prompts": range(2, 10**7 + 1)}  # searched for the smallest that is enough


@dataclass(frozen=True)
class Spread:
    """Variance components of the difference between two arms, estimated from a pilot."""

    seeds: float
    prompts: float
    residual: float  # of a single value, beyond what its seed and its prompt explain
    n_seeds: int
    n_prompts: float  # infinite for a measure that has no value per prompt
    df: int  # degrees of freedom of the variance over seeds
    limit: float = math.inf  # the largest difference that can be

    def sd(self) -> float:
        """Standard deviation over seeds of the mean over the pilot's prompts. It includes `residual` / n_prompts."""
        return math.sqrt(self.seeds + self.residual / self.n_prompts)

    def interval(self) -> list["Spread"]:
        """The spread with the lower and the upper end of the 95 % chi-square interval of `sd`."""
        x, weights = chi_density(self.df)
        factors = self.df / np.interp((0.975, 0.025), weights.cumsum() - weights / 2, x) ** 2
        seeds = self.sd() ** 2 * factors - self.residual / self.n_prompts
        return [replace(self, seeds=max(0.0, float(value))) for value in seeds]


def spread_of(values: np.ndarray, limit: float = math.inf) -> Spread:
    """The spread of values (arms, seeds, prompts), pooled over arms: from the mean squares of the interactions with the
    arm, doubled for the difference of two arms. One prompt means that the measure has no values per prompt."""

    def mean_square(x: np.ndarray) -> float:
        for axis in range(x.ndim):
            x = x - x.mean(axis, keepdims=True)
        return 2 * float((x**2).sum()) / max(1, math.prod(n - 1 for n in x.shape))

    (arms, n_seeds, n_prompts), residual = values.shape, mean_square(values)
    seeds = max(0.0, mean_square(values.mean(2)) - residual / n_prompts)
    prompts = max(0.0, mean_square(values.mean(1)) - residual / n_seeds)
    n_prompts = n_prompts if n_prompts > 1 else math.inf
    return Spread(seeds, prompts, residual, n_seeds, n_prompts, (arms - 1) * (n_seeds - 1), limit)


def chi_density(df: int) -> tuple[np.ndarray, np.ndarray]:
    """A grid of values of the chi distribution, and their probabilities."""
    low, high = max(0.0, math.sqrt(df) - 8), math.sqrt(df) + 8
    x = low + (high - low) * (np.arange(2000) + 0.5) / 2000
    log = (df - 1) * np.log(x) - x**2 / 2
    weights = np.exp(log - log.max())
    return x, weights / weights.sum()


def power(spread: Spread, difference: float, seeds: int, prompts: float, level: float = LEVEL) -> float:
    """The probability that intervals.estimate finds a true difference (p < level).

    The error that it estimates depends on one chi-square variable, the variance over seeds; those over prompts and of
    the residual have so many degrees of freedom that they are taken as known.
    """
    residual = spread.residual / prompts / seeds
    by_seeds, by_prompts = spread.seeds / seeds + residual, spread.prompts / prompts + residual
    sd = math.sqrt(max(by_seeds + by_prompts - residual, 1e-30))
    if spread.limit < math.inf:  # estimate adds a prompt at each limit
        by_prompts += 2 * spread.limit**2 / prompts / (prompts + 1)
    x, weights = chi_density(seeds - 1)
    estimated = by_seeds * x**2 / (seeds - 1)
    error = np.sqrt(np.maximum(np.maximum(estimated + by_prompts - residual, by_prompts), estimated))
    critical = t_quantile(min(seeds, prompts) - 1, level) * error
    z = np.concatenate([critical - difference, critical + difference]) / sd / math.sqrt(2)
    return float(np.array([math.erfc(v) / 2 for v in z]) @ np.append(weights, weights))


def needed(spread: Spread, difference: float, level: float = LEVEL, **given: float) -> int | None:
    """The fewest seeds with given `prompts=`, or prompts with given `seeds=`; None where no number is enough."""
    (wanted,) = COUNTS.keys() - given.keys()
    counts = COUNTS[wanted]
    at = bisect_left(
        counts, True, key=lambda n: power(spread, difference, **{wanted: n}, **given, level=level) >= POWER
    )
    return counts[at] if at < len(counts) else None


def detectable(spread: Spread, seeds: int, prompts: float, level: float = LEVEL) -> float | None:
    """The smallest difference found with the probability POWER; None where it exceeds the spread's limit."""
    low, high = 0.0, 1e4 * math.sqrt(spread.seeds + spread.prompts + spread.residual)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if power(spread, middle, seeds, prompts, level) >= POWER else (middle, high)
    return high if high <= spread.limit else None


def read_pilot(path: Path) -> dict[str, Spread]:
    """The spread of each measure in a results.json. Raises InputError."""
    with open_results(path) as results:
        runs, judge = runs_by_arm(results["runs"]), results["judge"]
        runs = {"one-off": runs.pop("one-off")} | runs
        values = np.array([[r["wins" if judge == "api" else "values"][-1] for r in of] for of in runs.values()], float)
        values = values[:, :, np.isfinite(values).all(axis=(0, 1))]  # the prompts that count in every run
        others = other_measures(results["runs"], results)
        losses = held_out_losses(runs)
    if min(values.shape) < 2:
        found = "{} arms, {} seeds and {} prompts with values in every run".format(*values.shape)
        raise InputError(f"{path}: {found}; a pilot needs two of each: --seeds 2")
    measures = {"win rate, %": spread_of(values if judge == "api" else score_wins(values, values[0], judge), 0.5)}
    if judge != "api":
        measures[MEASURED[judge]] = spread_of(values, 1.0 if judge == "exact" else math.inf)
    for name, arms in others.items():
        if name != "loss per row":  # it is the loss of the answers
            each = np.array(list(arms.values()))
            each = each[:, :, np.isfinite(each).all(axis=(0, 1))]
            measures[name] = spread_of(each, math.inf if limits_of(name) is None else limits_of(name)[1])
    return measures if losses is None else measures | {"held-out loss": spread_of(losses)}


def held_out_losses(runs: dict[str, list[dict]]) -> np.ndarray | None:
    """(arms, seeds, 1): the mean of all sets after the last stage. None where the study measured none."""
    held_out_table = [[r["matrix"] for r in of] for of in runs.values()]
    if not all(matrix for of in held_out_table for matrix in of):
        return None
    return np.array([[[np.mean([x[-1] for x in m["losses"].values()])] for m in of] for of in held_out_table])


def print_power(path: Path, differences: list[float], seeds: int, comparisons: int | None) -> None:
    """Print the tables for a study with this number of seeds and of comparisons with one-off (None: as in the pilot),
    and as many prompts as the pilot. `differences` are in points, for losses in hundredths."""
    pilot, limits, needs = read_pilot(path), [], []
    known = pilot["win rate, %"]
    comparisons, prompts = comparisons or known.df // (known.n_seeds - 1), f"{known.n_prompts:,} prompts"
    levels = (LEVEL, LEVEL / comparisons)

    def cell(spread: Spread, function: Callable, *given, scale: float = 1, style: str = ",", **named) -> str:
        found = [function(s, *given, **named) for s in (spread, *spread.interval())]
        middle, low, high = ("impossible" if x is None else format(scale * x, style) for x in found)
        return middle if middle == low == high else f"{middle} ({low} to {high})"

    for name, of in pilot.items():
        form = {"scale": 100, "style": ".1f"} if name.endswith("%") else {"scale": 1, "style": ".4f"}
        n, finite = of.n_prompts, math.isfinite(of.n_prompts)
        share = f"{of.residual / n / of.sd() ** 2:.0%}" if finite and of.sd() else "–"
        found = [cell(of, detectable, seeds, n, level, **form) for level in levels]
        limits.append((name, f"{n:,}" if finite else "–", cell(of, Spread.sd, **form), share, *found))
        for d in differences:
            few = [cell(of, needed, d / 100, level, prompts=n) for level in levels]
            few.append(cell(of, needed, d / 100, seeds=seeds) if finite else "–")
            needs.append((name, format(form["scale"] * d / 100, form["style"]), *few))
    print(f"Pilot: {known.n_seeds} seeds, {prompts}. In brackets: for the 95 % interval of the standard deviation (sd) "
          f"over seeds, which is\npooled over arms ({known.df} degrees of freedom). All for {POWER:.0%} power at "
          f"{LEVEL:.0%}, two-sided; by Holm: the worst case of {comparisons} comparisons.\n")  # fmt: skip
    header = ("difference of two arms", "prompts", "sd over seeds", "of its square by few prompts")
    print_table((*header, f"detectable, {seeds} seeds", "by Holm"), limits)
    print()
    print_table(("needed to detect", "difference", "seeds, these prompts", "by Holm", f"prompts, {seeds} seeds"), needs)
