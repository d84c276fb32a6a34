"""Does training in stages of rising difficulty help my model on my data? Compare arms over several seeds.

    python recipes/study/study.py                     on the demo; --quick is a small version
    python recipes/study/study.py --power PILOT       what a study can detect, before it begins
    python recipes/study/study.py --table RESULTS     its tables again, from results.json
    python recipes/study/study.py --model DIR --scored scored.jsonl --prompts F --judge exact \\
        --lr-grid 5e-6 1e-5 2e-5 4e-5 --out out/mine -- --batch-size 128 --checkpoint-activations

All arms start from the same model. Unless their definition says otherwise, they take the same number of steps and train
on every row equally often. The learning rate of each arm is the best of the grid on validation prompts. Further seeds
at that rate are tested on other prompts. Flags after `--` go to train.py. A killed study continues with the same
command.
"""

import argparse
import hashlib
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from parts.api.options import ApiOptions
from parts.api.prompts import judge_prompt
from parts.checkpoints.lock import lock_folder
from parts.cli import (
    HelpFormatter,
    InputError,
    WorkError,
    nonneg_int,
    positive_float,
    positive_int,
    progress,
    raise_if_any,
    run_program,
    set_parent_death_signal,
)
from parts.files import atomic_write, check_output_paths, json_values, read_json_object, read_text, sha256, write_lines
from parts.options import RESUMABLE_ARGS, make_parser
from parts.text.rows import messages_of
from parts.text.templates import TEMPLATES, choose_template
from parts.text.testsets import read_prompts
from parts.text.tokenizers import load_tokenizer
from recipes.study.arms import (
    MEASURED_EVERY_STAGE,
    REPLAY_SHARES,
    Arm,
    StudyData,
    cut_scores,
    hold_back_rows,
    make_arms,
    read_study_data,
    restage_by,
)
from recipes.study.power import print_power
from recipes.study.results import answer_files, file_name, print_saved_tables, write_results
from recipes.study.tasks import read_tasks
from score import read_score

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEMO = ROOT / "demo"
QUICK = ["one-off", "phased", "random stages", "stages 3-2-1", "stage 3 only", "phased, replay 0.1"]
# Runs are forks of a process that has imported torch: the import takes as long as ten steps of the demo.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch", "train", "recipes.study.measure"])
# Flags of train.py that the study sets.
STUDY_FLAGS = {"stages", "eval", "replay", "model", "out", "epochs", "lr", "batch_size", "optimizer_state", "seed",
               "select", "ratio", "scores", "eval_every", "sample_prompts", "dry_run"}  # fmt: skip
EXIT_CODE_LOCK = threading.Lock()  # starting a process reaps those that have ended, and an exit code can be read once
GRID_SEED = 1000  # of runs that choose a rate; tested runs have seeds 0, 1, …

# ---------------------------------------------------------------- the prompts


