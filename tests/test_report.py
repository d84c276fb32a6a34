"""judge.py report: statistics compared with scikit-learn and plain loops, and the page in a real browser."""

import base64
import csv
import hashlib
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
from api_helpers import run
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

import judge
from parts.files import write_lines
from parts.report import win_rates
from parts.report.page import PAGE_DATA_MARKER

EVIL = [
    '<script>document.title = "pwned"</script>',
    "<img src=x onerror=\"document.title='pwned'\">",
    "</script><script>document.title='pwned'</script>",
    "{data} {script} {table}",
    "$\\frac{",
    "\u202eright to left",
    "\ud800",
    "<!--",
    "http://example.invalid/x.png",
    "&lt;b&gt;",
    "\x00\x1b[31m",
]
SCORES = {
    "win": [[8, 6], [7, 7]],
    "tie": [[9, 3], [2, 8]],
    "loss": [[3, 9], [4, 8]],
    "unparsed": [[8, 6], None],
    "refused": [None, None],
    "failed": [None, None],
}


def make_verdicts(path, n, models=("a/stage1", "a/stage2", "random/stage1"), seed=0, evil=True, judge="j"):
    rng, rows = np.random.default_rng(seed), []
    for model in models:
        for i in range(n):
            verdict = str(rng.choice(list(SCORES), p=[0.4, 0.2, 0.25, 0.08, 0.04, 0.03]))
            text = EVIL[i % len(EVIL)] if evil else "plain"
            question = {"dataset": ("vicuna", "koala")[i % 2], "id": str(i), "instruction": f"question {i} {text}"}
            answer = f"{model} says {i} {text} " + "long " * int(rng.integers(0, 200))
            against = f"base says {i} " + "word " * int(rng.integers(0, 200))
            answers = {"model": model, "baseline": "base", "answer": answer, "against": against, "expected": None}
            result = {"scores": SCORES[verdict], "replies": [f"8 6\n{text}", ""], "verdict": verdict}
            rows.append({**question, **answers, "judge": judge, **result})
    write_lines(path, rows)
    return rows


def report(*arguments, expect=0):
    return run(judge, os.environ, "report", *arguments, expect=expect)


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("n", [10, 20, 50])
def test_the_interval_of_a_win_rate_has_its_coverage_at_every_rate_with_and_without_ties(n):
    """The exact coverage: a sum over all outcomes, weighted with their trinomial probabilities."""
    outcomes = np.array([(w, t, n - w - t) for w in range(n + 1) for t in range(n + 1 - w)])
    bounds = np.array([win_rates.rate_interval(np.repeat([1.0, 0.5, 0.0], x)) for x in outcomes])
    logs = [math.lgamma(n + 1) - sum(math.lgamma(k + 1) for k in x) for x in outcomes]
    for ties in (0.0, 0.02, 0.2, 0.65, 0.8, 0.95):
        for share in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 0.5, 0.65, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998):
            chances = np.array([(1 - ties) * share, ties, (1 - ties) * (1 - share)])
            weights = np.exp(logs + outcomes @ np.log(np.maximum(chances, 1e-300)))
            rate = chances @ (1, 0.5, 0)
            assert weights.sum() == pytest.approx(1)
            assert weights[(bounds[:, 0] <= rate) & (rate <= bounds[:, 1])].sum() >= 0.94, (ties, share)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 300))
def test_without_ties_the_interval_equals_wilsons_with_continuity_correction(n, wins):
    proportion = pytest.importorskip("scipy.stats").binomtest(min(wins, n), n)
    low, high = win_rates.rate_interval(np.arange(n) < min(wins, n))
    expected = proportion.proportion_ci(method="wilsoncc")
    assert (low, high) == (pytest.approx(expected.low, abs=1e-6), pytest.approx(expected.high, abs=1e-6))


def test_ties_make_the_interval_narrower():
    def width(wins, ties, losses):
        low, high = win_rates.rate_interval(np.repeat([1.0, 0.5, 0.0], (wins, ties, losses)))
        return high - low

    assert width(100, 800, 100) < 0.5 * width(500, 0, 500)
    defaults = 2 * 1.96 * np.repeat([1.0, 0.5, 0.0], (100, 800, 100)).std() / math.sqrt(1000)
    assert width(100, 800, 100) == pytest.approx(defaults, rel=0.06)
    assert width(0, 10, 0) > 0.2


