"""judge.py audit, compare --repeat and --canaries: biases of known judges are detected, numbers match hand counts."""

import json

import numpy as np
import pytest
from api_helpers import lines, paid, run
from test_judge import compare, write_answers
from test_report import verdict_rows

import judge
from parts.files import write_lines
from parts.report import win_rates


def audit(env, folder, *files):
    done = run(judge, env, "audit", *files, "--json", folder / "a.json", "--resamples", "500")
    return done.stdout, json.loads((folder / "a.json").read_text())


def answers(folder, n=30, seed=0):
    rng = np.random.default_rng(seed)
    qualities = rng.permuted(np.tile(np.arange(2, 9), (n, 1)), axis=1)[:, :2].T  # never equal
    return [write_answers(folder / f"{name}.json", q.tolist(), name) for name, q in zip(("base", "other"), qualities)]


# ---------------------------------------------------------------- canaries


def test_an_honest_judge_gets_every_canary_right_and_canaries_do_not_change_the_table(api, tmp_path):
    files = answers(tmp_path)
    done, env = compare(api(judge=0), *files, "--canaries", out="v.jsonl"), api(judge=0)
    rows = lines(tmp_path / "v.jsonl")
    found = [r for r in rows if "canary" in r]
    assert len(rows) == 42 and sorted({r["canary"] for r in found}) == sorted(win_rates.CANARIES)
    assert {r["verdict"] for r in found} == {"loss"} and {r["model"] for r in found} == {"canary"}
    assert "gpt-4-0613 got 12 of 12 pairs" in done.stdout and "WARNING" not in done.stdout
    compare(env, *files, out="w.jsonl")
    assert [r for r in rows if "canary" not in r] == lines(tmp_path / "w.jsonl")
    tables = []
    for name in "vw":
        outputs = ["--json", tmp_path / "t.json", "--html", tmp_path / "r.html"]
        run(judge, env, "report", tmp_path / f"{name}.jsonl", *outputs)
        tables.append(json.loads((tmp_path / "t.json").read_text()))
        assert ("got 12 of 12 pairs" in (tmp_path / "r.html").read_text()) == (name == "v")
    assert tables[0] == tables[1]


def test_a_gullible_judge_causes_a_warning_above_the_table(api, tmp_path):
    done = compare(api(judge=0, gullible=True), *answers(tmp_path), "--canaries")
    first = done.stdout.splitlines()
    warning = next(i for i, line in enumerate(first) if "WARNING" in line)
    assert "got 8 of 12" in first[warning] and "win rate" in first[warning + 1]
    printed, found = audit(api(), tmp_path, tmp_path / "v.jsonl")
    assert "WARNING" in printed and "8 of 12" in printed and found["judges"][0]["canaries_right"] == 8


def test_few_questions_make_few_canaries_that_differ_from_the_baseline(tmp_path):
    for n in (1, 2, 5):
        files = answers(tmp_path, n)
        made = judge.make_canaries(judge.pair_answers(files[0], files[1:], False))
        assert len(made) <= n and all(p.answer != p.against for p in made)


# ---------------------------------------------------------------- repeats and agreement


def test_repeats_use_other_seeds_and_count_once(api, tmp_path):
    files, env = answers(tmp_path), api(judge=0, moody=5)
    compare(env, *files, "--repeat", "3")
    rows = lines(tmp_path / "v.jsonl")
    assert len(rows) == 30 and all(len(r["repeats"]) == 2 for r in rows)
    assert sum(paid(tmp_path).values()) == 180
    assert {r["request"]["seed"] for r in lines(tmp_path / "server.log")} == {0, 1, 2}
    assert win_rates.summarize(rows)[-1]["n"] == 30
    verdicts = [[r["verdict"], *(x["verdict"] for x in r["repeats"])] for r in rows]
    same = np.mean([[a == b, a == c, b == c] for a, b, c in verdicts])
    printed, found = audit(env, tmp_path, tmp_path / "v.jsonl")
    (own,) = found["agreement"]
    assert own["second"] == "itself" and own["agreement"] == pytest.approx(same) and own["questions"] == 30
    assert own["agreement_low"] < same < own["agreement_high"] and f"{100 * same:.1f}" in printed
    order = np.mean([len({np.sign(a - b) for a, b in r["scores"]}) > 1 for r in rows])
    assert found["judges"][0]["order"] == pytest.approx(order)


@pytest.mark.parametrize("seed", range(3))
def test_kappa_matches_scikit_learn(seed):
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(seed)
    one = rng.choice(list(win_rates.POINTS), 200, p=[0.5, 0.2, 0.3])
    two = np.where(rng.random(200) < 0.6, one, rng.choice(list(win_rates.POINTS), 200))
    found = win_rates.agreement([(i, a, b) for i, (a, b) in enumerate(zip(one, two))], 2000, 0)
    assert found["kappa"] == pytest.approx(cohen_kappa_score(one, two))
    slow = [cohen_kappa_score(one[d], two[d]) for d in rng.integers(0, 200, (1000, 200))]
    assert found["kappa_low"] == pytest.approx(np.quantile(slow, 0.025), abs=0.03)
    assert found["kappa_high"] == pytest.approx(np.quantile(slow, 0.975), abs=0.03)