def read_test_prompts(args: argparse.Namespace) -> tuple[list[dict], list[dict], dict[str, list[dict]]]:
    """The test prompts, the validation prompts (which choose the rate), and a few of the latter as rows for the
    held-out loss, by name of the set: one set per stage if prompts have scores. Raises InputError."""

    def read(path: Path) -> list[dict]:
        prompts, rows = read_prompts(path), []
        raw = [value if isinstance(value, dict) else {} for _, value in json_values(read_text(path))]
        for p, given in zip(prompts, raw if len(raw) == len(prompts) else [{}] * len(prompts)):
            row = {"id": p.id, "dataset": p.dataset, "messages": messages_of(p.turns)}
            row |= {"told": given["told"]} if isinstance(given.get("told"), str) else {}
            score = read_score(given, "score", p.source)
            row |= {} if score is None else {"score": score}
            expected = p.expected if p.expected is not None else given.get("output")
            rows.append(row | ({"expected": expected} if isinstance(expected, str) and expected.strip() else {}))
        named = Counter((row["dataset"], row["id"]) for row in rows)
        raise_if_any(
            [f"{d} {i}" for (d, i), n in named.items() if n > 1], f"prompts of {path} have the same dataset and id"
        )
        return rows

    prompts = read(args.prompts)
    if args.validation:
        validation = read(args.validation)
    else:
        order = np.random.default_rng(0).permutation(len(prompts))
        cut = max(1, len(prompts) // 3)
        prompts, validation = [prompts[i] for i in sorted(order[cut:])], [prompts[i] for i in sorted(order[:cut])]
    if args.most_prompts:
        few = [np.random.default_rng(1).permutation(len(x))[: args.most_prompts] for x in (prompts, validation)]
        prompts, validation = ([x[i] for i in sorted(of)] for x, of in zip((prompts, validation), few))
    needing = validation if args.judge == "api" else [*prompts, *validation]
    raise_if_any([f"{row['dataset']} {row['id']}" for row in needing if "expected" not in row],
           "prompts do not say what answer is `expected`",
           "--judge exact and loss, and --validation, need it.")  # fmt: skip
    held_out = {"held-out": np.arange(len(validation))}
    if all("score" in row for row in validation):
        groups = cut_scores(np.array([row["score"] for row in validation]), args)
        held_out = {f"held-out{k}": group for k, group in enumerate(groups, 1) if len(group)}
    held_out = {name: [to_training_row(validation[i]) for i in group[:16]] for name, group in held_out.items()}
    return prompts, validation, held_out


def check_leaks(study_data: StudyData, prompts: list[dict], validation: list[dict]) -> None:
    """Raises InputError if a test or validation prompt is among the training rows, or is both."""

    def text(messages: list[dict]) -> str:
        return " ".join(" ".join(m["content"] for m in messages).split())  # white space makes no other question

    test, chose = ({text(row["messages"]): f"{row['dataset']} {row['id']}" for row in x} for x in (prompts, validation))
    trained = set()
    for row in (study_data.rows[i].get("messages", []) for i in study_data.everything):
        trained |= {text(row[:k]) for k, m in enumerate(row) if m["role"] == "assistant"}
    advice = "Each question once, on one side."
    raise_if_any([test[x] for x in test if x in trained], "rows that train are prompts that test", advice)
    raise_if_any([chose[x] for x in chose if x in trained], "rows that train are prompts that choose the rate", advice)
    raise_if_any([test[x] for x in test if x in chose], "prompts that test also choose the rate", advice)


def to_training_row(row: dict) -> dict:
    return {"messages": [*row["messages"], {"role": "assistant", "content": row["expected"]}]}


# ---------------------------------------------------------------- runs


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


def call(command: list, cwd: Path, device: str = "", ranks: int = 1) -> float:
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
    seconds = call(command, out / "data", device, args.nproc_per_node)
    measured = range(1 if job.arm in MEASURED_EVERY_STAGE and not tuning else len(names), len(names) + 1)
    found = measure(
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


def measure(args: argparse.Namespace, models: list[Path], prompts: str, name: str, device: str = "") -> list[dict]:
    """What measure.py finds of each model: `values` are, per prompt, whether the answer is exact, or its loss (also to
    choose rates for --judge api)."""
    path = args.out / "runs" / f"{name}.measured.json"
    what = {"exact": "exact", "loss": "loss", "api": "answers" if prompts == "prompts" else "loss"}[args.judge]
    file = args.out / "data" / f"{prompts}.jsonl"
    how = ["--prompts", file, "--what", what, "--max-new-tokens", args.max_new_tokens, "--template", args.template]
    if prompts == "prompts":
        how += ["--ifd"] * args.ifd + (["--tasks", args.tasks] if args.tasks else [])
    call([HERE / "measure.py", *models, *how, "--json", path], ROOT, device)
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


# ---------------------------------------------------------------- the plan


def measure_times(args: argparse.Namespace, study_data: StudyData, prompts: list[dict]) -> dict:
    """Seconds of a start, a step and a measurement, and the measurements of the model before any training. Written to
    timing.json, and read from it if it exists."""
    path = args.out / "timing.json"
    if path.exists():
        return read_json_object(path)
    few = np.concatenate([study_data.everything] * 4)[: 8 * study_data.batch_size]
    write_lines(args.out / "data" / "timing.jsonl", [study_data.rows[i] for i in few])
    timing = args.out / "runs" / "timing"
    shutil.rmtree(timing, ignore_errors=True)
    command = [ROOT / "train.py", "--model", args.model, "--stages", "timing.jsonl", "--lr", 0, "--out", timing,
               "--batch-size", study_data.batch_size, "--eval", *held_out_files(args.out), *args.train]  # fmt: skip
    device = device_of(args, 0)
    wall = call(command, args.out / "data", device, args.nproc_per_node)
    times = [row["seconds"] for row in read_jsonl(timing / "metrics.jsonl") if "loss" in row]
    shutil.rmtree(timing)
    started = time.monotonic()
    (base,) = measure(args, [args.model], "prompts", "base", device)
    start, seconds = wall - sum(times), time.monotonic() - started
    asked = sum(len(m["content"]) for p in prompts for m in p["messages"])
    said, expected = (sum(map(len, texts)) for texts in (base["answers"], [p.get("expected", "") for p in prompts]))
    if (
        said and expected
    ):  # a trained model answers at the expected length; an answer token costs as much as three of the prompt
        seconds = start + max(0, seconds - start) * min(1, (asked + 3 * expected) / (asked + 3 * said))
    found = {"start": start, "step": float(np.median(times)), "measure": seconds, "base": base}
    atomic_write(path, json.dumps(found))
    return read_json_object(path)


def make_plan(
    args: argparse.Namespace, study_data: StudyData, arms: dict[str, Arm], prompts: list[dict], times: dict
) -> dict:
    """Runs, steps, hours, dollars of judging. Written to plan.json."""
    tuned = len(arms) * len(args.lr_grid) if len(args.lr_grid) > 1 else 0
    runs, later = len(arms) * args.seeds + tuned, len(study_data.stages) - 1
    seconds = runs * (times["start"] + study_data.steps * times["step"] + times["measure"])
    seconds += args.seeds * len(MEASURED_EVERY_STAGE & arms.keys()) * later * times["measure"]  # after every stage
    if wants_ifd(arms):  # two forward passes over the rows, by one rank
        seconds += args.jobs * args.nproc_per_node * study_data.steps / study_data.epochs * times["step"] * 2 / 3
    plan = {"arms": list(arms), "rates": args.lr_grid, "seeds": args.seeds, "runs": runs, "steps": study_data.steps}
    plan |= {"rows": len(study_data.everything), "stages": [len(s) for s in study_data.stages], "prompts": len(prompts)}
    plan |= {"seconds_per_step": round(times["step"], 4), "hours": round(seconds / args.jobs / 3600, 4)}
    other_steps = {name: arm.steps for name, arm in arms.items() if arm.steps not in (None, study_data.steps)}
    plan |= {"other_steps": other_steps}
    plan |= {"replayed": {f"phased, replay {share:g}": replayed_shares(study_data, share) for share in REPLAY_SHARES}}
    plan |= {"dollars": estimate_judging_dollars(args, arms, prompts, later)}
    atomic_write(args.out / "plan.json", json.dumps(plan, indent=1))
    return plan


def replayed_shares(study_data: StudyData, share: float) -> list[float]:
    """The share of each stage but the last that moves into each later one, after rounding to complete batches."""
    kept = hold_back_rows(study_data.stages, share, study_data.batch_size, np.random.default_rng(0))
    later = range(len(kept) - 1, 0, -1)
    return [(1 - np.isin(stage, rows).mean()) / n for stage, rows, n in zip(study_data.stages, kept, later)]


def estimate_judging_dollars(
    args: argparse.Namespace, arms: dict[str, Arm], prompts: list[dict], later: int
) -> float | None:
    """Upper estimate of the API's price without what --judge-flags add: every answer of an arm in both orders, for some
    arms after each of the `later` stages too. None if the price is unknown."""
    if args.judge != "api":
        return 0.0
    options = ApiOptions(model=args.api_model) if args.api_model else ApiOptions()
    prices = options.prices()
    if None in prices:
        return None
    asked = np.mean([sum(len(m["content"]) for m in p["messages"]) for p in prompts]) + len(judge_prompt(None, False))
    each = prices[0] * (asked / 4 + 2 * args.max_new_tokens) + prices[1] * 16
    judged = len(arms) - 1 + later * len(MEASURED_EVERY_STAGE & arms.keys())
    return round(2 * len(prompts) * judged * args.seeds * each / 1e6, 2)


def print_plan(plan: dict, arms: dict[str, Arm]) -> None:
    sizes = " + ".join(f"{n:,}" for n in plan["stages"])
    money = "price of the judge unknown" if plan["dollars"] is None else f"${plan['dollars']:,.2f} of judging at most"
    takes = f"{plan['hours']:.1f} hours" if plan["hours"] >= 1 else f"{60 * plan['hours']:.0f} minutes"
    each = f"{plan['steps']:,} steps ({plan['seconds_per_step']:.2f} s each)"
    print(
        f"{len(arms)} arms, {len(plan['rates'])} rates, {plan['seeds']} seeds: {plan['runs']} runs of {each} "
        f"on {plan['rows']:,} rows ({sizes}), tested on {plan['prompts']:,} prompts. About {takes}; {money}."
    )
    for arm, shares in plan["replayed"].items():
        if arm in arms:
            held = ", ".join(f"{100 * share:.3g} % of stage {k}" for k, share in enumerate(shares, 1))
            print(f"{arm}: holds {held} back for each later stage (whole batches)")
    for arm, steps in plan["other_steps"].items():
        print(f"{arm}: {steps:,} steps, for whole epochs")


# ---------------------------------------------------------------- all of it


def choose_rates(records: list[dict], judge: str) -> dict[str, dict[float, float]]:
    """arm -> rate -> mean on the validation prompts, the best rate first."""
    found: dict[str, dict[float, float]] = {}
    for r in records:
        found.setdefault(r["arm"], {})[r["lr"]] = float(np.mean(r["values"][-1]))
    return {arm: dict(sorted(of.items(), key=lambda x: x[1], reverse=judge == "exact")) for arm, of in found.items()}


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
                call([ROOT / "judge.py", "compare", base, path, "--out", out, *model, *args.judge_flags], Path.cwd())
            except WorkError as e:
                if not out.exists():  # it exists if only some answers were refused
                    raise
                print(e, file=sys.stderr)
            points = {"win": 1.0, "tie": 0.5, "loss": 0.0}
            r["wins"].append([points.get(row["verdict"]) for row in read_jsonl(out) if not row.get("canary")])


def describe_settings(args: argparse.Namespace) -> dict:
    """What must be equal to continue a study: settings and hashes of data, model and code."""
    keys = "score_key bounds equal rows epochs batch_size lr_grid judge most_prompts max_new_tokens trained api_model"
    keys += " ifd evaluations"
    files = {f"--scored {k}, {path.name}": path for k, path in enumerate(args.scored, 1)}
    files |= {"--prompts": args.prompts} | ({"--validation": args.validation} if args.validation else {})
    files |= {"--tasks": args.tasks} if args.tasks else {}
    files |= {f"--model {p.name}": p for p in sorted(args.model.iterdir()) if p.is_file()}
    programs = [*ROOT.glob("*.py"), *(ROOT / "parts").rglob("*.py"), *HERE.glob("*.py")]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(programs)))
    given = {key: getattr(args, key) for key in keys.split()}
    hashes = {name: sha256(path) for name, path in files.items()}
    return {"settings": given, "hashes": hashes, "code": code.hexdigest()[:16]}