def test_comparisons_on_different_questions_give_a_warning_and_a_rate_on_the_common_ones(tmp_path):
    """A has a verdict on 10 questions, B on the 6 of them that it did not refuse: on these both win 5."""
    verdicts = ["win"] * 5 + ["loss"] * 5
    some_refused = [*verdicts[:6], *["refused"] * 4]
    write_lines(tmp_path / "v.jsonl", verdict_rows(verdicts, model="A") + verdict_rows(some_refused, model="B"))
    done = report(tmp_path / "v.jsonl", "--json", tmp_path / "t.json", "--html", tmp_path / "r.html")
    rows = {r["model"]: r for r in json.loads((tmp_path / "t.json").read_text())}
    assert [(rows[m]["n"], rows[m]["common"]) for m in "AB"] == [(10, 6), (6, 6)]
    assert rows["A"]["win_rate"] == 0.5 and rows["A"]["common_rate"] == rows["B"]["win_rate"] == pytest.approx(5 / 6)
    warning, header, *table = done.stdout.splitlines()
    assert "WARNING" in warning and "6 to 10" in warning and "on the 6 that all have" in warning
    assert " n " in header
    assert all("83.3 (n 6)" in line for line in table[:2])
    assert "rest on different questions" in (tmp_path / "r.html").read_text().split(PAGE_DATA_MARKER)[1]
    write_lines(tmp_path / "w.jsonl", verdict_rows(verdicts, model="A") + verdict_rows(["refused"] * 10, model="B"))
    assert "WARNING" not in report(tmp_path / "w.jsonl").stdout  # B has none that could be compared


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-500, 500)), min_size=3, max_size=60))
@example([(0.0, 3), (0.0, 3), (0.5, 3)])
@example([(0.0, 5), (1.0, 5), (0.5, 6), (1.0, -400)])
@pytest.mark.parametrize("strength", [0.05, 1.0, 100.0])
def test_the_penalised_regression_matches_scikit_learn(strength, rows):
    from sklearn.linear_model import LogisticRegression

    points, difference = np.array([p for p, _ in rows]), np.array([x for _, x in rows], float)
    x = np.stack([np.tanh(difference / max(difference.std(), 1)), np.ones(len(difference))], 1)
    model = LogisticRegression(
        C=strength, l1_ratio=1, solver="liblinear", fit_intercept=False, tol=1e-9, max_iter=1000, random_state=0
    )
    both, weight = np.repeat([1, 0], len(points)), np.concatenate([points, 1 - points])  # a tie is half of each
    if min(weight[both == 1].sum(), weight[both == 0].sum()) == 0:
        return  # one outcome alone
    model.fit(np.concatenate([x, x]), both, sample_weight=weight)

    def cost(theta):
        return np.abs(theta).sum() + strength * win_rates.log_loss(x @ theta, points)

    assert cost(win_rates.fit_logistic(x, points, strength, np.zeros(2))) <= cost(model.coef_[0]) + 1e-6


def alpaca_eval_rate(points, difference):
    """What AlpacaEval's own function makes of it; it wants questions of its leaderboard, of which its minimal model
    uses nothing."""
    pandas, glm = pytest.importorskip("pandas"), pytest.importorskip("alpaca_eval.metrics.glm_winrate")
    frame = pandas.DataFrame({"std_delta_len": difference / difference.std(ddof=1), "not_gamed_baseline": True})
    formula = glm.GLM_INFO["length_controlled_minimal"]["formula"]
    train, test = glm.make_dmatrix_for_model(
        frame.assign(preference=points), frame.assign(std_delta_len=0.0), formula=formula
    )
    model = glm.fit_LogisticRegressionCV(train, "preference", is_ytrue_proba=True, n_splits=5)
    return model.predict_proba(test)[:, 1].mean()


@pytest.mark.parametrize("seed", range(6))
def test_the_length_controlled_rate_matches_alpaca_eval(seed):
    rng = np.random.default_rng(seed)
    difference = rng.normal(200 * (seed - 2), 400, 300).round()
    better = rng.random(300) < 1 / (1 + np.exp(0.4 * (seed - 3) - np.tanh(difference / 400)))
    points = np.where(rng.random(300) < 0.1, 0.5, better.astype(float))
    expected = alpaca_eval_rate(points, difference)
    assert win_rates.length_controlled(points, difference) == pytest.approx(expected, abs=0.005)


