"""What verdicts add up to: win rates with their uncertainty, length, agreement of judges. Statistics only, no files."""

import math
import re
import warnings
from itertools import combinations, product

import numpy as np

from parts.cli import raise_if_any, strip_control_chars

POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}


def verdict(difference: list[float]) -> str:
    """win, tie or loss from the model's lead in each order: a win is better in both, or better once and equal once."""
    signs = sum(map(sign, difference))
    return "win" if signs > 0 else "loss" if signs < 0 else "tie"


def exact_verdict(right: bool, baseline_right: bool) -> dict:
    """Scores, replies and verdict of --judge exact: 10 for the expected answer, else 1; the order does not matter."""
    scores = [10.0 if x else 1.0 for x in (right, baseline_right)]
    return {"scores": [scores, scores], "replies": ["", ""], "verdict": verdict([scores[0] - scores[1]])}


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def score_margins(row: dict) -> list[float] | None:
    """The model's lead in each order; None where one has no scores."""
    try:
        (model_1, baseline_1), (model_2, baseline_2) = row["scores"]
        return [model_1 - baseline_1, model_2 - baseline_2] if row["verdict"] in POINTS else None
    except (KeyError, TypeError, ValueError):
        return None


def without_canaries(rows: list[dict]) -> list[dict]:
    return [row for row in rows if not row.get("canary")]


def judge_name(row: dict) -> str:
    return str(row.get("judge", "unknown"))


def identical(row: dict) -> bool:
    return "answer" in row and row["answer"] == row.get("against")


def check_duplicates(rows: list[dict]) -> None:
    """Raise InputError where a question stands twice for the same model, baseline and judge: it would count twice."""
    seen, twice = set(), {}
    for r in rows:
        key = (r["model"], r["baseline"], judge_name(r), r["dataset"], r["id"], r.get("canary"))
        if key in seen:
            twice[key] = f"{r['dataset']} {r['id']}: {r['model']} against {r['baseline']} by {judge_name(r)}"
        seen.add(key)
    raise_if_any(
        [strip_control_chars(line) for line in twice.values()],
        "questions come twice",
        "Give each file of verdicts once.",
    )


# ---------------------------------------------------------------- intervals and tests


def bootstrap(counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums (resamples, K) of the columns of `counts` (n, K) over n rows drawn with replacement."""
    rng, n, sums = np.random.default_rng(seed), len(counts), []
    for a in range(0, resamples, 1000):
        size = min(1000, resamples - a)
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float32)
        sums.append(times @ counts.astype(np.float32))
    return np.concatenate(sums)


def central_95_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bounds of the middle 95 % along the first dimension, NaN left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a column that is all NaN
        low, high = np.nanquantile(values, [0.025, 0.975], axis=0)
    return low, high


def rate_interval(values: np.ndarray, mean: float | None = None) -> tuple[float, float]:
    """The 95 % interval of the mean of n independent values, each from 0 to 1: half a point for a tie, or a share.

    Wilson's score interval with continuity correction (Newcombe, 1998, method 4), which holds near 0 and 1, too. Values
    between 0 and 1 vary less than wins and losses alone: it takes as many of these as would vary as much (the effective
    sample size of Korn and Graubard, 1998); a 0 and a 1 are added to the values to estimate that. `mean` may say
    another mean for which the values are linearised.
    """
    mean = float(values.mean()) if mean is None else mean
    padded = np.append(values, (0.0, 1.0))
    centre = padded.mean()
    n = float(len(values) * centre * (1 - centre) / padded.var())
    z2 = 1.959964**2

    def half(q: float, towards: int) -> float:
        return math.sqrt(z2 * max(0.0, z2 + 2 * towards - 1 / n + 4 * q * (n * (1 - q) - towards)))

    low = (2 * n * mean + z2 - 1 - half(mean, -1)) / (2 * (n + z2)) if mean > 0 else 0.0
    high = (2 * n * mean + z2 + 1 + half(mean, 1)) / (2 * (n + z2)) if mean < 1 else 1.0
    return max(0.0, min(low, mean)), min(1.0, max(high, mean))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p value of as many wins and losses if both were equally likely; ties say nothing."""
    n, k = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * sum(map(math.exp, logs)))


# ---------------------------------------------------------------- win rates


def natural_order(names: list[str]) -> list[str]:
    """Each name once, in the order of its first appearance; names that differ in a number only, by that number."""
    stems = {name: re.sub(r"[0-9]+", "0", name) for name in names}  # in the order of `names`
    order = list(stems.values())
    return sorted(stems, key=lambda name: (order.index(stems[name]), list(map(int, re.findall(r"[0-9]+", name)))))


