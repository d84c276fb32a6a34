"""Can a local model's log-likelihoods replace GPT-4 as the judge of two answers? Measured on AlpacaEval's verdicts.

    python tests/bench_judge.py --model DIR --annotations alpaca-7b.json falcon-7b-instruct.json \\
        --pairs 250 --out losses.jsonl

AlpacaEval records which of two answers GPT-4 preferred: results/MODEL/alpaca_eval_gpt4/annotations.json in
https://github.com/tatsu-lab/alpaca_eval. Every rule below gives each answer a number and prefers the answer with the
larger one; the table says how often that is the answer that GPT-4 preferred. The losses are kept in --out: the same
command with more pairs or files computes only those that are missing. docs/local_judge.md has the results.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import Transformer, load_model
from parts.api.store import Store
from parts.checkpoints.weights import checksum
from parts.cli import InputError, positive_int, print_table, progress, run_program
from parts.files import read_text
from parts.text.rows import Turn
from parts.text.templates import TEMPLATES, choose_template, render
from parts.text.tokenizers import load_tokenizer

MICRO_BATCH_TOKENS = 4096
SIMILAR_LENGTH = 1.25  # the longer answer has at most this times as many characters
RIDGE = 1.0  # of the logistic regression, per standardised feature
RESAMPLES = 2000


# ---------------------------------------------------------------- GPT-4's verdicts


@dataclass(frozen=True)
class Pair:
    comparison: str  # the model's name, by the file's path
    instruction: str
    answers: tuple[str, str]  # output_1 (AlpacaEval's baseline), output_2 (the model)
    preferred: int  # by GPT-4: 0 or 1


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of an annotations file in which GPT-4 preferred one answer. Raises InputError."""
    name = path.resolve().parent.parent.name if path.stem == "annotations" else path.stem
    try:
        rows = json.loads(read_text(path))
        return [
            Pair(name, row["instruction"], (row["output_1"], row["output_2"]), int(row["preference"]) - 1)
            for row in rows
            if row["preference"] in (1, 2)  # others: a tie (0 or 1.5), or no verdict (null)
        ]
    except (ValueError, TypeError, KeyError) as e:
        raise InputError(
            f"{path}: not an annotations.json of AlpacaEval, which is a list of objects with instruction, output_1, "
            f"output_2 and preference ({type(e).__name__}: {e})"
        ) from None


def draw_pairs(paths: list[Path], count: int) -> list[Pair]:
    """At most `count` pairs of each file. Instructions are ranked by their hash, so that files share instructions, and
    with them the baseline's answers, and more pairs include the fewer."""
    drawn = []
    for path in paths:
        pairs = sorted(read_pairs(path), key=lambda p: hashlib.sha256(p.instruction.encode()).digest())
        if not pairs:
            raise InputError(f"{path}: no pair in which one answer is preferred")
        if any(p.comparison == pairs[0].comparison for p in drawn):
            raise InputError(f"{path}: a second file of {pairs[0].comparison}. Give each model's file once")
        drawn += pairs[:count]
    return drawn


# ---------------------------------------------------------------- losses


@torch.no_grad()
def document_losses(model: Transformer, documents: list[tuple[list[int], list[bool]]]) -> list[float]:
    """The summed loss, in nats, of each document's supervised tokens; the first token of a document has no loss."""
    lengths = [len(tokens) for tokens, _ in documents]
    targets = torch.tensor([t if s else -100 for tokens, mask in documents for t, s in zip(tokens, mask)])
    offsets = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    targets[offsets[:-1].long()] = -100
    targets = torch.cat([targets[1:], torch.tensor([-100])])
    tokens = torch.tensor([t for tokens, _ in documents for t in tokens])
    positions = torch.cat([torch.arange(n) for n in lengths])
    _, losses = model(tokens, positions, offsets, targets)
    by_position = torch.zeros(len(tokens), dtype=torch.float64)
    by_position[targets != -100] = losses.double()
    return [part.sum().item() for part in by_position.split(lengths)]