def test_perfect_agreement_has_an_interval_of_nonzero_width():
    found = win_rates.agreement([(i, v, v) for i, v in enumerate(["win", "loss"] * 5)], 500, 0)
    assert found["agreement"] == found["kappa"] == 1 and 0.6 < found["agreement_low"] < 0.8
    assert found["kappa_low"] < 0.6
    found = win_rates.agreement([(i, "win", "win") for i in range(10)], 500, 0)
    assert found["kappa"] is None and found["agreement"] == 1  # chance explains all of it
    assert win_rates.agreement([(0, "win", "unparsed")], 500, 0) == {"n": 0}


def test_two_judges_are_compared_on_the_same_answers_only(tmp_path):
    first = verdict_rows(["win", "win", "loss", "tie"])
    second = verdict_rows(["win", "loss", "loss", "tie"], judge="k")
    second[3]["answer"] = "another one"
    write_lines(tmp_path / "v.jsonl", first)
    write_lines(tmp_path / "w.jsonl", second)
    printed, found = audit({}, tmp_path, tmp_path / "v.jsonl", tmp_path / "w.jsonl")
    (both,) = found["agreement"]
    assert (both["first"], both["second"], both["n"]) == ("j", "k", 3) and both["agreement"] == pytest.approx(2 / 3)
    assert both["kappa"] == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9)) and "j and k" in printed
    assert "twice" in run(judge, {}, "audit", tmp_path / "v.jsonl", tmp_path / "v.jsonl", expect=2).stderr


def test_position_bias_and_length_bias_are_detected(api, tmp_path):
    files = [write_answers(tmp_path / f"{n}.json", [q, 3 - q] * 15, n) for n, q in (("a", 1), ("b", 2))]
    compare(api(judge=5), *files)  # always the first one
    _, found = audit({}, tmp_path, tmp_path / "v.jsonl")
    (row,) = found["judges"]
    assert row["order"] == row["disagree"] == row["front"] == 1 and row["order_low"] > 0.8 and row["longer"] is None
    write_lines(tmp_path / "l.jsonl", verdict_rows(["win"] * 20))
    _, found = audit({}, tmp_path, tmp_path / "l.jsonl")
    assert found["judges"][0]["longer"] == 1 and found["judges"][0]["longer_low"] > 0.79
    rows = verdict_rows(["win"] * 20 + ["loss"] * 20, answer="same size", against="size same")
    write_lines(tmp_path / "l.jsonl", rows)
    assert audit({}, tmp_path, tmp_path / "l.jsonl")[1]["judges"][0]["longer"] is None


def test_identical_answers_are_a_tie_without_a_request(api, tmp_path):
    a, b = answers(tmp_path)
    rows, same = json.loads(b.read_text()), json.loads(a.read_text())
    for i in range(10):
        rows[i]["output"] = same[i]["output"]
    b.write_text(json.dumps(rows))
    done = compare(api(judge=0), a, b)
    assert sum(paid(tmp_path).values()) == 40 and "60 questions" not in done.stdout
    found = lines(tmp_path / "v.jsonl")
    assert [r["verdict"] for r in found[:10]] == ["tie"] * 10 and win_rates.summarize(found)[-1]["identical"] == 10


def test_repeats_and_canaries_need_the_api_judge(tmp_path, capsys):
    for more in (["--repeat", "2"], ["--canaries"]):
        with pytest.raises(SystemExit) as e:
            judge.main(["compare", "a", "b", "--out", "o", "--judge", "exact", *more])
        assert e.value.code == 2


def test_verdicts_in_unexpected_forms_cause_no_traceback(tmp_path):
    (row,) = verdict_rows(["win"])
    strange = [[1, 2], "x", None, [[1, 2]], [["a", "b"], [1, 2]], {}, [[1, 2, 3], [1, 2]]]
    rows = [row | {"id": str(i), "scores": s, "repeats": s, "answer": i} for i, s in enumerate(strange)]
    rows += [row | {"id": "x", "verdict": "great", "judge": ["\x1b[2J", "=1"]}]
    write_lines(tmp_path / "v.jsonl", rows)
    printed, _ = audit({}, tmp_path, tmp_path / "v.jsonl")
    done = run(judge, {}, "report", tmp_path / "v.jsonl", "--html", tmp_path / "r.html", "--csv", tmp_path / "t.csv")
    assert "\x1b" not in printed + done.stdout
