"""What a study found: the table, the figure, the page. Nothing is trained here."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from parts.cli import InputError, WorkError
from parts.files import atomic_write, read_json_object, write_lines
from parts.report.figures import can_draw, image, settings
from recipes.study.intervals import estimate, holm
from recipes.study.measures import compare_measures, measures_rows, other_measures

COMPARISONS = {"phased", "random stages", "phased by IFD", "phased, replay 0.1"}  # measured after every stage
DOTTED = "random"
MEASURED = {"exact": "exact answers, %", "loss": "loss of the answers", "api": "points against one-off, %"}
PAPER = {  # win rate against one-off - 50, by the order of the stages (Phased IFT, figure 3 and table 3)
    "Llama-2 7B": {"phased": 7.26, "2-1-3": 4.59, "1-3-2": 2.14, "3-1-2": 2.26},
    "Llama-2 13B": {"phased": 7.35, "2-1-3": 5.57, "1-3-2": 3.53, "3-1-2": 2.71, "3-2-1": -7.09},
    "Llama-3 8B": {"phased": 7.64, "2-1-3": 3.02, "1-3-2": 1.40, "3-1-2": 2.32, "2-3-1": -13.57, "3-2-1": -8.26},
}
PAPER_OTHERS = {"Llama-2 7B": {"stage 3 only": 4.44, "stage 2 only": 1.14}}

# ---------------------------------------------------------------- summary


def group_prompts(prompts: list[dict]) -> tuple[list[str], np.ndarray]:
    """The fifths of the prompts by score, easiest first; their data sets where some have none. Names, (P,) of which."""
    if all(isinstance(p.get("score"), (int, float)) for p in prompts):
        place = np.empty(len(prompts), int)
        place[np.argsort([p["score"] for p in prompts], kind="stable")] = np.arange(len(prompts))
        return [f"fifth {k}" for k in range(1, 6)], 5 * place // len(prompts)
    names = sorted({p["dataset"] for p in prompts})
    return names, np.array([names.index(p["dataset"]) for p in prompts])


def hard_weights(names: list[str], group: np.ndarray) -> np.ndarray | None:
    """As hard a test as the paper's sets are: three quarters of it the upper two fifths. None without fifths."""
    return np.where(group >= 3, 1.0, 2 / 9) if names[0] == "fifth 1" else None


def wins_of(values: np.ndarray, baseline: np.ndarray, judge: str) -> np.ndarray:
    """1, 1/2 or 0 a prompt: the model's value is better than the baseline's, the same, worse."""
    better = baseline - values if judge == "loss" else values - baseline
    return (1 + np.sign(better)) / 2


def summarize(results: dict) -> dict[str, dict]:
    """A row an arm: by group and over all, against one-off training with the same seed, after every stage measured.

    `win_rate_common` is over the prompts that count for every arm: an LLM that judges may leave out others of each.
    """
    names, group, judge = results["groups"], np.array(results["group"]), results["judge"]
    rates = {arm: {float(rate): mean for rate, mean in of.items()} for arm, of in results["rates"].items()}
    hard, by_arm = hard_weights(names, group), {}
    for r in sorted(results["runs"], key=lambda r: r["seed"]):
        by_arm.setdefault(r["arm"], []).append(r)
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
        wins = [v if judge == "api" else wins_of(v, values["one-off"][-1], judge) for v in of]
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
        row |= {"by_stage": [[mean_of(v[:, group == k]) for k in range(len(names))] for v in of]}
        row |= {"seeds": [mean_of(v) for v in last], "validation": rates[arm]}
        row |= {"matrix": mean_matrix([r["matrix"] for r in mine]), "curve": mean_curve([r["curve"] for r in mine])}
        table[arm] = row
    others = [arm for arm in table if arm != "one-off"]
    for arm, p in zip(others, holm([table[arm]["win_rate"]["p"] for arm in others])):
        table[arm]["p_holm"] = p
    return table