def test_lengths_collinear_with_the_constant_are_no_error():
    """Only wins and ties, and nearly equal differences of length: the regression is singular."""
    points, difference = np.repeat([1.0, 0.5], (57, 43)), np.full(100, -120.0)
    difference[0] = -119
    assert 0.5 < win_rates.length_controlled(points, difference) <= 1


def test_length_control_removes_the_bias_of_a_judge_that_prefers_long_answers():
    rng = np.random.default_rng(0)
    difference = rng.normal(300, 300, 2000)  # the model writes longer answers, and only that wins
    points = (rng.random(2000) < 1 / (1 + np.exp(-2 * np.tanh(difference / difference.std())))).astype(float)
    assert points.mean() > 0.65 and abs(win_rates.length_controlled(points, difference) - 0.5) < 0.05


def test_the_tables_agree_with_counts_of_the_rows(tmp_path):
    rows = make_verdicts(tmp_path / "v.jsonl", 90)
    tables = ["--csv", tmp_path / "t.csv", "--json", tmp_path / "t.json", "--leaderboard", tmp_path / "l.csv"]
    done = report(tmp_path / "v.jsonl", *tables)
    table = list(csv.DictReader((tmp_path / "t.csv").open(encoding="utf-8")))
    assert len(table) == 9 and [r["dataset"] for r in table[:3]] == ["vicuna", "koala", "all"]
    for row, twin in zip(table, json.loads((tmp_path / "t.json").read_text())):
        of = [r for r in rows if r["model"] == row["model"] and row["dataset"] in (r["dataset"], "all")]
        count = {v: sum(r["verdict"] == v for r in of) for v in SCORES}
        assert {v: int(row[v]) for v in SCORES} == count and twin["win"] == count["win"]
        n = count["win"] + count["tie"] + count["loss"]
        assert float(row["win_rate"]) == pytest.approx((count["win"] + count["tie"] / 2) / n) and float(
            row["low"]
        ) <= float(row["win_rate"]) <= float(row["high"])
        assert float(row["disagree"]) == pytest.approx(count["tie"] / n)
    board = list(csv.DictReader((tmp_path / "l.csv").open(encoding="utf-8")))
    assert [r[""] for r in board] == ["a/stage1", "a/stage2", "random/stage1"] and all(
        0 <= float(r["length_controlled_winrate"]) <= 100 for r in board
    )
    assert f"{100 * float(table[2]['win_rate']):.1f}" in done.stdout


def verdict_rows(verdicts, model="m", baseline="b", judge="j", dataset="d", first=0, **more):
    """A row of verdicts for each of `verdicts`."""
    texts = {"instruction": "q", "answer": "long answer", "against": "short"} | more
    names = {"model": model, "baseline": baseline, "judge": judge, "dataset": dataset}
    scores = {"win": [[8, 2], [8, 2]], "loss": [[2, 8], [2, 8]], "tie": [[5, 5], [5, 5]]}
    return [
        names | texts | {"id": str(first + i), "verdict": v, "scores": scores.get(v, [None, None])}
        for i, v in enumerate(verdicts)
    ]


def table_of(folder, *files, expect=0):
    report(*files, "--json", folder / "t.json", "--csv", folder / "t.csv", "--html", folder / "r.html", expect=expect)
    return json.loads((folder / "t.json").read_text())


def test_baselines_judges_and_datasets_are_never_mixed(tmp_path):
    rows = verdict_rows(["win"] * 30, baseline="weak") + verdict_rows(["loss"] * 28 + ["win"] * 2, baseline="strong")
    write_lines(tmp_path / "v.jsonl", rows)
    write_lines(tmp_path / "w.jsonl", verdict_rows(["tie"] * 30, baseline="weak", judge="k"))
    weak, strong, other = table_of(tmp_path, tmp_path / "v.jsonl", tmp_path / "w.jsonl")
    assert [r["win_rate"] for r in (weak, strong, other)] == [1, pytest.approx(2 / 30), 0.5]
    assert strong["p"] < 1e-5 and weak["n"] == strong["n"] == 30
    assert [r["name"] for r in (weak, strong, other)] == [
        "m against weak by j", "m against strong by j", "m against weak by k"
    ]  # fmt: skip
    assert "against weak and strong" in (tmp_path / "r.html").read_text()
    board = ["--leaderboard", tmp_path / "l.csv"]
    assert "one judge" in report(tmp_path / "v.jsonl", *board, expect=2).stderr and not (tmp_path / "l.csv").exists()


