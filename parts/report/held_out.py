"""The held-out losses of a training run: a table, and in words what improved and what was forgotten."""

import json
import os
import shlex
import sys
from pathlib import Path

from parts.cli import print_table, strip_control_chars
from parts.files import atomic_write, json_values, read_text


def eval_matrix(metrics: Path) -> tuple[list[str], dict[str, list[float | None]]]:
    """The held-out losses in a metrics.jsonl: the stages ("start" first), and for each evaluation set the loss after
    each stage."""
    rows = [row for _, row in json_values(read_text(metrics)) if isinstance(row, dict) and "eval_loss" in row]
    sets, stages = (list(dict.fromkeys(str(row.get(key)) for row in rows)) for key in ("eval", "stage"))
    last = {(str(row.get("eval")), str(row.get("stage"))): row["eval_loss"] for row in rows}
    return stages, {name: [last.get((name, stage)) for stage in stages] for name in sets}


def write_eval_matrix(out: Path) -> None:
    """Write the held-out losses of a run to out/held_out.json, and print them as a table."""
    stages, losses = eval_matrix(out / "metrics.jsonl")
    atomic_write(out / "held_out.json", json.dumps({"stages": stages, "losses": losses}, indent=1))
    rows = [(name, *("–" if x is None else f"{x:.4f}" for x in by_stage)) for name, by_stage in losses.items()]
    print_table(("held-out loss after", *stages), rows)
    print("A lower loss is better. It is the mean over the tokens of the held-out answers.")
    for name, by_stage in losses.items():
        if None not in by_stage:
            print(strip_control_chars(f"{name}: {describe_change(stages, by_stage)}"))


def describe_change(stages: list[str], losses: list[float]) -> str:
    """In words, how the loss of an evaluation set changed from the first of the stages, "start", to the last. A change
    of less than 1 % is not called one."""
    start, best, end = losses[0], min(losses), losses[-1]
    word = "improved" if end < 0.99 * start else "worse" if end > 1.01 * start else "hardly changed"
    change = f"{word}, {start:.2f} -> {end:.2f}"
    if end <= 1.01 * best or best > 0.99 * start:
        return f"{change}."
    return f"{change}; partly forgotten: it was {best:.2f} after {stages[losses.index(best)]}."


def print_answers_command(out: Path, model: Path) -> None:
    """Print the command that shows the answers of the demo's model and of every stage to its held-out prompts."""
    measure = Path(__file__).parents[2] / "recipes" / "study" / "measure.py"
    folders = [out / stage for stage in eval_matrix(out / "metrics.jsonl")[0] if stage != "start"]
    command = [min(str(p), os.path.relpath(p), key=len) for p in (sys.executable, measure, model, *folders)]
    print(
        "To compare the answers before and after the training, side by side:\n  "
        + shlex.join([*command, "--html", str(out / "report.html")])
    )