def summarize(rows: list[dict]) -> list[dict]:
    """A row per dataset of each comparison (model, baseline, judge), and one over all its datasets (`total`).

    `name` tells comparisons apart: the model, and its baseline and judge where there are several. `n` questions have a
    verdict and count; `common` of them count in every comparison of that dataset that has any, and `common_rate` is
    the win rate on these (None without any): rates on different questions cannot be compared.
    """
    comparisons: dict[tuple, list[dict]] = {}
    for r in rows:
        comparisons.setdefault((r["model"], r["baseline"], judge_name(r)), []).append(r)
    groups = []  # (comparison, dataset, whether it is over all, rows)
    for comparison, mine in comparisons.items():
        names = natural_order([r["dataset"] for r in mine])
        if len(names) > 1:
            groups += [(comparison, name, False, [r for r in mine if r["dataset"] == name]) for name in names]
        groups.append((comparison, "(all)" if "all" in names and len(names) > 1 else "all", True, mine))
    judged = [[r for r in of if r["verdict"] in POINTS] for *_, of in groups]
    points = [{(r["dataset"], r["id"]): POINTS[r["verdict"]] for r in of} for of in judged]
    common: dict[tuple, set] = {}  # (dataset, whether it is over all) -> questions that count in every comparison
    for (_, dataset, total, _), by_question in zip(groups, points):
        if by_question:
            common[dataset, total] = common.get((dataset, total), by_question.keys()) & by_question.keys()
    several = [len({comparison[k] for comparison in comparisons}) > 1 for k in (1, 2)]
    out = []
    for (comparison, dataset, total, of), by_question in zip(groups, points):
        model, baseline, judge = map(strip_control_chars, comparison)
        counts = {v: sum(r["verdict"] == v for r in of) for v in (*POINTS, "unparsed", "refused", "failed")}
        n = sum(counts[v] for v in POINTS)
        name = model + f" against {baseline}" * several[0] + f" by {judge}" * several[1]
        row = {
            "name": name,
            "model": model,
            "baseline": baseline,
            "judge": judge,
            "dataset": strip_control_chars(dataset),
        }
        row |= {"total": total, "n": n, **counts, "identical": sum(map(identical, of))}
        if n:
            values, shared = np.array(list(by_question.values())), common[dataset, total]
            mean, (low, high) = float(values.mean()), rate_interval(values)
            row |= {
                "common": len(shared),
                "common_rate": mean_or_none(np.array([by_question[q] for q in by_question if q in shared])),
                "win_rate": mean,
                "low": low,
                "high": high,
                "paper": mean - 0.5,
                "standard_error": float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
                "p": sign_test(counts["win"], counts["loss"]),
                **position_bias(of),
                **length_bias(of),
            }
        out.append(row)
    return out


def describe_question_mismatches(summary: list[dict]) -> list[str]:
    """A warning where comparisons rest on different questions, over all or on one dataset."""
    lines, of = [], {}
    for r in summary:
        if r["n"]:
            of.setdefault((r["dataset"], r["total"]), []).append(r)
    for (dataset, total), rows in of.items():
        if any(r["n"] > r["common"] for r in rows):
            on = "" if total else f" of {dataset}"
            counts = f"{min(r['n'] for r in rows):,} to {max(r['n'] for r in rows):,}"
            lines.append(
                f"WARNING: the win rates rest on different questions{on} ({counts} with a verdict): compare them on "
                f"the {rows[0]['common']:,} that all have in common."
            )
    return lines


def position_bias(rows: list[dict]) -> dict:
    """How often the two orders disagree, and the share of orders in which the answer in front was preferred."""
    both = [lead for lead in map(score_margins, rows) if lead]
    front = [f for a, b in both for f in (sign(a), -sign(b)) if f]
    return {
        "disagree": float(np.mean([a * b < 0 for a, b in both])) if both else None,
        "front": float(np.mean([f > 0 for f in front])) if front else None,
    }


def length_difference(row: dict) -> int:
    """Characters by which the model's answer is longer than the baseline's."""
    return len(str(row.get("answer", ""))) - len(str(row.get("against", "")))


def length_bias(rows: list[dict]) -> dict:
    """Win rate where the model's answer is the longer one and where it is the shorter, and what it would be at equal
    length; the mean length of its answers in characters."""
    of = [r for r in rows if r["verdict"] in POINTS]
    points = np.array([POINTS[r["verdict"]] for r in of])
    lead = np.array([length_difference(r) for r in of], float)
    return {
        "when_longer": mean_or_none(points[lead > 0]),
        "when_shorter": mean_or_none(points[lead < 0]),
        "length_controlled": length_controlled(points, lead),
        "mean_length": mean_or_none(np.array([len(str(r.get("answer", ""))) for r in of])),
    }


