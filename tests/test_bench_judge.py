"""tests/bench_judge.py: the losses it measures, its rules, its fits on held-out pairs."""

import json
import math
from pathlib import Path

import bench_judge
import numpy as np
import pytest
import torch
from bench_judge import (
    LONGEST,
    RULES,
    Answers,
    Pair,
    agreement,
    draw_pairs,
    held_out_scores,
    interval,
    measure,
    show_table,
)
from conftest import ROOT

from data import tokenize_files
from model import load_model
from parts.files import write_lines
from score import measure_ifd

MODEL = ROOT / "demo" / "model"


def write_annotations(path: Path, rows: int, preference=lambda i: 1 + i % 2) -> Path:
    content = [
        {"instruction": f"Task {i}", "output_1": "word " * (i % 5 + 1), "output_2": "a b", "preference": preference(i)}
        for i in range(rows)
    ]
    path.write_text(json.dumps(content))
    return path


def test_the_losses_give_the_same_ifd_as_score_py(tmp_path):
    rows = [json.loads(line) for line in (ROOT / "demo" / "prompts.jsonl").read_text().splitlines()[:6]]
    pairs = [(row["instruction"], row["expected"]) for row in rows]
    file = tmp_path / "rows.jsonl"
    write_lines(file, [{"instruction": q, "output": a} for q, a in pairs])
    documents = tokenize_files([file], MODEL, "phased", 2048, shown=False)
    expected = measure_ifd(load_model(MODEL), documents).numpy()
    tokens, given, alone = measure(MODEL, pairs, tmp_path / "losses.jsonl", torch.float32).T
    assert tokens.tolist() == documents.target_counts.tolist()
    np.testing.assert_allclose(np.exp((given - alone) / tokens), expected, rtol=1e-4)


def test_losses_are_computed_once_even_after_a_kill(tmp_path, monkeypatch):
    out, pairs = tmp_path / "losses.jsonl", [("Say a.", "a"), ("Say b.", ""), ("Say c.", "c c")]
    first = measure(MODEL, pairs, out, torch.float32)
    lines = out.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3 and np.isfinite(first).all()
    out.write_bytes(lines[0] + lines[1] + lines[2][:10])  # killed while it wrote the last line
    computed = []
    compute = bench_judge.document_losses
    monkeypatch.setattr(bench_judge, "document_losses", lambda m, d: computed.append(len(d)) or compute(m, d))
    again = measure(MODEL, pairs, out, torch.float32)
    assert computed == [2]  # the last answer, with its instruction and alone
    np.testing.assert_allclose(again, first, rtol=1e-5)


def test_a_larger_sample_of_pairs_contains_the_smaller(tmp_path):
    one, two = (write_annotations(tmp_path / f"{name}.json", 40) for name in ("one", "two"))
    few, many = draw_pairs([one, two], 5), draw_pairs([one, two], 30)
    assert set(few) <= set(many) and len(few) == 10 and len(many) == 60
    assert [p.instruction for p in few[:5]] == [p.instruction for p in few[5:]]


def test_ties_and_missing_verdicts_are_left_out(tmp_path):
    values = [0, 1, 1.5, 2, None, 2.0]
    pairs = draw_pairs([write_annotations(tmp_path / "a.json", 6, values.__getitem__)], 100)
    assert {(p.instruction, p.preferred) for p in pairs} == {("Task 1", 0), ("Task 3", 1), ("Task 5", 1)}


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"instruction": "x"}]', "[]", "nonsense"])
def test_a_file_without_annotations_is_reported_in_one_line(tmp_path, capsys, content):
    file = tmp_path / "annotations.json"
    file.write_text(content)
    argv = ["--model", str(MODEL), "--annotations", str(file), "--out", str(tmp_path / "losses.jsonl")]
    assert bench_judge.main(argv) == 2
    error = capsys.readouterr().err
    assert str(file) in error and error.count("\n") == 1
    assert not (tmp_path / "losses.jsonl").exists()


