"""The plan of a study before it runs: how many runs, steps, hours and dollars."""

import argparse
import json
import shutil
import time

import numpy as np

from parts.api.options import ApiOptions
from parts.api.prompts import judge_prompt
from parts.files import atomic_write, read_json_object, write_lines
from recipes.study import runs
from recipes.study.arms import MEASURED_EVERY_STAGE, REPLAY_SHARES, Arm, StudyData, hold_back_rows


def wants_ifd(arms: dict[str, Arm]) -> bool:
    return any(name == "phased by IFD" or "--scores" in arm.flags for name, arm in arms.items())


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
    command = [runs.ROOT / "train.py", "--model", args.model, "--stages", "timing.jsonl", "--lr", 0, "--out", timing]
    command += ["--batch-size", study_data.batch_size, "--eval", *runs.held_out_files(args.out), *args.train]
    device = runs.device_of(args, 0)
    wall = runs.run_python(command, args.out / "data", device, args.nproc_per_node)
    times = [row["seconds"] for row in runs.read_jsonl(timing / "metrics.jsonl") if "loss" in row]
    shutil.rmtree(timing)
    started = time.monotonic()
    (base,) = runs.measure_models(args, [args.model], "prompts", "base", device)
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
