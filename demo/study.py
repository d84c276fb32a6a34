"""Does training in stages of rising difficulty help my model on my data? Every arm, its own best rate, fresh seeds.

    python demo/study.py                     on the demo; --quick is a small version
    python demo/study.py --model DIR --scored scored.jsonl --prompts F --judge exact --lr-grid 5e-6 1e-5 2e-5 4e-5 \\
        --out out/mine -- --batch-size 128 --checkpoint-activations

All arms start from the same model and, unless that is their point, take the same number of steps and see the same rows
as often. The learning rate of each is the best of the grid on validation prompts; fresh seeds with it are tested on
prompts that chose nothing. Whatever stands behind `--` goes to train.py. Killed, the same command goes on.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from demo.findings import COMPARED, file_name, write_findings
from parts.api import ApiOptions
from parts.program import (
    HelpFormatter,
    InputError,
    WorkError,
    above_zero,
    die_with_parent,
    positive,
    progress,
    read_json_object,
    refuse,
    refuse_overwriting,
    run_program,
    sha256,
    write_file,
    write_lines,
)
from parts.prompts import judge_prompt
from parts.rows import finite_number, json_values, read_good_rows
from parts.store import lock_folder
from parts.testsets import read_prompts
from score import answer_of, cut_at, cut_equally

DEMO = Path(__file__).resolve().parent
ROOT = DEMO.parent
SIZES = (5, 20)  # per cent of the rows that are selected
REPLAYED = (0.01, 0.1, 0.25)
QUICK = ["one-off", "phased", "random stages", "stages 3-2-1", "stage 3 only", "phased, replay 0.1"]
# Runs are forks of a process that has imported torch, which takes as long as ten steps of the demo.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "train", "demo.measure"])
GRID_SEED = 1000  # of the runs that choose a rate; those that are tested have 0, 1, …

# ---------------------------------------------------------------- the rows and their stages


@dataclass
class Ground:
    """What all arms share. Stages are indices of rows; each holds a multiple of the batch size."""

    rows: list[dict]
    stages: list[np.ndarray]  # by the score, rising
    by: dict[str, list[np.ndarray]]  # by other keys, stages of the same sizes
    lengths: np.ndarray  # of the answers, in characters
    batch_size: int
    epochs: int

    @property
    def everything(self) -> np.ndarray:
        return np.sort(np.concatenate(self.stages))

    @property
    def steps(self) -> int:
        return self.epochs * len(self.everything) // self.batch_size


def read_ground(args: argparse.Namespace) -> tuple[list[dict], list[np.ndarray], np.ndarray]:
    """The scored rows, their stages, and the lengths of the answers. Raises InputError."""
    rows = [row for path in args.scored for row in read_good_rows(path, skip_bad=False)]
    missing = [row.where for row in rows if row.raw.get(args.score_key) is None]
    refuse(missing, f"rows have no {args.score_key}", "Score them, or leave them out of the file.")
    scores = np.array([finite_number(row.raw[args.score_key], args.score_key) for row in rows])
    groups = cut_equally(scores, args.equal) if args.equal else cut_at(scores, args.bounds)
    share, stages = min(1.0, args.rows / len(rows)) if args.rows else 1.0, []
    for k, group in enumerate(groups, 1):
        batches = min(round(share * len(group) / args.batch_size), len(group) // args.batch_size)
        if not batches:  # whole batches, so that every arm has the same steps
            raise InputError(f"stage {k} has {share * len(group):.0f} rows, less than a batch of {args.batch_size}: "
                             "--batch-size, --rows")  # fmt: skip
        stages.append(np.sort(np.random.default_rng(k).permutation(group)[: batches * args.batch_size]))
    return [row.raw for row in rows], stages, np.array([len(answer_of(row)) for row in rows])


def stages_by(values: list[float | None], stages: list[np.ndarray]) -> list[np.ndarray]:
    """The same rows in stages of the same sizes, by rising `values`; rows without one last."""
    rows = np.sort(np.concatenate(stages))
    of = np.array([np.inf if values[i] is None else values[i] for i in rows])
    return np.split(rows[np.argsort(of, kind="stable")], np.cumsum([len(s) for s in stages])[:-1])


# ---------------------------------------------------------------- arms


@dataclass
class Arm:
    stages: Callable[[np.random.Generator], list[np.ndarray]]  # of a seed: the rows of each stage
    epochs: int
    flags: list = field(default_factory=list)  # of train.py
    falling: float = 1.0  # each stage's rate over the one before


def repeated(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` rows, each of `rows` as often as any other or once more."""
    times = -(-count // len(rows))
    return np.concatenate([rng.permutation(rows) for _ in range(times)])[:count]


def held_back(stages: list[np.ndarray], share: float, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """About `share` of each stage's rows moved into each later stage, mixed in: every row is seen as often as without,
    and stages stay multiples of the batch size."""
    stages, later = [rng.permutation(s) for s in stages], [[] for _ in stages]
    out = []
    for k, stage in enumerate(stages):
        after, here = len(stages) - 1 - k, sum(map(len, later[k]))
        # What stays must fill the batches, together with what came from before.
        given = after and max(1, round((share * after * len(stage) - here) / batch_size)) * batch_size + here
        given = min(given, (len(stage) + here - batch_size) // batch_size * batch_size)
        for j, part in enumerate(np.array_split(stage[:given], after) if after else []):
            later[k + 1 + j].append(part)
        out.append(np.concatenate([stage[given:], *later[k]]))
    return out


def make_arms(ground: Ground) -> dict[str, Arm]:
    """By name. Every arm takes ground.steps steps."""
    s, everything, epochs, n = ground.stages, ground.everything, ground.epochs, len(ground.everything)
    sizes = [len(stage) for stage in s]
    arms = {"one-off": Arm(lambda rng: [everything], epochs), "phased": Arm(lambda rng: s, epochs)}
    for order in list(permutations(range(len(s))))[1:] if len(s) <= 3 else [tuple(range(len(s)))[::-1]]:
        name = "stages " + "-".join(str(k + 1) for k in order)
        arms[name] = Arm(lambda rng, order=order: [s[k] for k in order], epochs)
    arms["random stages"] = Arm(lambda rng: np.split(rng.permutation(everything), np.cumsum(sizes)[:-1]), epochs)
    for k in range(len(s) - 1, 0, -1):
        arms[f"stage {k + 1} only"] = Arm(lambda rng, k=k: [repeated(s[k], n, rng)], epochs)
    for share in REPLAYED:
        arms[f"phased, replay {share:g}"] = Arm(
            lambda rng, share=share: held_back(s, share, ground.batch_size, rng), epochs
        )
    arms["phased, optimizer kept"] = Arm(lambda rng: s, epochs, ["--optimizer-state", "keep"])
    arms["phased, falling rate"] = Arm(lambda rng: s, epochs, falling=0.5)
    for key in ground.by:
        arms[f"phased by {key}"] = Arm(lambda rng, key=key: ground.by[key], epochs)
    longest = everything[np.argsort(-ground.lengths[everything], kind="stable")]
    for size in SIZES:
        count = max(1, round(size / 100 * n / ground.batch_size)) * ground.batch_size
        passes = max(1, round(epochs * n / count))
        for select in ("iterit", "static"):
            flags = ["--select", select, "--ratio", count, "--scores", "ifd.jsonl"]
            arms[f"{select.replace('iterit', 'IterIT')} {size} %"] = Arm(lambda rng: [everything], passes, flags)
        arms[f"longest {size} %"] = Arm(lambda rng, c=count: [longest[:c]], passes)
        arms[f"random {size} %"] = Arm(lambda rng, c=count: [rng.permutation(everything)[:c]], passes)
    return arms


# ---------------------------------------------------------------- the prompts


def read_tests(args: argparse.Namespace) -> tuple[list[dict], list[dict], dict[str, list[dict]]]:
    """Prompts that test, prompts that choose the rate, and of the latter a few as rows for the held-out loss, by name:
    a set of them per stage where prompts have scores. Raises InputError."""

    def read(path: Path) -> list[dict]:
        raw = [value for _, value in json_values(path.read_text(encoding="utf-8"))]
        prompts = read_prompts(path)
        rows = []
        for p, given in zip(prompts, raw if len(raw) == len(prompts) else [{}] * len(prompts)):
            row = {"id": p.id, "dataset": p.dataset, "messages": [{"role": r, "content": c} for r, c in p.turns]}
            expected = p.expected if p.expected is not None else given.get("output")
            rows.append(row | {k: given[k] for k in ("score", "told") if given.get(k) is not None})
            rows[-1] |= {} if expected is None else {"expected": expected}
        return rows

    prompts = read(args.prompts)
    if args.validation:
        validation = read(args.validation)
    else:
        order = np.random.default_rng(0).permutation(len(prompts))
        cut = max(1, len(prompts) // 3)
        prompts, validation = [prompts[i] for i in sorted(order[cut:])], [prompts[i] for i in sorted(order[:cut])]
    if args.most_prompts:
        prompts, validation = prompts[: args.most_prompts], validation[: args.most_prompts]
    without = [f"{row['dataset']} {row['id']}" for row in (*prompts, *validation) if "expected" not in row]
    if args.judge != "api" or without != [f"{r['dataset']} {r['id']}" for r in prompts]:
        refuse(
            without,
            "prompts do not say what answer is `expected`",
            "--judge exact and loss, and --validation, need it.",
        )
    held_out = {"held-out": np.arange(len(validation))}
    if all("score" in row for row in validation):
        scores = np.array([row["score"] for row in validation])
        groups = cut_equally(scores, args.equal) if args.equal else cut_at(scores, args.bounds)
        held_out = {f"held-out{k}": group for k, group in enumerate(groups, 1) if len(group)}
    held_out = {name: [as_training_row(validation[i]) for i in group[:25]] for name, group in held_out.items()}
    return prompts, validation, held_out


def as_training_row(row: dict) -> dict:
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


def run_file(command: list[str], cwd: Path, device: str, said: Path) -> None:
    """As `python *command > said 2>&1` would, in a process that has imported torch already."""
    die_with_parent(signal.SIGKILL)
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update({"CUDA_VISIBLE_DEVICES": device} if device else {})
    os.chdir(cwd)
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore that nobody frees when a program ends
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def call(command: list, cwd: Path, device: str = "", ranks: int = 1) -> float:
    """Run a file of Python, by torchrun if on several ranks; its seconds. Raises WorkError with what it said last."""
    started, launched = time.monotonic(), [str(c) for c in command]
    if ranks > 1:
        launcher = importlib.util.find_spec("torch.distributed.run").origin
        launched = [launcher, "--standalone", "--nproc-per-node", str(ranks), *launched]
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        process = FORKS.Process(target=run_file, args=(launched, cwd, device, said))
        process.start()
        process.join()
        if process.exitcode:
            text = said.read_text(errors="replace")[-4000:]
            raise WorkError(f"{shlex.join(map(str, command))} ended with {process.exitcode}:\n{text}")
    return time.monotonic() - started


def run_job(args: argparse.Namespace, ground: Ground, arm: Arm, job: Job, device: str) -> None:
    """Train and measure; the result is out/results/NAME.json. A run that was killed goes on."""
    out, tuning = args.out, job.seed == GRID_SEED
    folder, result = out / "runs" / job.name, out / "results" / f"{job.name}.json"
    names = []
    for k, rows in enumerate(arm.stages(np.random.default_rng(job.seed)), 1):
        names.append(f"{job.name}.s{k}.jsonl")
        write_lines(out / "data" / names[-1], [ground.rows[i] for i in rows])
    rates = [job.lr * arm.falling**k for k in range(len(names))]
    command = [ROOT / "train.py", "--model", args.model, "--stages", *names, "--lr", *rates, "--out", folder,
               "--epochs", arm.epochs, "--batch-size", ground.batch_size, "--seed", job.seed, *arm.flags]  # fmt: skip
    if not tuning:
        held_out = sorted(path.name for path in (out / "data").glob("held-out*.jsonl"))
        command += ["--eval", *held_out, "--eval-every", max(1, ground.steps // 8)]
    command += args.train
    seconds = call(command, out / "data", device, args.nproc_per_node)
    measured = range(1 if job.arm in COMPARED and not tuning else len(names), len(names) + 1)
    found = measure(
        args, [folder / f"stage{k}" for k in measured], "validation" if tuning else "prompts", job.name, device
    )
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in metrics if "loss" in row]
    if len(steps) != ground.steps:
        raise WorkError(f"{job.name} took {len(steps)} steps instead of {ground.steps}")
    curve: dict[str, list] = {}
    for row in metrics:
        if "eval_loss" in row:
            curve.setdefault(row["eval"], []).append([row["global_step"], row["eval_loss"]])
    if not tuning:
        for k, texts in zip(measured, found["answers"]):
            write_answers(out, job, k, texts)
    record = {"arm": job.arm, "lr": job.lr, "seed": job.seed, "steps": len(steps), "seconds": round(seconds, 1)}
    record |= {"rows": sum(row["documents"] for row in steps), "tokens": sum(row["tokens"] for row in steps)}
    record |= {"values": found["values"], "curve": curve}
    record |= {"matrix": {} if tuning else read_json_object(folder / "held_out.json")}
    write_file(result, json.dumps(record))
    shutil.rmtree(folder)
    for name in names:
        (out / "data" / name).unlink()


def measure(args: argparse.Namespace, models: list[Path], prompts: str, name: str, device: str = "") -> dict:
    """Per model, per prompt: whether the answer is exact, or its loss (also to choose rates for --judge api)."""
    path = args.out / "runs" / f"{name}.measured.json"
    what = {"exact": "exact", "loss": "loss", "api": "answers" if prompts == "prompts" else "loss"}[args.judge]
    file = args.out / "data" / f"{prompts}.jsonl"
    how = ["--prompts", file, "--what", what, "--max-new-tokens", args.max_new_tokens, "--json", path]
    call([DEMO / "measure.py", *models, *how], ROOT, device)
    found = json.loads(path.read_text())
    path.unlink()
    return found


def write_answers(out: Path, job: Job, stage: int, texts: list[str]) -> None:
    """As generate.py writes them."""
    prompts = [json.loads(line) for line in (out / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [
        {"id": p["id"], "dataset": p["dataset"], "instruction": p["messages"][-1]["content"], "output": text,
         "generator": f"{job.arm}/stage{stage}"} | {k: p[k] for k in ("expected",) if k in p}
        for p, text in zip(prompts, texts)
    ]  # fmt: skip
    if rows:
        write_file(out / "answers" / f"{file_name(job.arm)}-{job.seed}.stage{stage}.json", json.dumps(rows, indent=1))


def run_jobs(args: argparse.Namespace, ground: Ground, arms: dict[str, Arm], jobs: list[Job], what: str) -> list[dict]:
    """The records of all jobs; those that are there already are not done again. Raises WorkError for the first that
    fails, when the others that run have ended."""
    devices: queue.Queue[str] = queue.Queue()
    for k in range(args.jobs):
        mine = range(k * args.nproc_per_node, (k + 1) * args.nproc_per_node)
        devices.put(",".join(map(str, mine)) if args.on_gpus else "")

    def work(job: Job) -> None:
        device = devices.get()
        try:
            run_job(args, ground, arms[job.arm], job, device)
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


def time_a_step(args: argparse.Namespace, ground: Ground, prompts: list[dict]) -> dict:
    """Seconds of a start, a step and a measurement, and what the model makes of the prompts before any training; all
    kept in timing.json."""
    path = args.out / "timing.json"
    if path.exists():
        return read_json_object(path)
    few = np.concatenate([ground.everything] * 4)[: 8 * ground.batch_size]
    write_lines(args.out / "data" / "timing.jsonl", [ground.rows[i] for i in few])
    timing = args.out / "runs" / "timing"
    command = [ROOT / "train.py", "--model", args.model, "--stages", "timing.jsonl", "--lr", 0, "--out", timing,
               "--batch-size", ground.batch_size, *args.train]  # fmt: skip
    device = ",".join(map(str, range(args.nproc_per_node))) if args.on_gpus else ""
    wall = call(command, args.out / "data", device, args.nproc_per_node)
    times = [json.loads(line)["seconds"] for line in (timing / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(timing)
    started = time.monotonic()
    base = measure(args, [args.model], "prompts", "base", device)
    start, seconds = wall - sum(times), time.monotonic() - started
    said, expected = (sum(map(len, texts)) for texts in (base["answers"][0], [p.get("expected", "") for p in prompts]))
    if said and expected:  # trained, it will answer at the length that is expected
        seconds = start + max(0, seconds - start) * min(1, expected / said)
    found = {"start": start, "step": float(np.median(times)), "measure": seconds, "base": base["values"][0]}
    write_file(path, json.dumps(found))
    return read_json_object(path)


def make_plan(args: argparse.Namespace, ground: Ground, arms: dict[str, Arm], prompts: list[dict], times: dict) -> dict:
    """Runs, steps, hours, dollars of judging; kept in plan.json."""
    runs = len(arms) * (args.seeds + (len(args.lr_grid) if len(args.lr_grid) > 1 else 0))
    seconds = runs * (times["start"] + ground.steps * times["step"] + times["measure"])
    plan = {"arms": list(arms), "rates": args.lr_grid, "seeds": args.seeds, "runs": runs, "steps": ground.steps}
    plan |= {"rows": len(ground.everything), "stages": [len(s) for s in ground.stages], "prompts": len(prompts)}
    plan |= {"seconds_per_step": round(times["step"], 4), "hours": round(seconds / args.jobs / 3600, 4)}
    first, later = len(ground.stages[0]), len(ground.stages) - 1
    held = {f"phased, replay {x:g}": held_back(ground.stages, x, ground.batch_size, np.random.default_rng(0))[0]
            for x in REPLAYED if later}  # fmt: skip
    plan |= {"replayed": {arm: (first - len(kept)) / later / first for arm, kept in held.items() if arm in arms}}
    plan |= {"dollars": judging_dollars(args, arms, prompts)}
    write_file(args.out / "plan.json", json.dumps(plan, indent=1))
    return plan


def judging_dollars(args: argparse.Namespace, arms: dict[str, Arm], prompts: list[dict]) -> float | None:
    """Of the API, at most: every answer of an arm in both orders. None where no price is known."""
    if args.judge != "api":
        return 0.0
    options = ApiOptions(model=args.api_model) if args.api_model else ApiOptions()
    prices = options.prices()
    if None in prices:
        return None
    asked = np.mean([sum(len(m["content"]) for m in p["messages"]) for p in prompts]) + len(judge_prompt(None, False))
    each = prices[0] * (asked / 4 + 2 * args.max_new_tokens) + prices[1] * 16
    return round(2 * len(prompts) * (len(arms) + 2 * len(COMPARED & arms.keys()) - 1) * args.seeds * each / 1e6, 2)


def print_plan(plan: dict, arms: dict[str, Arm]) -> None:
    sizes = " + ".join(f"{n:,}" for n in plan["stages"])
    money = "price of the judge unknown" if plan["dollars"] is None else f"${plan['dollars']:,.2f} of judging at most"
    takes = f"{plan['hours']:.1f} hours" if plan["hours"] >= 1 else f"{60 * plan['hours']:.0f} minutes"
    each = f"{plan['steps']:,} steps ({plan['seconds_per_step']:.2f} s each)"
    print(
        f"{len(arms)} arms, {len(plan['rates'])} rates, {plan['seeds']} seeds: {plan['runs']} runs of {each} "
        f"on {plan['rows']:,} rows ({sizes}), tested on {plan['prompts']:,} prompts. About {takes}; {money}."
    )
    for arm, share in plan["replayed"].items():
        print(f"{arm}: holds {100 * share:.3g} % of stage 1 back for each later stage (whole batches)")


# ---------------------------------------------------------------- all of it


def choose_rates(records: list[dict], judge: str) -> dict[str, dict[float, float]]:
    """arm -> rate -> its mean on validation, the best first."""
    found: dict[str, dict[float, float]] = {}
    for r in records:
        found.setdefault(r["arm"], {})[r["lr"]] = float(np.mean(r["values"][-1]))
    return {arm: dict(sorted(of.items(), key=lambda x: x[1], reverse=judge == "exact")) for arm, of in found.items()}


def judge_by_api(args: argparse.Namespace, records: list[dict]) -> None:
    """Every arm's answers against one-off training with the same seed; the store of judge.py asks nothing twice."""
    for r in records:
        r["wins"] = []
        base = args.out / "answers" / f"one-off-{r['seed']}.stage1.json"
        for path in sorted((args.out / "answers").glob(f"{file_name(r['arm'])}-{r['seed']}.stage*.json")):
            if path == base:
                r["wins"].append([0.5] * len(json.loads(base.read_text())))
                continue
            out = args.out / "verdicts" / f"{path.stem}.jsonl"
            if not out.exists():  # of a run that was killed judge.py asks only for the rest
                model = ["--api-model", args.api_model] if args.api_model else []
                call([ROOT / "judge.py", "compare", base, path, "--out", out, *model, *args.judge_flags], ROOT)
            points = {"win": 1.0, "tie": 0.5, "loss": 0.0}
            rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
            r["wins"].append([points.get(row["verdict"]) for row in rows if not row.get("canary")])


def settings_of(args: argparse.Namespace) -> dict:
    """What must be the same to go on: settings and hashes of data, model and code."""
    keys = "score_key bounds equal rows epochs batch_size lr_grid judge most_prompts max_new_tokens train api_model"
    files = [*args.scored, args.prompts, *([args.validation] if args.validation else [])]
    files += sorted(p for p in args.model.iterdir() if p.is_file())
    code = hashlib.sha256(
        b"".join(p.read_bytes() for d in (ROOT, ROOT / "parts", DEMO) for p in sorted(d.glob("*.py")))
    )
    given = {key: getattr(args, key) for key in keys.split()}
    hashes = {f"{path.parent.name}/{path.name}": sha256(path) for path in map(Path.resolve, files)}
    return {"settings": given, "hashes": hashes, "code": code.hexdigest()[:16]}


def keep_settings(args: argparse.Namespace) -> dict:
    """What the study is of, kept in study.json. Raises InputError where the folder holds another."""
    about, kept = settings_of(args), args.out / "study.json"
    before = read_json_object(kept) if kept.exists() else about
    changed = [k for part in ("settings", "hashes") for k, v in about[part].items() if before[part].get(k) != v]
    if changed or before["hashes"].keys() != about["hashes"].keys():
        raise InputError(f"{args.out} holds a study with other {', '.join(changed) or 'files'}: another --out")
    if before["code"] != about["code"]:
        print(f"{args.out}: the code changed since this study began; what is done stays", file=sys.stderr)
    write_file(kept, json.dumps(about, indent=1))
    return about


def write_data(args: argparse.Namespace, ground: Ground, prompts: list, validation: list, held_out: dict) -> None:
    """The files that runs read in out/data, and the stages by IFD."""
    data = args.out / "data"
    for folder in ("data", "runs", "results", "answers", "verdicts"):
        (args.out / folder).mkdir(exist_ok=True)
    for name, rows in {"prompts": prompts, "validation": validation, **held_out}.items():
        write_lines(data / f"{name}.jsonl", rows)
    if not (data / "ifd.jsonl").exists():
        write_lines(data / "all.jsonl", [ground.rows[i] for i in ground.everything])
        call([ROOT / "score.py", "ifd", "all.jsonl", "--model", args.model, "--out", "ifd.jsonl"], data)
    ifd: list[float | None] = [None] * len(ground.rows)
    for i, line in zip(ground.everything, (data / "ifd.jsonl").read_text(encoding="utf-8").splitlines()):
        ifd[i] = json.loads(line)["ifd"]
    ground.by["IFD"] = stages_by(ifd, ground.stages)


def measure_ceiling(args: argparse.Namespace, prompts: list[dict]) -> list | None:
    """Of each prompt, whether the model before any training knows it as text; None where that cannot be asked."""
    if args.judge != "exact" or not all("told" in p for p in prompts):
        return None
    path = args.out / "ceiling.json"
    if not path.exists():
        how = ["--what", "told", "--prompts", args.out / "data" / "prompts.jsonl"]
        call([DEMO / "measure.py", args.model, *how, "--max-new-tokens", args.max_new_tokens, "--json", path], ROOT)
    return json.loads(path.read_text())["values"][0]


def carry_out(args: argparse.Namespace, ground: Ground, arms: dict[str, Arm], prompts: list[dict], about: dict) -> None:
    times = time_a_step(args, ground, prompts)
    plan = make_plan(args, ground, arms, prompts, times)
    print_plan(plan, arms)
    if args.dry_run:
        return
    rates = {arm: {args.lr_grid[0]: None} for arm in arms}
    if len(args.lr_grid) > 1:
        grid = [Job(arm, lr, GRID_SEED) for arm in arms for lr in args.lr_grid]
        rates = choose_rates(run_jobs(args, ground, arms, grid, "rates"), args.judge)
    jobs = [Job(arm, next(iter(rates[arm])), seed) for seed in range(args.seeds) for arm in arms]
    records = run_jobs(args, ground, arms, jobs, "seeds")
    if args.judge == "api":
        judge_by_api(args, records)
    ceiling = measure_ceiling(args, prompts)
    write_findings(args.out, records, rates, prompts, times["base"], ceiling, args.judge, about | {"plan": plan})


def run(args: argparse.Namespace) -> None:
    args.out, args.model = args.out.resolve(), args.model.resolve()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of a run; --jobs of them side by side
    refuse_overwriting([args.out], [*args.scored, args.prompts, args.model])
    rows, stages, lengths = read_ground(args)
    prompts, validation, held_out = read_tests(args)
    by = {key: stages_by([row.get(key) for row in rows], stages) for key in args.also} | {"IFD": []}  # measured later
    ground = Ground(rows, stages, by, lengths, args.batch_size, args.epochs)
    known = make_arms(ground)
    wanted = ["one-off", *(args.arms or (QUICK if args.quick else known))]
    refuse([arm for arm in wanted if arm not in known], "arms are not known", f"There are: {', '.join(known)}.")
    with lock_folder(args.out):
        about = keep_settings(args)
        write_data(args, ground, prompts, validation, held_out)
        carry_out(args, ground, {arm: known[arm] for arm in dict.fromkeys(wanted)}, prompts, about)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=HelpFormatter,
        epilog="What stands behind -- goes to train.py.",
    )
    add = parser.add_argument
    add("--model", type=Path, default=DEMO / "model", metavar="DIR", help="HF folder from which every arm starts")
    scored = [DEMO / "scored.jsonl"]
    add("--scored", type=Path, nargs="+", default=scored, metavar="F", help="rows with a score of difficulty")
    add("--score-key", default="score", help="the key of the score")
    add("--bounds", type=float, nargs="+", default=[1.5, 3.5], metavar="X", help="scores at which a new stage begins")
    add("--equal", type=positive, metavar="K", help="K stages of equal size instead")
    rows_help = "so many of them, from every stage its share (default: all; for the demo 400)"
    add("--rows", type=positive, metavar="N", help=rows_help)
    add("--also", nargs="*", metavar="KEY", help="other keys of --scored to make stages by (for the demo: true)")
    prompts_help = "that test; with the right answer as `expected`, and perhaps a `score`"
    add("--prompts", type=Path, default=DEMO / "prompts.jsonl", metavar="F", help=prompts_help)
    add("--validation", type=Path, metavar="F", help="that choose the rate (default: a third of --prompts)")
    add("--judge", choices=["exact", "api", "loss"], default="exact", help="of an answer: is it as expected; against "
        "one-off's, by an LLM; the loss of the answer expected")  # fmt: skip
    add("--api-model", metavar="M", help="the judge (default: judge.py's)")
    judge_help = "more of judge.py compare, which is called for each arm, seed and stage: say '--canaries'"
    add("--judge-flags", type=shlex.split, default=[], metavar="'…'", help=judge_help)
    add("--arms", nargs="+", metavar="ARM", help="only these, and one-off (default: all)")
    grid_help = "rates of which each arm gets its best (needed; for the demo four from 2.5e-4 to 2e-3)"
    add("--lr-grid", type=above_zero, nargs="+", metavar="X", help=grid_help)
    add("--seeds", type=positive, metavar="N", help="runs of each arm that are tested (default: 5; for the demo 10)")
    add("--epochs", type=positive, default=2, metavar="N", help="passes over a stage")
    add("--batch-size", type=positive, default=16, metavar="N", help="documents in a step")
    add("--max-new-tokens", type=positive, default=96, metavar="N", help="longest answer")
    add("--jobs", type=positive, metavar="N", help="runs side by side (default: one a GPU, or one a core)")
    add("--nproc-per-node", type=positive, default=1, metavar="N", help="ranks of a run, by torchrun")
    add("--out", type=Path, metavar="DIR", help="(default: out/study, out/study-quick)")
    add("--quick", action="store_true", help="six arms, two rates, two seeds, 200 prompts")
    add("--dry-run", action="store_true", help="print the plan and stop")
    add("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv[:cut])
    args.train, is_demo = argv[cut + 1 :], args.model.resolve() == DEMO / "model"
    for flag in ("--batch-size", "--epochs", "--seed", "--lr", "--stages", "--out", "--model"):
        if flag in args.train:
            parser.error(f"{flag} belongs to the study: give it in front of --")
    if args.lr_grid is None:
        if not is_demo:
            parser.error("--lr-grid must be given for this --model, say 2e-6 5e-6 1e-5 2e-5 at 7 B")
        args.lr_grid = [5e-4, 1e-3] if args.quick else [2.5e-4, 5e-4, 1e-3, 2e-3]
    if args.scored == scored:
        args.also = ["true"] if args.also is None else args.also
        args.validation = args.validation or DEMO / "validation.jsonl"
        args.rows = args.rows or 400
    args.also = args.also or []
    args.most_prompts = 200 if args.quick else None
    args.seeds = args.seeds or (2 if args.quick else 10 if is_demo else 5)
    args.out = args.out or ROOT / "out" / ("study-quick" if args.quick else "study")
    import torch  # only to count

    args.on_gpus = torch.cuda.is_available()
    args.jobs = args.jobs or max(1, (torch.cuda.device_count() or os.cpu_count() or 1) // args.nproc_per_node)
    return args


def main(argv: list[str] | None = None) -> int:
    return run_program("study.py", run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