def mean_of(values: np.ndarray) -> float | None:
    """The mean of what is there (not NaN); None where nothing is."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else None


def mean_matrix(matrices: list[dict]) -> dict:
    """Held-out losses by set after each stage, the mean of runs."""
    found = [m for m in matrices if m]
    if not found:
        return {}
    losses = {name: np.mean([m["losses"][name] for m in found], axis=0).tolist() for name in found[0]["losses"]}
    return {"stages": found[0]["stages"], "losses": losses}


def mean_curve(curves: list[dict]) -> list[tuple[int, float]]:
    """(step, held-out loss), the mean of sets and runs."""
    by_step: dict[int, list[float]] = {}
    for curve in curves:
        for points in curve.values():
            for step, loss in points:
                by_step.setdefault(step, []).append(loss)
    return [(step, float(np.mean(losses))) for step, losses in sorted(by_step.items())]


# ---------------------------------------------------------------- the table


def lines_of(rows: list[list[str]]) -> str:
    header, *rest = rows
    return "".join(f"| {' | '.join(x)} |\n" for x in (header, ["---"] * len(header), *rest))


def signed(x: dict, scale: float = 100) -> str:
    if not x["n"]:
        return "–"
    mean, low, high = (f"{scale * x[key]:+.{1 if scale > 1 else 3}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def markdown(table: dict[str, dict], results: dict) -> str:
    """All tables of a study. `results` are those of results.json without `table`, see `write_findings`."""
    scale, digits = (1, 3) if results["judge"] == "loss" else (100, 0)

    def number(x: float | None, digits: int = digits) -> str:
        return "–" if x is None else f"{scale * x:.{digits}f}"

    rows, stages = arms_rows(table, results, number), len(results["plan"]["stages"])
    tables = [lines_of(rows), orders_table(table, stages), stages_table(table, results["groups"], number)]
    compared = compare_measures(other_measures(results["runs"], results))
    if compared:
        base = {name: float(np.nanmean(of["base"])) for name, of in base_measures(results).items()}
        tables.append(lines_of(list(measures_rows(compared, base))))
    parts = [caption(table, results), *tables, matrices(table)]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def base_measures(results: dict) -> dict[str, dict[str, np.ndarray]]:
    """The other measures of the model before any training, as those of a run."""
    base = results["base"]
    run = {"arm": "base", "seed": 0, "values": [base["values"]]} | {k: base.get(k) for k in ("ifd", "tasks")}
    return other_measures([run], results) if base["values"] else {}


def arms_rows(table: dict[str, dict], results: dict, number: Callable) -> list[list[str]]:
    """A row an arm: its values by group of prompts, and how it differs from one-off."""
    names, group, judge = results["groups"], np.array(results["group"]), results["judge"]
    differ, scale = prompts_differ(table), 1 if judge == "loss" else 100
    header = [MEASURED[judge], "rate", *names, "all", "hard", "loss", "against one-off", "win rate - 50", "p (Holm)"]
    rows = [[*header, "prompts", *["win rate - 50 on the common prompts"] * differ]]
    for name, values in (("*the model before*", results["base"]["values"]), ("*known as text*", results["ceiling"])):
        if values:
            values, hard = np.array(values, float), hard_weights(names, group)
            cells = [number(values[group == k].mean()) for k in range(len(names))]
            cells += [number(values.mean()), "–" if hard is None else number(np.average(values, weights=hard))]
            rows.append([name, "", *cells, "", "", "", "", f"{len(group):,}", *[""] * differ])
    for arm, r in table.items():
        row = [arm, f"{r['lr']:g}" + "†" * r["at_edge"], *(number(g["mean"]) for g in r["groups"])]
        row.append(f"**{number(r['all']['mean'], 3 if judge == 'loss' else 1)}**")
        row.append("–" if r["hard"] is None else number(r["hard"]["mean"]))
        losses = r["matrix"].get("losses", {}).values()
        row.append(f"{np.mean([of[-1] for of in losses]):.3f}" if losses else "–")
        if arm == "one-off":
            row += ["–"] * 3
        else:
            row.append("–" if r["difference"] is None else signed(r["difference"], scale))
            row += [signed(r["win_rate"]), "–" if r["p_holm"] is None else f"{r['p_holm']:.2g}"]
        rows.append([*row, f"{r['all']['n']:,}", *[signed(r["win_rate_common"])] * differ])
    shown = [k for k, column in enumerate(zip(*rows[1:])) if header[k : k + 1] not in (["hard"], ["loss"])
             or set(column) - {"–", ""}]  # fmt: skip
    return [[row[k] for k in shown] for row in rows]


def prompts_differ(table: dict[str, dict]) -> bool:
    """Whether the arms have verdicts on different prompts."""
    others = [r for arm, r in table.items() if arm != "one-off"]
    return len({r["win_rate"]["n"] for r in others} | {r["win_rate_common"]["n"] for r in others}) > 1


def caption(table: dict[str, dict], results: dict) -> str:
    seeds, steps = len(table["one-off"]["seeds"]), table["one-off"]["steps"]
    text = f"{steps:,} steps an arm, {seeds} seed{'s' * (seeds > 1)}, {len(results['group']):,} prompts; in brackets "
    if seeds > 1:
        text += f"95 % intervals over seeds and prompts (Student's t with {seeds - 1} degrees of freedom, so few seeds "
        text += f"make them wide); p corrected for {len(table) - 1} comparisons"
    else:
        text += "95 % intervals over prompts alone, and no p values, for one seed says nothing about others"
    if prompts_differ(table):
        common = max(r["win_rate_common"]["n"] for r in table.values())
        text += ". **The arms rest on different prompts**, those with a verdict in every seed: "
        text += f"all have {common:,} of them"
    text += ". Each arm at its best rate on other prompts"
    if any(r["at_edge"] for r in table.values()):
        text += " († the best is the grid's edge: better ones may lie beyond it)"
    if results["groups"][0] == "fifth 1":
        text += ". Hard: a test of which three quarters are the upper two fifths"
    if any(r["matrix"] for r in table.values()):
        text += ". Loss: held-out, the mean of all stages' sets"
    return f"{text}."


def orders_table(table: dict[str, dict], stages: int) -> str:
    """The paper's table of orders, beside its own numbers where there are three stages; empty without orders."""
    ours = orders_of(table) | {arm: r for arm, r in table.items() if arm.endswith(" only")}
    if len(ours) < 2:
        return ""
    paper = PAPER if stages == 3 else {}
    rows = [["win rate against one-off - 50", "here", "prompts", *paper]]
    for order, r in ours.items():
        known = [paper[model].get(order, PAPER_OTHERS.get(model, {}).get(order)) for model in paper]
        cells = ("–" if x is None else f"{x:+.2f}" for x in known)
        rows.append([order_name(order, stages), signed(r["win_rate"]), f"{r['win_rate']['n']:,}", *cells])
    return f"{lines_of(rows)}\n"


