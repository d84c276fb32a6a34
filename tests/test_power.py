"""What a study can detect (recipes/study/power.py), against simulated studies that are tested as real ones are."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parts.report.win_rates import rate_interval
from recipes.phased_alpaca import print_power as print_plan_power
from recipes.study import study
from recipes.study.intervals import estimate, holm, t_quantile
from recipes.study.power import LEVEL, POWER, Spread, chi_density, detectable, needed, power, read_pilot, spread_of


def make_spread(seeds, prompts, residual, n_prompts=200, limit=math.inf):
    """From standard deviations."""
    return Spread(seeds**2, prompts**2, residual**2, 2, n_prompts, 4, limit)


def share_found(spread, difference, seeds, prompts, level=LEVEL, studies=1500):
    """The share of simulated studies whose own test finds the difference."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(studies):
        values = math.sqrt(spread.seeds) * rng.normal(size=(seeds, 1)) + difference
        values = values + math.sqrt(spread.prompts) * rng.normal(size=(1, prompts))
        values = values + math.sqrt(spread.residual) * rng.normal(size=(seeds, prompts))
        found += estimate(values)["p"] < level
    return found / studies


NOISE = 3 * math.sqrt(POWER * (1 - POWER) / 1500)  # three standard errors of a simulated share
SPREADS = {
    "prompts matter": (make_spread(0.05, 0.3, 0.5), 0.1, 200),
    "seeds matter": (make_spread(0.1, 0.1, 0.2), 0.15, 80),
    "residual alone": (make_spread(0.0, 0.0, 0.6), 0.06, 200),
}


@pytest.mark.parametrize("spread, difference, prompts", SPREADS.values(), ids=SPREADS)
def test_with_the_seeds_needed_four_of_five_simulated_studies_find_the_difference_and_with_fewer_not(
    spread, difference, prompts
):
    for level in (LEVEL, LEVEL / 5):
        seeds = needed(spread, difference, level, prompts=prompts)
        assert 3 < seeds < 40
        found = share_found(spread, difference, seeds, prompts, level)
        assert found == pytest.approx(power(spread, difference, seeds, prompts, level), abs=NOISE)
        assert found > POWER - NOISE
        assert share_found(spread, difference, seeds - 1, prompts, level) < POWER + NOISE


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_the_detectable_difference_is_found_in_four_of_five_simulated_studies(seeds):
    for spread, _, prompts in SPREADS.values():
        least = detectable(spread, seeds, prompts)
        assert share_found(spread, least, seeds, prompts) == pytest.approx(POWER, abs=NOISE)


def test_with_the_prompts_needed_four_of_five_simulated_studies_find_the_difference():
    spread = make_spread(0.02, 0.2, 0.4)
    prompts = needed(spread, 0.06, seeds=5)
    assert 100 < prompts < 1000
    assert share_found(spread, 0.06, 5, prompts) == pytest.approx(POWER, abs=NOISE)
    assert needed(spread, 0.02, seeds=5) is None  # the seeds alone vary too much for it
    assert needed(spread, 0.02, prompts=200) is None  # and the prompts
    assert power(spread, 0.02, 5, 10**9) < POWER and power(spread, 0.02, 10**5, 200) < POWER


def answers_of_arms(rng, gains, seeds, prompts, sd):
    """Right (1) or wrong (0), (arms, seeds, prompts): prompts differ in difficulty, and the arms differ on them."""
    arms = len(gains)
    known = rng.beta(3, 3, prompts) + np.array(gains)[:, None, None] + rng.normal(0, 0.05, (arms, 1, prompts))
    return (rng.random((arms, seeds, prompts)) < known + rng.normal(0, sd, (arms, seeds, 1))).astype(float)


def test_with_the_seeds_that_a_pilot_asks_for_studies_of_right_and_wrong_answers_find_the_difference():
    rng, sd, prompts, studies = np.random.default_rng(0), 0.03, 300, 1000
    pilot = spread_of(answers_of_arms(rng, [0] * 60, 2, prompts, sd), 1.0)
    assert math.sqrt(pilot.seeds) == pytest.approx(sd * math.sqrt(2), rel=0.15)
    seeds, found = needed(pilot, 0.08, prompts=prompts), 0
    for _ in range(studies):
        base, arm = answers_of_arms(rng, [0, 0.08], seeds, prompts, sd)
        found += estimate(arm - base, (-1.0, 1.0))["p"] < LEVEL
    assert 4 <= seeds <= 12
    assert found / studies == pytest.approx(power(pilot, 0.08, seeds, prompts), abs=0.04)


