"""Measure models on prompts: exact answers, or the loss of the expected answers.

    python recipes/study/measure.py demo/model out/stage1 out/stage2 out/stage3 --html out/report.html

A greedy answer counts if it is the one expected but for case and white space, as for `judge.py --judge exact`. With
--what loss it is the mean loss of the tokens of the answer expected that counts. With --what told it is what a model
that has seen no instruction knows: how it goes on, up to the first full stop, from the `told` of a prompt.
--ifd adds the instruction-following difficulty of the expected answers, and --tasks FILE the answers to tasks of the
form of tasks.jsonl, both of the last model only. --html writes a page with the answers of all models side by side, each
compared with the first.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import Documents, micro_batches
from generate import Options, decode
from model import Transformer, load_model
from parts.cli import HelpFormatter, InputError, positive_int, print_table, run_program
from parts.distributed import compute_dtype
from parts.files import atomic_write, check_output_paths, json_values
from parts.report.page import page_data, render_page
from parts.report.win_rates import exact_verdict, summarize
from parts.text.rows import Turn, has_exact_answer
from parts.text.templates import TEMPLATES, choose_template, render, stop_ids
from parts.text.testsets import Prompt, read_prompts
from parts.text.tokenizers import load_tokenizer
from recipes.study.tasks import is_accepted, read_tasks
from score import answers_alone

DEMO = Path(__file__).resolve().parents[2] / "demo"


def answers(model: Transformer, tokenizer, prompts: list[list[int]], stop: set[int], most: int) -> list[str]:
    """The greedy answer to each prompt; empty where the prompt fills the context."""
    out: list[list[int]] = [[] for _ in prompts]
    fitting = [i for i, tokens in enumerate(prompts) if len(tokens) < model.config.max_positions]
    for i, token, _ in decode(model, [prompts[i] for i in fitting], stop, Options(max_new_tokens=most)):
        if token is not None:
            out[fitting[i]].append(token)
    return [tokenizer.decode(tokens) for tokens in out]


@torch.no_grad()
def answer_losses(model: Transformer, documents: Documents) -> np.ndarray:
    """The mean loss of each document's supervised tokens, (D,) fp64."""
    sums, device = np.zeros(len(documents)), next(model.parameters()).device
    for part in micro_batches(np.arange(len(documents)), documents.lengths, 1, 4096)[0]:
        _, losses = model(*(torch.from_numpy(a).to(device) for a in documents.pack(part)))
        np.add.at(sums, np.repeat(part, documents.target_counts[part]), losses.double().cpu().numpy())
    return sums / documents.target_counts


def expected_documents(prompts: list[Prompt], template: str, tokenizer) -> Documents:
    rendered = [render([*p.turns, Turn("assistant", p.expected)], TEMPLATES[template], tokenizer) for p in prompts]
    tokens = np.concatenate([np.array(t, np.int32) for t, _ in rendered])
    supervised = np.concatenate([np.array(s, bool) for _, s in rendered])
    starts = np.cumsum([0, *(len(t) for t, _ in rendered)])
    return Documents(tokens, supervised, starts, [p.id for p in prompts], [p.source for p in prompts], [])


@dataclass
class Measured:
    """Measurements of one model, each a list in the order of the prompts (`tasks`: of the tasks); empty if not asked
    for."""

    values: list  # bool: the answer is exact; or float: its loss
    answers: list[str]
    tokens: list[int] = field(default_factory=list)  # supervised ones of the expected answer
    ifd: list[float] = field(default_factory=list)  # of the expected answer
    tasks: list[bool] = field(default_factory=list)  # of each task, whether it was answered right


def measure(args: argparse.Namespace, folder: Path, prompts: list[Prompt], stated: list[str], extras: bool) -> Measured:
    """Measure the model of an HF folder: --what, and with `extras` also --ifd and --tasks."""
    device, most = torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.max_new_tokens
    model, tokenizer = load_model(folder, compute_dtype(args.dtype), device), load_tokenizer(folder)
    template = choose_template(folder, tokenizer, args.template)[0]
    stop = set(stop_ids(TEMPLATES[template], tokenizer))

    def answers_to(prompts: list[Prompt]) -> list[str]:
        rendered = [render(p.turns, TEMPLATES[template], tokenizer)[0] for p in prompts]
        return answers(model, tokenizer, rendered, stop, most)

    if args.what == "loss":
        documents = expected_documents(prompts, template, tokenizer)
        losses = answer_losses(model, documents)
        found = Measured(losses.tolist(), [], documents.target_counts.tolist())
        if extras and args.ifd:
            found.ifd = np.exp(losses - answer_losses(model, answers_alone(documents))).tolist()
    elif args.what == "told":
        rendered = [render([Turn("text", text)], TEMPLATES[template], tokenizer)[0][:-1] for text in stated]
        texts = answers(model, tokenizer, rendered, {tokenizer.encode(".")[-1], *tokenizer.eos_ids}, most)
        texts = [text.split(".")[0] for text in texts]
        found = Measured([has_exact_answer(text, p.expected) for text, p in zip(texts, prompts)], texts)
    else:
        texts = answers_to(prompts)
        right = [has_exact_answer(text, p.expected) for text, p in zip(texts, prompts)] if args.what == "exact" else []
        found = Measured(right, texts)
    if extras and args.tasks:
        accepted = [task["accepted"] for task in read_tasks(args.tasks).values()]
        found.tasks = [is_accepted(text, a) for text, a in zip(answers_to(read_prompts(args.tasks)), accepted)]
    return found