def test_a_duplicate_question_is_an_error(tmp_path):
    write_lines(tmp_path / "v.jsonl", verdict_rows(["win"] * 3))
    write_lines(tmp_path / "w.jsonl", verdict_rows(["loss"], first=2))
    for files in ((tmp_path / "v.jsonl",) * 2, (tmp_path / "v.jsonl", tmp_path / "w.jsonl")):
        done = report(*files, expect=2)
        assert "twice" in done.stderr and "d 2: m against b by j" in done.stderr


def test_a_dataset_named_all_keeps_its_own_row(tmp_path):
    rows = verdict_rows(["win"] * 4, dataset="all") + verdict_rows(["loss"] * 4, dataset="koala")
    write_lines(tmp_path / "v.jsonl", rows)
    table = table_of(tmp_path, tmp_path / "v.jsonl")
    assert [(r["dataset"], r["n"], r["total"], r["win_rate"]) for r in table] == [
        ("all", 4, False, 1), ("koala", 4, False, 0), ("(all)", 8, True, 0.5)
    ]  # fmt: skip


def test_identical_answers_are_counted_and_orders_described_only_if_judged_in_both(tmp_path):
    same = verdict_rows(["tie"] * 3, first=5, answer="x", against="x", scores=None)
    write_lines(tmp_path / "v.jsonl", verdict_rows(["win"] * 5) + [r | {"scores": [None, None]} for r in same])
    (row,) = table_of(tmp_path, tmp_path / "v.jsonl")
    assert (row["tie"], row["identical"], row["n"]) == (3, 3, 8)
    page = (tmp_path / "r.html").read_text()
    assert (
        "8 comparisons, 5 of them in both orders" in page
        and "each in both orders" not in page.split(PAGE_DATA_MARKER)[1]
    )
    write_lines(tmp_path / "v.jsonl", verdict_rows(["win"] * 5, judge="exact"))
    table_of(tmp_path, tmp_path / "v.jsonl")
    assert "both orders" not in (tmp_path / "r.html").read_text().split(PAGE_DATA_MARKER)[1]
    write_lines(tmp_path / "v.jsonl", verdict_rows(["win"] * 5))
    table_of(tmp_path, tmp_path / "v.jsonl")
    assert "5 comparisons, each in both orders" in (tmp_path / "r.html").read_text()


def test_no_cell_of_a_csv_is_a_formula(tmp_path):
    for k, name in enumerate(("=1+1", "+cmd", "-x", "@SUM(A1)", "\t=1", "fine - 1")):
        write_lines(tmp_path / f"{k}.jsonl", verdict_rows(["win", "loss", "loss"], model=name, dataset=name))
    files = [tmp_path / f"{k}.jsonl" for k in range(6)]
    report(*files, "--csv", tmp_path / "t.csv", "--leaderboard", tmp_path / "l.csv")
    for name, key in (("t.csv", "model"), ("l.csv", "")):
        rows = list(csv.DictReader((tmp_path / name).open(encoding="utf-8", newline="")))
        assert [r[key] for r in rows] == ["'=1+1", "'+cmd", "'-x", "'@SUM(A1)", "'\t=1", "fine - 1"]
    assert float(next(csv.DictReader((tmp_path / "t.csv").open()))["paper"]) < 0  # numbers stay numbers


def test_alpaca_eval_prints_the_leaderboard(tmp_path):
    write_lines(tmp_path / "v.jsonl", verdict_rows(["win", "loss", "tie"] * 5))
    report(tmp_path / "v.jsonl", "--leaderboard", tmp_path / "l.csv")
    assert next(csv.DictReader((tmp_path / "l.csv").open()))["mode"] == "community"
    pandas, utils = pytest.importorskip("pandas"), pytest.importorskip("alpaca_eval.utils")
    frame = pandas.read_csv(tmp_path / "l.csv", index_col=0)
    utils.print_leaderboard(frame, "community", ["win_rate", "length_controlled_winrate", "avg_length"])


