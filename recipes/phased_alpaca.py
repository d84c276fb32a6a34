"""What phased_alpaca.sh asks: what is usual for a model, what the whole of it costs, and the table beside the paper's.

phased_alpaca.py usual MODEL          flags of train.py
phased_alpaca.py plan …               rows, tokens, dollars, GPU hours, disk
phased_alpaca.py table MODEL REPORT   win rates against one-off - 50 %, beside the paper's
"""

import argparse
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist

from parts.cli import InputError, dataclass_from_args, print_table, raise_if_any, run_program
from parts.files import read_json_object
from parts.report.win_rates import describe_question_mismatches
from parts.text.templates import choose_template
from recipes.study.power import LEVEL, POWER, Spread, needed

ORDERS = ("phased", "2-1-3", "1-3-2", "3-1-2", "2-3-1", "3-2-1")
NAMES = {"phased": "phased (1-2-3)", "random": "random stages", "stage3": "stage 3 only"}
TEST_SETS = "vicuna 80, koala 180, self-instruct 252, wizardlm 218, oasst 188, anthropic 129"


@dataclass(frozen=True)
class Recipe:
    """Of a model: what fits on GPUs of 80 GB (never run on them by us), and the paper's average win rates - 50 %."""

    name: str
    micro_batch_tokens: int
    paper: dict[str, str] = field(default_factory=dict)


def paper(*orders: str, **others: str) -> dict[str, str]:
    return dict(zip(ORDERS, orders)) | {"random": "below 0"} | others


RECIPES = {  # by hidden size, intermediate size, layers, vocabulary; the paper's numbers as far as it gives them
    (4096, 11008, 32, 32000): Recipe(
        "Llama-2 7B", 16384, paper("+7.26", "+4.59", "+2.14", "+2.26", "below 0", "below 0", stage3="+4.44")
    ),
    (5120, 13824, 40, 32000): Recipe("Llama-2 13B", 8192, paper("+7.35", "+5.57", "+3.53", "+2.71", "–", "-7.09")),
    (8192, 28672, 80, 32000): Recipe("Llama-2 70B", 4096, paper("+2.82")),
    (4096, 14336, 32, 128256): Recipe(
        "Llama-3 8B", 16384, paper("+7.64", "+3.02", "+1.40", "+2.32", "-13.57", "-8.26")
    ),
    (8192, 28672, 80, 128256): Recipe("Llama-3 70B", 4096, paper("over +5")),
    (4096, 14336, 32, 32000): Recipe("Mistral 7B", 16384, paper("+6.30")),
}


