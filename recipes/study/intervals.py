"""The statistics of a study: intervals and p values over seeds and prompts, Holm's correction."""

import math
from functools import cache

import numpy as np


def t_tail_probability(t: float, df: float) -> float:
    """P(|T| > t) of Student's T with df degrees of freedom, at least 1: T = sqrt(df) tan(x), x of density
    ~ cos(x)^(df - 1)."""
    x = np.linspace(0.0, math.pi / 2, 4001)
    density = np.cos(x) ** (df - 1)
    mass = np.append(0.0, np.cumsum((density[1:] + density[:-1]) * np.diff(x)))
    return float(1 - np.interp(math.atan(abs(t) / math.sqrt(df)), x, mass) / mass[-1])


@cache
def t_quantile(df: float, p: float = 0.05) -> float:
    """The t with P(|T| > t) = p, for Student's T with df degrees of freedom."""
    low, high = 0.0, 1e4
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail_probability(middle, df) > p else (low, middle)
    return high


def estimate(
    values: np.ndarray, limits: tuple[float, float] | None = None, weights: np.ndarray | None = None
) -> dict[str, float | None]:
    """Mean of (seeds, prompts), its 95 % interval, and the p value of its being 0, for other seeds and other prompts.

    Both are random (two crossed factors): the variance of the mean is that of the seeds' means over seeds, and that of
    the prompts' means over prompts, less what both count, the residual's. Student's t has the smaller of the two
    degrees of freedom, as in Welch's test where it must hold its level (Satterthwaite's estimate of them does not with
    two or three seeds). Where values have `limits`, one prompt at each is added to the variance over prompts, so that
    equal values are not taken for certainty. Prompts without a value (NaN) in some seed are left out; `n` are left.
    An infinite value makes the interval infinite.

    One seed says nothing about others: the interval is over prompts alone, and there is no p value; nor is there one
    without any variance. Without a prompt the mean and the interval are None as well.
    """
    there = ~np.isnan(values).any(axis=0)
    values = values[:, there]
    seeds, n = values.shape
    if n == 0:
        return {"n": 0, "mean": None, "low": None, "high": None, "p": None}
    if weights is not None:
        values = values * (weights[there] * n / weights[there].sum())
    if np.isinf(values).any():
        return {"n": n, "mean": float(values.mean()), "low": -math.inf, "high": math.inf, "p": None}
    mean, of_seed, of_prompt = float(values.mean()), values.mean(1), values.mean(0)
    padded = np.append(of_prompt, limits or ()) - mean
    by_prompts = float((padded**2).sum()) / max(1, len(padded) - 1) / n
    by_seeds = of_seed.var(ddof=1) / seeds if seeds > 1 else 0.0
    residual = 0.0
    if seeds > 1 and n > 1:
        left = values - of_seed[:, None] - of_prompt + mean
        residual = (left**2).sum() / ((seeds - 1) * (n - 1)) / (seeds * n)
    error = math.sqrt(max(by_prompts + by_seeds - residual, by_prompts, by_seeds))
    df = max(1, min(seeds - 1 if seeds > 1 else n - 1, n - 1))
    half = t_quantile(df) * error
    low, high = (
        (mean - half, mean + half) if limits is None else (max(limits[0], mean - half), min(limits[1], mean + half))
    )
    p = t_tail_probability(mean / error, df) if seeds > 1 and error else None
    return {"n": n, "mean": mean, "low": float(low), "high": float(high), "p": p}


def holm(p: list[float | None]) -> list[float | None]:
    """p values corrected for multiple comparisons (Holm, 1979). None (unknown) counts as a comparison and stays
    None."""
    out, worst = [None] * len(p), 0.0
    for rank, i in enumerate(sorted((i for i, x in enumerate(p) if x is not None), key=p.__getitem__)):
        worst = max(worst, (len(p) - rank) * p[i])
        out[i] = min(1.0, worst)
    return out
