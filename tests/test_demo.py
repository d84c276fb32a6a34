"""The bundled demo: its data, what the base model can do, and what training adds."""

import argparse
import json
import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_forked

import train
from model import load_model
from parts.files import write_lines
from parts.report.held_out import describe_change
from parts.report.page import PAGE_DATA_MARKER
from parts.text.testsets import read_prompts
from recipes.study import measure

DEMO = ROOT / "demo"


def rows(name):
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


SCORED, PROMPTS = rows("scored.jsonl"), rows("prompts.jsonl")
STAGES = [rows(f"s{k}.jsonl") for k in (1, 2, 3)]


def test_the_demo_is_small():
    files = subprocess.run(["git", "ls-files", "demo"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert sum((ROOT / f).stat().st_size for f in files) <= 6e6
    assert 1e6 <= sum(p.numel() for p in load_model(DEMO / "model").parameters()) <= 4e6


# ---------------------------------------------------------------- instructions


def test_stages_have_the_papers_shares_and_contain_every_row_once():
    bounds = [(1, 1.5), (1.5, 3.5), (3.5, 5.01)]
    for (low, high), stage in zip(bounds, STAGES):
        assert stage == [row for row in SCORED if low <= row["score"] < high]
    shares = [len(stage) / len(SCORED) for stage in STAGES]
    assert np.allclose(shares, (0.59, 0.28, 0.13), atol=0.005)
    assert all(len(stage) % 16 == 0 for stage in STAGES)  # whole batches: every arm of the study has the same steps


def asked_of(text):
    """Start value, operations and distractions of a text; equal start value and operations are near duplicates."""
    body = re.split(r"\. (?=[A-Z])", text.rstrip("."))[0]
    opening, *parts = body.split(", ")
    start = re.sub(OPENING, "", opening)
    operations = [part.removeprefix("then ") for part in parts if part.removeprefix("then ") in ASKED]
    return start, tuple(ASKED[o].__name__ for o in operations), [part for part in parts if part not in operations]


def name(of):
    def named(function):
        function.__name__ = of
        return function

    return named


def lines(text):
    """Parse lines "phrase | phrase: expression in v": the function of each phrase, independent of demo/make.py."""
    found = {}
    for line in text.strip().splitlines():
        phrases, _, expression = line.strip().partition(": ")
        function = name(expression)(eval(f"lambda v: {expression}", {"words": words}))
        found |= dict.fromkeys(phrases.split(" | "), function)
    return found


SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()  # noqa: SIM905
SMALL += ["seventeen", "eighteen", "nineteen"]
TENS = dict(zip("23456789", "twenty thirty forty fifty sixty seventy eighty ninety".split()))  # noqa: SIM905


def words(n):
    tens, ones = divmod(n, 10)
    return SMALL[n] if n < 20 else TENS[str(tens)] + (f"-{SMALL[ones]}" if ones else "")


OPENING = r"^(Take|Start with|Look at|Begin with|Think of|Look up) ((the|a) )?((word|number|numbers|list|items) )?"
ASKED = lines("""
    reverse it | write it backwards | spell it from the end: v[::-1]
    write it in capitals | put it in upper case: v.upper()
    drop its first letter | leave out the first letter: v[1:]
    drop its last letter | leave out the last letter: v[:-1]
    repeat it | write it twice: v + v
    move its first letter to the end | put the first letter last: v[1:] + v[:1]
    swap its first and last letters | swap the two ends: v[-1] + v[1:-1] + v[0]
    leave out its vowels | keep only the consonants: v.translate(dict.fromkeys(map(ord, 'aeiouAEIOU')))
    put dashes between its letters | spell it with dashes: '-'.join(v)
    take its first letter | keep only the first letter: v[0]
    take its last letter | keep only the last letter: v[-1:]
    count its letters | say how many letters it has: str(len(v))
    add one | add 1 to it: str(int(v) + 1)
    take away one | subtract 1 from it: str(int(v) - 1)
    add ten | add 10 to it: str(int(v) + 10)
    double it | multiply it by 2: str(int(v) * 2)
    write it in words | spell it out: words(int(v))
    take its last digit | keep only the last digit: str(int(v) % 10)
    take nine minus it | subtract it from 9: str(9 - int(v))
    pick the larger one | keep the larger number: str(max(map(int, v.split(' and '))))
    pick the smaller one | keep the smaller number: str(min(map(int, v.split(' and '))))
    add them up | take their sum: str(sum(map(int, v.split(' and '))))
    take the first item | pick the first: v.split()[0]
    take the last item | pick the last: v.split()[-1]
    take the second item | pick the second: v.split()[1]
    turn the list around | reverse the order: ' '.join(v.split()[::-1])
    drop the first item | leave out the first item: ' '.join(v.split()[1:])
    drop the last item | leave out the last item: ' '.join(v.split()[:-1])
    sort the items | put them in alphabetical order: ' '.join(sorted(v.split()))
    join the items | write them as one word: v.replace(' ', '')
    count the items | say how many items there are: str(len(v.split()))
    name the town | say which town is home: 'the town of ' + v
    name the favourite colour | say which colour is liked best: 'the colour of ' + v
    name the trade | say what the work is: 'the trade of ' + v
""")
FORMS = {
    "": lambda start, results: "; ".join(results),
    "Put every result in brackets": lambda start, results: " ".join(f"[{r}]" for r in results),
    "Number the results": lambda start, results: "; ".join(f"{i + 1} {r}" for i, r in enumerate(results)),
    "Begin with what was given": lambda start, results: "; ".join([start, *results]),
    "Say done at the end": lambda start, results: "; ".join([*results, "done"]),
    "Give only the last result": lambda start, results: results[-1],
}


def test_every_answer_is_right():
    """Facts about people are taken from the first answer that contains one, and must agree in all others."""
    facts, seen = {}, Counter()
    for text, answer in [(r["data"][0], r["data"][1]) for r in SCORED] + [
        (p["instruction"], p["expected"]) for p in PROMPTS
    ]:
        start = asked_of(text)[0]
        form = (re.split(r"\. (?=[A-Z])", text.rstrip(".")) + [""])[1]
        value, results = start, []
        for part in text.rstrip(".").split(". ")[0].split(", ")[1:]:
            if (phrase := part.removeprefix("then ")) in ASKED:
                value = ASKED[phrase](value)
                if value.startswith("the "):
                    if value not in facts and form != "Give only the last result":
                        shown = FORMS[form](start, ["?"]).split("?")[0]
                        facts[value] = re.split(r"[;\]]", answer[len(shown) :])[0]
                    value = facts.get(value)
                    if value is None:
                        break
                results.append(value)
        if value is not None:
            assert FORMS[form](start, results) == answer, text
            seen[form] += 1
    assert min(seen.values()) >= 100 and len(seen) == 6 and len(facts) >= 60


def test_every_stage_contains_every_form_and_number_of_steps():
    for stage in STAGES:
        parsed = [asked_of(row["data"][0]) for row in stage]
        assert {len(operations) for _, operations, _ in parsed} == {1, 2, 3}
        forms = {(re.split(r"\. (?=[A-Z])", row["data"][0].rstrip(".")) + [""])[1] for row in stage}
        assert forms == set(FORMS)
        assert any(others for *_, others in parsed) and not all(others for *_, others in parsed)
    means = [np.mean([row["true"] for row in stage]) for stage in STAGES]
    assert means[0] < means[1] < means[2] and any(row["score"] != row["true"] for row in SCORED)


def auc(low, high):
    """The probability that one of `high` is above one of `low`."""
    low, high = np.array(low)[:, None], np.array(high)[None]
    return float((high > low).mean() + (high == low).mean() / 2)


def test_the_length_of_the_answer_does_not_reveal_the_stage():
    lengths = [[len(row["data"][1]) for row in stage] for stage in STAGES]
    assert auc(lengths[0] + lengths[1], lengths[2]) <= 0.68 and auc(lengths[0], lengths[1] + lengths[2]) <= 0.70


def test_no_held_out_prompt_has_a_near_duplicate_in_the_training_rows():
    trained = [asked_of(row["data"][0])[:2] for row in SCORED]
    held_out = [asked_of(p["instruction"])[:2] for p in (*PROMPTS, *rows("validation.jsonl"))]
    assert len(held_out) == 1500 and len(set(trained + held_out)) == len(trained) + len(held_out)


# ---------------------------------------------------------------- the base model and training


def share(folder, prompts, told, what):
    """The shares of right answers: of the easiest fifth, of the hardest fifth, and of all."""
    args = argparse.Namespace(what=what, max_new_tokens=96, template=None, dtype="auto", ifd=False, tasks=None)
    right = np.array(measure.measure(args, folder, prompts, told, extras=False).values)
    fifth = np.array([p.dataset for p in prompts])
    return [right[fifth == f"fifth {k}"].mean() for k in (1, 5)] + [right.mean()]


@pytest.fixture(scope="module")
def prompts():
    return read_prompts(DEMO / "prompts.jsonl")[::4]


def test_the_base_model_completes_statements_but_does_not_follow_instructions(prompts):
    told = [p["told"] for p in PROMPTS][::4]
    easiest, hardest, _ = share(DEMO / "model", prompts, told, "told")
    assert easiest >= 0.9 and hardest >= 0.5, (easiest, hardest)
    assert share(DEMO / "model", prompts, told, "exact")[2] <= 0.02


def test_training_teaches_to_follow_instructions_and_prints_the_improvement(prompts, tmp_path):
    done = run_forked(train.main, "--out", tmp_path / "out", cwd=ROOT)
    easiest, _, everything = share(tmp_path / "out" / "stage3", prompts, [], "exact")
    assert easiest >= 0.6 and everything >= 0.45, (easiest, everything)
    *_, header, easy, medium, hard, _, about_easy, about_medium, about_hard, _, command = done.stdout.splitlines()
    assert re.split(r" {2,}", header) == ["held-out loss after", "start", "stage1", "stage2", "stage3"]
    for row, about in ((easy, about_easy), (medium, about_medium), (hard, about_hard)):
        name, *losses = row.split()
        start, *_, end = map(float, losses)
        assert about.startswith(f"{name}: improved, {start:.2f} -> {end:.2f}") and end < 0.3 * start
    program, script, *words = shlex.split(command)
    assert Path(program).exists() and script == "recipes/study/measure.py" and "demo/model" in words
    untrusted = {"instruction": "Say </script><script>alert(1)</script>", "expected": "<b>no</b>"}
    few = [*PROMPTS[:12], untrusted]
    write_lines(tmp_path / "few.jsonl", few)
    run_forked(measure.main, *words, "--prompts", tmp_path / "few.jsonl", cwd=ROOT)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>alert" not in page and "<b>no" not in page
    data = json.loads(page.split(PAGE_DATA_MARKER)[1].split("</script>")[0])
    models = [Path(ROOT / r["model"]).resolve() for r in data["summary"] if r["total"]]
    assert models == [(tmp_path / f"out/stage{k}").resolve() for k in (1, 2, 3)]
    assert {r["baseline"] for r in data["rows"]} == {"demo/model"} and len(data["rows"]) == 3 * len(few)
    assert sum(r["verdict"] == "win" for r in data["rows"]) >= 12


def test_forgetting_is_described_in_words():
    stages = ["start", "stage1", "stage2"]
    assert describe_change(stages, [3.0, 0.5, 0.25]) == "improved, 3.00 -> 0.25."
    assert describe_change(stages, [3.0, 0.5, 0.503]) == "improved, 3.00 -> 0.50."
    forgotten = "improved, 3.00 -> 0.60; partly forgotten: it was 0.50 after stage1."
    assert describe_change(stages, [3.0, 0.5, 0.6]) == forgotten
    assert describe_change(stages, [3.0, 3.5, 3.25]) == "worse, 3.00 -> 3.25."
    assert describe_change(stages, [1.85, 1.83, 1.84]) == "hardly changed, 1.85 -> 1.84."
    assert "; partly forgotten: it was 1.50 after stage1" in describe_change(stages, [1.85, 1.5, 1.85])


def test_held_out_rows_have_the_difficulty_of_their_file():
    for name, (low, high) in {"easy": (1, 1.5), "medium": (1.5, 3.5), "hard": (3.5, 5.01)}.items():
        of_stage = [row for row in rows("validation.jsonl") if low <= row["score"] < high]
        assert rows(f"held_out_{name}.jsonl") == of_stage[:48] and len(of_stage) >= 48
