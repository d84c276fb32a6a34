"""Costs are counted as billed, within the budget; rows that always fail; the forms of replies and errors."""

import json
import os
import resource
import subprocess
import sys

import httpx
import pytest
from api_helpers import KEY, lines, make_rows, paid, run, stored_records
from conftest import ROOT
from fake_api import REJECTIONS
from test_api import difficulty, judge_command
from test_judge import compare, write_answers
from test_served import answers, arguments, many, write_prompts

import generate
from parts.api.questions import failure_reason, question_state
from parts.api.replies import extract_message, parse_scores, rejected_parameter, strip_thoughts
from parts.files import atomic_write

PRICE = ["--price-in", "100", "--price-out", "100"]
BATCH = ["--batch", "--batch-poll", "0.05"]


def total_dollars(records):
    return sum((r.get("dollars") or 0) + r.get("broken", 0) for r in records)


# ---------------------------------------------------------------- the budget


def test_the_budget_holds_for_requests_sent_again_with_other_parameters(api, tmp_path):
    """A model that rejects max_tokens gets 4,000 tokens for reasoning, and uses them."""
    make_rows(tmp_path / "in.jsonl", 60)
    usage = {"prompt_tokens": 300, "completion_tokens": 4000}
    env = api(reject=["max_tokens"], charge=usage, latency=0.05)
    for _ in range(2):
        done = difficulty(env, tmp_path, "--budget", "2", "--concurrency", "20", *PRICE, expect=1)
        assert "budget" in done.stderr
    billed = 4300 * 100e-6 * sum(paid(tmp_path).values())
    assert 1.2 < billed <= 2 and total_dollars(stored_records(tmp_path)) == pytest.approx(billed)


def test_only_one_request_is_sent_until_the_parameters_are_known(api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 40)
    server = {"reject": ["max_tokens", "temperature", "seed"], "latency": 0.1}
    env = api(**server, headers={"x-count": "1"})
    difficulty(env, tmp_path, "--concurrency", "40")
    assert len(paid(tmp_path)) == 40 and seen(env) == 43  # not 40 + 3 x 40


def seen(env):
    """How many requests for a completion the fake server got."""
    return httpx.get(env["OPENAI_BASE_URL"] + "/count").json()["count"]


@pytest.mark.parametrize("kind", ["truncated", "cut", "error", "empty"])
def test_unusable_replies_are_billed_and_their_row_fails(kind, api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 30)
    done = difficulty(api(poison=["number 3.", kind]), tmp_path, "--retries", "2", *PRICE, expect=1)
    records, unusable = stored_records(tmp_path), sum("unusable" in r for r in lines(tmp_path / "server.log"))
    of_row = [r for r in records if r["id"] == "r3"]
    assert unusable == 3 and total_dollars(of_row) > 0.99 * 3 * 107 * 100e-6
    spent = float(done.stdout.split(" in all")[0].split("$")[-1])
    assert spent == pytest.approx(total_dollars(records), abs=0.005)
    row = lines(tmp_path / "o.jsonl")[3]
    assert row["score"] is None and row["unscored"].startswith("failed: ") and "1 failed" in done.stderr
    difficulty(api(), tmp_path, *PRICE, expect=1)  # is not asked again
    difficulty(api(), tmp_path, *PRICE, "--ask-refused")
    assert all(r["score"] for r in lines(tmp_path / "o.jsonl"))


# ---------------------------------------------------------------- pending batches


def started_batch(api, folder, n=20, **server):
    """Start a batch and kill the program; returns the environment of the server."""
    env = api(batch_seconds=0.3, reply="7 8", **server)
    command, state = judge_command(folder, n, *BATCH), folder / "o.jsonl.batch.json"
    process = subprocess.Popen([*command, "--batch-poll", "60"], env=env, stdout=subprocess.DEVNULL)
    while not state.exists() or 'batch"' not in state.read_text():
        assert process.poll() is None
    process.kill()
    process.wait()
    return env