def changed_settings(before: dict, about: dict) -> str:
    """The settings and files in which two studies differ, as text; empty if they are the same."""
    keys = [(part, key) for part in ("settings", "hashes") for key in {**before.get(part, {}), **about[part]}]
    return ", ".join(key for part, key in keys if before.get(part, {}).get(key) != about[part].get(key))


def import_runs(args: argparse.Namespace, about: dict) -> None:
    """Write the runs of --runs-from to out/results, so that they are not repeated. Raises InputError."""
    results = read_json_object(args.runs_from)
    if changed := changed_settings(results, about):
        raise InputError(f"{args.runs_from} is of a study with other {changed}: its runs cannot be used")
    for record in [*results.get("tuning", []), *results.get("runs", [])]:
        path = args.out / "results" / f"{Job(record['arm'], record['lr'], record['seed']).name}.json"
        if not path.exists():
            atomic_write(path, json.dumps(record))


def check_settings(args: argparse.Namespace) -> dict:
    """Write study.json with the settings and hashes, and return them. Raises InputError if the folder holds a study
    with other ones."""
    about, kept = describe_settings(args), args.out / "study.json"
    before = read_json_object(kept) if kept.exists() else about
    if changed := changed_settings(before, about):
        raise InputError(f"{args.out} contains a study with other {changed}: give another --out")
    if before["code"] != about["code"]:
        print(f"{args.out}: the code changed since this study began; what is done stays", file=sys.stderr)
    atomic_write(kept, json.dumps(about, indent=1))
    return about