def test_every_rule_prefers_the_answer_that_its_name_states():
    """The first answer is longer; the second is likelier per token, and gains more by the instruction per token."""
    a = Answers(*(np.array([pair], np.float64) for pair in ([50, 10], [10, 2], [30, 4], [40, 8])))
    margins = {name: float(rule(a)[0, 0] - rule(a)[0, 1]) for name, rule in RULES.items()}
    assert margins == pytest.approx(
        {
            LONGEST: 40,
            "log-likelihood per token": -3 + 2,
            "log-likelihood, summed": -30 + 4,
            "lower log-likelihood, summed": 30 - 4,
            "log-likelihood per token without the instruction": -4 + 4,
            "lower IFD (= PMI per token)": 1 - 2,
            "higher IFD": 2 - 1,
            "PMI, summed": 10 - 4,
        }
    )


def test_a_rule_without_preference_agrees_by_half():
    assert agreement(np.array([2.0, -1.0, 0.0, 3.0]), np.array([1, 1, 1, 0])).tolist() == [1, 0, 0.5, 0]


def test_a_fit_is_evaluated_on_held_out_pairs_only():
    rng = np.random.default_rng(0)
    comparison, half = np.repeat(["a", "b", "c"], 200), np.tile([0, 1], 300)
    signal = rng.normal(size=600)
    x = np.stack(
        [signal, *rng.normal(size=(150, 600))], 1
    )  # 150 features of noise: what is seen can be learnt by heart
    found = held_out_scores(x[:, :1], (signal > 0).astype(int), comparison, half)
    assert agreement(found, (signal > 0).astype(int)).mean() == 1
    noise = rng.integers(0, 2, 600)
    scores = held_out_scores(x, noise, comparison, half)
    assert abs(agreement(scores, noise).mean() - 0.5) < 0.08
    assert held_out_scores(-x, 1 - noise, comparison, half) == pytest.approx(-scores)  # output_1 and output_2 exchanged


def test_the_interval_has_its_coverage_if_pairs_share_instructions():
    rng = np.random.default_rng(1)
    shared = np.repeat(rng.random(100) < 0.6, 5).astype(float)  # five pairs of an instruction all agree, or none
    low, high = interval(shared, np.repeat(np.arange(100), 5))
    apart = interval(shared, np.arange(500))
    assert high - low > 1.8 * (apart[1] - apart[0])
    assert math.isclose(high - low, 2 * 1.96 * math.sqrt(shared.var() / 100), rel_tol=0.15)


def test_the_command_prints_the_table(tmp_path, capsys):
    files = [write_annotations(tmp_path / f"{name}.json", 12) for name in ("one", "two")]
    argv = ["--model", str(MODEL), "--pairs", "8", "--out", str(tmp_path / "losses.jsonl"), "--annotations"]
    assert bench_judge.main([*argv, *map(str, files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["rule", "one", "two", "all"] and lines[1].split()[:4] == ["pairs", "8", "8", "16"]
    assert len(lines) == 5 + len(RULES) + len(bench_judge.FITTED)
    assert bench_judge.main([*argv, str(files[0]), str(files[0])]) == 2
    assert "one.json: a second file of one" in capsys.readouterr().err


def test_files_of_the_same_name_are_distinguished_by_their_folders(tmp_path):
    for name in ("model-a", "model-b"):
        (tmp_path / name / "alpaca_eval_gpt4").mkdir(parents=True)
        write_annotations(tmp_path / name / "alpaca_eval_gpt4" / "annotations.json", 2)
    pairs = draw_pairs(sorted(tmp_path.glob("*/*/annotations.json")), 2)
    assert [p.comparison for p in pairs] == ["model-a"] * 2 + ["model-b"] * 2


def test_a_rule_better_than_the_length_is_printed(capsys):
    """The log-likelihood per token stands for GPT-4's preference; here it does not depend on the length."""
    rng = np.random.default_rng(0)
    given, lengths = rng.normal(5, 1, (200, 2)), rng.integers(10, 90, (200, 2))
    pairs = [
        Pair("a", f"Task {i}", tuple("x" * n for n in lengths[i]), int(given[i, 1] < given[i, 0])) for i in range(200)
    ]
    show_table(pairs, np.stack([np.full(400, 10.0), 10 * given.ravel(), rng.normal(50, 1, 400)], 1))
    *_, last = capsys.readouterr().out.splitlines()
    assert "log-likelihood per token;" in last and LONGEST not in last.split(": ")[1].split("; ")