def test_a_pending_batch_is_collected_with_batch_and_an_error_without(api, tmp_path):
    env = started_batch(api, tmp_path)
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    done = compare(env, *files, "--dry-run", out="o.jsonl")
    assert "o.jsonl.batch.json" in done.stdout and "20 rows" not in done.stdout and "40 rows" in done.stdout
    done = compare(env, *files, out="o.jsonl", expect=2)
    assert "--batch" in done.stderr and "o.jsonl.batch.json" in done.stderr
    compare(env, *files, *BATCH, out="o.jsonl")
    assert sum(paid(tmp_path).values()) == 40 and len(lines(tmp_path / "o.jsonl")) == 20


def test_all_answers_of_a_pending_batch_are_recorded_and_billed(api, tmp_path):
    env = started_batch(api, tmp_path)
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    whole = [path.read_text() for path in files]
    for path, n in zip(files, (2, 2)):
        path.write_text(json.dumps(json.loads(path.read_text())[:n]))
    done = compare(env, *files, *BATCH, "--api-model", "gpt-4o-mini", out="o.jsonl")
    records = stored_records(tmp_path)
    assert len(records) == 44 and sum(paid(tmp_path).values()) == 44
    dear = [r for r in records if r["model"].startswith("gpt-4-0613")]
    prices = [15e-6 * r["usage"]["prompt_tokens"] + 30e-6 * r["usage"]["completion_tokens"] for r in dear]
    assert [r["dollars"] for r in dear] == pytest.approx(prices) and len(dear) == 40
    assert float(done.stdout.split(" in all")[0].split("$")[-1]) == pytest.approx(total_dollars(records), abs=0.005)
    for path, text in zip(files, whole):
        path.write_text(text)
    compare(env, *files, out="o.jsonl")
    assert sum(paid(tmp_path).values()) == 44  # the other answers are used now


def test_results_that_were_recorded_before_a_kill_are_not_recorded_again(api, tmp_path):
    env = started_batch(api, tmp_path)
    files, state = [tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "o.jsonl.batch.json"
    under_way = state.read_text()
    compare(env, *files, *BATCH, out="o.jsonl")
    before = stored_records(tmp_path)
    state.write_text(under_way)  # as after a kill between the last record and the removal of this file
    compare(env, *files, *BATCH, out="o.jsonl")
    assert stored_records(tmp_path) == before and len(before) == 40


def test_an_upload_without_a_batch_is_ignored(api, tmp_path):
    env = api(reply="7 8")
    command = judge_command(tmp_path, 3, *BATCH)
    atomic_write(
        tmp_path / "o.jsonl.batch.json", json.dumps({"file": "file-9", "rows": {"x": ["y", 3]}, "prices": [1, 1]})
    )
    subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=True)
    assert sum(paid(tmp_path).values()) == 6 and not (tmp_path / "o.jsonl.batch.json").exists()


def test_a_batch_unknown_to_the_server_is_an_error_with_advice(api, tmp_path):
    started_batch(api, tmp_path)
    env, files = api(forget=True, reply="7 8"), [tmp_path / "a.json", tmp_path / "b.json"]
    done = compare(env, *files, *BATCH, out="o.jsonl", expect=1)
    assert "batch-0" in done.stderr and f"{tmp_path}/o.jsonl.batch.json" in done.stderr and "delete" in done.stderr
    assert "--api-model" not in done.stderr
    (tmp_path / "o.jsonl.batch.json").unlink()
    compare(api(reply="7 8"), *files, *BATCH, out="o.jsonl")


@pytest.mark.parametrize("kind, dollars", [("null", 0), ("list", 1)])
def test_unusable_lines_of_a_batch_are_billed_and_asked_again(kind, dollars, api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 10)
    done = difficulty(api(batch_lines=kind, batch_seconds=0), tmp_path, *BATCH, *PRICE, expect=1)
    records = stored_records(tmp_path)
    assert "10 failed" in done.stderr and len(lines(tmp_path / "o.jsonl")) == 10
    assert sum("lost" in r for r in records) == 30 * dollars and (total_dollars(records) > 30 * 100e-6) == bool(dollars)
    assert not list(tmp_path.glob("*.batch.json"))


def test_parameters_rejected_in_a_batch_are_omitted_from_the_next(api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 10)
    difficulty(api(reject=["seed", "max_tokens"], batch_seconds=0), tmp_path, *BATCH)
    assert all(r["score"] for r in lines(tmp_path / "o.jsonl"))


