"""The summary of a study and its tables, computed from the runs in results.json."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from recipes.study.intervals import estimate, holm
from recipes.study.measures import compare_measures, measures_tables, other_measures, runs_by_arm

MEASURED = {"exact": "exact answers, %", "loss": "loss of the answers", "api": "points against one-off, %"}
PAPER = {  # win rate against one-off above 50 %, by the order of the stages (Phased IFT, figure 3 and table 3)
    "Llama-2 7B": {"phased": 7.26, "2-1-3": 4.59, "1-3-2": 2.14, "3-1-2": 2.26},
    "Llama-2 13B": {"phased": 7.35, "2-1-3": 5.57, "1-3-2": 3.53, "3-1-2": 2.71, "3-2-1": -7.09},
    "Llama-3 8B": {"phased": 7.64, "2-1-3": 3.02, "1-3-2": 1.40, "3-1-2": 2.32, "2-3-1": -13.57, "3-2-1": -8.26},
}
PAPER_OTHERS = {"Llama-2 7B": {"stage 3 only": 4.44, "stage 2 only": 1.14}}

# ---------------------------------------------------------------- summary


def group_prompts(prompts: list[dict]) -> tuple[list[str], np.ndarray]:
    """The names of the groups of prompts, and the group of each prompt, (P,): fifths by score, the easiest first, or
    the data sets where a prompt has no score."""
    if all(isinstance(p.get("score"), (int, float)) for p in prompts):
        place = np.empty(len(prompts), int)
        place[np.argsort([p["score"] for p in prompts], kind="stable")] = np.arange(len(prompts))
        return [f"fifth {k}" for k in range(1, 6)], 5 * place // len(prompts)
    names = list(dict.fromkeys(p["dataset"] for p in prompts))
    return names, np.array([names.index(p["dataset"]) for p in prompts])


def hard_weights(names: list[str], group: np.ndarray) -> np.ndarray | None:
    """Weights of the prompts, (P,), that give the upper two fifths three quarters of the test, which is about as hard
    as the paper's test sets. None without fifths."""
    return np.where(group >= 3, 1.0, 2 / 9) if names[0] == "fifth 1" else None


def score_wins(values: np.ndarray, baseline: np.ndarray, judge: str) -> np.ndarray:
    """Per prompt 1, 1/2 or 0: the model's value is better than the baseline's, equal, or worse."""
    better = baseline - values if judge == "loss" else values - baseline
    return (1 + np.sign(better)) / 2


def summarize(results: dict) -> dict[str, dict]:
    """A row per arm: its values by group and over all prompts, and its win rate against one-off training with the same
    seed, after every measured stage.

    `win_rate_common` is over the prompts that have a verdict in every arm: a judge may refuse others for each arm.
    """
    names, group, judge = results["groups"], np.array(results["group"]), results["judge"]
    rates = {arm: {float(rate): mean for rate, mean in of.items()} for arm, of in results["rates"].items()}
    hard, by_arm = hard_weights(names, group), runs_by_arm(results["runs"])
    key = "wins" if judge == "api" else "values"
    values = {
        arm: np.array([r[key] for r in mine], float).transpose(1, 0, 2) for arm, mine in by_arm.items()
    }  # (stages, seeds, prompts)
    limits = None if judge == "loss" else (0.0, 1.0)
    counted = [~np.isnan(of[-1]).any(axis=0) for of in values.values()]
    common = np.all([x for x in counted if x.any()], axis=0)  # the prompts that count for every arm
    table = {}
    for arm, of in values.items():
        mine, last = by_arm[arm], of[-1]
        wins = [v if judge == "api" else score_wins(v, values["one-off"][-1], judge) for v in of]
        grid = sorted(rates[arm])
        row = {"lr": mine[0]["lr"], "steps": mine[0]["steps"], "rows": mine[0]["rows"]}
        row["at_edge"] = len(grid) > 1 and mine[0]["lr"] in (grid[0], grid[-1])
        row |= {"groups": [estimate(last[:, group == k], limits) for k in range(len(names))]}
        row |= {"all": estimate(last, limits), "hard": None if hard is None else estimate(last, weights=hard)}
        row |= {"win_rate_by_stage": [estimate(w - 0.5, (-0.5, 0.5)) for w in wins]}
        row |= {"win_rate": row["win_rate_by_stage"][-1]}
        row |= {"win_rate_common": estimate(wins[-1][:, common] - 0.5, (-0.5, 0.5))}
        difference = None if judge == "api" else estimate(last - values["one-off"][-1], limits and (-1.0, 1.0))
        row |= {"difference": difference}
        row |= {"by_stage": [[mean_of_known(v[:, group == k]) for k in range(len(names))] for v in of]}
        row |= {"seeds": [mean_of_known(v) for v in last], "validation": rates[arm]}
        row |= {"matrix": mean_matrix([r["matrix"] for r in mine]), "curve": mean_curve([r["curve"] for r in mine])}
        table[arm] = row
    others = [arm for arm in table if arm != "one-off"]
    for arm, p in zip(others, holm([table[arm]["win_rate"]["p"] for arm in others])):
        table[arm]["p_holm"] = p
    return table


