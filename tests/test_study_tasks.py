"""recipes/study/tasks.py: which answers count as right, and the tasks themselves."""

import json
import re

import pytest

from parts.text.testsets import read_prompts
from recipes.study import tasks
from recipes.study.tasks import count_right, is_accepted, read_tasks


@pytest.mark.parametrize(
    "answer",
    [
        "Paris",
        " paris.\n",
        "**Paris**",
        "“Paris”!",
        "The capital of France is Paris.",
        'The capital of France is "Paris." It lies on the Seine, as Rome does not.',
        "The answer is:\n\nParis",
        "capital = Paris",
        "Answer: 'Paris'",
        "France has Paris",
    ],
)
def test_the_answer_alone_or_behind_an_introduction_is_right(answer):
    assert is_accepted(answer, ["Paris"])


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " \n",
        ".",
        "The capital of France is",
        "Paris, London, Rome",  # every option
        "Paris\nLondon",
        "Paris or London",
        "The capital is Paris or London.",
        "The capital is London: Rome, Paris",
        "Parisian",
        "The capital is Parisian.",
        "This Paris",  # the "is" of a longer word introduces nothing
        "The capital is not known. Paris",
        "London. The capital of France is Paris.",
    ],
)
def test_other_answers_are_wrong(answer):
    assert not is_accepted(answer, ["Paris"])


def test_every_accepted_text_counts_and_numbers_are_whole():
    assert is_accepted("2 + 3 = 5", ["5", "five"]) and is_accepted("Five.", ["5", "five"])
    assert not is_accepted("15", ["5"]) and not is_accepted("5.5", ["5"]) and not is_accepted("-5", ["5"])
    assert not is_accepted("5", [])


def test_a_text_in_capitals_must_be_answered_in_capitals():
    assert is_accepted('"tree" in capitals is "TREE".', ["TREE"]) and not is_accepted("tree", ["TREE"])
    assert is_accepted("T", ["t"])


def test_an_apostrophe_is_no_quotation_mark():
    assert is_accepted("'It's late'", ["it's late"]) and not is_accepted("its late", ["it's late"])


def test_the_tasks_are_a_hundred_different_ones_that_generate_reads():
    rows = [json.loads(line) for line in tasks.TASKS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len({r["id"] for r in rows}) == len(read_tasks()) == 100
    assert [sum(r["dataset"] == name for r in rows) for name in ("fact", "string")] == [50, 50]
    prompts = read_prompts(tasks.TASKS)
    assert [(p.id, p.dataset, p.expected) for p in prompts] == [(r["id"], r["dataset"], r["expected"]) for r in rows]


@pytest.mark.parametrize("row", read_tasks().values(), ids=lambda row: row["id"])
def test_no_task_accepts_its_own_question_and_all_its_answers_can_be_given(row):
    """A text with a quotation mark, or with a full stop inside, could never be accepted."""
    assert row["expected"] == row["accepted"][0] and len(set(row["accepted"])) == len(row["accepted"])
    for text in row["accepted"]:
        assert is_accepted(text, [text]) and is_accepted(f'The answer is: "{text}."', [text]), text
    question = row["instruction"]
    quoted = re.findall(r'"([^"]+)"', question) if row["group"] not in ("repeat", "alphabet") else []
    for text in [question, *quoted, *re.split(r"(?<=\.) ", question)]:
        assert not is_accepted(text, row["accepted"]), text


def test_computable_answers_are_right():
    """The answers to tasks that a line of Python solves, computed again from the question."""
    solve = {
        "arithmetic": lambda q: str(eval(re.sub("times", "*", re.sub("divided by", "//", q[8 : q.index("?")])))),
        "repeat": lambda q: q.split('"')[1],
        "capitals": lambda q: q.split('"')[1].upper(),
        "first letter": lambda q: q.split('"')[1][0],
        "last letter": lambda q: q.split('"')[1][-1],
        "count letters": lambda q: str(len(q.split('"')[1])),
        "pick word": lambda q: q.split('"')[1].split()[0 if "first" in q else -1],
        "reverse": lambda q: ", ".join(q.rstrip(".").split(": ")[1].split(", ")[::-1]),
        "next letter": lambda q: chr(ord(q.split(" after ")[1][0]) + 1),
        "larger": lambda q: max(re.findall(r"\d+", q), key=int),
        "alphabet": lambda q: min(re.findall(r'"(\w+)"', q)),
        "series": lambda q: str((lambda n: 2 * n[-1] - n[-2])([int(x) for x in re.findall(r"\d+", q)])),
    }
    checked = 0
    for question, row in read_tasks().items():
        if row["group"] in solve:
            assert solve[row["group"]](question) == row["expected"], question
            checked += 1
    assert checked == 58


def test_rates_are_counted_by_group_and_other_prompts_left_out(tmp_path, capsys):
    rows = list(read_tasks().values())
    answers = [{"instruction": r["instruction"], "output": r["expected"]} for r in rows[:8] + rows[-1:]]
    answers[0]["output"] = "Lyon"
    answers.append({"instruction": "Something else", "output": "Paris"})
    facts, strings = {"fact: capital": (7, 8), "fact, all": (7, 8)}, {"string: alphabet": (1, 1), "string, all": (1, 1)}
    assert count_right(answers) == {**facts, **strings, "all": (8, 9)}
    file = tmp_path / "answers.json"
    file.write_text(json.dumps(answers))
    assert tasks.main([str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["all", "8", "9", "89"]


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "[]", '[{"instruction": "Other", "output": "x"}]', '[{"output": "x"}]']
)
def test_a_file_without_answers_is_an_error_of_one_line(tmp_path, capsys, content):
    file = tmp_path / "answers.json"
    file.write_text(content)
    assert tasks.main([str(file)]) == 2
    said = capsys.readouterr().err
    assert str(file) in said and said.count("\n") == 1
    assert tasks.main([str(tmp_path / "none.json")]) == 2
