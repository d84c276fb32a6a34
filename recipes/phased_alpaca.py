"""Helper of phased_alpaca.sh: the default flags for a model, the estimated costs, the table beside the paper's numbers.

phased_alpaca.py usual MODEL          flags of train.py
phased_alpaca.py plan …               rows, tokens, dollars, GPU hours, disk
phased_alpaca.py table MODEL REPORT   win rates against one-off - 50 %, beside the paper's
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist

from parts.cli import InputError, print_table, run_program
from parts.files import read_json_object
from parts.report.win_rates import describe_question_mismatches
from recipes.study.power import LEVEL, POWER, Spread, needed

ORDERS = ("phased", "2-1-3", "1-3-2", "3-1-2", "2-3-1", "3-2-1")
NAMES = {"phased": "phased (1-2-3)", "random": "random stages", "stage3": "stage 3 only"}


@dataclass(frozen=True)
class Recipe:
    """For a model: what should fit on GPUs with 80 GB (not tested), and the paper's average win rates - 50 %."""

    name: str
    micro_batch_tokens: int
    paper: dict[str, str] = field(default_factory=dict)


def paper_results(*orders: str, **others: str) -> dict[str, str]:
    """The paper's numbers by arm; `orders` are those of ORDERS."""
    return dict(zip(ORDERS, orders)) | {"random": "below 0"} | others


# By hidden size, intermediate size, layers and vocabulary. The paper does not give all numbers.
RECIPES = {
    (4096, 11008, 32, 32000): Recipe(
        "Llama-2 7B", 16384, paper_results("+7.26", "+4.59", "+2.14", "+2.26", "below 0", "below 0", stage3="+4.44")
    ),
    (5120, 13824, 40, 32000): Recipe(
        "Llama-2 13B", 8192, paper_results("+7.35", "+5.57", "+3.53", "+2.71", "–", "-7.09")
    ),
    (8192, 28672, 80, 32000): Recipe("Llama-2 70B", 4096, paper_results("+2.82")),
    (4096, 14336, 32, 128256): Recipe(
        "Llama-3 8B", 16384, paper_results("+7.64", "+3.02", "+1.40", "+2.32", "-13.57", "-8.26")
    ),
    (8192, 28672, 80, 128256): Recipe("Llama-3 70B", 4096, paper_results("over +5")),
    (4096, 14336, 32, 32000): Recipe("Mistral 7B", 16384, paper_results("+6.30")),
}