def measure(model_dir: Path, texts: list[tuple[str, str]], out: Path, dtype: torch.dtype) -> np.ndarray:
    """(N, 3): tokens of each answer, its summed loss given the instruction, and its summed loss alone.

    As in `measure_ifd` of score.py: the answer's end token is included, and alone the answer stands behind the first
    token of the prompt. `texts`: (instruction, answer).
    """
    model, tokenizer = load_model(model_dir, dtype), load_tokenizer(model_dir)
    template, _ = choose_template(model_dir, tokenizer, None)
    about = f"{checksum(dict(model.named_parameters()))} {template} {dtype}"
    store = Store(out)
    keys = [hashlib.sha256(json.dumps([about, *text]).encode()).hexdigest()[:32] for text in texts]
    todo = {key: text for key, text in zip(keys, texts) if not store.records(key)}
    batch: dict[str, list] = {}

    def compute_batch() -> None:
        losses = document_losses(model, [document for pair in batch.values() for document in pair])
        for key, (_, alone), given_loss, alone_loss in zip(batch, batch.values(), losses[::2], losses[1::2]):
            store.add({"key": key, "tokens": len(alone[0]) - 1, "given": given_loss, "alone": alone_loss})
        bar.update(len(batch))
        batch.clear()

    with progress(len(todo), "losses", "answer") as bar:
        for key, (instruction, answer) in todo.items():
            turns = [Turn("user", instruction), Turn("assistant", answer)]
            tokens, supervised = render(turns, TEMPLATES[template], tokenizer)
            alone = [tokens[0], *(t for t, s in zip(tokens, supervised) if s)]
            batch[key] = [(tokens, supervised), (alone, [True] * len(alone))]
            if sum(len(tokens) for pair in batch.values() for tokens, _ in pair) >= MICRO_BATCH_TOKENS:
                compute_batch()
        if batch:
            compute_batch()
    records = [store.records(key)[-1] for key in keys]
    store.close()
    return np.array([[r["tokens"], r["given"], r["alone"]] for r in records], np.float64)


# ---------------------------------------------------------------- rules


@dataclass(frozen=True)
class Answers:
    """What rules may use; each array is (pairs, 2)."""

    characters: np.ndarray
    tokens: np.ndarray
    given: np.ndarray  # loss of the answer given the instruction, summed
    alone: np.ndarray  # loss of the answer without the instruction, summed


# The answer with the larger number is preferred. Preferring the smaller one agrees in 100 minus as many per cent.
LONGEST = "longer answer"
RULES: dict[str, Callable[[Answers], np.ndarray]] = {
    LONGEST: lambda a: a.characters,
    "log-likelihood per token": lambda a: -a.given / a.tokens,
    "log-likelihood, summed": lambda a: -a.given,
    "lower log-likelihood, summed": lambda a: a.given,
    "log-likelihood per token without the instruction": lambda a: -a.alone / a.tokens,
    "lower IFD (= PMI per token)": lambda a: (a.alone - a.given) / a.tokens,
    "higher IFD": lambda a: (a.given - a.alone) / a.tokens,
    "PMI, summed": lambda a: a.alone - a.given,
}

# Logistic regressions on the differences of these numbers between the two answers, tested on held-out pairs.
FEATURES: dict[str, Callable[[Answers], np.ndarray]] = {
    "length": lambda a: np.log(a.characters + 1),
    "log-likelihood per token": RULES["log-likelihood per token"],
    "PMI per token": RULES["lower IFD (= PMI per token)"],
    "PMI": RULES["PMI, summed"],
}
FITTED = [
    ("length",),
    ("length", "log-likelihood per token"),
    ("length", "PMI per token"),
    ("length", "PMI"),
    ("length", "log-likelihood per token", "PMI per token", "PMI"),
]


def fit_logistic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weights (K,) of a ridge logistic regression of y (n,) in {0, 1} on x (n, K), without an intercept: exchanging
    the two answers must exchange the verdict. Newton's method."""
    w = np.zeros(x.shape[1])
    for _ in range(25):
        p = 1 / (1 + np.exp(-x @ w))
        w -= np.linalg.solve((x.T * (p * (1 - p))) @ x + RIDGE * np.eye(len(w)), x.T @ (p - y) + RIDGE * w)
    return w


def held_out_scores(x: np.ndarray, y: np.ndarray, comparison: np.ndarray, half: np.ndarray) -> np.ndarray:
    """The fitted lead of output_2 (n,). Each pair's weights are fitted on the other half of the instructions and, if
    there are several comparisons, on the other comparisons only."""
    x = x / x.std(0)
    scores = np.zeros(len(y))
    several = len(set(comparison)) > 1
    for name, part in {*zip(comparison.tolist(), half.tolist())}:
        test = (comparison == name) & (half == part)
        train = (half != part) & ((comparison != name) | (not several))
        scores[test] = x[test] @ fit_logistic(x[train], y[train])
    return scores