def stages_table(table: dict[str, dict], names: list[str], number) -> str:
    rows = [["after each stage", "stage", *names, "win rate - 50", "prompts"]]
    for arm, r in table.items():
        if len(r["by_stage"]) > 1:
            for k, (values, win) in enumerate(zip(r["by_stage"], r["win_rate_by_stage"]), 1):
                rows.append([arm, str(k), *map(number, values), signed(win), f"{win['n']:,}"])
    return f"{lines_of(rows)}\n" if len(rows) > 1 else ""


def matrices(table: dict[str, dict]) -> str:
    """Held-out loss by difficulty after each stage: what is forgotten."""
    rows = []
    for arm in ("one-off", "phased", "random stages", "phased, replay 0.1"):
        matrix = table.get(arm, {}).get("matrix")
        for name, losses in (matrix or {"losses": {}})["losses"].items():
            rows.append([arm, Path(name).stem, *(f"{x:.3f}" for x in losses)])
    most = max(map(len, rows), default=0)
    rows = [row + ["–"] * (most - len(row)) for row in rows]
    stages = (f"stage {k}" for k in range(1, most - 2))
    return lines_of([["held-out loss", "set", "start", *stages], *rows]) if rows else ""


# ---------------------------------------------------------------- the figure


def draw(table: dict[str, dict], results: dict) -> bytes:
    from matplotlib.figure import Figure

    names, group, judge = results["groups"], np.array(results["group"]), results["judge"]
    ceiling, stages = results["ceiling"], len(results["plan"]["stages"])
    paper = PAPER if stages == 3 else {}
    with settings():
        figure = Figure((15, 9), layout="constrained")
        (a, b, forest), (c, d, e) = figure.subplots(2, 3)
        staged = {arm: r for arm, r in table.items() if len(r["by_stage"]) > 1}
        for k, (arm, r) in enumerate(staged.items()):
            mean, low, high = (
                100 * np.array([w[key] for w in r["win_rate_by_stage"]], float) for key in ("mean", "low", "high")
            )
            at = np.arange(1, len(mean) + 1) + 0.03 * k
            a.errorbar(at, mean, [mean - low, high - mean], marker="o", capsize=3, label=arm, linestyle=style(arm))
        for k, orders in enumerate(paper.values()):
            a.plot(3.25, orders["phased"], "*", color="grey", label="paper, phased (three models)" if k == 0 else None)
        a.axhline(0, color="grey", linewidth=0.8)
        a.set(xticks=range(1, stages + 1), xlabel="after stage", ylabel="win rate against one-off - 50")
        a.set(title="The paper's figure")
        orders = orders_of(table)
        for k, (model, known) in enumerate(paper.items()):
            b.plot([i for i, o in enumerate(orders) if o in known], [known[o] for o in orders if o in known], "*v^"[k],
                   color="grey", label=f"paper, {model}", linestyle="none")  # fmt: skip
        points(b, np.arange(len(orders)), [r["win_rate"] for r in orders.values()], label="here")
        b.axhline(0, color="grey", linewidth=0.8)
        b.set_xticks(range(len(orders)), [order_name(o, stages) for o in orders])
        b.set(title="The paper's table of orders", ylabel="win rate against one-off - 50")
        others = [arm for arm in table if arm != "one-off"]
        for k, arm in enumerate(reversed(others)):
            p = table[arm]["p_holm"]
            color = "C0" if p is not None and p < 0.05 else "grey"
            low, mean, high = 100 * np.array([table[arm]["win_rate"][key] for key in ("low", "mean", "high")], float)
            forest.plot([low, high], [k, k], color=color)
            forest.plot(mean, k, "o", color=color)
        forest.axvline(0, color="grey", linewidth=0.8)
        forest.set_yticks(range(len(others)), others[::-1], fontsize=8)
        forest.set(title="Every arm (blue: p < 0.05, Holm)", xlabel="win rate against one-off - 50")
        for arm in ("phased", "random stages"):
            for k, values in enumerate(zip(*table.get(arm, {"by_stage": []})["by_stage"])):
                scaled = np.array(values, float) * (1 if judge == "loss" else 100)
                c.plot(
                    range(1, len(values) + 1),
                    scaled,
                    "o",
                    color=f"C{k % 10}",
                    linestyle=style(arm),
                    label=names[k] if arm == "phased" else None,
                )
        if ceiling:
            for k in range(len(names)):
                c.plot(
                    stages + 0.3,
                    100 * np.array(ceiling, float)[group == k].mean(),
                    "_",
                    color=f"C{k % 10}",
                    markersize=14,
                )
        c.set(xticks=range(1, stages + 1), xlabel="after stage (random dotted; dash: known as text)")
        c.set(title="What each stage leaves")
        c.set_ylabel(MEASURED[judge])
        for arm in ("one-off", "phased", "random stages", "stage 3 only", "phased, replay 0.1"):
            if arm in table and table[arm]["curve"]:
                d.plot(*zip(*table[arm]["curve"]), label=arm, linestyle=style(arm))
        d.set(title="Learning curves", xlabel="step", ylabel="held-out loss, all stages")
        for arm in ("one-off", "phased", "random stages", "stage 3 only", "stages 3-2-1", "phased, replay 0.1"):
            if arm in table and None not in table[arm]["validation"].values():
                rates = sorted(table[arm]["validation"].items())
                scaled = [y * (1 if judge != "exact" else 100) for _, y in rates]
                e.plot([x for x, _ in rates], scaled, marker="o", label=arm, linestyle=style(arm))
        e.set(title="The rate decides as well", xlabel="peak learning rate", xscale="log")
        e.minorticks_off()
        tried = sorted({rate for r in table.values() for rate in r["validation"]})
        e.set_xticks(tried, [f"{rate:g}" for rate in tried])  # a scale of its own would want mathematics
        e.set_ylabel("on validation: " + ("exact answers, %" if judge == "exact" else "loss"))
        for axes in (a, b, c, d, e):
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
        return image(figure, "png", 110)


