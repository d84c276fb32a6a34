"""Alpaca rows with GPT-4's published difficulty, as the files of a study: is a row in the published stage 3 or not?

    python recipes/study/prepare_alpaca.py alpaca.json phased_stage3.jsonl --out out/alpaca --train 192 64

The first file has Alpaca's rows (`instruction`, `input`, `output`), the second the rows that GPT-4 scored 3.5 or
higher, as the authors of Phased IFT published them (`data`: instruction and input, answer). A row is hard if both files
have its instruction and input. Writes scored.jsonl (rows that train: `hard` is 0 or 1, `length` that of the answer in
characters), prompts.jsonl and validation.jsonl (rows that test, and that choose the rate, with `expected`). A row that
the second file has in another wording, or that was scored 3.5 and not published, counts as easy.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from parts.cli import HelpFormatter, InputError, positive_int, run_program
from parts.files import check_output_paths, write_lines
from parts.text.rows import Row, messages_of, read_good_rows
from score import answer_text

NAMES = ("below 3.5", "3.5 or above")


def prompt_text(row: Row) -> str:
    """The text of a row before its answer, with white space normalized."""
    return " ".join(" ".join(turn.text for turn in row.turns if turn.role != "assistant").split())


def read_groups(alpaca: Path, published: Path, most: int) -> list[list[Row]]:
    """The easy and the hard rows of at most `most` characters, each prompt once. Raises InputError."""
    hard = {prompt_text(row) for row in read_good_rows(published, skip_bad=True)}
    rows = {prompt_text(row): row for row in read_good_rows(alpaca, skip_bad=True)}
    groups: list[list[Row]] = [[], []]
    for prompt, row in rows.items():
        if len(prompt) + len(answer_text(row)) <= most:
            groups[prompt in hard].append(row)
    return groups


def run(args: argparse.Namespace) -> None:
    check_output_paths([args.out], [args.alpaca, args.published], folders=True)
    groups, parts = (
        read_groups(args.alpaca, args.published, args.max_chars),
        {"scored": [], "prompts": [], "validation": []},
    )
    for k, group in enumerate(groups):
        wanted = {"scored": args.train[k], "prompts": args.prompts[k], "validation": args.validation[k]}
        if sum(wanted.values()) > len(group):
            raise InputError(
                f"only {len(group):,} rows are {NAMES[k]}, but {sum(wanted.values()):,} are requested: "
                f"--train {args.train[k]}, --prompts {args.prompts[k]}, --validation {args.validation[k]}"
            )
        rows = iter(np.random.default_rng(k).permutation(len(group)))
        for name, count in wanted.items():
            parts[name] += [(k, group[next(rows)]) for _ in range(count)]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        written = []
        for k, row in rows:
            *asked, answer = messages_of(row.turns)
            if name == "scored":
                about = {"messages": [*asked, answer], "hard": k, "length": len(answer["content"])}
            else:
                about = {"dataset": NAMES[k], "messages": asked, "expected": answer["content"]}
            written.append({"id": Path(row.id).name} | about)
        write_lines(args.out / f"{name}.jsonl", written)
        print(f"{args.out / name}.jsonl: {len(rows):,} rows, {sum(k for k, _ in rows):,} of them {NAMES[1]}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    add = parser.add_argument
    add("alpaca", type=Path, metavar="ALPACA", help="Alpaca's rows, JSON or JSONL")
    add("published", type=Path, metavar="PUBLISHED", help="the published rows of a score of at least 3.5")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the three files")
    add("--max-chars", type=positive_int, default=1000, metavar="N", help="longest row: prompt and answer, characters")
    sizes = {"nargs": 2, "type": positive_int, "metavar": ("EASY", "HARD")}
    add("--train", **sizes, default=[192, 64], help="rows that train")
    add("--prompts", **sizes, default=[60, 60], help="rows that test")
    add("--validation", **sizes, default=[30, 30], help="rows that choose the rate")
    add("--debug", action="store_true", help="show tracebacks")
    return run_program("prepare_alpaca.py", run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
