"""What recipes/phased_alpaca.sh will cost: rows, tokens, dollars, GPU hours and disk space of each step, estimated."""

import argparse
import math
from collections import Counter
from dataclasses import dataclass

import torch

import data
import generate
import score
import train
from data import Documents
from model import Transformer
from parts.api.options import ApiOptions, api_options
from parts.api.prompts import PLACEHOLDERS, difficulty_prompt, judge_prompt
from parts.api.questions import estimate_tokens, fence, fill
from parts.checkpoints.config import read_config
from parts.cli import dataclass_from_args, print_table, raise_if_any
from parts.files import read_json_object
from parts.flops import PEAK_FLOPS, training_flops
from parts.memory_plan import memory_plan
from parts.options import Weights
from parts.text.rows import Row, read_good_rows
from parts.text.templates import choose_template
from parts.text.testsets import Prompt, read_prompts
from parts.text.tokenizers import load_tokenizer

STAGE_3_ROWS, STAGE_3_TOKENS = 6.8 / 51.8, 0.2  # shares of Alpaca: from the paper, and from its published stage 3
UTILIZATION = 0.3  # assumed share of a GPU's peak FLOPS in training
BANDWIDTH = 1.5e12  # assumed bytes of weights that a GPU reads per second in decoding
UNKNOWN = math.nan  # dollars, for a model without a known price
TEST_SETS = "vicuna 80, koala 180, self-instruct 252, wizardlm 218, oasst 188, anthropic 129"  # the paper's


@dataclass
class Inputs:
    training: argparse.Namespace  # flags of train.py
    answering: argparse.Namespace  # flags of generate.py
    api: ApiOptions
    rows: list[Row]
    documents: Documents
    prompts: list[Prompt]
    model: Transformer  # without weights


@dataclass
class Step:
    """A line of the plan. `hours` is the time of all GPUs together, `disk` is in bytes."""

    name: str
    rows: int = 0
    tokens: int = 0
    dollars: float | None = None
    hours: float = 0.0
    disk: float = 0.0


def read_inputs(args: argparse.Namespace) -> Inputs:
    """Read and check everything that the steps will read. Raises InputError."""
    training = train.parse_args(["--stages", str(args.alpaca), *args.training])
    files = ["--prompts", *map(str, args.prompts), "--out", "answers.json"]
    answering = generate.parse_args(["--model", str(training.model), *files, *args.answers.split()])
    scoring = score.parse_args(["difficulty", str(args.alpaca), "--out", "scored.jsonl", *args.api.split()])
    prompts = [p for path in args.prompts for p in read_prompts(path)]
    sources: dict[tuple[str, str], list[str]] = {}
    for p in prompts:
        sources.setdefault((p.dataset, p.id), []).append(p.source)
    duplicates = [" and ".join(of_key) for of_key in sources.values() if len(of_key) > 1]
    raise_if_any(duplicates, "prompts have the same data set and id")
    rows = read_good_rows(args.alpaca, skip_bad=True)
    template, _ = choose_template(training.model, load_tokenizer(training.model), training.template)
    documents = data.tokenize_files([args.alpaca], training.model, template, training.max_len, shown=True)
    model = train.build_meta_model(read_config(training.model), dataclass_from_args(Weights, training), torch.bfloat16)
    return Inputs(training, answering, api_options(scoring), rows, documents, prompts, model)


def count_parameters(model: Transformer) -> int:
    return sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------- the steps


def api_step(name: str, questions: int, tokens: int, api: ApiOptions) -> Step:
    """A step that sends `questions` requests with `tokens` tokens in all; each reply has the longest length."""
    prices = api.prices()
    dollars = UNKNOWN if None in prices else (prices[0] * tokens + prices[1] * questions * api.max_tokens) / 1e6
    return Step(name, questions, tokens, dollars)


def difficulty_step(inputs: Inputs) -> Step:
    prompt = difficulty_prompt(None, False)
    texts = [score.fill_difficulty_prompt(prompt, row) for row in inputs.rows]
    tokens = sum(estimate_tokens([{"content": text}]) for text in texts)
    return api_step("difficulty", len(inputs.rows), tokens, inputs.api)


