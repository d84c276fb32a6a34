"""The histogram of scores, and all figures; only drawing needs matplotlib."""

import io
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from parts.cli import InputError
from parts.files import atomic_write

FIGURES = {  # of a report, by name: the title
    "stages": "After each stage",
    "datasets": "By dataset",
    "models": "Over all",
    "difficulty": "Difficulty of the instructions",
    "losses": "Training loss",
    "forgetting": "Held-out loss after each stage",
}
MAX_NAMED_MODELS = 8  # with more models, the title has no names and no figure shows datasets
RC_PARAMS = {
    "text.parse_math": False,  # names may contain dollars
    "svg.fonttype": "none",
    "svg.hashsalt": "",  # makes the bytes of a figure reproducible
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def histogram(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges: bins of width 0.5 for scores from 1 to 5, else 12 equal bins."""
    low, high = float(scores.min()), float(scores.max())
    if low >= 1 and high <= 5:
        return np.histogram(scores, np.arange(0.75, 5.5, 0.5))
    return np.histogram(scores, np.linspace(low, high if high > low else low + 1, 13))


def print_histogram(scores: np.ndarray, name: str) -> None:
    counts, edges = histogram(scores)
    print(f"\n{name}, rows")
    for count, a, b in zip(counts, edges, edges[1:]):
        label = f"{(a + b) / 2:.1f}" if edges[0] == 0.75 and len(counts) == 9 else f"{a:.3g} – {b:.3g}"
        print(f"{label:>15} {count:8,} {'█' * round(50 * count / counts.max())}")


# ---------------------------------------------------------------- matplotlib


def can_draw() -> bool:
    return find_spec("matplotlib") is not None


def settings():
    """A context with matplotlib's settings for all figures. Raises InputError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plots needs matplotlib: pip install matplotlib") from None
    return matplotlib.rc_context(RC_PARAMS)


def subplots(xlabel: str | None, ylabel: str, width: float = 5.5, height: float = 3.6):
    """A figure (sizes in inches) and its axes."""
    from matplotlib.figure import Figure  # unlike pyplot, it opens no window and needs no close

    figure = Figure((width, height))
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def figure_bytes(figure, kind: str, dpi: int = 120) -> bytes:
    """The figure as "svg" or "png"."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def plot_histogram(scores: np.ndarray, name: str, groups: list[np.ndarray], path: Path) -> None:
    """Write a PNG histogram of the scores, stacked by `groups` (row indices of each stage). Raises InputError."""
    with settings():
        figure, axes = subplots(name, "rows", 7, 3.5)
        labels = [f"s{k}" for k in range(1, len(groups) + 1)]
        axes.hist([scores[g] for g in groups], histogram(scores)[1], stacked=True, label=labels, rwidth=0.9)
        axes.legend()
        atomic_write(path, figure_bytes(figure, "png", 150))
    print(f"-> {path}")


# ---------------------------------------------------------------- the figures of a report


def report_figures(
    summary: list[dict],
    difficulty: list[float],
    losses: list[tuple[str, list[int], list[float]]],
    held_out: list[tuple[str, list[str], dict[str, list[float | None]]]],
    dotted: str,
    kinds: tuple[str, ...],
) -> dict[str, dict[str, bytes]]:
    """name -> {kind: image} for each of `kinds` ("svg", "png"), for the figures that have data.

    `summary`: the rows of win_rates.summarize; `losses`: (name, steps, losses) of runs; `held_out`: (name, stages,
    losses by evaluation set) of runs. Runs with `dotted` in their name get dotted lines. Raises InputError if
    matplotlib is not installed.
    """
    rows = [r for r in summary if r["n"]]
    models = len({r["name"] for r in rows})
    with settings():
        figures = {
            "stages": draw_stages(rows, dotted),
            "datasets": draw_datasets(rows) if 0 < models <= MAX_NAMED_MODELS else None,
            "models": draw_models(rows) if models > MAX_NAMED_MODELS else None,
            "difficulty": draw_difficulty(np.array(difficulty)) if difficulty else None,
            "losses": draw_losses(losses) if losses else None,
            "forgetting": draw_eval_matrix(held_out) if any(stages for _, stages, _ in held_out) else None,
        }
        return {name: {kind: figure_bytes(f, kind) for kind in kinds} for name, f in figures.items() if f}


def win_rates_and_errors(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Win rates (n,) in per cent, and the lengths of the error bars below and above them (2, n)."""
    low, mean, high = (100 * np.array([r[key] for r in rows]) for key in ("low", "win_rate", "high"))
    return mean, np.stack([mean - low, high - mean])


def win_rate_label(rows: list[dict]) -> str:
    baselines = {r["baseline"] for r in rows}
    return f"win rate against {baselines.pop() if len(baselines) == 1 else 'the baseline'}, %"


def draw_stages(rows: list[dict], dotted: str):
    """The paper's figure 3, for models called NAME/stage1, NAME/stage2, …; None if there are none."""
    runs: dict[str, dict[int, dict]] = {}  # name of the run -> stage -> row
    for r in rows:
        match = re.fullmatch(r"(.*?)[/_ -]?stage([0-9]+)", r["model"])
        if match and r["total"]:
            runs.setdefault(match[1] + r["name"].removeprefix(r["model"]), {})[int(match[2])] = r
    if not runs:
        return None
    figure, axes = subplots("after stage", win_rate_label(rows))
    for k, (name, by_stage) in enumerate(runs.items()):
        stages = sorted(by_stage)
        mean, errors = win_rates_and_errors([by_stage[stage] for stage in stages])
        style = ":" if dotted and dotted in name else "-"
        x = np.array(stages) + 0.02 * k  # so that error bars do not overlap
        axes.errorbar(x, mean, errors, marker="o", capsize=3, label=name or "stages", linestyle=style)
    axes.axhline(50, color="grey", linewidth=0.8)
    axes.set(xticks=sorted({stage for by_stage in runs.values() for stage in by_stage}))
    axes.legend()
    return figure


def draw_datasets(rows: list[dict]):
    """Bars of the win rates, a group per dataset."""
    datasets, models = (list(dict.fromkeys(r[key] for r in rows)) for key in ("dataset", "name"))
    bar_width = 0.8 / len(models)
    figure, axes = subplots(None, win_rate_label(rows), width=max(5.5, 0.35 * len(datasets) * len(models) + 2))
    for k, model in enumerate(models):
        of_model = [r for r in rows if r["name"] == model]
        mean, errors = win_rates_and_errors(of_model)
        x = np.array([datasets.index(r["dataset"]) for r in of_model]) + (k + 0.5) * bar_width - 0.4
        axes.bar(x, mean - 50, bar_width, bottom=50, yerr=errors, capsize=2, label=model)
    axes.axhline(50, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(datasets)), datasets, rotation=30 if len(datasets) > 3 else 0)
    figure.legend(loc="outside upper left", ncols=min(4, len(models)))
    return figure


def draw_models(rows: list[dict]):
    """The win rate of each model over all datasets, one below the other."""
    rows = [r for r in rows if r["total"]][::-1]
    figure, axes = subplots(win_rate_label(rows), "", height=0.22 * len(rows) + 1)
    mean, errors = win_rates_and_errors(rows)
    axes.errorbar(mean, range(len(rows)), xerr=errors, fmt="o", capsize=2)
    axes.axvline(50, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [r["name"] for r in rows])
    return figure


def draw_difficulty(scores: np.ndarray):
    figure, axes = subplots("difficulty", "rows")
    axes.stairs(*histogram(scores), fill=True)
    return figure


def draw_losses(losses: list[tuple[str, list[int], list[float]]]):
    figure, axes = subplots("step", "loss")
    for name, steps, values in losses:
        axes.plot(steps, values, linewidth=0.9, label=name)
    axes.locator_params("x", integer=True)
    axes.legend()
    return figure


def draw_eval_matrix(held_out: list[tuple[str, list[str], dict[str, list[float | None]]]]):
    """The loss of each evaluation set (rows) after each stage (columns); darker: further above the set's best loss."""
    rows = [
        (f"{run}: {name}" if len(held_out) > 1 else name, stages, losses)
        for run, stages, by_set in held_out
        for name, losses in by_set.items()
    ]
    columns = max((stages for _, stages, _ in rows), key=len)
    values = np.full((len(rows), len(columns)), np.nan)
    for i, (_, stages, losses) in enumerate(rows):
        for stage, loss in zip(stages, losses):
            values[i, columns.index(stage)] = np.nan if loss is None else loss
    figure, axes = subplots(None, "", 1.2 * len(columns) + 2, 0.45 * len(rows) + 1)
    increase = values - np.nanmin(values, axis=1, keepdims=True)
    axes.imshow(increase, cmap="YlOrRd", aspect="auto", vmin=0)
    dark = np.nanmax(increase) / 2
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = "white" if increase[i, j] > dark > 0 else "black"
            axes.text(j, i, f"{value:.3f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.xaxis.tick_top()
    return figure
