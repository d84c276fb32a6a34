"""Statistics of verdicts: win rates with intervals, length control, position bias and agreement of judges."""

import math
import re
import warnings
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product

import numpy as np

from parts.cli import raise_if_any, strip_control_chars

POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}


def decide_verdict(margins: list[float]) -> str:
    """win, tie or loss from the score margin in each order: a win is better in both, or better once and equal once."""
    signs = sum(map(sign, margins))
    return "win" if signs > 0 else "loss" if signs < 0 else "tie"


def exact_verdict(right: bool, baseline_right: bool) -> dict:
    """Scores, replies and verdict of --judge exact: 10 for the expected answer, else 1, the same in both orders."""
    scores = [10.0 if x else 1.0 for x in (right, baseline_right)]
    return {"scores": [scores, scores], "replies": ["", ""], "verdict": decide_verdict([scores[0] - scores[1]])}


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def score_margins(row: dict) -> list[float] | None:
    """The model's score minus the baseline's in each order; None if an order has no scores."""
    try:
        (model_1, baseline_1), (model_2, baseline_2) = row["scores"]
        return [model_1 - baseline_1, model_2 - baseline_2] if row["verdict"] in POINTS else None
    except (KeyError, TypeError, ValueError):
        return None


def without_canaries(rows: list[dict]) -> list[dict]:
    return [row for row in rows if not row.get("canary")]


def judge_name(row: dict) -> str:
    return str(row.get("judge", "unknown"))


def check_duplicates(rows: list[dict]) -> None:
    """Raise InputError if a question occurs twice for the same model, baseline and judge: it would count twice."""
    seen, duplicates = set(), {}
    for r in rows:
        key = (r["model"], r["baseline"], judge_name(r), r["dataset"], r["id"], r.get("canary"))
        if key in seen:
            duplicates[key] = f"{r['dataset']} {r['id']}: {r['model']} against {r['baseline']} by {judge_name(r)}"
        seen.add(key)
    lines = [strip_control_chars(line) for line in duplicates.values()]
    raise_if_any(lines, "questions occur twice", "Give each file of verdicts once.")


# ---------------------------------------------------------------- intervals and tests


def bootstrap(counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Column sums (resamples, K) of `counts` (n, K) over n rows drawn with replacement."""
    rng, n, sums = np.random.default_rng(seed), len(counts), []
    for a in range(0, resamples, 1000):
        size = min(1000, resamples - a)
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float32)
        sums.append(times @ counts.astype(np.float32))
    return np.concatenate(sums)


def central_95_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 2.5 % and 97.5 % quantiles along the first dimension, without NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a column of NaN only
        low, high = np.nanquantile(values, [0.025, 0.975], axis=0)
    return low, high


def rate_interval(values: np.ndarray, mean: float | None = None) -> tuple[float, float]:
    """The 95 % interval of the mean of n independent values, each from 0 to 1: half a point for a tie, or a share.

    Wilson's score interval with continuity correction (Newcombe, 1998, method 4), which is also valid near 0 and 1.
    Values between 0 and 1 vary less than wins and losses alone: n is replaced by the number of wins and losses that
    would vary as much (the effective sample size of Korn and Graubard, 1998), estimated with a 0 and a 1 added to the
    values. `mean`: the mean for which the values are linearised, if it is not their own.
    """
    mean = float(values.mean()) if mean is None else mean
    padded = np.append(values, (0.0, 1.0))
    centre = padded.mean()
    n = float(len(values) * centre * (1 - centre) / padded.var())
    z2 = 1.959964**2

    def half_width(side: int) -> float:
        return math.sqrt(z2 * max(0.0, z2 + 2 * side - 1 / n + 4 * mean * (n * (1 - mean) - side)))

    low = (2 * n * mean + z2 - 1 - half_width(-1)) / (2 * (n + z2)) if mean > 0 else 0.0
    high = (2 * n * mean + z2 + 1 + half_width(1)) / (2 * (n + z2)) if mean < 1 else 1.0
    return max(0.0, min(low, mean)), min(1.0, max(high, mean))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p value of these wins and losses if both were equally likely; ties do not count."""
    n, k = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * sum(map(math.exp, logs)))