def test_components_and_their_interval_hold_the_truth():
    rng, truth, inside, pilots = np.random.default_rng(0), make_spread(0.1, 0.2, 0.4, 100), 0, 400
    found = []
    for _ in range(pilots):
        values = 0.3 + rng.normal(0, 0.1, (6, 2, 1)) + rng.normal(0, 0.2, (6, 1, 100))
        values = values + rng.normal(0, 1, (1, 2, 100)) + rng.normal(0, 0.4, (6, 2, 100))  # all arms' alike: no matter
        found.append(spread_of(values))
        low, high = (s.sd() for s in found[-1].interval())
        inside += low <= math.sqrt(2) * truth.sd() <= high
    assert inside / pilots == pytest.approx(0.95, abs=0.035) and found[0].df == 5
    for name in ("seeds", "prompts", "residual"):
        assert np.mean([getattr(s, name) for s in found]) == pytest.approx(2 * getattr(truth, name), rel=0.1), name
    # Two arms: the variances from which the study's own test has its error.
    pair = rng.normal(size=(2, 4, 50)) + rng.normal(size=(2, 4, 1)) + rng.normal(size=(2, 1, 50))
    of, difference = spread_of(pair), pair[1] - pair[0]
    assert of.sd() ** 2 == pytest.approx(difference.mean(1).var(ddof=1))
    assert of.prompts + of.residual / 4 == pytest.approx(difference.mean(0).var(ddof=1))


def test_quantiles_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for df in (1, 2, 5, 24, 500):
        x, weights = chi_density(df)
        for p in (0.025, 0.5, 0.975):
            assert np.interp(p, weights.cumsum() - weights / 2, x) == pytest.approx(stats.chi.ppf(p, df), rel=5e-3)
        for level in (LEVEL, LEVEL / 24):
            assert t_quantile(df, level) == pytest.approx(stats.t.isf(level / 2, df), rel=2e-3)
    # Without any prompts' variance it is the power of Student's test.
    for seeds, difference in ((2, 3.0), (4, 1.2), (9, 0.7)):
        shift, critical = difference * math.sqrt(seeds), stats.t.isf(0.025, seeds - 1)
        exact = stats.nct.sf(critical, seeds - 1, shift) + stats.nct.cdf(-critical, seeds - 1, shift)
        assert power(Spread(1.0, 0.0, 0.0, 2, math.inf, 1), difference, seeds, math.inf) == pytest.approx(
            exact, abs=2e-3
        )


def number(n):
    return math.inf if n is None else n


SD = st.floats(0.001, 0.5)


@settings(max_examples=20, deadline=None)
@given(SD, SD, SD, st.floats(0.01, 0.3), st.floats(1, 4), st.integers(10, 2000), st.integers(0, 2000))
def test_a_smaller_difference_needs_no_fewer_seeds_or_prompts_and_more_prompts_need_no_more_seeds(
    seeds, prompts, residual, difference, factor, n, more
):
    spread = make_spread(seeds, prompts, residual)
    few = number(needed(spread, difference, prompts=n))
    assert number(needed(spread, difference / factor, prompts=n)) >= few
    assert number(needed(spread, difference, prompts=n + more)) <= few
    assert number(needed(spread, difference, LEVEL / 5, prompts=n)) >= few
    asked = number(needed(spread, difference, seeds=5))
    assert number(needed(spread, difference / factor, seeds=5)) >= asked >= number(needed(spread, difference, seeds=6))
    assert detectable(spread, 5, n + more) <= detectable(spread, 5, n) * 1.0001
    assert detectable(spread, 6, n) <= detectable(spread, 5, n) * 1.0001


# ---------------------------------------------------------------- the command


def write_results(folder, judge="exact", seeds=2, arms=("phased", "one-off", "random stages"), prompts=40):
    rng, runs = np.random.default_rng(0), []
    for k, arm in enumerate(arms):
        for seed in range(seeds):
            values = (
                (rng.random(prompts) < 0.4 + 0.2 * seed * (k % 2)).tolist() if judge == "exact" else rng.random(prompts)
            )
            losses = {f"held-out{j}.jsonl": [2.0, 1.0 + 0.1 * j + 0.01 * k * seed] for j in (1, 2)}
            run = {"arm": arm, "seed": seed, "values": [list(values)], "matrix": {"losses": losses}}
            if judge == "api":
                run["wins"] = [[None if k == 0 else 0.5, *rng.choice([0.0, 0.5, 1.0], prompts - 1)]]
            runs.append(run)
    (folder / "results.json").write_text(
        json.dumps({"judge": judge, "groups": ["d"], "group": [0] * prompts, "runs": runs[::-1]})
    )
    return folder