# ---------------------------------------------------------------- keys of answers


@pytest.mark.parametrize("flags", [["--temperature", "0.7"], ["--max-tokens", "20"]])
def test_other_settings_make_other_questions(flags, api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 3)
    env = api()
    for more in ([], flags, [], flags):
        difficulty(env, tmp_path, *more)
    assert len(lines(tmp_path / "server.log")) == 6
    for more in (["--votes", "2", "--temperature", "0.5"], ["--votes", "2"]):
        difficulty(env, tmp_path, *more)
    assert len(lines(tmp_path / "server.log")) == 6 + 12


# ---------------------------------------------------------------- rows that a server always fails


@pytest.mark.parametrize("kind", ["500", "hang", "empty"])
@pytest.mark.parametrize("n, concurrency", [(30, "1"), (30, "64"), (1, "8")])
def test_a_row_that_always_fails_affects_no_other_row(kind, n, concurrency, api, tmp_path):
    """The first row, which is asked alone; or the only row without an answer from an earlier run."""
    make_rows(tmp_path / "in.jsonl", 30)
    if n == 1:
        rows = (tmp_path / "in.jsonl").read_text()
        (tmp_path / "in.jsonl").write_text("".join(rows.splitlines(True)[1:]))
        difficulty(api(), tmp_path)
        (tmp_path / "in.jsonl").write_text(rows)
    env = api(poison=["number 0.", kind])
    more = ["--retries", "1", "--timeout", "0.5" if kind == "hang" else "60", "--concurrency", concurrency]
    done = difficulty(env, tmp_path, *more, expect=1)
    rows = lines(tmp_path / "o.jsonl")
    assert [r["id"] for r in rows if r["score"] is None] == ["r0"] and "2 tries" in rows[0]["unscored"]
    assert "29 parsed" in done.stdout and "--ask-refused" in done.stderr
    before = len(lines(tmp_path / "server.log"))
    difficulty(env, tmp_path, *more, expect=1)
    assert len(lines(tmp_path / "server.log")) == before
    difficulty(api(), tmp_path, "--ask-refused")
    assert all(r["score"] for r in lines(tmp_path / "o.jsonl"))


def test_the_judge_and_generate_record_failed_rows_as_well(api, tmp_path):
    a, b = (write_answers(tmp_path / f"{n}.json", [1, 2, 3, 4], n) for n in "ab")
    compare(api(judge=1, poison=["answer 2 by b", "500"]), a, b, "--retries", "1", expect=1)
    rows = lines(tmp_path / "v.jsonl")
    assert [r["verdict"] == "failed" for r in rows] == [False, False, True, False] and "it hurts" in rows[2]["reason"]
    write_prompts(tmp_path, many(4))
    env = api(poison=["with 2,", "500"], charge={"prompt_tokens": 10, "completion_tokens": 5}, finish="length")
    done = run(generate, env, *arguments(tmp_path, "--retries", "1"), expect=1)
    assert "it hurts" in answers(tmp_path)[2]["error"] and answers(tmp_path)[1]["output"]
    table = next(line.split() for line in done.stdout.splitlines() if line.startswith("p "))
    assert table[1:5] == ["3", "10", "5", "100%"]


def test_a_server_that_fails_every_row_stops_the_run(api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 300)
    env = api(status=[500, {}])
    done = difficulty(env, tmp_path, "--retries", "1", expect=1)
    assert "no answer from the server" in done.stderr and not (tmp_path / "o.jsonl").exists()
    assert seen(env) <= 40 and not stored_records(tmp_path)
    done = difficulty(api(after=[100, 500]), tmp_path, "--retries", "1", "--concurrency", "4", expect=1)
    assert "no answer from the server" in done.stderr and not any("failed" in r for r in stored_records(tmp_path))
    difficulty(api(), tmp_path)
    make_rows(tmp_path / "in.jsonl", 2)
    done = difficulty(api(status=[500, {}]), tmp_path, "--retries", "1", out="new.jsonl", expect=1)
    assert "no answer from the server" in done.stderr and not stored_records(tmp_path, "new.jsonl")


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize("form", REJECTIONS)
def test_rejections_of_a_parameter_are_recognized_in_every_format(form, api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 5)
    done = difficulty(api(reject=["seed"], reject_as=form), tmp_path)
    assert "without seed" in done.stdout and all(r["score"] for r in lines(tmp_path / "o.jsonl"))
    assert all("temperature" in r["request"] and "max_tokens" in r["request"] for r in lines(tmp_path / "server.log"))


