"""The runs of a study: training, measuring and judging, each by the program in a process of its own."""

import argparse
import importlib.util
import json
import multiprocessing
import os
import queue
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from tqdm import tqdm

from parts.cli import WorkError, progress, set_parent_death_signal
from parts.files import atomic_write, json_values, read_json_object, read_text, write_lines
from recipes.study.arms import MEASURED_EVERY_STAGE, Arm, StudyData, restage_by
from recipes.study.results import answer_files, file_name

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Runs are forks of a process that has imported torch: the import takes as long as ten steps of the demo.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch", "train", "recipes.study.measure"])
EXIT_CODE_LOCK = threading.Lock()  # starting a process reaps those that have ended, and an exit code can be read once
GRID_SEED = 1000  # of runs that choose a rate; tested runs have seeds 0, 1, …


@dataclass(frozen=True)
class Job:
    arm: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{file_name(self.arm)}-{self.lr:g}-{self.seed}"


def run_script(command: list[str], cwd: Path, device: str, said: Path) -> None:
    """Run `python *command > said 2>&1` in this process, which has imported torch already."""
    set_parent_death_signal(signal.SIGKILL)
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update({"CUDA_VISIBLE_DEVICES": device} if device else {})
    os.chdir(cwd)
    tqdm.set_lock(threading.RLock())  # the default is a semaphore that is not freed at exit
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def run_python(command: list, cwd: Path, device: str = "", ranks: int = 1) -> float:
    """Run a Python program, with torchrun on several ranks, and return its seconds. Raises WorkError with the end of
    its output."""
    started, launched = time.monotonic(), [str(c) for c in command]
    if ranks > 1:
        launcher = importlib.util.find_spec("torch.distributed.run").origin
        launched = [launcher, "--standalone", "--nproc-per-node", str(ranks), *launched]
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        process = FORKSERVER.Process(target=run_script, args=(launched, cwd, device, said))
        with EXIT_CODE_LOCK:
            process.start()
        wait([process.sentinel])
        with EXIT_CODE_LOCK:
            process.join()
        if process.exitcode:
            text = said.read_text(errors="replace")[-4000:]
            raise WorkError(f"{shlex.join(map(str, command))} ended with {process.exitcode}:\n{text}")
    return time.monotonic() - started


def device_of(args: argparse.Namespace, run: int) -> str:
    """CUDA_VISIBLE_DEVICES for the run-th of the concurrent runs. If there are more runs than GPUs, they share."""
    first = run % max(1, len(args.gpus) // args.nproc_per_node) * args.nproc_per_node
    return ",".join(args.gpus[first : first + args.nproc_per_node])


def held_out_files(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "data").glob("held-out*.jsonl"))


def read_jsonl(path: Path) -> list[dict]:
    return [value for _, value in json_values(read_text(path))]