def style(arm: str) -> str:
    return ":" if DOTTED in arm else "-"


def orders_of(table: dict[str, dict]) -> dict[str, dict]:
    """The arms that are the same stages in some order, by it."""
    return {arm.removeprefix("stages "): r for arm, r in table.items() if arm == "phased" or arm.startswith("stages ")}


def order_name(order: str, stages: int) -> str:
    return order.replace("phased", "-".join(str(k) for k in range(1, stages + 1)))


def points(axes, at, estimates: list[dict], label: str) -> None:
    if estimates:
        mean, low, high = (100 * np.array([x[key] for x in estimates], float) for key in ("mean", "low", "high"))
        axes.errorbar(at, mean, [mean - low, high - mean], fmt="o", capsize=3, label=label)


# ---------------------------------------------------------------- all files


def file_name(arm: str) -> str:
    return re.sub("[^a-z0-9.]+", "-", arm.lower()).strip("-")


def answers_of(out: Path, arm: str, seed: int) -> list[Path]:
    """The answers of a run after each measured stage."""
    found = (out / "answers").glob(f"{file_name(arm)}-{seed}.stage*.json")
    return sorted(found, key=lambda path: int(path.stem.rpartition("stage")[2]))


def texts_of(out: Path, record: dict) -> list[list[str]]:
    """After each measured stage, what there is to read of each prompt: the answers, or else the losses."""
    paths = answers_of(out, record["arm"], record["seed"])
    if paths:
        return [[row["output"] for row in json.loads(path.read_text(encoding="utf-8"))] for path in paths]
    return [[f"(loss {x:.3f})" for x in losses] for losses in record["values"]]