def test_other_errors_reject_no_parameter():
    sent = ["max_tokens", "temperature", "seed"]
    message = "'temperature' must be at most 1"
    detail = [{"type": "string_type", "loc": ["body", "messages"], "msg": "not text", "input": "unknown seed"}]
    for body in ({"error": {"message": message}}, {"detail": detail}, {"message": "unknown model seedling"}, {}):
        assert rejected_parameter(body, sent) is None
    text = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead of 'seed'."
    assert rejected_parameter({"error": {"message": text, "param": "seed"}}, sent) == "seed"
    assert rejected_parameter({"error": {"message": text}}, sent) == "max_tokens"


# ---------------------------------------------------------------- replies


def test_recorded_reviews_are_parsed_as_published(shared):
    reviews = lines(shared / "judge_replies.jsonl")
    assert len(reviews) == 200
    for r in reviews:
        for review in (r["first_line"], r["first_line"] + "\nBoth answers are of use.", f"```\n{r['first_line']}\n```"):
            assert parse_scores(review) == r["scores"], r


def test_thoughts_are_removed_from_answers(api, tmp_path):
    for reply, rest in (
        ("<think>a</think>\n\nb\n", "b"),
        ("a\n</think>b", "b"),
        ("a</think>", ""),
        ("<think>a", ""),
        (" b ", " b "),
        ("b <think>a</think>", "b <think>a</think>"),
        ("a" + "</think>" * 10_000 + "b", "b"),
    ):
        assert strip_thoughts(reply) == rest
    write_prompts(tmp_path, many(2))
    run(generate, api(reply="1, no: 2.\n</think>\n\nThree."), *arguments(tmp_path))
    assert [r["output"] for r in answers(tmp_path)] == ["Three.", "Three."]
    assert "1, no" in stored_records(tmp_path, "a.json")[0]["reply"]


def test_content_parts_are_joined_and_errors_have_no_message():
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "7 or 8?"}]}
    parts = [thinking, {"type": "text", "text": "8"}, {"type": "text", "text": " 7"}]
    body = {"choices": [{"message": {"role": "assistant", "content": parts}, "finish_reason": "stop"}]}
    assert extract_message(body)["content"] == "8 7"
    assert extract_message({"choices": [{"message": {"content": [4]}}]}) is None
    assert extract_message({"choices": [{"message": {"content": "4"}, "finish_reason": "error"}]}) is None


def test_unparsed_replies_are_shown_at_the_end_with_advice(api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 4)
    done = difficulty(api(reply="I would say", finish="length"), tmp_path, expect=1)
    assert done.stderr.count("'I would say'") == 3 and "raise --max-tokens" in done.stderr
    assert sum(paid(tmp_path).values()) == 8  # at temperature 0 a third request would repeat the second
    difficulty(api(reply="I would say"), tmp_path, "--temperature", "1", out="p.jsonl", expect=1)
    assert sum(paid(tmp_path).values()) == 8 + 12
    make_rows(tmp_path / "in.jsonl", 60)  # one of the first 20 can be read: the run goes on to the end
    done = difficulty(api(odd="number", reply=None), tmp_path, out="q.jsonl")
    assert "cannot be read" not in done.stderr


def test_states_of_records():
    reply, lost = {"reply": "x", "value": None, "dollars": 0.1}, {"lost": "HTTP 200: {}", "dollars": 0.1}
    for records, state in (
        ([], "open"),
        ([reply] * 2, "open"),
        ([reply] * 3, "unparsed"),
        ([lost] * 2, "open"),
        ([lost] * 3, "failed"),
        ([lost, reply, lost], "unparsed"),
        ([lost, reply | {"value": 0}], "parsed"),
        ([{"failed": "HTTP 500"}], "failed"),
    ):
        assert question_state(records) == state, records
    assert "{}" in failure_reason([lost] * 3) and failure_reason([{"failed": "no"}]) == "failed: no"


# ---------------------------------------------------------------- files and secrets