def test_figures_are_drawn_as_png_and_svg(tmp_path):
    pytest.importorskip("matplotlib")
    make_verdicts(tmp_path / "v.jsonl", 20)
    scored, metrics = tmp_path / "scored.jsonl", tmp_path / "metrics.jsonl"
    write_lines(scored, [{"id": i, "score": f"{1 + i % 5}\n", "data": ["q", "a"]} for i in range(20)])
    rows = [{"global_step": i, "loss": 1.0 / i} for i in range(1, 6)]
    for stage, easy, hard in (("start", 2.5, 3.125), ("stage1", 1.25, 2.0), ("stage2", 1.75, 0.875)):
        step = {"stage": stage, "global_step": 8}
        rows += [step | {"eval": "easy", "eval_loss": easy}, step | {"eval": "hard", "eval_loss": hard}]
    write_lines(metrics, rows)
    done = report(tmp_path / "v.jsonl", "--plots", tmp_path / "p", "--scored", scored, "--metrics", metrics)
    for name in ("stages", "datasets", "difficulty", "losses", "forgetting"):
        assert (tmp_path / "p" / f"{name}.png").read_bytes()[:4] == b"\x89PNG" and f"{name}.svg" in done.stdout
    matrix = (tmp_path / "p" / "forgetting.svg").read_text()
    assert all(f">{x}<" in matrix for x in ("easy", "hard", "stage2", "2.500", "1.750", "0.875"))
    losses = (tmp_path / "p" / "losses.svg").read_text()
    assert ">2<" in losses and ">2.0<" not in losses  # a step is a whole number
    stages = (tmp_path / "p" / "stages.svg").read_text()
    assert ">random<" in stages and ">a<" in stages and "stroke-dasharray" in stages
    done = report(tmp_path / "v.jsonl", "--html", tmp_path / "r.html", "--metrics", scored, expect=2)
    assert "contains no training steps" in done.stderr


def test_many_models_are_drawn_in_a_list_and_not_named_in_the_title(tmp_path):
    pytest.importorskip("matplotlib")
    make_verdicts(tmp_path / "v.jsonl", 6, [f"model{k}" for k in range(9)], evil=False)
    report(tmp_path / "v.jsonl", "--plots", tmp_path / "p", "--html", tmp_path / "r.html")
    drawn = (tmp_path / "p" / "models.svg").read_text()
    assert all(f">model{k}<" in drawn for k in range(9)) and not (tmp_path / "p" / "datasets.svg").exists()
    assert '"title": "9 models against base"' in (tmp_path / "r.html").read_text()


# ---------------------------------------------------------------- the page, in a browser


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs Debian's chromium and chromium-driver, which are not here")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1250,1000",
        "--disable-component-update",
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def test_no_figure_of_the_page_is_enlarged(browser, tmp_path):
    pytest.importorskip("matplotlib")
    make_verdicts(tmp_path / "v.jsonl", 6, ["a"], evil=False)
    row = {"stage": "start", "global_step": 1, "eval": "one", "eval_loss": 2.5}
    write_lines(tmp_path / "metrics.jsonl", [row, {"global_step": 1, "loss": 2.0}])
    report(tmp_path / "v.jsonl", "--html", tmp_path / "r.html", "--metrics", tmp_path / "metrics.jsonl")
    browser.get((tmp_path / "r.html").as_uri())
    sizes = "return [...document.images].map(i => [i.clientHeight, i.naturalHeight])"
    heights = browser.execute_script(sizes)
    assert len(heights) >= 3 and all(0 < shown <= natural for shown, natural in heights), heights


