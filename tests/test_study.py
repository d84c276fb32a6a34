"""recipes/study/study.py on a model and data that are not the demo's: what arms see, what is chosen, what comes out."""

import argparse
import json
import math
import os
import signal
import time
from concurrent.futures import Executor, Future
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from api_helpers import paid, run
from conftest import Forked, children_of, run_forked
from hypothesis import given, settings
from hypothesis import strategies as st

import judge
import score
import train
from parts.cli import InputError, WorkError
from recipes.study import analysis, figure, intervals, measure, measures, prepare_alpaca, runs, study
from recipes.study import results as results_files
from recipes.study.arms import StudyData, choose_subset_size, hold_back_rows, make_arms

# ---------------------------------------------------------------- statistics


def test_tails_and_quantiles_are_students():
    stats = pytest.importorskip("scipy.stats")
    for df in (1.0, 2.3, 4.0, 11.7, 300.0):
        for t in (0.0, 0.4, 2.1, 5.0, 40.0):
            assert intervals.t_tail_probability(t, df) == pytest.approx(2 * stats.t.sf(t, df), rel=1e-3, abs=1e-7)
        assert intervals.t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-3)


@pytest.mark.parametrize("of_seeds, of_prompts, noise", [(0.3, 1.0, 1.0), (1.0, 0.2, 0.5), (0.0, 0.0, 1.0)])
def test_an_interval_over_seeds_and_prompts_holds_the_truth_as_often_as_it_says(of_seeds, of_prompts, noise):
    rng, held, runs = np.random.default_rng(0), 0, 300
    for _ in range(runs):
        values = noise * rng.normal(size=(5, 60))
        values += of_seeds * rng.normal(size=(5, 1)) + of_prompts * rng.normal(size=(1, 60)) + 0.7
        found = intervals.estimate(values)
        held += found["low"] <= 0.7 <= found["high"]
    assert held / runs >= 0.94


@pytest.mark.parametrize("seeds, shares", [(2, (0.0, 0.06)), (3, (0.0, 0.06)), (6, (0.01, 0.06))])
def test_no_real_difference_is_found_in_at_most_six_of_a_hundred_studies(seeds, shares):
    """Five arms that differ by nothing but their seeds, against a sixth, on 200 prompts."""
    rng, found, studies = np.random.default_rng(0), 0, 200
    for _ in range(studies):
        known = rng.beta(1.5, 1.2, 200)
        moved = rng.normal(0, rng.uniform(0.01, 0.09, 6)[:, None, None], (6, seeds, 1))
        base, *arms = (rng.random((6, seeds, 200)) < known + moved).astype(float)
        p = [intervals.estimate((np.sign(arm - base)) / 2, (-0.5, 0.5))["p"] for arm in arms]
        found += min(intervals.holm(p)) < 0.05
    assert shares[0] <= found / studies <= shares[1]


def test_prompts_that_all_say_the_same_are_no_certainty_and_one_seed_has_no_p_value():
    limits = (-0.5, 0.5)
    won = intervals.estimate(np.full((2, 4), 0.5), limits)
    assert won["p"] > 0.2 and won["low"] < 0 < won["mean"] == won["high"] == 0.5
    tied = intervals.estimate(np.zeros((6, 50)), limits)
    assert tied["p"] == 1 and tied["low"] < 0 < tied["high"]
    one = intervals.estimate(np.random.default_rng(0).choice([-0.5, 0.0, 0.5], (1, 100)), limits)
    assert one["p"] is None and one["low"] < one["mean"] < one["high"]
    assert intervals.estimate(np.full((2, 3), 1.5))["p"] is None  # losses have no limits: nothing is known
    assert intervals.estimate(np.full((2, 3), np.nan), limits) | {"n": 0, "mean": None} == {
        "n": 0, "mean": None, "low": None, "high": None, "p": None
    }  # fmt: skip
    infinite = intervals.estimate(np.array([[0.1, np.inf], [0.2, 0.3]]))  # an interval without end, and no p value
    assert infinite == {"n": 2, "mean": np.inf, "low": -np.inf, "high": np.inf, "p": None}
    assert intervals.holm([0.02, None, 0.01]) == [pytest.approx(0.04), None, pytest.approx(0.03)]