def write_data(out: Path, sets: dict[str, list[dict]]) -> None:
    """Make the folders of a study, and write the prompts and held-out rows to out/data."""
    for folder in ("data", "runs", "results", "answers", "verdicts"):
        (out / folder).mkdir(exist_ok=True)
    for name, rows in sets.items():
        write_lines(out / "data" / f"{name}.jsonl", rows)


def wants_ifd(arms: dict[str, Arm]) -> bool:
    return any(name == "phased by IFD" or "--scores" in arm.flags for name, arm in arms.items())


def measure_ifd(args: argparse.Namespace, study_data: StudyData) -> None:
    """Measure the IFD of every row with the model before any training (out/data/ifd.jsonl), and make stages by it."""
    data = args.out / "data"
    if not (data / "ifd.jsonl").exists():
        write_lines(data / "all.jsonl", [study_data.rows[i] for i in study_data.everything])
        how = ["--template", args.template, "--max-len", args.max_len]
        call([ROOT / "score.py", "ifd", "all.jsonl", "--model", args.model, "--out", "ifd.jsonl", *how], data)
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
        call([HERE / "measure.py", args.model, *how, "--max-new-tokens", args.max_new_tokens, "--json", path], ROOT)
    return json.loads(path.read_text())[0]["values"]


def run_study(
    args: argparse.Namespace, study_data: StudyData, arms: dict[str, Arm], prompts: list[dict], about: dict
) -> None:
    times = measure_times(args, study_data, prompts)
    plan = make_plan(args, study_data, arms, prompts, times)
    print_plan(plan, arms)
    if args.dry_run:
        return
    if wants_ifd(arms):
        measure_ifd(args, study_data)
    rates, tuning = {arm: {args.lr_grid[0]: None} for arm in arms}, []
    if len(args.lr_grid) > 1:
        grid = [Job(arm, lr, GRID_SEED) for arm in arms for lr in args.lr_grid]
        tuning = run_jobs(args, study_data, arms, grid, "rates")
        rates = choose_rates(tuning, args.judge)
    jobs = [Job(arm, next(iter(rates[arm])), seed) for seed in range(args.seeds) for arm in arms]
    records = run_jobs(args, study_data, arms, jobs, "seeds")
    if args.judge == "api":
        judge_by_api(args, records)
    ceiling = measure_ceiling(args, prompts)
    results = about | {"command": shlex.join(sys.argv), "plan": plan, "judge": args.judge, "rates": rates}
    results |= {"tokens": times["base"].pop("tokens"), "base": times["base"], "ceiling": ceiling, "tuning": tuning}
    write_results(args.out, records, prompts, results)