def mean_of_known(values: np.ndarray) -> float | None:
    """The mean of the values that are not NaN; None if there are none."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else None


def mean_matrix(held_out_table: list[dict]) -> dict:
    """Held-out losses by set after each stage, averaged over runs."""
    found = [m for m in held_out_table if m]
    if not found:
        return {}
    losses = {name: np.mean([m["losses"][name] for m in found], axis=0).tolist() for name in found[0]["losses"]}
    return {"stages": found[0]["stages"], "losses": losses}


def mean_curve(curves: list[dict]) -> list[tuple[int, float]]:
    """(step, held-out loss), averaged over sets and runs."""
    by_step: dict[int, list[float]] = {}
    for curve in curves:
        for points in curve.values():
            for step, loss in points:
                by_step.setdefault(step, []).append(loss)
    return [(step, float(np.mean(losses))) for step, losses in sorted(by_step.items())]


# ---------------------------------------------------------------- the table


def markdown_table(rows: list[list[str]]) -> str:
    header, *rest = rows
    return "".join(f"| {' | '.join(x)} |\n" for x in (header, ["---"] * len(header), *rest))


def format_interval(x: dict, scale: float = 100) -> str:
    if not x["n"]:
        return "–"
    mean, low, high = (f"{scale * x[key]:+.{1 if scale > 1 else 3}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def markdown(table: dict[str, dict], results: dict) -> str:
    """All tables of a study. `results` are those of results.json without `table`, see `results.write_results`."""
    scale, digits = (1, 3) if results["judge"] == "loss" else (100, 0)

    def number(x: float | None, digits: int = digits) -> str:
        return "–" if x is None else f"{scale * x:.{digits}f}"

    rows, stages = arms_rows(table, results, number), len(results["plan"]["stages"])
    tables = [markdown_table(rows), orders_table(table, stages), stages_table(table, results["groups"], number)]
    compared = compare_measures(other_measures(results["runs"], results))
    base = {name: float(np.nanmean(of["base"])) for name, of in base_measures(results).items()}
    tables += map(markdown_table, measures_tables(compared, base))
    parts = [caption(table, results), *tables, held_out_table(table)]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def base_measures(results: dict) -> dict[str, dict[str, np.ndarray]]:
    """The other measures of the model before any training, as those of a run."""
    base = results["base"]
    run = {"arm": "base", "seed": 0, "values": [base["values"]]} | {k: base.get(k) for k in ("ifd", "tasks")}
    return other_measures([run], results) if base["values"] or results["judge"] != "loss" else {}


def arms_rows(table: dict[str, dict], results: dict, number: Callable) -> list[list[str]]:
    """The table with a row per arm: its values by group of prompts, and its difference from one-off."""
    names, group, judge = results["groups"], np.array(results["group"]), results["judge"]
    differ, scale = prompts_differ(table), 1 if judge == "loss" else 100
    header = [
        MEASURED[judge],
        "rate",
        *names,
        "all",
        "hard",
        "loss",
        "against one-off",
        "win rate above 50 %",
        "p (Holm)",
    ]
    rows = [[*header, "prompts", *["the same on the common prompts"] * differ]]
    for name, values in (("*before training*", results["base"]["values"]), ("*known as text*", results["ceiling"])):
        if values:
            values, hard = np.array(values, float), hard_weights(names, group)
            cells = [number(mean_of_known(values[group == k])) for k in range(len(names))]
            cells += [number(mean_of_known(values)), "–" if hard is None else number(np.average(values, weights=hard))]
            rows.append([name, "", *cells, "", "", "", "", f"{len(group):,}", *[""] * differ])
    for arm, r in table.items():
        row = [arm, f"{r['lr']:g}" + "†" * r["at_edge"], *(number(g["mean"]) for g in r["groups"])]
        row.append(f"**{number(r['all']['mean'], 3 if judge == 'loss' else 1)}**")
        row.append("–" if r["hard"] is None else number(r["hard"]["mean"]))
        losses = r["matrix"].get("losses", {}).values()
        row.append(f"{np.mean([of[-1] for of in losses]):.3f}" if losses else "–")
        common = format_interval(r["win_rate_common"])
        if arm == "one-off":
            row, common = [*row, *["–"] * 3], "–"
        else:
            row.append("–" if r["difference"] is None else format_interval(r["difference"], scale))
            row += [format_interval(r["win_rate"]), "–" if r["p_holm"] is None else f"{r['p_holm']:.2g}"]
        rows.append([*row, f"{r['all']['n']:,}", *[common] * differ])
    shown = [k for k, column in enumerate(zip(*rows[1:])) if header[k : k + 1] not in (["hard"], ["loss"])
             or set(column) - {"–", ""}]  # fmt: skip
    return [[row[k] for k in shown] for row in rows]


def prompts_differ(table: dict[str, dict]) -> bool:
    """Whether the arms have verdicts on different prompts."""
    others = [r for arm, r in table.items() if arm != "one-off"]
    return len({r["win_rate"]["n"] for r in others} | {r["win_rate_common"]["n"] for r in others}) > 1


def caption(table: dict[str, dict], results: dict) -> str:
    seeds, steps = len(table["one-off"]["seeds"]), table["one-off"]["steps"]
    text = f"{steps:,} steps per arm, {seeds} seed{'s' * (seeds > 1)}, {len(results['group']):,} prompts; in brackets "
    if seeds > 1:
        text += f"95 % intervals over seeds and prompts (Student's t with {seeds - 1} degrees of freedom, so few seeds "
        text += f"make them wide); p corrected for {len(table) - 1} comparisons"
    else:
        text += "95 % intervals over prompts alone, and no p values, for one seed says nothing about others"
    if prompts_differ(table):
        common = max(r["win_rate_common"]["n"] for r in table.values())
        text += ". **The arms rest on different prompts**, those with a verdict in every seed: "
        text += f"all have {common:,} of them"
    if any(len(r["validation"]) > 1 for r in table.values()):
        text += ". Each arm at its best rate on other prompts"
    if any(r["at_edge"] for r in table.values()):
        text += " († the best is the grid's edge: better ones may lie beyond it)"
    if results["groups"][0] == "fifth 1":
        text += ". Hard: a test of which three quarters are the upper two fifths"
    if any(r["matrix"] for r in table.values()):
        text += ". Loss: held-out, the mean of all stages' sets"
    return f"{text}."


def orders_of(table: dict[str, dict]) -> dict[str, dict]:
    """The arms that train on the same stages in some order, by that order."""
    return {arm.removeprefix("stages "): r for arm, r in table.items() if arm == "phased" or arm.startswith("stages ")}


def order_name(order: str, stages: int) -> str:
    return order.replace("phased", "-".join(str(k) for k in range(1, stages + 1)))


def orders_table(table: dict[str, dict], stages: int) -> str:
    """The paper's table of orders, beside its own numbers where there are three stages; empty without orders."""
    ours = orders_of(table) | {arm: r for arm, r in table.items() if arm.endswith(" only")}
    if len(ours) < 2:
        return ""
    paper = PAPER if stages == 3 else {}
    rows = [["win rate against one-off above 50 %", "here", "prompts", *paper]]
    for order, r in ours.items():
        known = [paper[model].get(order, PAPER_OTHERS.get(model, {}).get(order)) for model in paper]
        cells = ("–" if x is None else f"{x:+.2f}" for x in known)
        rows.append([order_name(order, stages), format_interval(r["win_rate"]), f"{r['win_rate']['n']:,}", *cells])
    return f"{markdown_table(rows)}\n"


def stages_table(table: dict[str, dict], names: list[str], number) -> str:
    rows = [["after each stage", "stage", *names, "win rate above 50 %", "prompts"]]
    for arm, r in table.items():
        if len(r["by_stage"]) > 1:
            for k, (values, win) in enumerate(zip(r["by_stage"], r["win_rate_by_stage"]), 1):
                rows.append([arm, str(k), *map(number, values), format_interval(win), f"{win['n']:,}"])
    return f"{markdown_table(rows)}\n" if len(rows) > 1 else ""


def held_out_table(table: dict[str, dict]) -> str:
    """The table of held-out losses by difficulty after each stage, which shows what is forgotten."""
    rows = []
    for arm in ("one-off", "phased", "random stages", "phased, replay 0.1"):
        matrix = table.get(arm, {}).get("matrix")
        for name, losses in (matrix or {"losses": {}})["losses"].items():
            rows.append([arm, Path(name).stem, *(f"{x:.3f}" for x in losses)])
    most = max(map(len, rows), default=0)
    rows = [row + ["–"] * (most - len(row)) for row in rows]
    stages = (f"stage {k}" for k in range(1, most - 2))
    return markdown_table([["held-out loss", "set", "start", *stages], *rows]) if rows else ""