def test_arms_judged_on_different_prompts_are_told_apart_and_compared_on_the_common_ones():
    """Each seed of arm A has a verdict on all 8 prompts, of B on 4 (the others refused): on the same 4 both win."""
    prompts = [{"id": str(i), "dataset": "d", "messages": []} for i in range(8)]
    half, none = [1.0] * 4 + [0.0] * 4, [1.0] * 4 + [None] * 4
    records = [
        {"arm": arm, "seed": seed, "wins": [wins], "lr": 1e-3, "steps": 9, "rows": 9, "matrix": {}, "curve": {}}
        for arm, wins in (("one-off", [0.5] * 8), ("A", half), ("B", none), ("C", [None] * 8)) for seed in (0, 1)
    ]  # fmt: skip
    rates = {arm: {1e-3: None} for arm in ("one-off", "A", "B", "C")}
    names, group = analysis.group_prompts(prompts)
    results = {"groups": names, "group": group.tolist(), "judge": "api", "rates": rates, "runs": records}
    results |= {"plan": {"stages": [1, 1, 1]}, "base": {"values": []}, "ceiling": None}
    table = analysis.summarize(results)
    assert [table[arm]["win_rate"]["n"] for arm in "ABC"] == [8, 4, 0]
    assert [table[arm]["win_rate"]["mean"] for arm in "ABC"] == [0, 0.5, None]
    assert [table[arm]["win_rate_common"]["mean"] for arm in "AB"] == [0.5, 0.5]
    said = analysis.markdown(table, results)
    assert "different prompts" in said and "all have 4" in said and "1 degrees" in said
    rows = {line.split(" | ")[0]: line.strip(" |").split(" | ") for line in said.splitlines() if " | " in line}
    assert [rows[f"| {arm}"][-2] for arm in "ABC"] == ["8", "4", "0"] and rows["| C"][-3] == "–"
    assert rows["| A"][-1].startswith("+50.0") and rows["| B"][-1].startswith("+50.0") and rows["| one-off"][-1] == "–"
    assert "best rate" not in said  # there is one
    json.dumps(table, allow_nan=False)
    if results_files.can_draw():
        figure.draw(table, results)
    alike = results | {"runs": [r for r in records if r["arm"] in ("one-off", "A")]}
    said = analysis.markdown(analysis.summarize(alike), alike)
    assert "different" not in said and "common" not in said
    alone = results | {"runs": [r for r in records if r["seed"] == 0]}
    table = analysis.summarize(alone)
    assert "no p values" in analysis.markdown(table, alone) and table["A"]["p_holm"] is None


def test_the_model_before_any_training_has_no_value_in_a_group_without_prompts():
    names, group = analysis.group_prompts([{"score": score} for score in (1, 2, 3)])
    run = {"arm": "one-off", "seed": 0, "lr": 1e-3, "steps": 9, "rows": 9, "matrix": {}, "curve": {}}
    results = {"groups": names, "group": group.tolist(), "judge": "exact", "rates": {"one-off": {"0.001": None}}}
    results |= {"runs": [run | {"values": [[True, False, True]]}], "base": {"values": [True, False, True]}}
    results |= {"plan": {"stages": [1]}, "ceiling": None}
    said = analysis.markdown(analysis.summarize(results), results)
    assert "| *before training* |  | 100 | 0 | – | 100 | – | 67 |" in said


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.5))
@settings(deadline=None)
def test_holm_rejects_what_the_step_down_procedure_rejects(p, alpha):
    rejected = set()
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[i] * (len(p) - rank) > alpha:
            break
        rejected.add(i)
    assert {i for i, x in enumerate(intervals.holm(p)) if x <= alpha} == rejected


# ---------------------------------------------------------------- other measures


def test_every_measure_is_compared_with_one_off_and_corrected_for_the_number_of_arms():
    """Loss per row and per token, IFD, all in each group too, and tasks: computed here in another way."""
    rng, arms = np.random.default_rng(0), ("one-off", "A", "B")
    tokens, group = rng.integers(1, 50, 12), np.array([0, 1] * 6)
    runs = [
        {"arm": arm, "seed": seed, "values": [rng.random(12).tolist(), rng.random(12).tolist()],
         "ifd": rng.random(12).tolist(), "tasks": (rng.random(30) < 0.5).tolist()}
        for seed in (1, 0, 2) for arm in arms
    ]  # fmt: skip
    results = {"judge": "loss", "groups": ["easy", "hard"], "group": group.tolist(), "tokens": tokens.tolist()}
    found = measures.other_measures(runs, results)
    compared = measures.compare_measures(found)
    kinds = ("loss per row", "loss per token", "IFD")
    assert list(found) == [*(part + kind for kind in kinds for part in ("", "easy: ", "hard: ")), "tasks right, %"]

    def mean(arm, seed, measure):
        (run,) = [run for run in runs if (run["arm"], run["seed"]) == (arm, seed)]
        if measure == "tasks right, %":
            return np.mean(run["tasks"])
        part, _, kind = measure.rpartition(": ")
        of = {"": group >= 0, "easy": group == 0, "hard": group == 1}[part]
        values = np.array(run["ifd"] if kind == "IFD" else run["values"][-1])[of]
        return np.average(values, weights=tokens[of] if kind == "loss per token" else None)

    for name, rows in compared.items():
        for arm in arms:
            assert rows[arm]["mean"] == pytest.approx(np.mean([mean(arm, seed, name) for seed in range(3)]))
        p = []
        for arm in ("A", "B"):
            differences = [mean(arm, seed, name) - mean("one-off", seed, name) for seed in range(3)]
            assert rows[arm]["difference"] == pytest.approx(np.mean(differences))
            assert rows[arm]["low"] <= rows[arm]["difference"] <= rows[arm]["high"]
            p.append(rows[arm]["p"])
        assert [rows[arm]["p_holm"] for arm in ("A", "B")] == pytest.approx(intervals.holm(p))
    everything, easy, hard = measures.measures_tables(compared, {"hard: IFD": 0.25})
    assert everything[0] == ["difference from one-off", *kinds, "tasks right, %"]
    assert hard[0] == ["difference from one-off, hard", *kinds] and hard[1][1:] == ["–", "–", "0.2500"]
    for table in (everything, easy, hard):
        assert [row[0] for row in table[1:]] == ["*before training: mean*", "one-off: mean", "A", "B"]
    assert easy[3][3].startswith(f"{compared['easy: IFD']['A']['difference']:+.4f} (")
    shown = 100 * compared["tasks right, %"]["A"]["difference"]
    assert everything[3][-1].startswith(f"{shown:+.1f} (") and ", p " in everything[3][-1]