def run(args: argparse.Namespace) -> None:
    if args.table:
        return print_saved_tables(args.table)
    if args.power:
        return print_power(args.power, args.difference, args.seeds, len({*(args.arms or ())} - {"one-off"}) or None)
    args.out, args.model = args.out.resolve(), args.model.resolve()
    args.tasks = args.tasks and args.tasks.resolve()
    args.template = choose_template(args.model, load_tokenizer(args.model), args.template)[0]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # per run; --jobs runs are concurrent
    inputs = [*args.scored, args.prompts, args.model, *(path for path in (args.validation, args.tasks) if path)]
    check_output_paths([args.out], inputs, folders=True)
    if (args.out / "data").exists() and not (args.out / "study.json").exists():
        raise InputError(f"{args.out} contains data that are not a study's: give another --out")
    study_data = read_study_data(args)
    prompts, validation, held_out = read_test_prompts(args)
    check_leaks(study_data, prompts, validation)
    if args.tasks:
        read_tasks(args.tasks)  # raises InputError
    known = make_arms(study_data)
    shared = Counter(map(file_name, known))
    raise_if_any(
        [arm for arm in known if shared[file_name(arm)] > 1], "arms would share their files", "Other keys: --also."
    )
    wanted = ["one-off", *(args.arms or ([arm for arm in QUICK if arm in known] if args.quick else known))]
    raise_if_any([arm for arm in wanted if arm not in known], "arms are not known", f"There are: {', '.join(known)}.")
    beside = next(parent for parent in args.out.parents if parent.is_dir())
    with tempfile.TemporaryDirectory(dir=beside) if args.dry_run else nullcontext(args.out) as folder:
        args.out = Path(folder)  # --dry-run leaves no files
        with lock_folder(args.out):
            about = check_settings(args)
            write_data(args.out, {"prompts": prompts, "validation": validation, **held_out})
            if args.runs_from:
                import_runs(args, about)
            run_study(args, study_data, {arm: known[arm] for arm in dict.fromkeys(wanted)}, prompts, about)