def find_recipe(folder: Path) -> tuple[Recipe, bool]:
    """For the model of an HF folder, and whether it is large."""
    raw = read_json_object(folder / "config.json")
    try:
        dim, layers = int(raw["hidden_size"]), int(raw["num_hidden_layers"])
        key = dim, int(raw["intermediate_size"]), layers, int(raw["vocab_size"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{folder / 'config.json'}: no config of a Llama or Mistral model") from None
    parameters = 12 * layers * dim**2
    micro_batch_tokens = 2**14 if parameters <= 10e9 else 2**13 if parameters <= 20e9 else 2**12
    return RECIPES.get(key) or Recipe(folder.name, micro_batch_tokens), parameters > 1e9


def print_flags(args: argparse.Namespace) -> None:
    found, large = find_recipe(args.model)
    print(f"--micro-batch-tokens {found.micro_batch_tokens}" + " --checkpoint-activations" * large)


# ---------------------------------------------------------------- the plan

STAGE_3 = 6.8 / 51.8, 0.2  # the hardest stage's share of Alpaca: rows in the paper, tokens by what it published of it
UTILIZATION, BANDWIDTH = 0.3, 1.5e12  # guesses: of a GPU's peak in training; bytes of weights read a second in decoding


def plan(args: argparse.Namespace) -> None:
    """Print what everything takes from its beginning. Raises InputError where something would fail later."""
    import torch

    import data
    import generate
    import score
    import train
    from parts import memory_plan
    from parts.api.options import api_options
    from parts.api.prompts import difficulty_prompt, judge_prompt
    from parts.api.questions import estimate_tokens, fence, fill
    from parts.checkpoints.config import read_config
    from parts.options import Weights
    from parts.text.rows import read_good_rows
    from parts.text.testsets import read_prompts
    from parts.text.tokenizers import load_tokenizer

    training = train.parse_args(["--stages", str(args.alpaca), *args.training])
    files = ["--prompts", *map(str, args.prompts), "--out", "answers.json"]
    answering = generate.parse_args(["--model", str(training.model), *files, *args.answers.split()])
    api = api_options(score.parse_args(["difficulty", str(args.alpaca), "--out", "scored.jsonl", *args.api.split()]))
    prompts = [p for path in args.prompts for p in read_prompts(path)]
    places: dict[tuple[str, str], list[str]] = {}
    for p in prompts:
        places.setdefault((p.dataset, p.id), []).append(p.source)
    raise_if_any([" and ".join(w) for w in places.values() if len(w) > 1], "prompts have the same data set and id")
    rows = read_good_rows(args.alpaca, skip_bad=True)
    template, _ = choose_template(training.model, load_tokenizer(training.model), training.template)
    documents = data.tokenize_files([args.alpaca], training.model, template, training.max_len, shown=True)
    model = train.build_meta_model(read_config(training.model), dataclass_from_args(Weights, training), torch.bfloat16)
    learned = train.trained_parameters(model)
    trained = set(learned)
    parameters = sum(p.numel() for p in model.parameters())
    state = sum(p.nbytes for p in learned.values())  # of weights; of a moment as much
    stored = read_json_object(training.model / "config.json").get("torch_dtype", "bfloat16")
    weights = parameters * (4 if "32" in str(stored) and training.save_dtype == "same" else 2)

    def dollars(tokens: float, replies: int) -> float | None:
        prices = api.prices()
        return None if None in prices else (prices[0] * tokens + prices[1] * replies * api.max_tokens) / 1e6

    def question(prompt: str, texts: dict[str, str]) -> int:
        return estimate_tokens([{"content": fill(prompt, {f"{{{k}}}": fence(v, k) for k, v in texts.items()})}])

    sent = 0
    for row in rows:
        asked, answered = ("\n\n".join(score.format_conversation(row)[k::2]) for k in (0, 1))
        sent += question(difficulty_prompt(None, False), {"instruction": asked, "answer": answered})
    table = [("difficulty", len(rows), sent, dollars(sent, len(rows)), 0.0, 0.0)]
    flops = memory_plan.training_flops(model, trained).of_batch(documents.lengths, int(documents.target_counts.sum()))
    speed = memory_plan.PEAK_FLOPS[args.gpu] * UTILIZATION / (4 / 3 if training.checkpoint_activations else 1)
    for arm in args.arms:
        share, tokens_share = STAGE_3 if arm == "stage3" else (1.0, 1.0)
        epochs = training.epochs[0]
        stages = {"one-off": 1, "phased": 3, "random": 3, "stage3": 1}.get(arm) or len(arm.split("-"))
        seen, hours = tokens_share * epochs, flops * tokens_share * epochs / speed / 3600
        disk = stages * weights + 4 * state  # folders; states kept: weights and moments, and weights
        tokens = round(seen * documents.lengths.sum())
        table.append((f"train {arm}", round(share * len(documents)), tokens, None, hours, disk))
    table.append(("  while it trains", 0, 0, None, 0.0, 5 * state))  # a third state before the oldest goes
    held = max(1, math.ceil(2 * parameters / 60e9))  # GPUs that one model takes; if several, an engine's work
    shares, longest, arms = max(1, args.gpus // held), answering.max_new_tokens, len(args.arms)
    steps = longest * max(1.0, len(prompts) / shares / (answering.batch_size or 64))
    hours = arms * args.gpus * steps * 2 * parameters / held / BANDWIDTH / 3600
    table.append(("answers", arms * len(prompts), arms * len(prompts) * longest, None, hours, 0.0))
    one = {"question": "", "answer_1": "", "answer_2": ""}
    each = question(judge_prompt(None, False), one) + 2 * longest
    asked = 2 * (arms - 1)
    sent = asked * sum(each + len(p.instruction.encode()) // 4 for p in prompts)
    asked *= len(prompts)
    table.append(("verdicts", asked, sent, dollars(sent, asked), 0.0, 0.0))
    paid = [row[3] for row in table if row[0] in ("difficulty", "verdicts")]
    total = None if None in paid else sum(paid)
    table.append(("together", 0, 0, total, sum(row[4] for row in table), sum(row[5] for row in table)))
    lines = []
    for what, n, tokens, money, hours, disk in table:
        money = f"{money:,.2f}" if money is not None else "unknown" if what in ("difficulty", "verdicts") else ""
        counts = (f"{n:,}" if n else "", f"{tokens:,}" if tokens else "")
        lines.append((what, *counts, money, f"{hours:,.1f}" if hours else "", f"{disk / 1e9:,.1f}" if disk else ""))
    print_table(("from the beginning, estimated", "rows", "tokens", "dollars", "GPU hours", "disk, GB"), lines)
    micro = training.micro_batch_tokens
    shape = (torch.bfloat16, micro, micro, training.checkpoint_activations, True)
    memory = sum(memory_plan.memory_plan(model, trained, args.gpus, *shape).values())
    where = f"{args.gpus} {args.gpu}"
    print(
        f"{find_recipe(training.model)[0].name}, {parameters:,} parameters, on {where}: about "
        f"{memory / 2**30:,.1f} GiB each while it trains. Hours are for {UTILIZATION:.0%} of their peak in training, "
        f"{BANDWIDTH / 1e12:g} TB/s\nin answering: guesses. Answers count as {longest} tokens. Stage 3 is taken as "
        f"{STAGE_3[0]:.0%} of the rows and {STAGE_3[1]:.0%} of the tokens, as in the paper's data."
    )
    sizes = ", ".join(f"{name} {n:,}" for name, n in Counter(p.dataset for p in prompts).items())
    print(f"Test sets: {sizes}.\nThe paper's: {TEST_SETS}.\n")
    print_power(len(prompts), arms - 1, table[-2][3])


def print_power(prompts: int, comparisons: int, dollars: float | None) -> None:
    """What verdicts for these dollars can detect: points of a win rate, whose standard deviation over prompts is 50
    without ties."""
    z = [sum(map(NormalDist().inv_cdf, (1 - LEVEL / 2 / m, POWER))) for m in (1, max(1, comparisons))]
    alone, corrected = (f"{50 * x / math.sqrt(prompts):.1f}" for x in z)
    sds, lines = (1, 2, 4), []
    for difference in (2, 5, 7):
        n = math.ceil((50 * z[0] / difference) ** 2)
        cost = "unknown" if dollars is None else f"{dollars * n / prompts:,.2f}"
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


def table(args: argparse.Namespace) -> None:
    """A line for each arm that we or the paper have: win rate - 50 %, by test set and over all questions."""
    found = find_recipe(args.model)[0]
    ours = {(r["model"], r["dataset"], r["total"]): r for r in json.loads(args.report.read_text(encoding="utf-8"))}
    sets = list(dict.fromkeys(dataset for _, dataset, total in ours if not total))
    totals = {model: r for (model, _, total), r in ours.items() if total}
    lines = []
    for arm in dict.fromkeys(["phased", "random", "stage3", *totals, *found.paper]):
        cells = [lead(ours.get((arm, dataset, False))) for dataset in sets]
        all_of_it, interval = totals.get(arm), "–"
        if all_of_it and all_of_it["n"]:
            interval = " to ".join(f"{100 * all_of_it[key] - 50:+.1f}" for key in ("low", "high"))
        name = NAMES.get(arm, f"stages {arm}")
        n = f"{all_of_it['n']:,}" if all_of_it else "–"
        lines.append((name, *cells, lead(all_of_it), n, interval, found.paper.get(arm, "–")))
    judge = ", ".join(dict.fromkeys(r["judge"] for r in ours.values()))
    print(f"{found.name}: win rate against one-off - 50 %, by {judge}; the paper's by gpt-4-0613")
    print_table(("", *sets, "all", "n", "95 %", "paper"), lines)
    for line in describe_question_mismatches(list(ours.values())):
        print(line)


def lead(row: dict | None) -> str:
    return f"{100 * row['paper']:+.2f}" if row and row["n"] else "–"


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What phased_alpaca.sh asks.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("usual", help="flags of train.py that are usual for a model")
    p.add_argument("model", type=Path, metavar="MODEL", help="HF folder")
    p.set_defaults(work=print_flags)
    p = commands.add_parser("plan", help="what the whole of it costs")
    p.add_argument("--alpaca", type=Path, required=True, metavar="F")
    p.add_argument("--prompts", type=Path, nargs="+", required=True, metavar="F")
    p.add_argument("--arms", nargs="+", required=True, metavar="NAME")
    p.add_argument("--gpus", type=int, required=True, metavar="N")
    p.add_argument("--gpu", choices=["B200", "H200", "H100", "A100", "L40S", "A10", "L4"], required=True)
    p.add_argument("--api", default="", metavar="FLAGS", help="of score.py difficulty")
    p.add_argument("--answers", default="", metavar="FLAGS", help="of generate.py")
    p.add_argument("training", nargs="*", metavar="FLAGS", help="of train.py, after --")
    p.set_defaults(work=plan)
    p = commands.add_parser("table", help="the win rates beside the paper's")
    p.add_argument("model", type=Path, metavar="MODEL", help="HF folder")
    p.add_argument("report", type=Path, metavar="REPORT", help="judge.py report --json")
    p.set_defaults(work=table)
    for p in commands.choices.values():
        p.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_program("phased_alpaca.py", args.work, args)


if __name__ == "__main__":
    sys.exit(main())
