"""What is measured of a run beside the verdict of the study's judge, and how each arm differs from one-off in it."""

from collections.abc import Iterable

import numpy as np

from recipes.study.intervals import estimate, holm

TASKS = "tasks right, %"


def runs_by_arm(runs: list[dict]) -> dict[str, list[dict]]:
    """The runs of each arm, by rising seed. Raises ValueError if the arms have different seeds: each is compared with
    one-off seed by seed."""
    by_arm: dict[str, list[dict]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        by_arm.setdefault(run["arm"], []).append(run)
    if len({tuple(run["seed"] for run in mine) for mine in by_arm.values()}) > 1:
        raise ValueError("the arms have different seeds")
    return by_arm


def other_measures(runs: list[dict], results: dict) -> dict[str, dict[str, np.ndarray]]:
    """measure -> arm -> (seeds, prompts) after the last stage, as values whose plain mean is the measure.

    With --judge loss: the loss per row (the mean of the rows' mean losses) and the loss per token. With --ifd: the mean
    IFD. Each of all prompts, and of each group of prompts if there are two or three. With --tasks: the share of right
    answers. `results` are those of results.json: `judge`, `groups` and `group` of the prompts, `tokens` of their
    expected answers.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for arm, mine in runs_by_arm(runs).items():
        group, names = np.array(results["group"]), results["groups"] if 1 < len(results["groups"]) <= 3 else ()
        parts = {"": np.full(len(group), True)} | {f"{name}: ": group == k for k, name in enumerate(names)}
        if results["judge"] == "loss":
            values = np.array([run["values"][-1] for run in mine], float)
            for part, of in parts.items():
                found.setdefault(f"{part}loss per row", {})[arm] = values[:, of]
            for part, of in parts.items() if results.get("tokens") else ():
                weights = np.array(results["tokens"], float)[of]
                found.setdefault(f"{part}loss per token", {})[arm] = values[:, of] * (weights / weights.mean())
        if all(run.get("ifd") for run in mine):
            for part, of in parts.items():
                found.setdefault(f"{part}IFD", {})[arm] = np.array([run["ifd"] for run in mine], float)[:, of]
        if all(run.get("tasks") for run in mine):
            found.setdefault(TASKS, {})[arm] = np.array([run["tasks"] for run in mine], float)
    return found


def limits_of(name: str) -> tuple[float, float] | None:
    """The smallest and the largest difference that a prompt can make; None where there is no limit."""
    return (-1.0, 1.0) if name == TASKS else None


def compare_measures(measures: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, dict]]:
    """measure -> arm -> mean of the arm, its difference from one-off with the same seeds and prompts as
    intervals.estimate finds it, and `p_holm`, corrected for the number of arms. One-off has only the mean."""
    compared = {}
    for name, arms in measures.items():
        rows = {arm: {"mean": float(np.nanmean(values))} for arm, values in arms.items()}
        others = [arm for arm in arms if arm != "one-off"]
        found = [estimate(arms[arm] - arms["one-off"], limits_of(name)) for arm in others]
        for arm, difference, p in zip(others, found, holm([x["p"] for x in found])):
            rows[arm] |= difference | {"mean": rows[arm]["mean"], "difference": difference["mean"], "p_holm": p}
        compared[name] = rows
    return compared


def measures_tables(compared: dict[str, dict[str, dict]], base: dict[str, float]) -> Iterable[list[list[str]]]:
    """The cells of a table for all prompts and of one for each group: the means before training and of one-off, each
    arm's difference from one-off, its 95 % interval and its corrected p."""
    for part in dict.fromkeys(name.rpartition(": ")[0] for name in compared):
        found = {name: rows for name, rows in compared.items() if name.rpartition(": ")[0] == part}
        arms = [arm for arm in next(iter(found.values())) if arm != "one-off"]
        yield [
            ["difference from one-off" + (part and f", {part}"), *(name.rpartition(": ")[2] for name in found)],
            ["*before training: mean*", *(number(name, base.get(name)) for name in found)],
            ["one-off: mean", *(number(name, rows["one-off"]["mean"]) for name, rows in found.items())],
            *([arm, *(difference_cell(name, rows[arm]) for name, rows in found.items())] for arm in arms),
        ]


def number(name: str, value: float | None, sign: str = "") -> str:
    if value is None:
        return "–"
    return format(100 * value, f"{sign}.1f") if name == TASKS else format(value, f"{sign}.4f")


def difference_cell(name: str, row: dict) -> str:
    mean, low, high = (number(name, row[key], "+") for key in ("difference", "low", "high"))
    return f"{mean} ({low} to {high})" + ("" if row["p_holm"] is None else f", p {row['p_holm']:.2g}")