def run_job(args: argparse.Namespace, study_data: StudyData, arm: Arm, job: Job, device: str) -> None:
    """Train and measure a run and write out/results/NAME.json. A run that was killed continues."""
    out, tuning = args.out, job.seed == GRID_SEED
    folder, result = out / "runs" / job.name, out / "results" / f"{job.name}.json"
    names = []
    for k, rows in enumerate(arm.stages(np.random.default_rng(job.seed)), 1):
        names.append(f"{job.name}.s{k}.jsonl")
        write_lines(out / "data" / names[-1], [study_data.rows[i] for i in rows])
    rates = [job.lr * arm.falling**k for k in range(len(names))]
    command = [ROOT / "train.py", "--model", args.model, "--stages", *names, "--lr", *rates, "--out", folder]
    command += ["--epochs", arm.epochs, "--batch-size", study_data.batch_size, "--seed", job.seed, *arm.flags]
    if not tuning and args.evaluations:
        command += ["--eval", *held_out_files(out), "--eval-every", max(1, study_data.steps // args.evaluations)]
    command += args.train
    seconds = run_python(command, out / "data", device, args.nproc_per_node)
    measured = range(1 if job.arm in MEASURED_EVERY_STAGE and not tuning else len(names), len(names) + 1)
    found = measure_models(
        args, [folder / f"stage{k}" for k in measured], "validation" if tuning else "prompts", job.name, device
    )
    metrics = read_jsonl(folder / "metrics.jsonl")
    steps = [row for row in metrics if "loss" in row]
    if len(steps) != (arm.steps or study_data.steps):
        raise WorkError(f"{job.name} took {len(steps)} steps instead of {arm.steps or study_data.steps}")
    curve: dict[str, list] = {}
    for row in metrics:
        if "eval_loss" in row:
            curve.setdefault(row["eval"], []).append([row["global_step"], row["eval_loss"]])
    if not tuning:
        for k, of in zip(measured, found):
            write_answers(out, job, k, of["answers"])
    record = {"arm": job.arm, "lr": job.lr, "seed": job.seed, "steps": len(steps), "seconds": round(seconds, 1)}
    record |= {"rows": sum(row["documents"] for row in steps), "tokens": sum(row["tokens"] for row in steps)}
    record |= {"values": [of["values"] for of in found], "curve": curve}
    record |= {"matrix": read_json_object(folder / "held_out.json") if curve else {}}
    record |= {key: found[-1][key] for key in ("ifd", "tasks")}
    atomic_write(result, json.dumps(record))
    shutil.rmtree(folder)
    for name in names:
        (out / "data" / name).unlink()


def measure_models(
    args: argparse.Namespace, models: list[Path], prompts: str, name: str, device: str = ""
) -> list[dict]:
    """What measure.py finds of each model: `values` are, per prompt, whether the answer is exact, or its loss (also to
    choose rates for --judge api)."""
    path = args.out / "runs" / f"{name}.measured.json"
    what = {"exact": "exact", "loss": "loss", "api": "answers" if prompts == "prompts" else "loss"}[args.judge]
    file = args.out / "data" / f"{prompts}.jsonl"
    how = ["--prompts", file, "--what", what, "--max-new-tokens", args.max_new_tokens]
    how += ["--template", args.template, "--dtype", args.dtype]
    if prompts == "prompts":
        how += ["--ifd"] * args.ifd + (["--tasks", args.tasks] if args.tasks else [])
    run_python([HERE / "measure.py", *models, *how, "--json", path], ROOT, device)
    found = json.loads(path.read_text())
    path.unlink()
    return found


def write_answers(out: Path, job: Job, stage: int, texts: list[str]) -> None:
    """Write the answers in the format of generate.py."""
    prompts = read_jsonl(out / "data" / "prompts.jsonl")
    rows = [
        {"id": p["id"], "dataset": p["dataset"], "instruction": p["messages"][-1]["content"], "output": text,
         "generator": f"{job.arm}/stage{stage}"} | {k: p[k] for k in ("expected",) if k in p}
        for p, text in zip(prompts, texts)
    ]  # fmt: skip
    if rows:
        atomic_write(out / "answers" / f"{file_name(job.arm)}-{job.seed}.stage{stage}.json", json.dumps(rows, indent=1))


def run_jobs(
    args: argparse.Namespace, study_data: StudyData, arms: dict[str, Arm], jobs: list[Job], what: str
) -> list[dict]:
    """The records of all jobs; finished ones are read, not repeated. If one fails, raises its WorkError when the jobs
    already started have ended."""
    devices: queue.Queue[str] = queue.Queue()
    for k in range(args.jobs):
        devices.put(device_of(args, k))

    def work(job: Job) -> None:
        device = devices.get()
        try:
            run_job(args, study_data, arms[job.arm], job, device)
        finally:
            devices.put(device)

    todo = [job for job in jobs if not (args.out / "results" / f"{job.name}.json").exists()]
    with ThreadPoolExecutor(args.jobs) as pool, progress(len(jobs), what, "run", initial=len(jobs) - len(todo)) as bar:
        running = [pool.submit(work, job) for job in todo]
        try:
            for done in as_completed(running):
                done.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [json.loads((args.out / "results" / f"{job.name}.json").read_text()) for job in jobs]


def measure_ifd(args: argparse.Namespace, study_data: StudyData) -> None:
    """Measure the IFD of every row with the model before any training (out/data/ifd.jsonl), and make stages by it."""
    data = args.out / "data"
    if not (data / "ifd.jsonl").exists():
        write_lines(data / "all.jsonl", [study_data.rows[i] for i in study_data.everything])
        how = ["--template", args.template, "--max-len", args.max_len, "--dtype", args.dtype]
        run_python([ROOT / "score.py", "ifd", "all.jsonl", "--model", args.model, "--out", "ifd.jsonl", *how], data)
    found = {i: row["ifd"] for i, row in zip(study_data.everything, read_jsonl(data / "ifd.jsonl"), strict=True)}
    study_data.by["IFD"] = restage_by([found.get(i) for i in range(len(study_data.rows))], study_data.stages)


def measure_ceiling(args: argparse.Namespace, prompts: list[dict]) -> list | None:
    """Per prompt, whether the model before any training completes it as plain text; None if prompts have no such
    text."""
    if args.judge != "exact" or not all("told" in p for p in prompts):
        return None
    path = args.out / "ceiling.json"
    if not path.exists():
        how = ["--what", "told", "--prompts", args.out / "data" / "prompts.jsonl", "--template", args.template]
        how += ["--dtype", args.dtype]
        run_python(
            [HERE / "measure.py", args.model, *how, "--max-new-tokens", args.max_new_tokens, "--json", path], ROOT
        )
    return json.loads(path.read_text())[0]["values"]


def judge_by_api(args: argparse.Namespace, records: list[dict]) -> None:
    """Judge every arm's answers against those of one-off training with the same seed. judge.py asks nothing twice."""
    for r in records:
        r["wins"] = []
        base = args.out / "answers" / f"one-off-{r['seed']}.stage1.json"
        for path in answer_files(args.out, r["arm"], r["seed"]):
            if path == base:
                r["wins"].append([0.5] * len(json.loads(read_text(base))))
                continue
            out = args.out / "verdicts" / f"{path.stem}.jsonl"
            model = ["--api-model", args.api_model] if args.api_model else []
            out.unlink(missing_ok=True)
            try:
                run_python(
                    [ROOT / "judge.py", "compare", base, path, "--out", out, *model, *args.judge_flags], Path.cwd()
                )
            except WorkError as e:
                if not out.exists():  # it exists if only some answers were refused
                    raise
                print(e, file=sys.stderr)
            points = {"win": 1.0, "tie": 0.5, "loss": 0.0}
            r["wins"].append([points.get(row["verdict"]) for row in read_jsonl(out) if not row.get("canary")])
