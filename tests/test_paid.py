"""Paid work with failing servers and unusual input: nothing paid is lost, nothing hangs, no input is overwritten."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import httpx
import pytest
from api_helpers import KEY, lines, make_rows, paid, run, stored_records
from conftest import ROOT
from test_api import difficulty, judge_command
from test_judge import compare, write_answers

import judge
import score
from parts.api.rate_limit import RateLimiter
from parts.cli import InputError
from parts.files import check_output_paths, write_lines

# ---------------------------------------------------------------- rows that are refused, runs that must stop


@pytest.mark.parametrize("status", [401, 402])
def test_replies_in_flight_are_recorded_when_a_run_stops(status, api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 300)
    env = api(after=[70, status], latency=0.1)  # the others fail before these have arrived
    difficulty(env, tmp_path, "--concurrency", "50", expect=1)
    assert len(stored_records(tmp_path)) == sum(paid(tmp_path).values()) == 70
    difficulty(api(), tmp_path)
    assert sum(paid(tmp_path).values()) == 300


@pytest.mark.parametrize("batch", [False, True])
def test_if_no_reply_of_the_probe_is_parsed_the_run_stops_with_examples(batch, api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 1000)
    more = ["--batch", "--batch-poll", "0.1"] if batch else []
    done = difficulty(api(reply="It is hard to say."), tmp_path, *more, expect=1)
    assert done.stderr.count("It is hard to say.") == 3 and "--prompt-file" in done.stderr
    assert sum(paid(tmp_path).values()) == (2000 if batch else 40)
    make_rows(tmp_path / "in.jsonl", 21)
    difficulty(api(reply="4"), tmp_path, "--ask-refused")
    assert all(r["score"] == 4 for r in lines(tmp_path / "o.jsonl"))


def test_the_other_rows_start_when_one_probe_row_has_a_value(api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 200)
    started = time.monotonic()
    difficulty(api(latency=0.2), tmp_path, "--concurrency", "200")
    assert time.monotonic() - started < 2


def test_a_run_ends_if_probe_rows_end_in_different_states(api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 100)
    env = api(reply="hard to say", after=[30, 503])  # some are unparsed, some use up their retries
    done = difficulty(env, tmp_path, "--retries", "1", expect=1)
    assert "no answer from the server" in done.stderr and sum(paid(tmp_path).values()) == 30


def test_more_than_5_percent_of_rows_without_a_score_is_a_failure(api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 100)
    done = difficulty(api(refuse="number 3"), tmp_path, expect=1)  # 3, 30, 31, …
    assert "11 refused" in done.stdout.splitlines()[-1] and "5 %" in done.stderr and "--ask-refused" in done.stderr
    assert len(lines(tmp_path / "o.jsonl")) == 100


# ---------------------------------------------------------------- interrupts and waits


@pytest.mark.parametrize(
    "more, server", [(["--rpm", "30"], {}), ([], {"after": [1, 503], "headers": {"retry-after": "50"}})]
)
def test_the_first_ctrl_c_ends_a_wait(more, server, api, tmp_path):
    command, env = judge_command(tmp_path, 100, *more), api(reply="7 8", **server)
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not stored_records(tmp_path):
        time.sleep(0.02)
    time.sleep(0.5)
    there, started = len(stored_records(tmp_path)), time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - started < 1.5 and process.returncode == 130 and "interrupted" in errors
    assert len(stored_records(tmp_path)) <= there + 1


RESETS = ["1893456000", "2030-01-01T00:00:00Z", "Tue, 01 Jan 2030 00:00:00 GMT", "86400s", "9" * 400, "-5", "soon"]


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("remaining", ["0", "59"])
def test_a_reset_that_is_a_date_or_far_away_is_ignored(reset, remaining, api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 40)
    names = ("limit", "60"), ("remaining", remaining), ("reset", reset)
    headers = {f"x-ratelimit-{name}-{kind}": value for name, value in names for kind in ("requests", "tokens")}
    started = time.monotonic()
    difficulty(api(headers=headers), tmp_path, "--concurrency", "8")
    assert time.monotonic() - started < 5


def test_a_window_that_refills_at_its_end_does_not_lower_the_rate():
    limiter = RateLimiter(float("inf"), float("inf"), 64, None)
    headers = {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "59"}
    limiter.learn(httpx.Headers(headers | {"x-ratelimit-reset-requests": "60s"}), 10)
    assert limiter.learned["requests"] > 0.9


def test_a_requested_wait_above_the_maximum_stops_the_run(api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 30)
    started = time.monotonic()
    done = difficulty(api(after=[5, 429], headers={"retry-after": "121"}), tmp_path, "--concurrency", "2", expect=1)
    assert "it asks to wait 121 s" in done.stderr and time.monotonic() - started < 5
    assert len(stored_records(tmp_path)) == 5


# ---------------------------------------------------------------- replies


STRANGE = ["half a character", "base64", "utf-7", "idna", "broken gzip", "bomb", "endless", "drip", "drip of headers"]


@pytest.mark.parametrize("kind", STRANGE)
def test_malformed_replies_are_asked_again_without_traceback(kind, api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 3)
    env, before = api(strange=kind, reply="4"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    difficulty(env, tmp_path, "--concurrency", "1", "--timeout", "0.4")
    assert [r["score"] for r in lines(tmp_path / "o.jsonl")] == [4, 4, 4]
    assert time.monotonic() - started < 6  # five times the timeout, and a wait
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    difficulty(env, tmp_path)  # the stored replies can be read


def test_unpaired_surrogates_in_answers_are_replaced(api, tmp_path):
    a, b = (write_answers(tmp_path / f"{n}.json", [1, 2, 3], n) for n in "ab")
    b.write_text(b.read_text().replace("answer 1 by b", "answer \\ud800 by b"))
    compare(api(judge=0), a, b)
    assert "\ufffd" in lines(tmp_path / "v.jsonl")[1]["answer"]


ADDRESSES = ["http://[::1", "http://host:99999/v1", "http://", "ftp://host", "http://a..b/v1", "http://" + "a" * 70]


@pytest.mark.parametrize(
    "base", [*ADDRESSES, "http://exa mple", "http://h\u00f6st:x/", "host:80", "http://xn--\u00e4/"]
)
def test_an_invalid_base_url_is_an_input_error(base, tmp_path):
    make_rows(tmp_path / "in.jsonl", 2)
    env = os.environ | {"OPENAI_BASE_URL": base, "OPENAI_API_KEY": KEY}
    assert "OPENAI_BASE_URL" in difficulty(env, tmp_path, "--retries", "1", expect=2).stderr


def test_an_invalid_proxy_is_an_input_error(tmp_path):
    make_rows(tmp_path / "in.jsonl", 2)
    env = os.environ | {"OPENAI_BASE_URL": "http://host.invalid/v1", "OPENAI_API_KEY": KEY, "HTTP_PROXY": "foo://bar"}
    assert "proxy" in difficulty({k: v for k, v in env.items() if k != "NO_PROXY"}, tmp_path, expect=2).stderr


# ---------------------------------------------------------------- money and secrets


def test_stored_answers_keep_the_price_at_which_they_were_paid(api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 50)
    env = api()
    difficulty(env, tmp_path, "--api-model", "gpt-4")
    dollars = sum(r["dollars"] for r in stored_records(tmp_path))
    usage = [r["usage"] for r in stored_records(tmp_path)]
    assert dollars == pytest.approx(sum(30e-6 * u["prompt_tokens"] + 60e-6 * u["completion_tokens"] for u in usage))
    done = difficulty(env, tmp_path, "--api-model", "gpt-4o-mini", "--budget", f"{dollars + 0.001:.4f}", expect=1)
    assert "budget" in done.stderr and len(stored_records(tmp_path)) < 80
    cheap = difficulty(env, tmp_path, "--api-model", "gpt-4o-mini", "--budget", f"{dollars + 1:.4f}")
    spent = float(cheap.stdout.split("$")[-1].split(" ")[0])
    assert dollars < spent < dollars + 0.1


@pytest.mark.parametrize("n", [-1000, 0.4, float("nan"), 10**400, "12", None, True])
def test_implausible_usage_does_not_evade_the_budget(n, api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 200)
    charge, price = {"prompt_tokens": n, "completion_tokens": n}, ["--price-in", "100", "--price-out", "100"]
    env = api(charge=charge)
    done = difficulty(env, tmp_path, "--budget", "2", "--concurrency", "4", *price, expect=0 if n == 0.4 else 1)
    kept = stored_records(tmp_path)
    assert all(r["dollars"] >= 200e-6 for r in kept)
    assert n == 0.4 or ("budget" in done.stderr and sum(r["dollars"] for r in kept) <= 2 and len(kept) < 100)


def test_the_key_is_removed_from_every_field_of_a_reply(api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 5)
    env = api(strange="key everywhere")
    difficulty(env, tmp_path)
    for path in tmp_path.iterdir():
        assert path.name == "server.log" or KEY not in path.read_text(), path
    assert stored_records(tmp_path)[0]["model"] == "Bearer [key]"
    env = api(reply="4") | {"OPENAI_API_KEY": "4"}  # a local server needs any key
    difficulty(env, tmp_path, "--api-model", "other")
    assert lines(tmp_path / "o.jsonl")[0]["score"] == 4


# ---------------------------------------------------------------- nothing that is read is overwritten


def test_no_program_overwrites_its_inputs(tmp_path):
    make_rows(tmp_path / "in.jsonl", 9)
    shutil.copy(tmp_path / "in.jsonl", tmp_path / "s1.jsonl")
    scored = [{"id": i, "score": 1 + i % 5, "data": ["q", "a"], "ifd": 0.5} for i in range(9)]
    for name in ("s2.jsonl", "x.jsonl.partial.jsonl", "x.jsonl.tmp"):
        write_lines(tmp_path / name, scored)
    (tmp_path / "p.txt").write_text("{instruction}")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    a, b = (write_answers(tmp_path / f"{n}.json", [1, 2, 3], n, ["x"] * 3) for n in "ab")
    run(judge, os.environ, "compare", a, b, "--judge", "exact", "--out", tmp_path / "v.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "in.jsonl")
    os.link(tmp_path / "s2.jsonl", tmp_path / "hard.jsonl")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for program, *arguments in (
        (score, "difficulty", "in.jsonl", "--out", "in.jsonl"),
        (score, "difficulty", "in.jsonl", "--out", "m/../in.jsonl"),
        (score, "difficulty", "link.jsonl", "--out", "in.jsonl"),
        (score, "difficulty", "x.jsonl.partial.jsonl", "--out", "x.jsonl"),
        (score, "difficulty", "in.jsonl", "--prompt-file", "p.txt", "--out", "p.txt"),
        (score, "stages", "s2.jsonl", "--out-dir", "."),
        (score, "stages", "hard.jsonl", "--out-dir", "."),
        (score, "select", "s2.jsonl", "--out", "s2.jsonl"),
        (score, "select", "x.jsonl.tmp", "--out", "x.jsonl"),
        (score, "ifd", "in.jsonl", "--model", "m", "--out", "in.jsonl"),
        (score, "ifd", "in.jsonl", "--model", "m", "--out", "m/config.json"),
        (judge, "compare", "a.json", "b.json", "--judge", "exact", "--out", "a.json"),
        (judge, "compare", "a.json", "b.json", "--judge", "exact", "--out", "b.json"),
        *((judge, "report", "v.jsonl", f"--{kind}", "v.jsonl") for kind in ("html", "csv", "json", "leaderboard")),
        (judge, "report", "v.jsonl", "--scored", "s2.jsonl", "--html", "s2.jsonl"),
        (judge, "report", "v.jsonl", "--csv", "same", "--json", "same"),
        (judge, "audit", "v.jsonl", "--json", "v.jsonl"),
    ):
        placed = [a if a.startswith("--") or a in ("exact", arguments[0]) else tmp_path / a for a in arguments]
        done = run(program, os.environ, *placed, expect=2)
        assert "overwrite" in done.stderr, arguments
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before, arguments
    run(score, os.environ, "stages", tmp_path / "in.jsonl", "--out-dir", tmp_path / "n", "--score-key", "id", expect=2)
    with pytest.raises(InputError):
        check_output_paths([tmp_path / "o", tmp_path / "o.tmp"], [])


def test_stages_written_again_replace_the_old_ones(tmp_path):
    write_lines(tmp_path / "x.jsonl", [{"id": i, "score": 1 + i % 5, "data": ["q", "a"]} for i in range(9)])
    for _ in range(2):
        run(score, os.environ, "stages", tmp_path / "x.jsonl", "--out-dir", tmp_path)


def test_judging_imports_no_slow_package(tmp_path):
    code = "import judge, sys; assert not {'torch', 'matplotlib', 'sklearn', 'score'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