def mean_or_none(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


# ---------------------------------------------------------------- length


def length_controlled(points: np.ndarray, lead: np.ndarray) -> float:
    """The win rate that a logistic regression on the lead in length (characters) gives at equal length.

    It is the model which AlpacaEval 2 calls length_controlled_minimal: a term for tanh(lead / its standard deviation)
    and one for the model, a tie half a win, both under an L1 penalty whose strength, of ten from 1e-4 to 1e4, does best
    in five-fold cross-validation. Their leaderboard's length_controlled_v1 adds two things that exist only for their
    805 instructions against their baseline: a difficulty of each instruction, fitted over all models of the
    leaderboard, and verdicts on that baseline told to be brief or verbose.
    """
    if len(points) < 5 or np.ptp(points) == 0 or lead.std() == 0:
        return float(points.mean())
    x = np.stack([np.tanh(lead / lead.std(ddof=1)), np.ones(len(lead))], 1)
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
    """The theta (K,) that minimises |theta|_1 + strength x log-loss: Newton steps, each of them exact and shortened
    until it helps. For a K of two or so: it tries every choice of signs, since columns can be as good as the same."""
    choices = sorted(product((-1, 0, 1), repeat=len(theta)), key=lambda signs: signs.count(0))

    def cost(t: np.ndarray) -> float:
        return float(np.abs(t).sum() + strength * log_loss(x @ t, points))

    for _ in range(200):
        p = 1 / (1 + np.exp(-np.clip(x @ theta, -500, 500)))
        slope = strength * x.T @ (p - points)
        curve = strength * (x * (p * (1 - p))[:, None]).T @ x
        curve += 1e-10 * (1 + np.trace(curve)) * np.eye(len(theta))  # columns that are the same leave it singular
        new, best = theta, math.inf
        for signs in choices:
            on, t = np.flatnonzero(signs), np.zeros(len(theta))
            t[on] = np.linalg.solve(curve[np.ix_(on, on)], (curve @ theta - slope - signs)[on])
            away = t - theta
            value = np.abs(t).sum() + slope @ away + away @ curve @ away / 2
            if (np.sign(t) == signs).all() and value < best:
                new, best = t, value
                if all(signs):
                    break  # no other choice can be right
        step, before = 1.0, cost(theta)
        while step > 1e-8 and cost(theta + step * (new - theta)) > before:
            step /= 2
        change, theta = step * (new - theta), theta + step * (new - theta)
        if abs(change).max() < 1e-9:
            break
    return theta


# ---------------------------------------------------------------- may one trust the judge?

# What `compare --canaries` adds: answers of which every judge must say that they lose.
CANARIES = ("an empty answer", "the answer to another question", "an answer that asks for a 10")
TRUSTED = 0.9  # the share of canaries that a judge must get right


def canaries_right(rows: list[dict]) -> dict[str, tuple[int, int]]:
    """judge -> how many canaries it got right, and how many it judged."""
    found: dict[str, tuple[int, int]] = {}
    for r in rows:
        if r.get("canary") and r["verdict"] in POINTS:
            right, n = found.get(judge_name(r), (0, 0))
            found[judge_name(r)] = (right + (r["verdict"] == "loss"), n + 1)
    return found


def describe_canaries(rows: list[dict]) -> list[str]:
    """A line a judge: how many canaries it got right; a warning where that is too few."""
    lines = []
    for judge, (right, n) in canaries_right(rows).items():
        warning = "" if right >= TRUSTED * n else "WARNING: what this judge says cannot be trusted. "
        lines.append(strip_control_chars(f"{warning}{judge} got {right} of {n} pairs with a known verdict right."))
    return lines


def cohen_kappa(table: np.ndarray) -> np.ndarray:
    """Cohen's kappa (…) of counts (…, 3, 3); NaN where both always say the same one thing: chance explains all."""
    total = table.sum((-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        seen = np.trace(table, axis1=-2, axis2=-1) / total
        chance = (table.sum(-1) * table.sum(-2)).sum(-1) / total**2
        return np.where(chance < 1 - 1e-9, (seen - chance) / (1 - chance), np.nan)


def agreement(pairs: list[tuple[tuple, str, str]], resamples: int, seed: int) -> dict:
    """How often two verdicts on the same answers are the same, and Cohen's kappa, with 95 % intervals over questions.

    `pairs` are (question, one verdict, the other); each of one question counts, and questions are resampled.
    """
    names = list(POINTS)
    pairs = [(q, a, b) for q, a, b in pairs if a in POINTS and b in POINTS]
    at = {q: i for i, q in enumerate(dict.fromkeys(q for q, _, _ in pairs))}
    if not at:
        return {"n": 0}
    tables = np.zeros((len(at), 3, 3))
    for q, a, b in pairs:
        tables[at[q], names.index(a), names.index(b)] += 1
    drawn = bootstrap(tables.reshape(len(at), 9), resamples, seed).reshape(-1, 3, 3)
    total = tables.sum(0)
    raw, chance_corrected = float(np.trace(total) / total.sum()), float(cohen_kappa(total))
    low, high = share_interval(np.trace(tables, axis1=1, axis2=2), tables.sum((1, 2)))
    kappa_low, kappa_high = central_95_interval(cohen_kappa(drawn))
    if raw in (0, 1):
        chance = float((total.sum(0) * total.sum(1)).sum() / total.sum() ** 2)
        if chance < 1:
            kappa_low, kappa_high = ((bound - chance) / (1 - chance) for bound in (low, high))
    return {
        "n": len(pairs),
        "questions": len(at),
        "agreement": raw,
        "agreement_low": float(low),
        "agreement_high": float(high),
        "kappa": none_if_nan(chance_corrected),
        "kappa_low": none_if_nan(float(kappa_low)),
        "kappa_high": none_if_nan(float(kappa_high)),
    }


def none_if_nan(x: float) -> float | None:
    return None if math.isnan(x) else x


def share_interval(hits: np.ndarray, of: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of sum(hits) / sum(of) over questions (Q,), each with so many hits of so many."""
    mean = float(hits.sum() / of.sum())
    return rate_interval(mean + (hits - mean * of) / of.mean(), mean)


def share_with_interval(hits: list[tuple[tuple, bool]], name: str) -> dict:
    """The share of hits, of (question, hit), with its 95 % interval over questions."""
    at = {q: i for i, q in enumerate(dict.fromkeys(q for q, _ in hits))}
    if not at:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    counts = np.zeros((len(at), 2))
    for q, hit in hits:
        counts[at[q]] += (hit, 1)
    low, high = share_interval(*counts.T)
    return {name: float(counts[:, 0].sum() / len(hits)), f"{name}_low": low, f"{name}_high": high}


def audit_judges(rows: list[dict]) -> list[dict]:
    """A row a judge: how often the order of the answers changed which was better (`order`), and turned it round
    (`disagree`), how often the answer in front (`front`) and the longer one (`longer`) won where one did; canaries."""
    out = []
    for judge in dict.fromkeys(map(judge_name, rows)):
        of = [r for r in rows if judge_name(r) == judge and not r.get("canary")]
        questions = [(r["dataset"], r["id"]) for r in of]
        both = [(q, lead) for q, lead in zip(questions, map(score_margins, of)) if lead]
        order = [(q, sign(a) != sign(b)) for q, (a, b) in both]
        longer = [
            (q, (r["verdict"] == "win") == (length_difference(r) > 0))
            for q, r in zip(questions, of)
            if r["verdict"] in ("win", "loss") and length_difference(r)
        ]
        right, canaries = canaries_right(rows).get(judge, (0, 0))
        row = {"judge": strip_control_chars(judge), "n": len(both), "decided": len(longer), **position_bias(of)}
        row |= share_with_interval(order, "order") | share_with_interval(longer, "longer")
        out.append(row | {"canaries_right": right, "canaries": canaries})
    return out


def audit_agreement(rows: list[dict], resamples: int, seed: int) -> list[dict]:
    """A row for each judge that judged more than once, with itself, and for each two judges of the same answers."""
    said: dict[str, dict[tuple, list[str]]] = {}  # judge -> pair of answers -> its verdicts
    for r in rows:
        if not r.get("canary"):
            names = tuple(str(r.get(key, "")) for key in ("model", "baseline", "answer", "against"))
            again = r.get("repeats") if isinstance(r.get("repeats"), list) else []
            verdicts = [r["verdict"], *(str(x.get("verdict")) for x in again if isinstance(x, dict))]
            said.setdefault(judge_name(r), {})[(r["dataset"], r["id"]), names] = verdicts
    out = []
    for judge, by_pair in said.items():
        pairs = [(q, a, b) for (q, _), verdicts in by_pair.items() for a, b in combinations(verdicts, 2)]
        if pairs:
            out.append({"first": strip_control_chars(judge), "second": "itself", **agreement(pairs, resamples, seed)})
    for one, two in combinations(said, 2):
        common = [key for key in said[one] if key in said[two]]
        pairs = [(key[0], said[one][key][0], said[two][key][0]) for key in common]
        out.append(
            {"first": strip_control_chars(one), "second": strip_control_chars(two), **agreement(pairs, resamples, seed)}
        )
    return out