TITLES = {"exact": "exact answers, %", "loss": "loss of the answers", "told": "known as text, %", "answers": "answers"}


def comparisons(models: list[Path], prompts: list[Prompt], measured: list[Measured]) -> list[dict]:
    """Rows of verdicts: every model's answers against those of the first model."""
    rows, (base, *others) = [], measured
    for folder, found in zip(models[1:], others):
        for k, p in enumerate(prompts):
            row = {"dataset": p.dataset, "id": p.id, "instruction": p.instruction, "expected": p.expected}
            row |= {"model": str(folder), "baseline": str(models[0])}
            row |= {"answer": found.answers[k], "against": base.answers[k], "judge": "exact"}
            rows.append(row | exact_verdict(found.values[k], base.values[k]))
    return rows


def run(args: argparse.Namespace) -> None:
    if args.ifd and args.what != "loss":
        raise InputError("--ifd needs --what loss")
    if args.html and (args.what != "exact" or len(args.models) < 2):
        raise InputError("--html compares exact answers: give two models or more, and no other --what")
    check_output_paths([path for path in (args.html, args.json) if path], [args.prompts])
    prompts, stated = read_prompts(args.prompts), []
    if args.what != "answers" and any(p.expected is None for p in prompts):
        raise InputError(f"{args.prompts}: every prompt must say what answer is `expected`")
    if args.what == "told":
        stated = [row.get("told") for _, row in json_values(args.prompts.read_text(encoding="utf-8"))]
        if not all(isinstance(text, str) for text in stated):
            raise InputError(
                f"{args.prompts}: --what told needs prompts with `told`, a text that the model goes on with"
            )
    groups = sorted({p.dataset for p in prompts})
    measured, table = [], []
    for k, folder in enumerate(args.models, 1):
        found = measure(args, folder, prompts, stated, extras=k == len(args.models))
        measured.append(found)
        if found.values:
            scale = 1.0 if args.what == "loss" else 100.0
            means = [np.mean([v for v, p in zip(found.values, prompts) if p.dataset == group]) for group in groups]
            table.append((str(folder), *(f"{scale * x:.3g}" for x in (*means, np.mean(found.values)))))
    print_table((TITLES[args.what], *groups, "all"), table)
    if measured[-1].ifd:
        print(f"IFD: {np.mean(measured[-1].ifd):.3f}")
    if measured[-1].tasks:
        print(f"tasks: {sum(measured[-1].tasks)} of {len(measured[-1].tasks)} right")
    if args.json:
        atomic_write(args.json, json.dumps([asdict(found) for found in measured]))
    if args.html:
        rows = comparisons(args.models, prompts, measured)
        atomic_write(args.html, render_page(page_data(rows, summarize(rows), {})))
        print(f"-> {args.html}: open it in a browser")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", type=Path, metavar="DIR", help="HF folders")
    add("--prompts", type=Path, default=DEMO / "prompts.jsonl", metavar="F", help="with `expected`")
    what_help = "exact answers; mean loss of the answers expected; what is known as text; answers alone"
    add("--what", choices=TITLES, default="exact", help=what_help)
    add("--max-new-tokens", type=positive_int, default=96, metavar="N", help="longest answer")
    add("--ifd", action="store_true", help="with --what loss: also the IFD of the expected answers, of the last model")
    add(
        "--tasks", type=Path, metavar="F", help="tasks with `accepted` answers: also how many the last model gets right"
    )
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 if the device supports it")
    add("--template", choices=TEMPLATES, help="(default: as the model folder's own chat template, else phased)")
    add(
        "--json",
        type=Path,
        metavar="F",
        help="for each model, for each prompt: its value and its answer, and what else was asked for",
    )
    add("--html", type=Path, metavar="F", help="a page with the answers side by side, each model against the first")
    add("--debug", action="store_true", help="show tracebacks")
    return run_program("measure.py", run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
