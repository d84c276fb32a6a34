"""Which of the short tasks in tasks.jsonl did a model answer right?

    python generate.py --model DIR --prompts recipes/study/tasks.jsonl --max-new-tokens 32 --out answers.json
    python recipes/study/tasks.py answers.json

Prints the share of right answers in each group of tasks. A right answer is often a sentence ("The capital of France is
Paris."), so `is_accepted` decides, not generate.py's and judge.py's comparison with `expected` as a whole.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from parts.cli import InputError, print_table, run_program
from parts.files import json_values, read_text

TASKS = Path(__file__).with_name("tasks.jsonl")
MARKS = re.compile(r"[\"“”*`]|(?<!\w)['‘’]|['‘’](?!\w)")  # quotation marks and Markdown, but no apostrophe
SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
INTRODUCTION = re.compile(r"\b(?:is|are|has|contains|equals)\s+|[:=]\s*")


def is_accepted(answer: str, accepted: list[str]) -> bool:
    """Whether the first sentence of an answer, or what stands in it behind a word such as "is" or "has", a ":" or a
    "=", is one of the `accepted` texts and nothing else.

    White space, quotation marks and the final full stop do not count, nor does case, except that a text all in capitals
    must be answered in capitals. "Paris", "Paris." and "The capital of France is **Paris**." are right, "Paris, London"
    and "a Parisian" are not. Negation is not understood.
    """
    sentence = SENTENCE_END.split(MARKS.sub("", " ".join(answer.split())).strip())[0]
    said = [sentence, *(sentence[match.end() :] for match in INTRODUCTION.finditer(sentence))]
    return any(
        text.strip() == right if right.isupper() else text.strip().casefold() == right.casefold()
        for text in said
        for right in accepted
    )


def read_tasks(path: Path = TASKS) -> dict[str, dict]:
    """The tasks by instruction: id, dataset (fact or string), group, instruction, expected, accepted. Raises
    InputError."""
    tasks = {}
    for line, row in json_values(read_text(path)):
        accepted = row.get("accepted") if isinstance(row, dict) else None
        texts = isinstance(accepted, list) and accepted and all(isinstance(text, str) for text in accepted)
        if not texts or not isinstance(row.get("instruction"), str) or row["instruction"] in tasks:
            raise InputError(f"{path}:{line}: a task is an object with its own `instruction` and a list `accepted`")
        tasks[row["instruction"]] = row
    return tasks


def count_right(answers: list[dict]) -> dict[str, tuple[int, int]]:
    """(right, answered) of each group, by its dataset, and of all, from the rows of generate.py: `instruction`,
    `output`. Rows of other prompts are left out."""
    tasks, counts = read_tasks(), {}
    for row in answers:
        if task := tasks.get(row["instruction"]):
            right = is_accepted(row["output"], task["accepted"])
            for name in (f"{task['dataset']}: {task['group']}", f"{task['dataset']}, all", "all"):
                before = counts.get(name, (0, 0))
                counts[name] = before[0] + right, before[1] + 1
    return dict(sorted(counts.items(), key=lambda item: (item[0] == "all", "all" in item[0])))


def run(args: argparse.Namespace) -> None:
    try:
        counts = count_right(json.loads(read_text(args.answers)))
    except (ValueError, TypeError, KeyError) as e:
        raise InputError(f"{args.answers}: not answers of generate.py ({type(e).__name__}: {e})") from None
    if not counts:
        raise InputError(
            f"{args.answers}: contains no answer to a task of {TASKS}: give it to generate.py as --prompts"
        )
    print_table(
        ("tasks", "right", "of", "%"),
        [(name, str(right), str(n), f"{100 * right / n:.0f}") for name, (right, n) in counts.items()],
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path, metavar="ANSWERS", help="JSON that generate.py wrote")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return run_program("tasks.py", run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