def agreement(scores: np.ndarray, preferred: np.ndarray) -> np.ndarray:
    """(n,): 1 where output_2's lead has the sign of GPT-4's preference, 0 where not, 0.5 where there is no lead."""
    return 0.5 + 0.5 * np.sign(scores) * np.where(preferred == 1, 1, -1)


# ---------------------------------------------------------------- table


def interval(values: np.ndarray, instructions: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of `values` (n,). Instructions are resampled, not pairs, because pairs of
    one instruction share the baseline's answer."""
    _, instructions = np.unique(instructions, return_inverse=True)
    sums, counts = np.bincount(instructions, values), np.bincount(instructions)
    drawn = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)


def show_rate(values: np.ndarray, instructions: np.ndarray, sign: str = "") -> str:
    """The mean with its interval, in per cent."""
    if not len(values):
        return "–"
    low, high = interval(values, instructions)
    return f"{100 * values.mean():{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


def show_table(pairs: list[Pair], losses: np.ndarray) -> None:
    """`losses` (2 n, 3): of `measure`, for the two answers of each pair in turn."""
    characters = np.array([[len(text) for text in p.answers] for p in pairs], np.float64)
    answers = Answers(characters, *losses.reshape(len(pairs), 2, 3).transpose(2, 0, 1))
    preferred = np.array([p.preferred for p in pairs])
    comparison = np.array([p.comparison for p in pairs])
    _, instructions = np.unique([p.instruction for p in pairs], return_inverse=True)
    similar = (characters.max(1) + 1) <= SIMILAR_LENGTH * (characters.min(1) + 1)

    def lead(number: Callable[[Answers], np.ndarray]) -> np.ndarray:
        """(n,): of output_2."""
        first, second = number(answers).T
        return second - first

    agreed = {name: agreement(lead(rule), preferred) for name, rule in RULES.items()}
    for names in FITTED:
        x = np.stack([lead(FEATURES[name]) for name in names], 1)
        scores = held_out_scores(x, preferred, comparison, instructions % 2)
        agreed["fitted: " + " + ".join(names)] = agreement(scores, preferred)

    names = list(dict.fromkeys(comparison.tolist()))
    groups = [comparison == name for name in names]
    counts = [str(group.sum()) for group in [*groups, comparison != "", similar]]
    rates = [f"{100 * preferred[group].mean():.1f}" for group in [*groups, comparison != ""]]
    table = [("pairs", *counts[:-1], "", counts[-1]), ("GPT-4 preferred output_2", *rates, "", "")]
    better = []
    for name, values in agreed.items():
        over_longest = values - agreed[LONGEST]
        table.append(
            (
                name,
                *(f"{100 * values[group].mean():.1f}" for group in groups),
                show_rate(values, instructions),
                "" if name == LONGEST else show_rate(over_longest, instructions, "+"),
                show_rate(values[similar], instructions[similar]),
            )
        )
        if values.mean() >= 0.6 and interval(over_longest, instructions)[0] > 0:
            better.append(name)
    print_table(("rule", *names, "all", "minus longer answer", f"lengths within {SIMILAR_LENGTH:g}"), table)
    print("Agreement with GPT-4 in %, with 95 % intervals; chance is 50.")
    print(f"At least 60 % and better than the longer answer: {'; '.join(better) or 'none'}.")


def run(args: argparse.Namespace) -> None:
    pairs = draw_pairs(args.annotations, args.pairs)
    texts = [(p.instruction, answer) for p in pairs for answer in p.answers]
    show_table(pairs, measure(args.model, texts, args.out, getattr(torch, args.dtype)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="HF folder of the model that judges")
    add("--annotations", type=Path, required=True, nargs="+", metavar="F", help="annotations.json files of AlpacaEval")
    add("--pairs", type=positive_int, default=250, metavar="N", help="pairs of each file (default: 250)")
    add("--out", type=Path, required=True, metavar="F", help="JSONL that keeps the losses of every answer")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the computation (default: bfloat16)")
    add("--debug", action="store_true", help="show tracebacks")
    return run_program("bench_judge.py", run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
