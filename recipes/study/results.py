"""The files of a study: answers, verdicts, results.json, table.md, figure.png, report.html."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from parts.cli import InputError, WorkError
from parts.files import atomic_write, read_json_object, write_lines
from parts.report.figures import can_draw
from recipes.study.analysis import group_prompts, markdown, score_wins, summarize
from recipes.study.figure import draw


def file_name(arm: str) -> str:
    return re.sub("[^a-z0-9.]+", "-", arm.lower()).strip("-")


def answer_files(out: Path, arm: str, seed: int) -> list[Path]:
    """The files with the answers of a run, one per measured stage."""
    found = (out / "answers").glob(f"{file_name(arm)}-{seed}.stage*.json")
    return sorted(found, key=lambda path: int(path.stem.rpartition("stage")[2]))


def read_texts(out: Path, record: dict) -> list[list[str]]:
    """Per measured stage and prompt the answer, or its loss as text where there are no answers."""
    paths = answer_files(out, record["arm"], record["seed"])
    if paths:
        return [[row["output"] for row in json.loads(path.read_text(encoding="utf-8"))] for path in paths]
    return [[f"(loss {x:.3f})" for x in losses] for losses in record["values"]]


def verdict_rows(records: list[dict], prompts: list[dict], order: np.ndarray, out: Path, judge: str) -> list[dict]:
    """Verdicts of the first seed as judge.py writes them, with the prompts in this order."""
    first = {r["arm"]: r for r in records if r["seed"] == 0}
    base, rows = first.pop("one-off"), []
    against = read_texts(out, base)[-1]
    for arm, r in first.items():
        texts, wins = read_texts(out, r), r.get("wins")
        if judge != "api":
            goal = np.array(base["values"][-1], float)
            wins = [score_wins(np.array(values, float), goal, judge) for values in r["values"]]
        for k, (answers, won) in enumerate(zip(texts, wins, strict=True), 1):
            who = {"model": f"{arm}/stage{k}" if len(texts) > 1 else arm, "baseline": "one-off, seed 0", "judge": judge}
            compared = list(zip(prompts, answers, against, won, strict=True))
            for p, answer, other, points_won in (compared[i] for i in order):
                row = who | {"dataset": p["dataset"], "id": p["id"], "instruction": p["messages"][-1]["content"]}
                said = {1.0: "win", 0.5: "tie", 0.0: "loss"}.get(points_won, "unparsed")
                row |= {"answer": answer, "against": other, "verdict": said}
                rows.append(row | ({"expected": p["expected"]} if "expected" in p else {}))
    return rows


def write_page(rows: list[dict], verdicts: Path, page: Path) -> None:
    """Write report.html with judge.py report. Raises WorkError."""
    write_lines(verdicts, rows)
    command = [sys.executable, "judge.py", "report", str(verdicts), "--html", str(page)]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True)
    if done.returncode:
        raise WorkError(f"{page}: {done.stderr.strip()}")


def write_results(out: Path, records: list[dict], prompts: list[dict], results: dict) -> None:
    """table.md, results.json, figure.png (with matplotlib) and report.html in `out`.

    `results` has settings, `plan`, `rates` (arm -> rate -> its mean on validation), `judge`, `tokens` of the expected
    answers, `base` (what the model before any training has) and `ceiling`; groups of prompts, runs and table are added.
    """
    names, group = group_prompts(prompts)
    results = results | {"groups": names, "group": group.tolist(), "runs": records}
    table = summarize(results)
    text = markdown(table, results)
    print(f"\n{text}")
    atomic_write(out / "table.md", text)
    atomic_write(out / "results.json", json.dumps(results | {"table": table}))
    written = ["table.md", "results.json"]
    if can_draw():
        atomic_write(out / "figure.png", draw(table, results))
        written.append("figure.png")
    if len(table) > 1:
        rows = verdict_rows(records, prompts, np.argsort(group, kind="stable"), out, results["judge"])
        write_page(rows, out / "verdicts.jsonl", out / "report.html")
        written.append("report.html")
    files = ", ".join(str(out / name) for name in written)
    print(f"-> {files}" + ("" if can_draw() else " (no figure: it needs matplotlib)"))


@contextmanager
def open_results(path: Path) -> Iterator[dict]:
    """A context manager that yields what a results.json, or the one in the folder `path`, contains. Raises InputError
    if there is none, or if the block fails because it is not as a study writes it."""
    path = path / "results.json" if path.is_dir() else path
    if not path.exists():
        raise InputError(f"{path}: does not exist")
    results = read_json_object(path)
    try:
        yield results
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path}: not the results of a study ({type(e).__name__}: {e})") from None


def print_saved_tables(path: Path) -> None:
    """Compute the tables again from a results.json. Raises InputError."""
    with open_results(path) as results:
        print(markdown(summarize(results), results), end="")
