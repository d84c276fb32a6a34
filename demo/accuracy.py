"""How many of the held-out prompts a model answers exactly, by level of difficulty.

    python demo/accuracy.py demo/model out/stage1 out/stage2 out/stage3

Greedy answers, without a cache: the documents grow by a token a step, all prompts at once.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import TEMPLATES, load_tokenizer, render, stop_ids  # noqa: E402
from model import load_model  # noqa: E402


@torch.no_grad()
def answers(folder: str, prompts: list[str], longest: int = 80) -> list[str]:
    """The model's greedy answer to each prompt."""
    model, tokenizer, template = load_model(folder), load_tokenizer(folder), TEMPLATES["phased"]
    stops = stop_ids(template, tokenizer)
    documents = [render([("user", p)], template, tokenizer)[0] for p in prompts]
    given = [len(d) for d in documents]
    going = list(range(len(documents)))
    for _ in range(longest):
        lengths = torch.tensor([len(documents[d]) for d in going])
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        logits = model(torch.tensor([t for d in going for t in documents[d]]),
                       torch.cat([torch.arange(n) for n in lengths.tolist()]), cu_seqlens.to(torch.int32))
        for d, token in zip(list(going), logits[cu_seqlens[1:] - 1].argmax(1).tolist()):
            if token in stops:
                going.remove(d)
            else:
                documents[d].append(token)
        if not going:
            break
    return [tokenizer.decode(d[n:]) for d, n in zip(documents, given)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="DIR")
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts.jsonl")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N answers of each level")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    levels = sorted({row["level"] for row in rows})
    print("exact answers, %".ljust(24) + "".join(f"level {level:<3}" for level in levels) + "all")
    for folder in args.models:
        got = answers(folder, [row["instruction"] for row in rows])
        right = [a.strip() == row["expected"] for a, row in zip(got, rows)]
        by_level = [[r for r, row in zip(right, rows) if row["level"] == level] for level in levels]
        print(folder.ljust(24) + "".join(f"{100 * sum(r) / len(r):5.0f}    " for r in by_level)
              + f"{100 * sum(right) / len(right):3.0f}", flush=True)
        for level in levels:
            for row, a in [(row, a) for row, a in zip(rows, got) if row["level"] == level][:args.show]:
                print(f"  {row['instruction']}\n    expected {row['expected']!r}, got {a!r}")


if __name__ == "__main__":
    main()