# ---------------------------------------------------------------- win rates


def natural_order(names: list[str]) -> list[str]:
    """Each name once, in order of first appearance; names that differ only in a number are sorted by the number."""
    stems = {name: re.sub(r"[0-9]+", "0", name) for name in names}  # in the order of `names`
    order = list(stems.values())
    return sorted(stems, key=lambda name: (order.index(stems[name]), list(map(int, re.findall(r"[0-9]+", name)))))


@dataclass
class Group:
    """The rows of one comparison on one dataset, or on all of its datasets (`total`)."""

    model: str
    baseline: str
    judge: str
    dataset: str
    total: bool
    rows: list[dict]

    @cached_property
    def points(self) -> dict[tuple, float]:
        """(dataset, id) -> points, of the questions that have a verdict."""
        return {(r["dataset"], r["id"]): POINTS[r["verdict"]] for r in self.rows if r["verdict"] in POINTS}


def group_rows(rows: list[dict]) -> list[Group]:
    """For each comparison (model, baseline, judge) a group per dataset, if there are several, and one for all."""
    comparisons: dict[tuple, list[dict]] = {}
    for r in rows:
        comparisons.setdefault((r["model"], r["baseline"], judge_name(r)), []).append(r)
    groups = []
    for names, of_comparison in comparisons.items():
        datasets = natural_order([r["dataset"] for r in of_comparison])
        several = len(datasets) > 1
        for dataset in datasets if several else []:
            groups.append(Group(*names, dataset, False, [r for r in of_comparison if r["dataset"] == dataset]))
        groups.append(Group(*names, "(all)" if several and "all" in datasets else "all", True, of_comparison))
    return groups


def summarize(rows: list[dict]) -> list[dict]:
    """A row per dataset of each comparison (model, baseline, judge), and one for all its datasets (`total`).

    `name` identifies the comparison: the model, with its baseline and judge if there are several. `n` questions have a
    verdict; `common` of them have one in every comparison on that dataset, and `common_rate` is the win rate on these
    (None if there are none): rates on different questions cannot be compared.
    """
    groups = group_rows(rows)
    common: dict[tuple, set] = {}  # (dataset, total) -> questions with a verdict in every comparison that has any
    for group in groups:
        if group.points:
            key = group.dataset, group.total
            common[key] = common.get(key, group.points.keys()) & group.points.keys()
    several_baselines, several_judges = (len({getattr(g, key) for g in groups}) > 1 for key in ("baseline", "judge"))
    summary = []
    for group in groups:
        names = {key: strip_control_chars(getattr(group, key)) for key in ("model", "baseline", "judge", "dataset")}
        name = names["model"]
        name += f" against {names['baseline']}" * several_baselines + f" by {names['judge']}" * several_judges
        counts = {v: sum(r["verdict"] == v for r in group.rows) for v in (*POINTS, "unparsed", "refused", "failed")}
        row = {"name": name, **names, "total": group.total, "n": sum(counts[v] for v in POINTS), **counts}
        row["identical"] = sum("answer" in r and r["answer"] == r.get("against") for r in group.rows)
        if group.points:
            row |= win_rate_statistics(group, common[group.dataset, group.total])
        summary.append(row)
    return summary


def win_rate_statistics(group: Group, common: set) -> dict:
    """The win rate of a group with its interval and p value, also on the `common` questions, and the judge's biases."""
    points, verdicts = np.array(list(group.points.values())), [r["verdict"] for r in group.rows]
    low, high = rate_interval(points)
    return {
        "common": len(common),
        "common_rate": mean_or_none(np.array([group.points[q] for q in group.points if q in common])),
        "win_rate": float(points.mean()),
        "low": low,
        "high": high,
        "paper": float(points.mean()) - 0.5,
        "standard_error": float(points.std(ddof=1) / math.sqrt(len(points))) if len(points) > 1 else None,
        "p": sign_test(verdicts.count("win"), verdicts.count("loss")),
        **position_bias(group.rows),
        **length_bias(group.rows),
    }