def test_published_scores_are_matched_by_instruction_and_input_and_no_row_is_used_twice(tmp_path, capsys):
    rows = [
        {"instruction": f"Do  task {i}.", "input": "this" if i % 2 else "", "output": "x" * i} for i in range(1, 41)
    ]
    rows += [rows[3], {"instruction": "Too long", "input": "", "output": "y" * 900}]
    hard = [{"id": str(i), "score": "4.5", "data": [f"Do task {i}.{chr(10) + 'this' if i % 2 else ''}", "another"]}
            for i in range(1, 41, 3)]  # fmt: skip
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    (tmp_path / "published.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hard))
    sizes = ["--train", "10", "8", "--prompts", "6", "4", "--validation", "4", "2", "--max-chars", "500"]
    files = [str(tmp_path / name) for name in ("alpaca.json", "published.jsonl")]
    assert prepare_alpaca.main([*files, "--out", str(tmp_path / "out"), *sizes]) == 0
    used = []
    for name, counts in (("scored", (10, 8)), ("prompts", (6, 4)), ("validation", (4, 2))):
        written = runs.read_jsonl(tmp_path / "out" / f"{name}.jsonl")
        marks = [row.get("hard", row.get("dataset") == "3.5 or above") for row in written]
        assert (marks.count(0), marks.count(1)) == counts
        for row, mark in zip(written, marks):
            asked = row["messages"][0]["content"]
            number = int(asked.split("task ")[1].split(".")[0])
            assert mark == (number % 3 == 1) and ("this" in asked) == bool(number % 2)
            answer = row["expected"] if name != "scored" else row["messages"][-1]["content"]
            assert answer == "x" * number and row.get("length", number) == number
            used.append(number)
    assert len(used) == len(set(used)) == 34
    assert prepare_alpaca.main([*files, "--out", str(tmp_path / "out"), "--train", "10", "9", *sizes[3:]]) == 2
    assert "only 14 rows are 3.5 or above, but 15 are requested: --train 9, --prompts" in capsys.readouterr().err


# ---------------------------------------------------------------- arms


@pytest.fixture
def study_data():
    rng = np.random.default_rng(0)
    order = rng.permutation(240)
    stages = [np.sort(order[:144]), np.sort(order[144:208]), np.sort(order[208:])]
    lengths = rng.integers(1, 50, 240)
    return StudyData([{}] * 240, stages, {"IFD": stages}, lengths, 16, 2)


def test_every_arm_takes_the_same_steps_and_sees_every_row_as_often_unless_that_is_its_point(study_data):
    arms = make_arms(study_data)
    assert {"one-off", "phased", "stages 3-2-1", "random stages", "stage 3 only", "phased, replay 0.01"} <= arms.keys()
    for name, arm in arms.items():
        for seed in (0, 1):
            stages = arm.stages(np.random.default_rng(seed))
            if "--select" not in arm.flags:
                steps = sum(arm.epochs * -(-len(s) // study_data.batch_size) for s in stages)
                assert steps == study_data.steps == (arm.steps or 30), name
                assert sum(map(len, stages)) * arm.epochs == 480, name
            if "only" not in name and "%" not in name:
                assert sorted(np.concatenate(stages)) == list(range(240)), name


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 16), st.floats(0.0, 0.5), st.integers(0, 9))
def test_replay_moves_a_share_of_every_stage_into_each_later_one(batches, batch_size, share, seed):
    """Whatever the sizes: whole batches, every row once, none in an earlier stage, and the share asked for as near as
    whole batches allow."""
    ends = np.cumsum([0, *batches]) * batch_size
    stages = [np.arange(a, b) for a, b in pairwise(ends)]
    found = hold_back_rows(stages, share, batch_size, np.random.default_rng(seed))
    assert sorted(np.concatenate(found)) == list(range(ends[-1]))
    assert all(len(rows) and len(rows) % batch_size == 0 for rows in found)
    of = np.searchsorted(ends, np.arange(ends[-1]), side="right") - 1
    for k, rows in enumerate(found):
        assert of[rows].max() <= k
        moved = [sum(of[later] == k) for later in found[k + 1 :]]
        if moved and len(rows) > batch_size:  # or else all that could go is gone
            assert max(moved) - min(moved) <= 1
            assert abs(sum(moved) - min(1, share * len(moved)) * len(stages[k])) <= batch_size


@settings(max_examples=300, deadline=None)
@given(st.integers(3, 1000), st.integers(1, 4), st.sampled_from([1, 4, 16, 128]))
def test_few_rows_over_and_over_take_as_many_steps_as_all_rows(batches, epochs, batch_size):
    rows = np.arange(batches * batch_size)
    study_data = StudyData([], [rows], {}, rows, batch_size, epochs)
    for share in (0.05, 0.2):
        count, passes = choose_subset_size(study_data, share)
        assert count % batch_size == 0 and 0 < count <= len(rows)
        assert abs(count * passes // batch_size - study_data.steps) <= max(2, 0.1 * study_data.steps)
        if batches >= 40:
            assert 0.799 * share <= count / len(rows) <= 1.251 * share
            assert abs(count * passes // batch_size - study_data.steps) <= max(2, 0.025 * study_data.steps)


def test_seeds_draw_other_rows_and_the_same_seed_the_same(study_data):
    arms = make_arms(study_data)
    for name in ("random stages", "phased, replay 0.1", "random 20 %"):
        first, again, other = (
            [rows.tolist() for rows in arms[name].stages(np.random.default_rng(seed))] for seed in (0, 0, 1)
        )
        assert first == again != other, name
    longest = arms["longest 20 %"].stages(np.random.default_rng(0))[0]
    assert study_data.lengths[longest].min() >= np.sort(study_data.lengths)[-len(longest)]


# ---------------------------------------------------------------- the whole tool


def test_without_arguments_it_is_of_the_demo_and_calls_programs_that_exist():
    args = study.parse_args([])
    for path in (args.model, *args.scored, args.prompts, args.validation, study.HERE / "measure.py"):
        assert path.exists(), path
    assert args.out.parent.parent == study.ROOT and (study.ROOT / "train.py").exists()
    assert (measure.DEMO / "prompts.jsonl").exists()


def test_a_rate_at_which_training_diverges_is_never_the_best():
    def choose(*losses):
        records = [{"arm": "phased", "lr": 10.0**-k, "values": [[loss]]} for k, loss in enumerate(losses, 1)]
        return study.choose_rates(records, "loss")["phased"]

    assert choose(math.nan, 2.0, 1.0) == {0.001: 1.0, 0.01: 2.0, 0.1: None}
    assert list(choose(3.0, math.inf, 1.0, math.nan, 2.0))[:3] == [0.001, 1e-05, 0.1]
    if results_files.can_draw():
        from matplotlib.figure import Figure

        for rates, shown in ((choose(math.nan, 2.0, 1.0), [2]), (choose(math.nan), [])):
            axes = Figure().subplots()
            figure.draw_rates(axes, {"phased": {"validation": rates}}, "loss")
            assert [len(line.get_xdata()) for line in axes.lines] == shown and axes.axison == bool(shown)
    exact = [{"arm": "phased", "lr": lr, "values": [[lr > 1, True]]} for lr in (1.0, 2.0)]
    assert study.choose_rates(exact, "exact") == {"phased": {2.0: 1.0, 1.0: 0.5}}
    assert study.parse_args(["--lr-grid", "1e-3", "1e-4", "0.001"]).lr_grid == [1e-3, 1e-4]  # a run is done once


def test_results_that_are_missing_or_damaged_or_of_other_code_are_reported(tmp_path, capsys, monkeypatch):
    about = {"settings": {}, "hashes": {}, "code": "new"}
    args = argparse.Namespace(out=tmp_path / "out", runs_from=tmp_path)
    for flag in ("--table", "--power"):
        assert study.main([flag, str(tmp_path)]) == 2
        assert "results.json: does not exist" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"results\.json: does not exist"):
        study.import_runs(args, about)
    (tmp_path / "results.json").write_text(json.dumps(about | {"runs": [{"arm": "phased", "seed": 0}]}))
    with pytest.raises(InputError, match=r"not the results of a study \(KeyError: 'lr'"):
        study.import_runs(args, about)
    run = {"arm": "phased", "seed": 0, "lr": 1e-3}
    (tmp_path / "results.json").write_text(json.dumps(about | {"runs": [run]}))
    study.import_runs(args, about)
    assert json.loads((args.out / "results" / "phased-0.001-0.json").read_text()) == run
    assert not capsys.readouterr().err
    study.import_runs(args, about | {"code": "newer"})
    assert "other code" in capsys.readouterr().err
    for code, noted in (("new", False), ("newer", True), ("newer", True)):
        monkeypatch.setattr(study, "describe_settings", lambda args, code=code: about | {"code": code})
        assert study.check_settings(args)["code"] == code
        assert ("the code changed" in capsys.readouterr().err) == noted


def test_a_program_runs_in_its_folder_on_its_ranks_and_its_last_words_are_kept(tmp_path):
    (tmp_path / "here").mkdir()
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, pathlib\n"
        "name = 'rank' + os.environ.get('RANK', '')\n"
        "pathlib.Path(name).write_text(os.environ.get('CUDA_VISIBLE_DEVICES', '') + ' '.join(sys.argv[1:]))\n"
        "sys.exit('it failed' if sys.argv[1:] == ['fail'] else 0)\n"
    )
    runs.run_python([program, "a", 1], tmp_path / "here", device="3")
    assert (tmp_path / "here" / "rank").read_text() == "3a 1"
    runs.run_python([program, "b"], tmp_path / "here", ranks=2)
    assert [(tmp_path / "here" / f"rank{k}").read_text() for k in (0, 1)] == ["b", "b"]
    with pytest.raises(WorkError, match=r"program\.py fail ended with 1:\nit failed"):
        runs.run_python([program, "fail"], tmp_path / "here")


class AtOnce(Executor):
    """Runs what is submitted before it returns: forks must come from the main thread."""

    def __init__(self, workers):
        pass

    def submit(self, work, *args):
        done = Future()
        try:
            done.set_result(work(*args))
        except BaseException as e:
            done.set_exception(e)
        return done


@pytest.fixture
def folder(bench, tmp_path, monkeypatch):
    """Scored rows and prompts for the tiny model; programs run in forks of this process."""
    rows = [
        json.loads(line) | {"score": score} for k, score in ((1, 1.2), (2, 2.5), (3, 4.0))
        for line in (bench / f"s{k}.jsonl").read_text().splitlines()
    ]  # fmt: skip
    prompts = [
        {"id": f"p{i}", "instruction": f"{row['data'][0]} Please.", "expected": row["data"][1], "score": row["score"]}
        for i, row in enumerate(rows) if i % 4 == 0
    ]  # fmt: skip
    rows[0]["data"][0] += "\u2028and a separator of lines that is none here\x85"
    prompts[0]["instruction"] += "\u2028"
    other = [
        {"instruction": r["data"][0], "output": r["data"][1], "score": r["score"]} for r in rows if r["score"] == 4
    ]
    for name, part in (("scored.jsonl", rows[: -len(other)]), ("more.jsonl", other)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (tmp_path / "m").symlink_to(bench / "m")

    def call(command, cwd, device="", ranks=1):
        started, program = time.monotonic(), Path(command[0]).stem
        main = {"train": train.main, "measure": measure.main, "score": score.main}[program]
        run_forked(main, *command[1:], cwd=cwd)
        return time.monotonic() - started

    monkeypatch.setattr(runs, "run_python", call)
    monkeypatch.setattr(runs, "ThreadPoolExecutor", AtOnce)
    return tmp_path


def arguments(folder, *more):
    files = ["--model", folder / "m", "--scored", folder / "scored.jsonl", folder / "more.jsonl"]
    files += ["--prompts", folder / "prompts.jsonl"]
    defaults = ["--out", folder / "out", "--batch-size", 8, "--epochs", 1, "--max-new-tokens", 4, "--jobs", 1]
    return [str(a) for a in (*files, *defaults, *more)]


TRAIN = ("--", "--dtype", "fp32")


def test_a_study_of_another_model_chooses_rates_tests_fresh_seeds_and_says_how_sure_it_is(folder, capsys):
    arms = ("--arms", "phased", "stage 3 only")
    asked = arguments(folder, *arms, "--lr-grid", "1e-5", "3e-3", "--seeds", "2", "--judge", "loss", *TRAIN)
    assert study.main(asked) == 0, capsys.readouterr().err
    out = folder / "out"
    said, results = capsys.readouterr().out, json.loads((out / "results.json").read_text())
    assert "3 arms, 2 rates, 2 seeds: 12 runs of 8 steps" in said and (out / "table.md").read_text() in said
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG" and "<script" in (out / "report.html").read_text()
    records = [json.loads(path.read_text()) for path in (out / "results").glob("*.json")]
    assert len(records) == 12 and {r["steps"] for r in records} == {8}
    # The rate is the best on validation, and validation prompts are not tested.
    for arm in ("one-off", "phased", "stage 3 only"):
        tuned = {r["lr"]: np.mean(r["values"][-1]) for r in records if r["arm"] == arm and r["seed"] == runs.GRID_SEED}
        assert results["table"][arm]["lr"] == min(tuned, key=tuned.get)
    ids = [{row["id"] for row in runs.read_jsonl(out / "data" / f)} for f in ("prompts.jsonl", "validation.jsonl")]
    assert not ids[0] & ids[1] and len(ids[0]) + len(ids[1]) == 20
    # Table, intervals and correction, computed anew from the runs.
    last = {arm: np.array([r["values"][-1] for r in results["runs"] if r["arm"] == arm]) for arm in results["table"]}
    p = {}
    for arm, row in results["table"].items():
        assert row["all"]["mean"] == pytest.approx(last[arm].mean())
        wins = (last[arm] < last["one-off"]) + 0.5 * (last[arm] == last["one-off"]) - 0.5
        assert row["win_rate"]["mean"] == pytest.approx(wins.mean())
        p[arm] = row["win_rate"]["p"]
    first, second = sorted(p[arm] for arm in ("phased", "stage 3 only"))
    assert sorted(results["table"][arm]["p_holm"] for arm in ("phased", "stage 3 only")) == pytest.approx(
        [min(1, 2 * first), min(1, max(2 * first, second))]
    )
    # The tables are computed again from the file alone.
    assert study.main(["--table", str(out)]) == 0
    assert capsys.readouterr().out == (out / "table.md").read_text()
    matrix = results["table"]["phased"]["matrix"]
    assert list(matrix["losses"]) == ["held-out1.jsonl", "held-out3.jsonl"]  # no prompt for stage 2
    assert all(len(losses) == 4 for losses in matrix["losses"].values())
    # The same command does nothing again; other data are refused.
    before = {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    assert study.main(asked) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    lines = (folder / "scored.jsonl").read_text().splitlines()
    (folder / "scored.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert study.main(asked) == 2
    assert "scored.jsonl" in capsys.readouterr().err


def test_an_llm_judges_every_arm_against_one_off_with_the_same_seed_and_is_asked_nothing_twice(
    api, tmp_path, monkeypatch
):
    """The server finds the answer with the greater quality better, whichever stands first."""
    monkeypatch.setattr(runs, "run_python", lambda command, cwd: run(judge, api(judge=0), *command[1:]))
    for folder in ("data", "answers", "verdicts"):
        (tmp_path / folder).mkdir()
    prompts = [
        {"id": f"p{i}", "dataset": "d", "messages": [{"role": "user", "content": f"q{i}"}]} for i in range(6)
    ]  # fmt: skip
    study.write_lines(tmp_path / "data" / "prompts.jsonl", prompts)
    given = {("one-off", 0): [5, 5, 5, 5, 5, 5], ("phased", 0): [6, 4, 5, 7, 3, 9], ("one-off", 1): [9] * 6,
             ("phased", 1): [1, 2, 3, 4, 5, 9]}  # fmt: skip
    for (arm, seed), qualities in given.items():
        texts = [f"of {arm} {seed}: quality={q}" for q in qualities]
        runs.write_answers(tmp_path, runs.Job(arm, 1e-3, seed), 1, texts)
    args = argparse.Namespace(out=tmp_path, api_model="gpt-4-0613", judge_flags=["--canaries"])
    for _ in range(2):
        records = [{"arm": arm, "seed": seed} for arm, seed in given]
        runs.judge_by_api(args, records)
        assert [r["wins"][0] for r in records] == [
            [0.5] * 6, [1.0, 0.0, 0.5, 1.0, 0.0, 1.0], [0.5] * 6, [0.0, 0.0, 0.0, 0.0, 0.0, 0.5]
        ]  # fmt: skip
        asked = paid(tmp_path)
        assert len(asked) >= 24 and set(asked.values()) == {1}

    def some_refused(command, cwd):  # as judge.py ends where it is more than 5 %
        verdicts = ('{"verdict": "refused"}\n', '{"verdict": "win"}\n')
        Path(command[command.index("--out") + 1]).write_text("".join(verdicts))
        raise WorkError("1 refused")

    monkeypatch.setattr(runs, "run_python", some_refused)
    records = [{"arm": "phased", "seed": 0}]
    runs.judge_by_api(args, records)
    assert records[0]["wins"] == [[None, 1.0]]


def test_ifd_and_tasks_are_measured_as_the_programs_do_and_runs_are_taken_from_results(
    folder, tmp_path, capsys, monkeypatch
):
    task = {"instruction": "say a", "accepted": ["a"]}
    (folder / "tasks.jsonl").write_text(json.dumps(task) + "\n" + json.dumps(task | {"instruction": "say b"}) + "\n")
    more = ["--ifd", "--tasks", str(folder / "tasks.jsonl"), "--evaluations", "0", "--judge", "loss", "--seeds", "2"]
    asked = arguments(folder, "--arms", "phased", "--lr-grid", "1e-3", *more, *TRAIN)
    assert study.main(asked) == 0, capsys.readouterr().err
    out = folder / "out"
    results = json.loads((out / "results.json").read_text())
    prompts = runs.read_jsonl(out / "data" / "prompts.jsonl")
    assert len(results["tokens"]) == len(results["base"]["ifd"]) == len(prompts) and len(results["base"]["tasks"]) == 2
    for r in results["runs"]:
        assert len(r["ifd"]) == len(prompts) and len(r["tasks"]) == 2 and r["matrix"] == {} and r["curve"] == {}
    # score.py ifd of the same rows gives the same values for the model before.
    rows = [{"messages": [*p["messages"], {"role": "assistant", "content": p["expected"]}]} for p in prompts]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_forked(score.main, "ifd", "rows.jsonl", "--model", "m", "--out", "ifd.jsonl", *TRAIN[1:], cwd=folder)
    ifd = [row["ifd"] for row in runs.read_jsonl(folder / "ifd.jsonl")]
    assert results["base"]["ifd"] == pytest.approx(ifd, rel=1e-4)
    said = (out / "table.md").read_text()
    assert "| difference from one-off | loss per row | loss per token | IFD | tasks right, % |" in said
    assert "| loss |" not in said  # no held-out losses were measured
    assert study.main(["--power", str(out)]) == 0
    assert "\nIFD" in (power := capsys.readouterr().out) and "\ntasks right, %" in power
    # Another folder takes the runs of results.json, and only what is missing is run.
    saved = tmp_path / "saved.json"
    saved.write_bytes((out / "results.json").read_bytes())
    ran, run_job = [], runs.run_job
    monkeypatch.setattr(runs, "run_job", lambda args, *rest: ran.append(rest[2].name) or run_job(args, *rest))
    other = [a.replace(str(out), str(folder / "other")) for a in asked]
    other[other.index("phased")] = "random stages"
    assert study.main([*other[: other.index("--")], "--runs-from", str(saved), *TRAIN]) == 0
    assert sorted(ran) == ["random-stages-0.001-0", "random-stages-0.001-1"]
    again = json.loads((folder / "other" / "results.json").read_text())
    assert [r for r in again["runs"] if r["arm"] == "one-off"] == [r for r in results["runs"] if r["arm"] == "one-off"]
    saved.write_text(json.dumps(results | {"hashes": results["hashes"] | {"--prompts": "other"}}))
    capsys.readouterr()
    assert study.main([*other[: other.index("--")], "--runs-from", str(saved), *TRAIN]) == 2
    assert "of a study with other --prompts" in capsys.readouterr().err
    settings = results["settings"] | {"dtype": {"bf16": "fp32", "fp32": "bf16"}[results["settings"]["dtype"]]}
    saved.write_text(json.dumps(results | {"settings": settings}))  # measured where "auto" means another dtype
    assert study.main([*other[: other.index("--")], "--runs-from", str(saved), *TRAIN]) == 2
    assert "of a study with other dtype" in capsys.readouterr().err
    (folder / "tasks.jsonl").write_text('{"instruction": "say a", "accepted": "a"}\n')
    assert study.main([a.replace(str(out), str(folder / "new")) for a in asked]) == 2
    assert "tasks.jsonl:1: a task is" in capsys.readouterr().err


def test_bad_arguments_are_said_before_anything_runs(folder, capsys):
    (folder / "data").mkdir()
    spaced = [json.loads(line) for line in (folder / "more.jsonl").read_text().splitlines()]
    for row in spaced:
        row["instruction"] += " \n"
    study.write_lines(folder / "spaced.jsonl", spaced)
    for more, words in (
        (("--lr-grid", "1e-3", "--arms", "phasd"), "phasd"),
        (("--lr-grid", "1e-3", "--bounds", "1.5", "4.5"), "less than a batch of 8: --batch-size, --rows, --bounds"),
        (("--lr-grid", "1e-3", "--score-key", "ifd"), "rows have no ifd"),
        (("--lr-grid", "1e-3", "--also", "ifd"), "no row has it"),
        (("--lr-grid", "1e-3", "--also", "IFD"), "is measured anyway"),
        (("--lr-grid", "1e-3", "--also", "score", "Score"), "no row has it"),
        (("--lr-grid", "1e-3", "--validation", str(folder / "prompts.jsonl")), "also choose the rate"),
        (("--lr-grid", "1e-3", "--prompts", str(folder / "more.jsonl")), "rows that train are prompts that test"),
        (("--lr-grid", "1e-3", "--prompts", str(folder / "spaced.jsonl")), "rows that train are prompts that test"),
        (("--lr-grid", "1e-3", "--validation", str(folder / "more.jsonl")), "rows that train are prompts that choose"),
        (("--lr-grid", "1e-3", "--bounds", "3", "2"), "--bounds must be in increasing order"),
        (("--lr-grid", "1e-3", "--out", str(folder)), "data that are not a study's"),
    ):
        assert study.main(arguments(folder, *more, *TRAIN)) == 2
        assert words in capsys.readouterr().err
    asked = study.parse_args(arguments(folder, "--lr-grid", "1e-3", "--judge-flags=--canaries --votes 2", *TRAIN))
    assert asked.judge_flags == ["--canaries", "--votes", "2"]
    of_train = {"--lr=1": "--lr", "--optimizer-state=reset": "--optimizer-state", "--sel=static": "--select",
                "--replay=0": "--replay"}  # fmt: skip
    errors = {("--lr-grid", "1e-3", "--", flag): f"{name} belongs to the study" for flag, name in of_train.items()}
    errors[("--lr-grid", "1e-3", "--max-len", "64")] = "--max-len 64 (flags of train.py go after --)"
    for more, words in ({(): "--lr-grid must be given"} | errors).items():
        with pytest.raises(SystemExit):
            study.main(arguments(folder, *more))
        assert words in capsys.readouterr().err
    prompts = [json.loads(x) for x in (folder / "prompts.jsonl").read_text().splitlines()]
    for errors, words in (
        ({"expected": " "}, "p12"),
        ({"id": "p0"}, "same dataset and id"),
        ({"score": "high"}, "high"),
    ):
        mine = [p | errors if i == 3 else p for i, p in enumerate(prompts)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in mine))
        assert study.main(arguments(folder, "--lr-grid", "1e-3", *TRAIN)) == 2
        assert words in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_a_question_on_both_sides_is_found_in_whatever_form():
    def said(*texts):
        return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts)]

    def refused(trained, tested):
        study_data = StudyData([{"messages": trained}], [np.array([0])], {}, np.array([1]), 1, 1)
        prompt = {"id": "7", "dataset": "d", "messages": tested}
        try:
            study.check_leaks(study_data, [prompt], [prompt | {"messages": said("another")}])
        except InputError as e:
            return "d 7" in str(e)
        return False

    assert refused(said("q", "a"), said("q")) and refused(said("q", "a", "r", "b"), said("q"))
    assert refused(said("q", "a", "r", "b"), said("q", "a", "r"))
    assert refused(said("be brief\nq", "a"), [{"role": "system", "content": "be brief"}, *said("q")])
    assert not refused(said("q", "a", "r", "b"), said("r")) and not refused(said("q", "a"), said("another q"))


def test_answers_after_ten_stages_are_in_order(tmp_path):
    (tmp_path / "answers").mkdir()
    for k in range(12, 0, -1):
        (tmp_path / "answers" / f"phased-0.stage{k}.json").touch()
    (tmp_path / "answers" / "phased-by-ifd-0.stage1.json").touch()
    found = results_files.answer_files(tmp_path, "phased", 0)
    assert [path.name for path in found] == [f"phased-0.stage{k}.json" for k in range(1, 13)]


def test_a_plan_alone_leaves_nothing_behind_and_says_what_whole_batches_make_of_replay(folder, capsys):
    plan = arguments(folder, "--arms", "phased, replay 0.1", "--lr-grid", "1e-4", "1e-3", "--dry-run", *TRAIN)
    assert study.main(plan) == 0 and not (folder / "out").exists()
    said = capsys.readouterr().out
    assert "2 arms, 2 rates, 5 seeds: 14 runs" in said
    assert "phased, replay 0.1: holds 16.7 % of stage 1, 25 % of stage 2 back" in said


def test_runs_side_by_side_have_their_own_gpus_of_those_that_may_be_used():
    def devices(gpus, ranks, jobs):
        args = argparse.Namespace(gpus=gpus, nproc_per_node=ranks)
        return [runs.device_of(args, k) for k in range(jobs)]

    assert devices(["4", "5", "6", "7"], 2, 2) == ["4,5", "6,7"]
    assert devices(["5"], 1, 3) == ["5", "5", "5"] and devices(["GPU-a", "GPU-b"], 1, 2) == ["GPU-a", "GPU-b"]
    assert devices([], 2, 2) == ["", ""]


def test_a_study_killed_goes_on_and_ends_with_the_same_results(folder):
    asked = arguments(folder, "--equal", "2", "--arms", "phased", "--lr-grid", "1e-3", "--seeds", "1", *TRAIN)
    whole = [a.replace(str(folder / "out"), str(folder / "whole")) for a in asked]
    run_forked(study.main, *whole)
    first = Forked(study.main, asked, ".")
    first.wait_until(lambda: list((folder / "out" / "results").glob("one-off*")))
    first.send_signal(signal.SIGSTOP)
    started = children_of(first.pids[0])
    assert first.kill().returncode == -signal.SIGKILL
    kept = {p: p.read_text() for p in (folder / "out" / "results").iterdir()}
    assert len(kept) == 1
    while any(os.path.exists(f"/proc/{pid}") for pid in started):  # what it had started ends by itself
        time.sleep(0.02)
    run_forked(study.main, *asked)
    ours, theirs = (json.loads((folder / f / "results.json").read_text()) for f in ("out", "whole"))
    assert ours["table"] == theirs["table"]
    said = (folder / "out" / "table.md").read_text()
    assert "| start | stage 1 | stage 2 |\n" in said and "prompts alone" in said and "Llama" not in said
    assert all(path.read_text() == text for path, text in kept.items())
