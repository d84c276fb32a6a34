"""The histogram of scores, and all figures; matplotlib is needed only where one is drawn."""

import io
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from parts.cli import InputError
from parts.files import atomic_write

FIGURES = {  # of a report: their names and titles
    "stages": "After each stage",
    "datasets": "By dataset",
    "models": "Over all",
    "difficulty": "Difficulty of the instructions",
    "losses": "Training loss",
    "forgetting": "Held-out loss after each stage",
}
MAX_NAMED_MODELS = 8  # models: more are not named in a title, nor drawn by dataset
RC_PARAMS = {
    "text.parse_math": False,  # a dollar in a name is a dollar
    "svg.fonttype": "none",
    "svg.hashsalt": "",  # the same figure, the same bytes
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def histogram(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges: halves for scores from 1 to 5, else 12 equal bins."""
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
    """A context with the look of all figures. Raises InputError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plots needs matplotlib: pip install matplotlib") from None
    return matplotlib.rc_context(RC_PARAMS)


def subplots(xlabel: str | None, ylabel: str, width: float = 5.5, height: float = 3.6):
    """A figure, in inches, and its axes."""
    from matplotlib.figure import Figure  # without pyplot there is no window and nothing to close

    figure = Figure((width, height))
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def image(figure, kind: str, dpi: int = 120) -> bytes:
    """The figure as "svg" or "png"."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def plot_histogram(scores: np.ndarray, name: str, groups: list[np.ndarray], path: Path) -> None:
    """Write a PNG of the scores, stacked by `groups` (indices of the rows of each stage). Raises InputError."""
    with settings():
        figure, axes = subplots(name, "rows", 7, 3.5)
        labels = [f"s{k}" for k in range(1, len(groups) + 1)]
        axes.hist([scores[g] for g in groups], histogram(scores)[1], stacked=True, label=labels, rwidth=0.9)
        axes.legend()
        atomic_write(path, image(figure, "png", 150))
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
    """name -> {kind: image} for each of `kinds` ("svg", "png"), of those figures for which there are numbers.

    `summary` are the rows of verdicts.summarize; `losses` are (name, steps, losses) of runs, `held_out`
    (name, stages, losses by set); runs with `dotted` in
    their name are dotted lines. Raises InputError where matplotlib is not installed.
    """
    rated = [r for r in summary if r["n"]]
    models = len({r["name"] for r in rated})
    with settings():
        drawn = {
            "stages": draw_stages(rated, dotted),
            "datasets": draw_datasets(rated) if 0 < models <= MAX_NAMED_MODELS else None,
            "models": draw_models(rated) if models > MAX_NAMED_MODELS else None,
            "difficulty": draw_difficulty(np.array(difficulty)) if difficulty else None,
            "losses": draw_losses(losses) if losses else None,
            "forgetting": draw_eval_matrix(held_out) if any(stages for _, stages, _ in held_out) else None,
        }
        return {name: {kind: image(f, kind) for kind in kinds} for name, f in drawn.items() if f}


def rates(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Win rates (n,) in per cent, and how far the interval reaches below and above them (2, n)."""
    low, mean, high = (100 * np.array([r[key] for r in rows]) for key in ("low", "win_rate", "high"))
    return mean, np.stack([mean - low, high - mean])


def rate_label(rated: list[dict]) -> str:
    baselines = {r["baseline"] for r in rated}
    return f"win rate against {baselines.pop() if len(baselines) == 1 else 'the baseline'}, %"


def draw_stages(rated: list[dict], dotted: str):
    """The paper's figure 3, from models called NAME/stage1, NAME/stage2, …; None where there are none."""
    runs: dict[str, dict[int, dict]] = {}  # name of the run -> stage -> row
    for r in rated:
        found = re.fullmatch(r"(.*?)[/_ -]?stage([0-9]+)", r["model"])
        if found and r["total"]:
            runs.setdefault(found[1] + r["name"].removeprefix(r["model"]), {})[int(found[2])] = r
    if not runs:
        return None
    figure, axes = subplots("after stage", rate_label(rated))
    for k, (name, by_stage) in enumerate(runs.items()):
        stages = sorted(by_stage)
        mean, bars = rates([by_stage[x] for x in stages])
        style = ":" if dotted and dotted in name else "-"
        at = np.array(stages) + 0.02 * k
        axes.errorbar(at, mean, bars, marker="o", capsize=3, label=name or "stages", linestyle=style)
    axes.axhline(50, color="grey", linewidth=0.8)
    axes.set(xticks=sorted({stage for by_stage in runs.values() for stage in by_stage}))
    axes.legend()
    return figure


def draw_datasets(rated: list[dict]):
    names, models = (list(dict.fromkeys(r[key] for r in rated)) for key in ("dataset", "name"))
    width = max(5.5, 0.35 * len(names) * len(models) + 2)
    figure, axes = subplots(None, rate_label(rated), width)
    for k, model in enumerate(models):
        mine = [r for r in rated if r["name"] == model]
        mean, bars = rates(mine)
        at = np.array([names.index(r["dataset"]) for r in mine]) + (k + 0.5) * 0.8 / len(models) - 0.4
        axes.bar(at, mean - 50, 0.8 / len(models), bottom=50, yerr=bars, capsize=2, label=model)
    axes.axhline(50, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 3 else 0)
    figure.legend(loc="outside upper left", ncols=min(4, len(models)))
    return figure


def draw_models(rated: list[dict]):
    """Each over all, one below the other."""
    rows = [r for r in rated if r["total"]][::-1]
    figure, axes = subplots(rate_label(rated), "", height=0.22 * len(rows) + 1)
    mean, bars = rates(rows)
    axes.errorbar(mean, range(len(rows)), xerr=bars, fmt="o", capsize=2)
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
    axes.legend()
    return figure


def draw_eval_matrix(held_out: list[tuple[str, list[str], dict[str, list[float | None]]]]):
    """A matrix a run, evaluation set by finished stage; darker is a higher loss than the set's best."""
    rows = [(f"{run}: {name}" if len(held_out) > 1 else name, stages, losses) for run, stages, by_set in held_out
            for name, losses in by_set.items()]  # fmt: skip
    columns = max((stages for _, stages, _ in rows), key=len)
    values = np.full((len(rows), len(columns)), np.nan)
    for i, (_, stages, losses) in enumerate(rows):
        for stage, loss in zip(stages, losses):
            values[i, columns.index(stage)] = np.nan if loss is None else loss
    figure, axes = subplots(None, "", 1.2 * len(columns) + 2, 0.45 * len(rows) + 1)
    worse = values - np.nanmin(values, axis=1, keepdims=True)
    axes.imshow(worse, cmap="YlOrRd", aspect="auto", vmin=0)
    high = np.nanmax(worse) / 2
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            axes.text(
                j, i, f"{value:.3f}", ha="center", va="center", color="white" if worse[i, j] > high > 0 else "black"
            )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.xaxis.tick_top()
    return figure