def training_steps(inputs: Inputs, arms: list[str], gpu: str) -> list[Step]:
    training, documents, trained = inputs.training, inputs.documents, train.trained_parameters(inputs.model)
    stored_dtype = read_json_object(training.model / "config.json").get("torch_dtype", "bfloat16")
    bytes_per_weight = 4 if "32" in str(stored_dtype) and training.save_dtype == "same" else 2
    export = bytes_per_weight * count_parameters(inputs.model)
    weights = sum(p.nbytes for p in trained.values())  # each of the two moments has as many bytes
    flops = training_flops(inputs.model, set(trained)).of_batch(documents.lengths, int(documents.target_counts.sum()))
    speed = PEAK_FLOPS[gpu] * UTILIZATION / (4 / 3 if training.checkpoint_activations else 1)
    steps = []
    for arm in arms:
        rows, tokens = (STAGE_3_ROWS, STAGE_3_TOKENS) if arm == "stage3" else (1.0, 1.0)
        tokens *= training.epochs[0]
        stages = {"one-off": 1, "phased": 3, "random": 3, "stage3": 1}.get(arm) or len(arm.split("-"))
        steps.append(
            Step(
                f"train {arm}",
                rows=round(rows * len(documents)),
                tokens=round(tokens * documents.lengths.sum()),
                hours=flops * tokens / speed / 3600,
                disk=stages * export + 4 * weights,  # two saved states remain: weights and moments, and weights alone
            )
        )
    return [*steps, Step("  while it trains", disk=5 * weights)]  # a third state, before the oldest one is removed


def answers_step(inputs: Inputs, arms: int, gpus: int) -> Step:
    prompts, parameters = len(inputs.prompts), count_parameters(inputs.model)
    max_tokens, batch_size = inputs.answering.max_new_tokens, inputs.answering.batch_size or 64
    gpus_per_model = max(1, math.ceil(2 * parameters / 60e9))  # above 1, an inference server generates the answers
    copies = max(1, gpus // gpus_per_model)
    decode_steps = max_tokens * max(1.0, prompts / copies / batch_size)
    hours = arms * gpus * decode_steps * 2 * parameters / gpus_per_model / BANDWIDTH / 3600
    return Step("answers", arms * prompts, arms * prompts * max_tokens, hours=hours)


def verdicts_step(inputs: Inputs, comparisons: int) -> Step:
    empty = fill(judge_prompt(None, False), {name: fence("", name[1:-1]) for name in PLACEHOLDERS})
    tokens_per_pair = estimate_tokens([{"content": empty}]) + 2 * inputs.answering.max_new_tokens
    tokens = sum(tokens_per_pair + len(p.instruction.encode()) // 4 for p in inputs.prompts)
    return api_step("verdicts", 2 * comparisons * len(inputs.prompts), 2 * comparisons * tokens, inputs.api)


def estimate_steps(inputs: Inputs, arms: list[str], gpus: int, gpu: str) -> list[Step]:
    """All steps, with the verdicts last."""
    return [
        difficulty_step(inputs),
        *training_steps(inputs, arms, gpu),
        answers_step(inputs, len(arms), gpus),
        verdicts_step(inputs, len(arms) - 1),
    ]


# ---------------------------------------------------------------- printing


def format_dollars(dollars: float | None) -> str:
    if dollars is None:
        return ""
    return "unknown" if math.isnan(dollars) else f"{dollars:,.2f}"


def print_steps(steps: list[Step]) -> None:
    dollars, hours, disk = (sum(getattr(step, key) or 0 for step in steps) for key in ("dollars", "hours", "disk"))
    table = []
    for step in [*steps, Step("together", 0, 0, dollars, hours, disk)]:
        counts = [f"{n:,}" if n else "" for n in (step.rows, step.tokens)]
        sizes = [f"{x:,.1f}" if x else "" for x in (step.hours, step.disk / 1e9)]
        table.append((step.name, *counts, format_dollars(step.dollars), *sizes))
    print_table(("from the beginning, estimated", "rows", "tokens", "dollars", "GPU hours", "disk, GB"), table)


def print_plan_notes(inputs: Inputs, name: str, gpus: int, gpu: str) -> None:
    """Print the memory per GPU, the assumptions of the estimates, and the test sets beside the paper's."""
    tokens, checkpointing = inputs.training.micro_batch_tokens, inputs.training.checkpoint_activations
    trained = set(train.trained_parameters(inputs.model))
    memory = memory_plan(inputs.model, trained, gpus, torch.bfloat16, tokens, tokens, checkpointing, True)
    print(
        f"{name}, {count_parameters(inputs.model):,} parameters, on {gpus} {gpu}: about "
        f"{sum(memory.values()) / 2**30:,.1f} GiB each while it trains. Hours are for {UTILIZATION:.0%} of their peak "
        f"in training, {BANDWIDTH / 1e12:g} TB/s\nin answering: guesses. Answers count as "
        f"{inputs.answering.max_new_tokens} tokens. Stage 3 is taken as {STAGE_3_ROWS:.0%} of the rows and "
        f"{STAGE_3_TOKENS:.0%} of the tokens, as in the paper's data."
    )
    sizes = ", ".join(f"{dataset} {n:,}" for dataset, n in Counter(p.dataset for p in inputs.prompts).items())
    print(f"Test sets: {sizes}.\nThe paper's: {TEST_SETS}.\n")