def describe_question_mismatches(summary: list[dict]) -> list[str]:
    """A warning for each dataset, and for all, on which comparisons have verdicts on different questions."""
    lines, by_dataset = [], {}
    for r in summary:
        if r["n"]:
            by_dataset.setdefault((r["dataset"], r["total"]), []).append(r)
    for (dataset, total), rows in by_dataset.items():
        if any(r["n"] > r["common"] for r in rows):
            on = "" if total else f" of {dataset}"
            counts = f"{min(r['n'] for r in rows):,} to {max(r['n'] for r in rows):,}"
            lines.append(
                f"WARNING: the win rates rest on different questions{on} ({counts} with a verdict): compare them on "
                f"the {rows[0]['common']:,} that all have in common."
            )
    return lines


def position_bias(rows: list[dict]) -> dict:
    """How often the two orders disagree, and how often the first answer won in the orders that one answer won."""
    margins = [m for m in map(score_margins, rows) if m]
    winners = [s for a, b in margins for s in (sign(a), -sign(b)) if s]  # 1: the first answer of the order
    return {
        "disagree": mean_or_none(np.array([a * b < 0 for a, b in margins])),
        "front": mean_or_none(np.array(winners) > 0),
    }


def length_difference(row: dict) -> int:
    """The length of the model's answer minus that of the baseline's, in characters."""
    return len(str(row.get("answer", ""))) - len(str(row.get("against", "")))


def length_bias(rows: list[dict]) -> dict:
    """The win rate where the model's answer is longer, where it is shorter, and estimated for equal length; the mean
    length of its answers in characters."""
    judged = [r for r in rows if r["verdict"] in POINTS]
    points = np.array([POINTS[r["verdict"]] for r in judged])
    difference = np.array([length_difference(r) for r in judged], float)
    return {
        "when_longer": mean_or_none(points[difference > 0]),
        "when_shorter": mean_or_none(points[difference < 0]),
        "length_controlled": length_controlled(points, difference),
        "mean_length": mean_or_none(np.array([len(str(r.get("answer", ""))) for r in judged])),
    }