def test_a_full_disk_names_the_file_and_leaves_complete_lines(tmp_path):
    """Also if a line does not fit and a shorter one after it does."""
    code = """
import resource, sys
from pathlib import Path
from parts.api.store import Store
from parts.files import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))
store, errors = Store(Path("s.jsonl")), []
for size in (200, 300, 10, 300):
    try:
        store.add({"key": "k", "reply": "x" * size})
    except OSError as e:
        errors.append(str(e))
print(errors)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.close()
resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))
try:
    atomic_write(Path("o.json"), "x" * 500)
except OSError as e:
    print(e)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.count("s.jsonl") == 3 and "o.json" in done.stdout and not (tmp_path / "o.json").exists()
    assert sorted(len(r["reply"]) for r in lines(tmp_path / "s.jsonl")) == [10, 200, 300, 300]


def test_on_a_full_disk_replies_in_flight_are_recorded(api, tmp_path):
    """The same command, with free space, asks only for the missing rows."""
    env, command = api(latency=0.1, reply="7 8"), judge_command(tmp_path, 100, "--concurrency", "8")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))  # noqa: E731
    done = subprocess.run(command, env=env, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 1 and "o.jsonl.partial.jsonl" in done.stderr and "Traceback" not in done.stderr
    there = len(stored_records(tmp_path))
    assert there > 20 and "could not be written" in done.stderr
    subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=True)
    assert sum(paid(tmp_path).values()) <= 200 + 8


def test_credentials_in_the_address_are_in_no_message_and_no_file(api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 3)
    for status in ([500, {}], [400, {}], None):
        env = api(echo=True, status=status)
        env["OPENAI_BASE_URL"] = env["OPENAI_BASE_URL"].replace("//", "//someone:very-secret@")
        done = difficulty(env, tmp_path, "--retries", "1", "--ask-refused", expect=1)
        texts = [done.stdout, done.stderr, (tmp_path / "o.jsonl.partial.jsonl").read_text()]
        for secret in ("very-secret", "c29tZW9uZTp2ZXJ5LXNlY3JldA=="):
            assert not any(secret in text for text in texts)
    proxy = {k: v for k, v in env.items() if k != "NO_PROXY"} | {"HTTP_PROXY": "foo://someone:very-secret@bar"}
    done = difficulty(proxy, tmp_path, "--api-model", "gpt-4o", expect=2)
    assert "proxy" in done.stderr and "very-secret" not in done.stderr


def test_a_missing_certificate_file_is_named(tmp_path):
    make_rows(tmp_path / "in.jsonl", 3)
    env = os.environ | {"OPENAI_API_KEY": KEY, "SSL_CERT_FILE": str(tmp_path / "none.pem")}
    assert "none.pem" in difficulty(env, tmp_path, expect=2).stderr


def test_the_plan_states_the_date_of_the_price_list(api, tmp_path):
    make_rows(tmp_path / "in.jsonl", 3)
    assert "August 2025" in difficulty(api(), tmp_path, "--dry-run").stdout
    assert "August 2025" not in difficulty(api(), tmp_path, "--dry-run", *PRICE).stdout


def test_generate_refuses_to_overwrite_inputs_and_partial_work(bench, tmp_path):
    write_prompts(tmp_path, many(2))
    for name in ("x.json.partial.jsonl", "x.json.partial.0.jsonl", "x.json.batch.json"):
        (tmp_path / name).write_text("")
    before = (bench / "m" / "config.json").read_bytes()
    for out in (bench / "m" / "config.json", tmp_path, *tmp_path.glob("x.json.*")):
        for more in ([], ["--server", "x", "--completions"]):
            given = ["--model", bench / "m", *more, "--prompts", tmp_path / "p.jsonl", "--out", out]
            assert str(out) in run(generate, os.environ, *given, expect=2).stderr
    assert (bench / "m" / "config.json").read_bytes() == before
    prompts = tmp_path / "p.jsonl.partial.0.jsonl"
    prompts.write_text((tmp_path / "p.jsonl").read_text())
    given = ["--model", bench / "m", "--prompts", prompts, "--out", tmp_path / "p.jsonl"]
    assert "overwrite" in run(generate, os.environ, *given, expect=2).stderr and prompts.exists()