def test_the_page_filters_and_pages_without_running_data_or_loading_resources(browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select, WebDriverWait

    rows = make_verdicts(tmp_path / "v.jsonl", 1000)
    report(tmp_path / "v.jsonl", "--html", tmp_path / "r.html")
    browser.get((tmp_path / "r.html").as_uri())
    WebDriverWait(browser, 20).until(lambda b: b.execute_script("return document.readyState") == "complete")

    def get(name):
        return browser.find_element(By.ID, name)

    def text(name):
        return browser.execute_script("return document.getElementById(arguments[0]).textContent.toWellFormed()", name)

    assert text("place") == "1 of 3000"
    milliseconds = "const t = performance.getEntriesByType('navigation')[0]; return t.loadEventEnd - t.startTime"
    assert browser.execute_script(milliseconds) < 2000
    assert "base" in browser.title

    def check(expected):
        place, of = text("place").split(" of ")
        assert int(of) == len(expected)
        row = expected[int(place) - 1]
        values = {name: row[name] for name in ("instruction", "answer", "against")} | {"reply0": row["replies"][0]}
        for name, value in values.items():
            assert text(name) == value.replace("\ud800", "\ufffd"), name
        assert text("badge") == row["verdict"] and text("who") == row["model"]

    check(rows)
    body = browser.find_element(By.TAG_NAME, "body")
    for _ in range(len(EVIL) + 1):  # every kind of evil text comes by
        body.send_keys(Keys.ARROW_RIGHT)
        check(rows)
    body.send_keys("k")
    body.send_keys(Keys.ARROW_LEFT)
    assert text("place") == f"{len(EVIL)} of 3000"
    Select(get("model")).select_by_visible_text("a/stage2")
    Select(get("dataset")).select_by_visible_text("koala")
    Select(get("verdict")).select_by_visible_text("tie")
    expected = [r for r in rows if (r["model"], r["dataset"], r["verdict"]) == ("a/stage2", "koala", "tie")]
    check(expected)
    body.send_keys(Keys.ARROW_LEFT)  # from the first to the last
    assert text("place") == f"{len(expected)} of {len(expected)}"
    check(expected)
    get("search").send_keys(f"QUESTION {expected[3]['id']} ")
    check([expected[3]])
    get("search").clear()
    get("search").send_keys("nothing has this")
    assert text("place") == "nothing matches" and not get("pair").is_displayed()
    get("search").clear()
    for name in ("model", "dataset", "verdict"):
        Select(get(name)).select_by_index(0)
    get("disagree").click()
    check([r for r in rows if r["verdict"] == "tie"])

    assert browser.title != "pwned" and not browser.find_elements(
        By.CSS_SELECTOR, "main img, main script, table img, table script"
    )
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 2
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    page = (tmp_path / "r.html").as_uri()  # the browser's own start page may load something too
    asked = [p["request"]["url"] for p in sent if p["documentURL"] == page]
    assert [u for u in asked if not u.startswith("data:")] == [page]
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_the_policy_blocks_injected_markup(browser, tmp_path):
    """The content security policy protects the page if escaping fails."""
    make_verdicts(tmp_path / "v.jsonl", 4, evil=False)
    report(tmp_path / "v.jsonl", "--html", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    broken = page.replace(
        "<main", "<script>document.title = 'pwned'</script><img src=x onerror=\"document.title = 'pwned'\"><main"
    )
    assert broken != page
    (tmp_path / "b.html").write_text(broken)
    browser.get((tmp_path / "b.html").as_uri())
    assert browser.title != "pwned" and browser.find_element("id", "place").text == "1 of 12"
    browser.get_log("performance"), browser.get_log("browser")


def test_names_of_models_and_datasets_are_not_interpreted_as_markup(browser, tmp_path):
    name = "<b>m</b> $x$ {data} \x1b[2J\ud800"
    make_verdicts(tmp_path / "v.jsonl", 3, models=(name,))
    text = (tmp_path / "v.jsonl").read_text().replace('"koala"', '"<i>k</script><!--"')
    (tmp_path / "v.jsonl").write_text(text)
    done = report(tmp_path / "v.jsonl", "--html", tmp_path / "r.html", "--plots", tmp_path / "p")
    assert "\x1b" not in done.stdout
    page = (tmp_path / "r.html").read_text()
    assert "<b>m" not in page and "<i>k" not in page and "\\u003cb>m\\u003c/b>" in page
    assert "<i>k" not in (tmp_path / "p" / "datasets.svg").read_text()
    assert all(ord(c) < 128 for c in page)
    browser.get((tmp_path / "r.html").as_uri())
    cells = [cell.text for cell in browser.find_elements("css selector", "#summary td:nth-child(-n+2)")]
    assert cells == [c for d in ("vicuna", "<i>k</script><!--", "all") for c in ("<b>m</b> $x$ {data} [2J", d)]
    assert not browser.find_elements("css selector", "table b, table i, h1 b, option b")
    browser.get_log("performance"), browser.get_log("browser")


def shown_table(browser, head, body):
    """The rows of a table of the open page, as dicts by column."""
    header = [cell.text for cell in browser.find_elements("css selector", f"#{head} th")]
    rows = browser.find_elements("css selector", f"#{body} tr")
    return [dict(zip(header, [cell.text for cell in row.find_elements("tag name", "td")])) for row in rows]


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens the page of given verdicts, 1,100 px wide."""

    def open_(rows):
        write_lines(tmp_path / "v.jsonl", rows)
        report(tmp_path / "v.jsonl", "--html", tmp_path / "r.html")
        size = {"width": 1100, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get((tmp_path / "r.html").as_uri())
        return browser

    yield open_
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get_log("performance"), browser.get_log("browser")


def test_the_page_states_the_result_in_a_sentence_that_agrees_with_the_interval(open_page):
    """Better, worse and undecided; a bound just above 50 % is not rounded to 50."""
    shares = {"good": (61, 4, 35), "bad": (35, 4, 61), "same": (50, 4, 46), "edge": (586, 0, 516)}
    rows = []
    for model, counts in shares.items():
        verdicts = [v for v, n in zip(("win", "tie", "loss"), counts) for _ in range(n)]
        rows += verdict_rows(verdicts, model=model, baseline="base")
    page = open_page(rows)
    lines = [item.text.replace("\n", " ") for item in page.find_elements("css selector", "#result li")]
    good, bad, same, edge = lines
    assert good.startswith("good answered better than base in 61 of 100 questions and worse in 35, with 4 ties: ")
    low, high = win_rates.rate_interval(np.repeat([1.0, 0.5, 0.0], shares["good"]))
    assert f"win rate 63 % (95 %: {100 * low:.0f} to {100 * high:.0f}). good answers better." in good
    assert bad.endswith("base answers better.")
    assert "do not show which of the two is better" in same and "answers better" not in same
    low, high = win_rates.rate_interval(np.repeat([1.0, 0.0], (586, 516)))
    assert 0.5 < low < 0.505 and 0.55 < high < 0.57, (low, high)
    assert f"(95 %: {100 * low:.1f} to {100 * high:.0f}). edge answers better." in edge


def test_the_page_hides_order_and_length_for_exact_match_and_columns_without_numbers(open_page):
    rows = verdict_rows(["win", "loss", "tie"] * 4, judge="exact")
    page = open_page(rows)
    assert list(shown_table(page, "head", "summary")[0]) == [
        "model", "dataset", "", "n", "wins", "ties", "losses", "win rate, %", "- 50 %", "p"
    ]  # fmt: skip
    for name in ("judge", "orders", "disagree-label"):
        assert not page.find_element("id", name).is_displayed(), name
    assert "AlpacaEval" not in page.find_element("tag name", "body").text
    page = open_page([r | {"judge": "j"} for r in rows] + verdict_rows(["refused"], first=50))
    assert "refused" in shown_table(page, "judge-head", "judge-summary")[0]
    assert "unparsed" not in shown_table(page, "judge-head", "judge-summary")[0]
    assert page.find_element("id", "orders").is_displayed()


def test_nothing_is_cut_off_at_1100_pixels_and_datasets_are_in_natural_order(open_page, tmp_path):
    rows = make_verdicts(tmp_path / "v.jsonl", 60, models=("phased/stage1", "phased/stage3"), evil=False)
    for k, row in enumerate(rows):
        row["dataset"] = ("vicuna", "fifth 10", "fifth 2", "koala")[k % 4]
    page = open_page(rows)
    names = [row["dataset"] for row in shown_table(page, "head", "summary")]
    assert names == ["vicuna", "fifth 2", "fifth 10", "koala", "all"] * 2
    chosen = [option.text for option in page.find_elements("css selector", "#dataset option")]
    assert chosen == ["every dataset", *names[:4]]
    wide = "return [...document.querySelectorAll('.wide, html')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert len(shown_table(page, "judge-head", "judge-summary")[0]) == 10 and page.execute_script(wide) == 0


def test_the_page_shows_the_answers_of_other_models_to_the_same_question(open_page):
    rows = [r for k in (1, 2, 3) for r in verdict_rows(["win", "loss"], model=f"stage{k}", answer=f"<b>of {k}</b>")]
    page = open_page(rows)
    others = page.find_element("id", "others").text.split("\n")
    assert others == ["stage2 win", "<b>of 2</b>", "stage3 win", "<b>of 3</b>"]
    page.find_element("id", "next").click()
    assert page.find_element("id", "others").text.startswith("stage2 loss")
    page = open_page(rows[:2])
    assert not page.find_element("id", "others-part").is_displayed()


def test_table_and_figures_of_the_page_match_the_report(browser, tmp_path):
    pytest.importorskip("matplotlib")
    make_verdicts(tmp_path / "v.jsonl", 90, evil=False)
    report(tmp_path / "v.jsonl", "--html", tmp_path / "r.html", "--json", tmp_path / "t.json")
    browser.get((tmp_path / "r.html").as_uri())
    first, second = shown_table(browser, "head", "summary"), shown_table(browser, "judge-head", "judge-summary")
    table = [row | more for row, more in zip(first, second)]
    summary = json.loads((tmp_path / "t.json").read_text())
    assert len(table) == len(first) == len(second) == len(summary) == 9
    for shown, row in zip(table, summary):
        rate, low, high = (100 * row[key] for key in ("win_rate", "low", "high"))
        found = [float(x) for x in re.findall(r"[\d.]+", shown["win rate, %"])]
        assert found == pytest.approx([rate, low, high], abs=0.051)
        assert (shown["model"], shown["dataset"]) == (row["model"], row["dataset"])
        assert [shown[key] for key in ("n", "refused", "failed")] == [str(row[k]) for k in ("n", "refused", "failed")]
        assert shown["on the common questions, %"] == f"{100 * row['common_rate']:.1f} (n {row['common']})"
        assert [shown[k] for k in ("wins", "ties", "losses")] == [str(row[k]) for k in ("win", "tie", "loss")]
        assert float(shown["- 50 %"]) == pytest.approx(100 * row["paper"], abs=0.051) and shown["- 50 %"][0] in "+-"
        assert float(shown["p"]) == pytest.approx(row["p"], rel=0.06)
        for name, key in (("orders disagree, %", "disagree"), ("length-controlled, %", "length_controlled")):
            assert float(shown[name]) == pytest.approx(100 * row[key], abs=0.051)
    widths = "return [...document.querySelectorAll('.bar')[2].children].map(part => parseFloat(part.style.width))"
    assert browser.execute_script(widths) == pytest.approx(
        [100 * summary[2][k] / summary[2]["n"] for k in ("win", "tie", "loss")], abs=0.1
    )
    drawn = (
        "return [...document.querySelectorAll('figure img')].map(image => image.complete && image.naturalWidth > 100)"
    )
    assert browser.execute_script(drawn) == [True, True]
    assert "Judge: j" in browser.find_element("id", "about").text
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    browser.get_log("performance")


def test_the_page_template_shows_its_sample_data(browser):
    """The expected answer, the replies of both orders, and light and dark mode."""
    browser.get((ROOT / "parts" / "report" / "page.html").as_uri())
    shown = browser.find_element("tag name", "body").text
    for text in ("sample/stage1 against base", "75.0 (19.8 to 98.9)", "What is 2 + 2?", "9 2", "3 8", "1 of 2"):
        assert text in shown, text
    assert "first order, model in front: 9 to 2" in shown and "second order, baseline in front: 8 to 3" in shown
    assert browser.find_element("id", "wanted").text == "4"
    browser.find_element("id", "next").click()
    assert not browser.find_element("id", "expected").is_displayed() and "2 of 2" in browser.page_source
    ground = "return getComputedStyle(document.querySelector('.text')).backgroundColor"
    seen = set()
    for value in ("light", "dark"):
        feature = {"features": [{"name": "prefers-color-scheme", "value": value}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
        seen.add(browser.execute_script(ground))
    assert len(seen) == 2
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    browser.get_log("performance")


def test_the_policy_of_the_page_contains_the_hash_of_its_script(tmp_path):
    """Only the script in the file may run; after changing it, copy the hash that this test prints into the policy."""
    page = (ROOT / "parts" / "report" / "page.html").read_text(encoding="ascii")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    right = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1 and f"script-src 'sha256-{right}'\"" in page, f"the policy must say 'sha256-{right}'"
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src" in page
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|eval\(", page)
    make_verdicts(tmp_path / "v.jsonl", 5)
    report(tmp_path / "v.jsonl", "--html", tmp_path / "r.html")
    before, after = page.split(PAGE_DATA_MARKER)
    made = (tmp_path / "r.html").read_text()  # nothing is changed but the data
    assert made.startswith(before + PAGE_DATA_MARKER) and made.endswith(after[after.index("</script>") :])