def mean_or_none(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


# ---------------------------------------------------------------- length


def length_controlled(points: np.ndarray, difference: np.ndarray) -> float:
    """The win rate at equal length by a logistic regression on the difference of lengths (characters).

    The model is AlpacaEval 2's length_controlled_minimal: a term for tanh(difference / its standard deviation) and one
    for the model, a tie half a win, both under an L1 penalty. Its strength, one of ten from 1e-4 to 1e4, is chosen by
    five-fold cross-validation. Their leaderboard's length_controlled_v1 adds two things that exist only for their 805
    instructions and their baseline: a difficulty of each instruction, fitted over all models of the leaderboard, and
    verdicts on that baseline prompted to be brief or verbose.
    """
    if len(points) < 5 or np.ptp(points) == 0 or difference.std() == 0:
        return float(points.mean())
    x = np.stack([np.tanh(difference / difference.std(ddof=1)), np.ones(len(difference))], 1)
    strengths, losses = np.logspace(-4, 4, 10), np.zeros(10)
    folds = np.arange(len(points)) % 5
    for k in range(5):
        theta = np.zeros(2)
        for i, strength in enumerate(strengths):
            theta = fit_logistic(x[folds != k], points[folds != k], strength, theta)
            losses[i] += log_loss(x[folds == k] @ theta, points[folds == k]) / (folds == k).sum()
    theta = fit_logistic(x, points, strengths[losses.argmin()], np.zeros(2))
    return float(1 / (1 + np.exp(-np.clip(theta[1], -500, 500))))


def log_loss(z: np.ndarray, points: np.ndarray) -> float:
    return float((np.logaddexp(0, z) - points * z).sum())


def fit_logistic(x: np.ndarray, points: np.ndarray, strength: float, theta: np.ndarray) -> np.ndarray:
    """The theta (K,) that minimizes |theta|_1 + strength x log-loss, by Newton steps. Each step minimizes the quadratic
    model exactly, trying every choice of signs (so K must be small: columns may be nearly collinear), and is then
    shortened until the objective falls."""
    choices = sorted(product((-1, 0, 1), repeat=len(theta)), key=lambda signs: signs.count(0))

    def objective(t: np.ndarray) -> float:
        return float(np.abs(t).sum() + strength * log_loss(x @ t, points))

    for _ in range(200):
        p = 1 / (1 + np.exp(-np.clip(x @ theta, -500, 500)))
        gradient = strength * x.T @ (p - points)
        hessian = strength * (x * (p * (1 - p))[:, None]).T @ x
        hessian += 1e-10 * (1 + np.trace(hessian)) * np.eye(len(theta))  # equal columns would make it singular
        new, best = theta, math.inf
        for signs in choices:
            active, t = np.flatnonzero(signs), np.zeros(len(theta))
            t[active] = np.linalg.solve(hessian[np.ix_(active, active)], (hessian @ theta - gradient - signs)[active])
            delta = t - theta
            value = np.abs(t).sum() + gradient @ delta + delta @ hessian @ delta / 2
            if (np.sign(t) == signs).all() and value < best:
                new, best = t, value
                if all(signs):
                    break  # the other choices cannot be better
        step, before = 1.0, objective(theta)
        while step > 1e-8 and objective(theta + step * (new - theta)) > before:
            step /= 2
        change, theta = step * (new - theta), theta + step * (new - theta)
        if abs(change).max() < 1e-9:
            break
    return theta


# ---------------------------------------------------------------- reliability of the judge

# The answers that `compare --canaries` adds; they must lose.
CANARIES = ("an empty answer", "the answer to another question", "an answer that asks for a 10")
MIN_CANARIES_RIGHT = 0.9  # share of canaries that a reliable judge gets right


def canaries_right(rows: list[dict]) -> dict[str, tuple[int, int]]:
    """judge -> the number of canaries it got right, and the number it judged."""
    counts: dict[str, tuple[int, int]] = {}
    for r in rows:
        if r.get("canary") and r["verdict"] in POINTS:
            right, n = counts.get(judge_name(r), (0, 0))
            counts[judge_name(r)] = (right + (r["verdict"] == "loss"), n + 1)
    return counts


def describe_canaries(rows: list[dict]) -> list[str]:
    """A line per judge: how many canaries it got right, with a warning if too few."""
    lines = []
    for judge, (right, n) in canaries_right(rows).items():
        warning = "" if right >= MIN_CANARIES_RIGHT * n else "WARNING: the verdicts of this judge are not reliable. "
        lines.append(strip_control_chars(f"{warning}{judge} got {right} of {n} pairs with a known verdict right."))
    return lines


def cohen_kappa(table: np.ndarray) -> np.ndarray:
    """Cohen's kappa (…) of counts (…, 3, 3); NaN if both judges give only one and the same verdict."""
    total = table.sum((-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        observed = np.trace(table, axis1=-2, axis2=-1) / total
        chance = (table.sum(-1) * table.sum(-2)).sum(-1) / total**2
        return np.where(chance < 1 - 1e-9, (observed - chance) / (1 - chance), np.nan)


def agreement(pairs: list[tuple[tuple, str, str]], resamples: int, seed: int) -> dict:
    """How often two verdicts on the same answers agree, and Cohen's kappa, with 95 % intervals over questions.

    `pairs` are (question, verdict, other verdict). All pairs of a question count; the bootstrap resamples questions.
    """
    names = list(POINTS)
    pairs = [(q, a, b) for q, a, b in pairs if a in POINTS and b in POINTS]
    index = {q: i for i, q in enumerate(dict.fromkeys(q for q, _, _ in pairs))}
    if not index:
        return {"n": 0}
    tables = np.zeros((len(index), 3, 3))
    for q, a, b in pairs:
        tables[index[q], names.index(a), names.index(b)] += 1
    resampled = bootstrap(tables.reshape(len(index), 9), resamples, seed).reshape(-1, 3, 3)
    total = tables.sum(0)
    share, kappa = float(np.trace(total) / total.sum()), float(cohen_kappa(total))
    low, high = share_interval(np.trace(tables, axis1=1, axis2=2), tables.sum((1, 2)))
    kappa_low, kappa_high = central_95_interval(cohen_kappa(resampled))
    if share in (0, 1):  # every resample gives the same kappa: use the interval of the share
        chance = float((total.sum(0) * total.sum(1)).sum() / total.sum() ** 2)
        if chance < 1:
            kappa_low, kappa_high = ((bound - chance) / (1 - chance) for bound in (low, high))
    return {
        "n": len(pairs),
        "questions": len(index),
        "agreement": share,
        "agreement_low": float(low),
        "agreement_high": float(high),
        "kappa": none_if_nan(kappa),
        "kappa_low": none_if_nan(float(kappa_low)),
        "kappa_high": none_if_nan(float(kappa_high)),
    }


def none_if_nan(x: float) -> float | None:
    return None if math.isnan(x) else x


def share_interval(hits: np.ndarray, trials: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of sum(hits) / sum(trials), where hits and trials (Q,) are counts of each question."""
    mean = float(hits.sum() / trials.sum())
    return rate_interval(mean + (hits - mean * trials) / trials.mean(), mean)


def share_with_interval(hits: list[tuple[tuple, bool]], name: str) -> dict:
    """The share of hits in pairs (question, hit), with its 95 % interval over questions."""
    index = {q: i for i, q in enumerate(dict.fromkeys(q for q, _ in hits))}
    if not index:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    counts = np.zeros((len(index), 2))
    for q, hit in hits:
        counts[index[q]] += (hit, 1)
    low, high = share_interval(*counts.T)
    return {name: float(counts[:, 0].sum() / len(hits)), f"{name}_low": low, f"{name}_high": high}


def audit_judges(rows: list[dict]) -> list[dict]:
    """A row per judge: how often the order of the answers changed the verdict (`order`) and reversed it (`disagree`),
    how often the first (`front`) and the longer answer (`longer`) won if one of the two won; canaries."""
    audits = []
    for judge in dict.fromkeys(map(judge_name, rows)):
        judged = [r for r in without_canaries(rows) if judge_name(r) == judge]
        order, longer = [], []  # (question, whether it is so)
        for r in judged:
            question, margins = (r["dataset"], r["id"]), score_margins(r)
            if margins:
                order.append((question, sign(margins[0]) != sign(margins[1])))
            if r["verdict"] in ("win", "loss") and length_difference(r):
                longer.append((question, (r["verdict"] == "win") == (length_difference(r) > 0)))
        right, canaries = canaries_right(rows).get(judge, (0, 0))
        row = {"judge": strip_control_chars(judge), "n": len(order), "decided": len(longer), **position_bias(judged)}
        row |= share_with_interval(order, "order") | share_with_interval(longer, "longer")
        audits.append(row | {"canaries_right": right, "canaries": canaries})
    return audits


def audit_agreement(rows: list[dict], resamples: int, seed: int) -> list[dict]:
    """A row for each judge with repeated verdicts, with itself, and for each two judges of the same answers."""
    verdicts: dict[str, dict[tuple, list[str]]] = {}  # judge -> (question, answers) -> its verdicts
    for r in without_canaries(rows):
        answers = tuple(str(r.get(key, "")) for key in ("model", "baseline", "answer", "against"))
        repeats = r.get("repeats") if isinstance(r.get("repeats"), list) else []
        repeated = [str(x.get("verdict")) for x in repeats if isinstance(x, dict)]
        verdicts.setdefault(judge_name(r), {})[(r["dataset"], r["id"]), answers] = [r["verdict"], *repeated]
    compared = []  # (judge, the other one, pairs of verdicts)
    for judge, by_answers in verdicts.items():
        pairs = [(q, a, b) for (q, _), of_pair in by_answers.items() for a, b in combinations(of_pair, 2)]
        if pairs:
            compared.append((judge, "itself", pairs))
    for one, two in combinations(verdicts, 2):
        common = [key for key in verdicts[one] if key in verdicts[two]]
        compared.append((one, two, [(key[0], verdicts[one][key][0], verdicts[two][key][0]) for key in common]))
    return [
        {"first": strip_control_chars(one), "second": strip_control_chars(two), **agreement(pairs, resamples, seed)}
        for one, two, pairs in compared
    ]