def verdict_rows(records: list[dict], prompts: list[dict], order: np.ndarray, out: Path, judge: str) -> list[dict]:
    """As judge.py writes them, of the first seed, the prompts in this order: for its page."""
    first = {r["arm"]: r for r in records if r["seed"] == 0}
    base, rows = first.pop("one-off"), []
    against = texts_of(out, base)[-1]
    for arm, r in first.items():
        texts, wins = texts_of(out, r), r.get("wins")
        if judge != "api":
            goal = np.array(base["values"][-1], float)
            wins = [wins_of(np.array(values, float), goal, judge) for values in r["values"]]
        for k, (answers, won) in enumerate(zip(texts, wins, strict=True), 1):
            who = {"model": f"{arm}/stage{k}" if len(texts) > 1 else arm, "baseline": "one-off, seed 0", "judge": judge}
            compared = list(zip(prompts, answers, against, won, strict=True))
            for p, answer, other, points_won in (compared[i] for i in order):
                row = who | {"dataset": p["dataset"], "id": p["id"], "instruction": p["messages"][-1]["content"]}
                said = {1.0: "win", 0.5: "tie", 0.0: "loss"}.get(points_won, "unparsed")
                row |= {"answer": answer, "against": other, "verdict": said}
                rows.append(row | ({"expected": p["expected"]} if "expected" in p else {}))
    return rows


def write_page(rows: list[dict], verdicts: Path, page: Path) -> None:
    """The page of judge.py report. Raises WorkError."""
    write_lines(verdicts, rows)
    command = [sys.executable, "judge.py", "report", str(verdicts), "--html", str(page)]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True)
    if done.returncode:
        raise WorkError(f"{page}: {done.stderr.strip()}")


def write_findings(out: Path, records: list[dict], prompts: list[dict], results: dict) -> None:
    """table.md, results.json, figure.png (with matplotlib) and report.html in `out`.

    `results` has settings, `plan`, `rates` (arm -> rate -> its mean on validation), `judge`, `tokens` of the expected
    answers, `base` (what the model before any training has) and `ceiling`; groups of prompts, runs and table are added.
    """
    names, group = group_prompts(prompts)
    results = results | {"groups": names, "group": group.tolist(), "runs": records}
    table = summarize(results)
    text = markdown(table, results)
    print(f"\n{text}")
    atomic_write(out / "table.md", text)
    atomic_write(out / "results.json", json.dumps(results | {"table": table}))
    written = ["table.md", "results.json"]
    if can_draw():
        atomic_write(out / "figure.png", draw(table, results))
        written.append("figure.png")
    if len(table) > 1:
        rows = verdict_rows(records, prompts, np.argsort(group, kind="stable"), out, results["judge"])
        write_page(rows, out / "verdicts.jsonl", out / "report.html")
        written.append("report.html")
    files = ", ".join(str(out / name) for name in written)
    print(f"-> {files}" + ("" if can_draw() else " (no figure: it needs matplotlib)"))


def print_table_of(path: Path) -> None:
    """Compute the tables again from a results.json. Raises InputError."""
    path = path / "results.json" if path.is_dir() else path
    results = read_json_object(path)
    try:
        print(markdown(summarize(results), results), end="")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path}: not the results of a study ({type(e).__name__}: {e})") from None
