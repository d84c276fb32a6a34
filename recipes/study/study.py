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
import json
import math
import os
import shlex
import sys
import tempfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from parts.checkpoints.lock import lock_folder
from parts.cli import HelpFormatter, InputError, nonneg_int, positive_float, positive_int, raise_if_any, run_program
from parts.distributed import resolve_dtype
from parts.files import atomic_write, check_output_paths, json_values, read_json_object, read_text, sha256, write_lines
from parts.options import RESUMABLE_ARGS, make_parser
from parts.text.rows import messages_of
from parts.text.templates import TEMPLATES, choose_template
from parts.text.testsets import read_prompts
from parts.text.tokenizers import load_tokenizer
from recipes.study import runs
from recipes.study.arms import Arm, StudyData, cut_scores, make_arms, read_study_data
from recipes.study.plan import make_plan, measure_times, print_plan, wants_ifd
from recipes.study.power import print_power
from recipes.study.results import file_name, open_results, print_saved_tables, write_results
from recipes.study.tasks import read_tasks
from score import read_score

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEMO = ROOT / "demo"
QUICK = ["one-off", "phased", "random stages", "stages 3-2-1", "stage 3 only", "phased, replay 0.1"]
# Flags of train.py that the study sets.
STUDY_FLAGS = {"stages", "eval", "replay", "model", "out", "epochs", "lr", "batch_size", "optimizer_state", "seed",
               "select", "ratio", "scores", "eval_every", "sample_prompts", "dry_run"}  # fmt: skip

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


# ---------------------------------------------------------------- all of it


def choose_rates(records: list[dict], judge: str) -> dict[str, dict[float, float | None]]:
    """arm -> rate -> mean on the validation prompts, the best rate first; a mean that is not finite is None."""
    found: dict[str, dict[float, float | None]] = {}
    for r in records:
        mean = float(np.mean(r["values"][-1]))
        found.setdefault(r["arm"], {})[r["lr"]] = mean if math.isfinite(mean) else None
    sign = -1 if judge == "exact" else 1
    return {
        arm: dict(sorted(of.items(), key=lambda item: (item[1] is None, sign * (item[1] or 0.0))))
        for arm, of in found.items()
    }


def describe_settings(args: argparse.Namespace) -> dict:
    """What must be equal to continue a study: settings and hashes of data, model and code."""
    keys = "score_key bounds equal rows epochs batch_size lr_grid judge most_prompts max_new_tokens trained api_model"
    keys += " ifd evaluations dtype"
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
    with open_results(args.runs_from) as results:
        if changed := changed_settings(results, about):
            raise InputError(f"{args.runs_from} is of a study with other {changed}: its runs cannot be used")
        if results["code"] != about["code"]:
            print(f"{args.runs_from}: its runs were made by other code", file=sys.stderr)
        for record in [*results.get("tuning", []), *results["runs"]]:
            path = args.out / "results" / f"{runs.Job(record['arm'], record['lr'], record['seed']).name}.json"
            if not path.exists():
                atomic_write(path, json.dumps(record))


def check_settings(args: argparse.Namespace) -> dict:
    """Write study.json with the settings and hashes, unless it exists, and return them. Raises InputError if the folder
    contains a study with other ones."""
    about, kept = describe_settings(args), args.out / "study.json"
    before = read_json_object(kept) or about
    if changed := changed_settings(before, about):
        raise InputError(f"{args.out} contains a study with other {changed}: give another --out")
    if before["code"] != about["code"]:
        print(f"{args.out}: the code changed since this study began; what is done stays", file=sys.stderr)
    atomic_write(kept, json.dumps(before, indent=1))
    return about


def write_data(out: Path, sets: dict[str, list[dict]]) -> None:
    """Make the folders of a study, and write the prompts and held-out rows to out/data."""
    for folder in ("data", "runs", "results", "answers", "verdicts"):
        (out / folder).mkdir(exist_ok=True)
    for name, rows in sets.items():
        write_lines(out / "data" / f"{name}.jsonl", rows)


def run_study(
    args: argparse.Namespace, study_data: StudyData, arms: dict[str, Arm], prompts: list[dict], about: dict
) -> None:
    times = measure_times(args, study_data, prompts)
    plan = make_plan(args, study_data, arms, prompts, times)
    print_plan(plan, arms)
    if args.dry_run:
        return
    if wants_ifd(arms):
        runs.measure_ifd(args, study_data)
    rates, tuning = {arm: {args.lr_grid[0]: None} for arm in arms}, []
    if len(args.lr_grid) > 1:
        grid = [runs.Job(arm, lr, runs.GRID_SEED) for arm in arms for lr in args.lr_grid]
        tuning = runs.run_jobs(args, study_data, arms, grid, "rates")
        rates = choose_rates(tuning, args.judge)
    jobs = [runs.Job(arm, next(iter(rates[arm])), seed) for seed in range(args.seeds) for arm in arms]
    records = runs.run_jobs(args, study_data, arms, jobs, "seeds")
    if args.judge == "api":
        runs.judge_by_api(args, records)
    ceiling = runs.measure_ceiling(args, prompts)
    results = about | {"command": shlex.join(sys.argv), "plan": plan, "judge": args.judge, "rates": rates}
    base = {key: value for key, value in times["base"].items() if key not in ("answers", "tokens")}
    results |= {"tokens": times["base"]["tokens"], "base": base, "ceiling": ceiling, "tuning": tuning}
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
    power_help += "the results.json of a study of two or more seeds, or its folder"
    add("--power", type=Path, metavar="PILOT", help=power_help)
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
    args.trained = {k: v for k, v in sorted(given.items()) if k not in RESUMABLE_ARGS and k != "dtype"}
    args.dtype = resolve_dtype(given.get("dtype", "auto"))  # of training and of measurements
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
    args.lr_grid, args.also = list(dict.fromkeys(args.lr_grid)), args.also or []
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