def find_recipe(folder: Path) -> tuple[Recipe, bool]:
    """The recipe for the model of an HF folder, and whether it needs activation checkpointing."""
    raw = read_json_object(folder / "config.json")
    try:
        dim, layers = int(raw["hidden_size"]), int(raw["num_hidden_layers"])
        key = dim, int(raw["intermediate_size"]), layers, int(raw["vocab_size"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{folder / 'config.json'}: not the config of a Llama or Mistral model") from None
    parameters = 12 * layers * dim**2
    micro_batch_tokens = 2**14 if parameters <= 10e9 else 2**13 if parameters <= 20e9 else 2**12
    return RECIPES.get(key) or Recipe(folder.name, micro_batch_tokens), parameters > 1e9


def flags_command(args: argparse.Namespace) -> None:
    recipe, large = find_recipe(args.model)
    print(f"--micro-batch-tokens {recipe.micro_batch_tokens}" + " --checkpoint-activations" * large)


# ---------------------------------------------------------------- the plan


def plan_command(args: argparse.Namespace) -> None:
    """Print what all steps will cost. Raises InputError for input that a later step could not use."""
    from recipes import phased_plan  # imported here: the other commands need no torch

    inputs = phased_plan.read_inputs(args)
    steps = phased_plan.estimate_steps(inputs, args.arms, args.gpus, args.gpu)
    phased_plan.print_steps(steps)
    phased_plan.print_plan_notes(inputs, find_recipe(inputs.training.model)[0].name, args.gpus, args.gpu)
    print_power(len(inputs.prompts), len(args.arms) - 1, steps[-1].dollars)


def print_power(prompts: int, comparisons: int, dollars: float) -> None:
    """Print which differences of win rates (in points) the verdicts can detect. Without ties, the standard deviation of
    a verdict is 50 points. `dollars`: the cost of the verdicts; NaN if unknown."""
    z = [sum(map(NormalDist().inv_cdf, (1 - LEVEL / 2 / m, POWER))) for m in (1, max(1, comparisons))]
    alone, corrected = (f"{50 * x / math.sqrt(prompts):.1f}" for x in z)
    sds, lines = (1, 2, 4), []
    for difference in (2, 5, 7):
        n = math.ceil((50 * z[0] / difference) ** 2)
        cost = "unknown" if math.isnan(dollars) else f"{dollars * n / prompts:,.2f}"
        seeds = [needed(Spread((sd / 100) ** 2, 1 / 8, 1 / 8, 2, prompts, 1, 0.5), difference / 100, prompts=prompts)
                 for sd in sds]  # fmt: skip
        lines.append((f"{difference}", f"{n:,}", cost, *("impossible" if x is None else f"{x:,}" for x in seeds)))
    print(f"With {POWER:.0%} power at {LEVEL:.0%}, two-sided, {prompts:,} verdicts without ties detect a win rate that "
          f"is {alone} points from 50 %\n({corrected} in the worst case of Holm's correction for {comparisons} "
          "comparisons): for the models trained, not for other seeds. Needed for\nfewer points, and for other seeds as "
          "well, where half of the variance over prompts is the prompts' own:")  # fmt: skip
    few = (f"seeds, {prompts:,} prompts, sd over seeds {sds[0]}", *(f"sd {sd}" for sd in sds[1:]))
    print_table(("points", "prompts, one seed", "dollars", *few), lines)


# ---------------------------------------------------------------- the table


def table_command(args: argparse.Namespace) -> None:
    """Print a line for each arm in the report or the paper: points of win rate above 50 %, by test set and over all."""
    recipe, _ = find_recipe(args.model)
    summary = json.loads(args.report.read_text(encoding="utf-8"))
    by_dataset = {(r["model"], r["dataset"]): r for r in summary if not r["total"]}
    totals = {r["model"]: r for r in summary if r["total"]}
    datasets = list(dict.fromkeys(dataset for _, dataset in by_dataset))
    lines = []
    for arm in dict.fromkeys(["phased", "random", "stage3", *totals, *recipe.paper]):
        cells = [format_margin(by_dataset.get((arm, dataset))) for dataset in datasets]
        total, n, interval = totals.get(arm), "–", "–"
        if total:
            n = f"{total['n']:,}"
        if total and total["n"]:
            interval = " to ".join(f"{100 * total[key] - 50:+.1f}" for key in ("low", "high"))
        name = NAMES.get(arm, f"stages {arm}")
        lines.append((name, *cells, format_margin(total), n, interval, recipe.paper.get(arm, "–")))
    judge = ", ".join(dict.fromkeys(r["judge"] for r in summary))
    print(f"{recipe.name}: win rate against one-off - 50 %, by {judge}; the paper's by gpt-4-0613")
    print_table(("", *datasets, "all", "n", "95 %", "paper"), lines)
    for line in describe_question_mismatches(summary):
        print(line)


def format_margin(row: dict | None) -> str:
    return f"{100 * row['paper']:+.2f}" if row and row["n"] else "–"


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Helper of phased_alpaca.sh.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("usual", help="default flags of train.py for a model")
    p.add_argument("model", type=Path, metavar="MODEL", help="HF folder")
    p.set_defaults(work=flags_command)
    p = commands.add_parser("plan", help="what all steps will cost, estimated")
    p.add_argument("--alpaca", type=Path, required=True, metavar="F")
    p.add_argument("--prompts", type=Path, nargs="+", required=True, metavar="F")
    p.add_argument("--arms", nargs="+", required=True, metavar="NAME")
    p.add_argument("--gpus", type=int, required=True, metavar="N")
    p.add_argument("--gpu", choices=["B200", "H200", "H100", "A100", "L40S", "A10", "L4"], required=True)
    p.add_argument("--api", default="", metavar="FLAGS", help="of score.py difficulty")
    p.add_argument("--answers", default="", metavar="FLAGS", help="of generate.py")
    p.add_argument("training", nargs="*", metavar="FLAGS", help="of train.py, after --")
    p.set_defaults(work=plan_command)
    p = commands.add_parser("table", help="the win rates beside the paper's")
    p.add_argument("model", type=Path, metavar="MODEL", help="HF folder")
    p.add_argument("report", type=Path, metavar="REPORT", help="judge.py report --json")
    p.set_defaults(work=table_command)
    for p in commands.choices.values():
        p.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_program("phased_alpaca.py", args.work, args)


if __name__ == "__main__":
    sys.exit(main())