def test_measures_are_those_that_a_study_has(tmp_path):
    exact = read_pilot(write_results(tmp_path))
    assert list(exact) == ["win rate, %", "exact answers, %", "held-out loss"]
    answers, wins = exact["exact answers, %"], exact["win rate, %"]
    assert answers.sd() > 0 and answers.sd() == pytest.approx(2 * wins.sd()) and wins.df == 2
    losses = exact["held-out loss"]  # the last of each, its seeds 0.01 k apart: 0, 0.01, 0.02
    assert losses.sd() == pytest.approx(math.sqrt(2 * np.var([0, 0.01, 0.02], ddof=1) / 2)) and losses.residual == 0
    names = list(read_pilot(write_results(tmp_path, "loss")))
    assert names == ["win rate, %", "loss of the answers", "held-out loss"]
    runs = json.loads((tmp_path / "results.json").read_text())["runs"][::-1]
    losses = np.array([r["values"][0] for r in runs]).reshape(3, 2, 40)  # phased, one-off, random stages
    won = spread_of((1.0 + np.sign(losses[1] - losses)) / 2, 0.5)  # a smaller loss than one-off's wins
    assert read_pilot(tmp_path)["win rate, %"].sd() == pytest.approx(won.sd())
    api = read_pilot(write_results(tmp_path, "api") / "results.json")
    assert list(api) == ["win rate, %", "held-out loss"] and api["win rate, %"].n_prompts == 39


def test_the_table_says_seeds_prompts_and_what_is_impossible(tmp_path, capsys):
    write_results(tmp_path)
    assert study.main(["--power", str(tmp_path), "--seeds", "6", "--difference", "30", "1"]) == 0
    said, of = capsys.readouterr().out, read_pilot(tmp_path)["exact answers, %"]
    low, high = of.interval()
    seeds = [needed(s, 0.3, prompts=40) for s in (of, low, high)]
    assert "2 comparisons" in said and "{} ({} to {})".format(*seeds) in said
    least = [100 * detectable(s, 6, 40) for s in (of, low)]
    assert "{:.1f} ({:.1f} to ".format(*least) in said
    assert f"{100 * detectable(of, 6, 40, LEVEL / 2):.1f} (" in said
    assert detectable(of, 2, 40) is None  # more than 100 points
    rows = [line for line in said.splitlines() if line.startswith("exact answers, %") and " 1.0 " in line]
    assert "impossible" in rows[0] and needed(of, 0.01, seeds=6) is None
    assert [line.rstrip()[-1] for line in said.splitlines() if line.startswith("held-out loss")][-1] == "–"
    assert study.main(["--power", str(tmp_path), "--seeds", "6", "--arms", "one-off", "phased"]) == 0
    assert "worst case of 1 comparisons" in capsys.readouterr().out


def test_a_pilot_that_says_nothing_is_refused(tmp_path, capsys):
    for given_up, words in (
        ({"seeds": 1}, "1 seeds"),
        ({"arms": ["one-off"]}, "1 arms"),
        ({"prompts": 1}, "1 prompts"),
        ({"arms": ["phased", "random stages"]}, "KeyError: 'one-off'"),
    ):
        write_results(tmp_path, **given_up)
        assert study.main(["--power", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "results.json").write_text('{"runs": 3}')
    for path in (tmp_path, tmp_path / "none"):
        assert study.main(["--power", str(path)]) == 2
        assert str(path) in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study.main(["--power", str(tmp_path), "--seeds", "1"])


def test_the_recipes_plan_says_which_win_rate_its_verdicts_detect(capsys):
    """By the interval of judge.py report, in simulated verdicts of two models without ties."""
    rng, n, studies = np.random.default_rng(0), 1047, 3000
    print_plan_power(n, 3, 100.0)
    said = capsys.readouterr().out
    points = float(re.search(r"detect a win rate that is ([\d.]+) points", said)[1])
    wins = rng.random((studies, n)) < 0.5 + points / 100
    assert np.mean([rate_interval(x.astype(float))[0] > 0.5 for x in wins]) == pytest.approx(POWER, abs=0.03)
    prompts, dollars = re.search(r"^5 +(\d+) +([\d.]+)", said, re.MULTILINE).groups()
    wins = rng.random((studies, int(prompts))) < 0.55
    assert np.mean([rate_interval(x.astype(float))[0] > 0.5 for x in wins]) == pytest.approx(POWER, abs=0.03)
    assert float(dollars) == pytest.approx(100 * int(prompts) / n, abs=0.01)


def test_holms_worst_case_is_what_its_smallest_p_value_must_stay_below():
    p = LEVEL / 5
    assert min(holm([p * 0.99, *[1.0] * 4])) < LEVEL < min(holm([p * 1.01, *[1.0] * 4]))
