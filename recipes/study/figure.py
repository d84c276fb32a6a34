"""The figure of a study: one function per panel."""

from functools import partial

import numpy as np

from parts.report.figures import figure_bytes, settings
from recipes.study.analysis import MEASURED, PAPER, order_name, orders_of

CURVES = ("one-off", "phased", "random stages", "stage 3 only", "phased, replay 0.1")
RATES = ("one-off", "phased", "random stages", "stage 3 only", "stages 3-2-1", "phased, replay 0.1")
WIN_RATE = "win rate against one-off above 50 %"


def draw(table: dict[str, dict], results: dict) -> bytes:
    """The figure as PNG, from the summary of `analysis.summarize` and the results of results.json."""
    from matplotlib.figure import Figure

    with settings():
        figure = Figure((15, 9), layout="constrained")
        (stages, orders, arms), (groups, curves, rates) = figure.subplots(2, 3)
        count = len(results["plan"]["stages"])
        paper = PAPER if count == 3 else {}
        draw_stages(stages, table, paper, count)
        draw_orders(orders, table, paper, count)
        draw_arms(arms, table)
        draw_groups(groups, table, results, count)
        draw_curves(curves, table)
        draw_rates(rates, table, results["judge"])
        for axes in (stages, orders, groups, curves, rates):
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
        return figure_bytes(figure, "png", 110)


def linestyle(arm: str) -> str:
    return ":" if "random" in arm else "-"


def plot_estimates(axes, at: np.ndarray, estimates: list[dict], **style) -> None:
    """Means with their 95 % intervals, in per cent."""
    if estimates:
        mean, low, high = (100 * np.array([x[key] for x in estimates], float) for key in ("mean", "low", "high"))
        axes.errorbar(at, mean, [mean - low, high - mean], marker="o", capsize=3, **style)


def draw_stages(axes, table: dict[str, dict], paper: dict, stages: int) -> None:
    """The win rate after each stage, as in figure 3 of the paper."""
    staged = {arm: r for arm, r in table.items() if len(r["by_stage"]) > 1}
    for k, (arm, r) in enumerate(staged.items()):
        at = np.arange(1, len(r["by_stage"]) + 1) + 0.03 * k
        plot_estimates(axes, at, r["win_rate_by_stage"], label=arm, linestyle=linestyle(arm))
    for k, orders in enumerate(paper.values()):
        axes.plot(3.25, orders["phased"], "*", color="grey", label="paper, phased (three models)" if k == 0 else None)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xticks=range(1, stages + 1), xlabel="after stage", ylabel=WIN_RATE, title="The paper's figure")


def draw_orders(axes, table: dict[str, dict], paper: dict, stages: int) -> None:
    """Every order of the stages, beside the paper's."""
    orders = orders_of(table)
    for (model, known), marker in zip(paper.items(), "*v^"):
        at = [i for i, order in enumerate(orders) if order in known]
        values = [known[order] for order in orders if order in known]
        axes.plot(at, values, marker, color="grey", label=f"paper, {model}", linestyle="none")
    plot_estimates(
        axes, np.arange(len(orders)), [r["win_rate"] for r in orders.values()], label="here", linestyle="none"
    )
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(orders)), [order_name(order, stages) for order in orders])
    axes.set(title="The paper's table of orders", ylabel=WIN_RATE)


def draw_arms(axes, table: dict[str, dict]) -> None:
    """A forest plot of the win rates."""
    arms = [arm for arm in table if arm != "one-off"][::-1]
    for k, arm in enumerate(arms):
        p = table[arm]["p_holm"]
        color = "C0" if p is not None and p < 0.05 else "grey"
        low, mean, high = 100 * np.array([table[arm]["win_rate"][key] for key in ("low", "mean", "high")], float)
        axes.plot([low, high], [k, k], color=color)
        axes.plot(mean, k, "o", color=color)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(arms)), arms, fontsize=8)
    axes.set(title="Every arm (blue: p < 0.05, Holm)", xlabel=WIN_RATE)


def draw_groups(axes, table: dict[str, dict], results: dict, stages: int) -> None:
    """What each group of prompts has after each stage of phased training and of random stages."""
    names, group, judge = results["groups"], np.array(results["group"]), results["judge"]
    scale = 1 if judge == "loss" else 100
    for arm in ("phased", "random stages"):
        for k, values in enumerate(zip(*table.get(arm, {"by_stage": []})["by_stage"])):
            plot = partial(axes.plot, color=f"C{k % 10}", marker="o", linestyle=linestyle(arm))
            plot(
                range(1, len(values) + 1), scale * np.array(values, float), label=names[k] if arm == "phased" else None
            )
    for k in range(len(names) if results["ceiling"] else 0):
        known = 100 * np.array(results["ceiling"], float)[group == k].mean()
        axes.plot(stages + 0.3, known, "_", color=f"C{k % 10}", markersize=14)
    xlabel = "after stage (random dotted" + ("; dash: known as text)" if results["ceiling"] else ")")
    axes.set(xticks=range(1, stages + 1), xlabel=xlabel, ylabel=MEASURED[judge], title="Groups of prompts by stage")


def draw_curves(axes, table: dict[str, dict]) -> None:
    arms = [arm for arm in CURVES if arm in table and table[arm]["curve"]]
    if not arms:  # --evaluations 0
        return axes.set_axis_off()
    for arm in arms:
        axes.plot(*zip(*table[arm]["curve"]), label=arm, linestyle=linestyle(arm))
    axes.set(title="Learning curves", xlabel="step", ylabel="held-out loss, all stages")


def draw_rates(axes, table: dict[str, dict], judge: str) -> None:
    """The measure on validation prompts that chose the rate of each arm."""
    for arm in RATES:
        measured = table[arm]["validation"].items() if arm in table else ()
        if rates := sorted(item for item in measured if item[1] is not None):
            scaled = [y * (100 if judge == "exact" else 1) for _, y in rates]
            axes.plot([x for x, _ in rates], scaled, marker="o", label=arm, linestyle=linestyle(arm))
    if not axes.lines:  # a grid of one rate
        return axes.set_axis_off()
    axes.set(title="Learning rates", xlabel="peak learning rate", xscale="log")
    axes.minorticks_off()
    tried = sorted({rate for r in table.values() for rate in r["validation"]})
    axes.set_xticks(tried, [f"{rate:g}" for rate in tried])  # the default labels need mathtext
    axes.set_ylabel("on validation: " + ("exact answers, %" if judge == "exact" else "loss"))