def make_study_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=HelpFormatter,
        epilog="Arguments after -- are passed to train.py.",
    )
    add = parser.add_argument
    add("--model", type=Path, default=DEMO / "model", metavar="DIR", help="HF folder from which every arm starts")
    add("--scored", type=Path, nargs="+", metavar="F", help="rows with a difficulty score (default: the demo's)")
    add("--score-key", default="score", help="the field with the score")
    add("--bounds", type=float, nargs="+", default=[1.5, 3.5], metavar="X", help="scores at which a new stage begins")
    add("--equal", type=positive_int, metavar="K", help="K stages of equal size, instead of --bounds")
    rows_help = "number of rows of --scored to use, in proportion from each stage (default: all; for the demo 240)"
    add("--rows", type=positive_int, metavar="N", help=rows_help)
    add("--also", nargs="*", metavar="KEY", help="other fields of --scored to make stages from (for the demo: true)")
    prompts_help = "test prompts, with the right answer as `expected` and optionally a `score`"
    add("--prompts", type=Path, default=DEMO / "prompts.jsonl", metavar="F", help=prompts_help)
    add("--validation", type=Path, metavar="F", help="prompts to choose the rate by (default: a third of --prompts)")
    judge_help = (
        "measure of an answer. exact: equal to the expected one; api: an LLM compares it with one-off's; "
        "loss: the loss of the expected answer"
    )
    add("--judge", choices=["exact", "api", "loss"], default="exact", help=judge_help)
    add("--api-model", metavar="M", help="the model that judges (default: that of judge.py)")
    judge_help = "more flags of judge.py compare, which runs for each arm, seed and stage: --judge-flags='--canaries'"
    add("--judge-flags", type=shlex.split, default=[], metavar="'…'", help=judge_help)
    add("--ifd", action="store_true", help="with --judge loss: also measure the IFD of the prompts' expected answers")
    tasks_help = "also count right answers to these tasks after the last stage, for example recipes/study/tasks.jsonl"
    add("--tasks", type=Path, metavar="F", help=tasks_help)
    evaluations_help = "number of held-out measurements during a tested run; 0: none, which is faster"
    add("--evaluations", type=nonneg_int, default=8, metavar="N", help=evaluations_help)
    add("--arms", nargs="+", metavar="ARM", help="the arms to run, in addition to one-off (default: all)")
    grid_help = "learning rates, of which each arm uses its best (required; for the demo four from 1.25e-4 to 1e-3)"
    add("--lr-grid", type=positive_float, nargs="+", metavar="X", help=grid_help)
    add("--seeds", type=positive_int, metavar="N", help="tested runs of each arm (default: 5; for the demo 6)")
    add("--epochs", type=positive_int, default=2, metavar="N", help="passes over a stage")
    add("--batch-size", type=positive_int, metavar="N", help="documents in a step (default: 16; for the demo 4)")
    add("--max-new-tokens", type=positive_int, default=96, metavar="N", help="longest answer, in tokens")
    add("--jobs", type=positive_int, metavar="N", help="concurrent runs (default: one per GPU, or per core)")
    add("--nproc-per-node", type=positive_int, default=1, metavar="N", help="ranks per run, started by torchrun")
    add("--out", type=Path, metavar="DIR", help="output folder (default: out/study; with --quick out/study-quick)")
    add("--quick", action="store_true", help="six arms, two rates, two seeds, 200 prompts")
    runs_help = "results.json of a study with the same settings and files: take its runs (--judge loss only)"
    add("--runs-from", type=Path, metavar="RESULTS", help=runs_help)
    add("--dry-run", action="store_true", help="print the plan and stop")
    power_help = (
        "print the difference that a study with --seeds and --arms (default: PILOT's) can detect, and stop; PILOT is "
    )
    add("--power", type=Path, metavar="PILOT", help=power_help + "the --out folder of a study of two or more seeds")
    difference_help = "with --power: the differences to detect, in percentage points or hundredths of a loss"
    add(
        "--table",
        type=Path,
        metavar="RESULTS",
        help="compute the tables again from the runs in a results.json, print them and stop",
    )
    add("--difference", type=positive_float, nargs="+", default=[2.0, 5.0, 10.0], metavar="D", help=difference_help)
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv, parser = sys.argv[1:] if argv is None else argv, make_study_parser()
    cut = argv.index("--") if "--" in argv else len(argv)
    args, unknown = parser.parse_known_args(argv[:cut])
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (flags of train.py go after --)")
    args.train, is_demo = argv[cut + 1 :], args.model.resolve() == DEMO / "model"
    of_train = make_parser(list(TEMPLATES), DEMO)
    defaults = vars(of_train.parse_args([]))
    of_train.set_defaults(**dict.fromkeys(defaults))
    given = {k: v for k, v in vars(of_train.parse_args(args.train)).items() if v is not None}
    for key in given.keys() & STUDY_FLAGS:
        parser.error(f"--{key.replace('_', '-')} belongs to the study, not behind --")
    args.trained = {key: value for key, value in sorted(given.items()) if key not in RESUMABLE_ARGS}
    args.template, args.max_len = given.get("template"), given.get("max_len", defaults["max_len"])
    if args.lr_grid is None:
        if not is_demo:
            parser.error("--lr-grid must be given for this --model, say 2e-6 5e-6 1e-5 2e-5 at 7 B")
        args.lr_grid = [2.5e-4, 5e-4] if args.quick else [1.25e-4, 2.5e-4, 5e-4, 1e-3]
    if args.scored is None:
        args.scored = [DEMO / "scored.jsonl"]
        args.also = ["true"] if args.also is None else args.also
        args.validation = args.validation or DEMO / "validation.jsonl"
        args.rows = args.rows or 240
    args.also = args.also or []
    args.batch_size = args.batch_size or (4 if is_demo else 16)
    if (args.ifd or args.runs_from) and args.judge != "loss":
        parser.error("--ifd and --runs-from need --judge loss")
    args.most_prompts = 200 if args.quick else None
    args.seeds = args.seeds or (2 if args.quick else 6 if is_demo else 5)
    if args.power and args.seeds < 2:
        parser.error("--power needs --seeds of at least 2: one says nothing about others")
    args.out = args.out or ROOT / "out" / ("study-quick" if args.quick else "study")
    import torch  # only to count

    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    args.gpus = seen.split(",") if torch.cuda.is_available() else []
    args.jobs = args.jobs or max(1, (len(args.gpus) or os.cpu_count() or 1) // args.nproc_per_node)
    return args


def main(argv: list[str] | None = None) -> int:
    return run_program("study.py", run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
