"""The rows of a study, their stages, and its arms: which rows are trained on, in which order and how often."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np

from parts.cli import InputError, raise_if_any
from parts.text.rows import Row, messages_of, read_good_rows
from score import answer_text, read_score, split_at_bounds, split_equally

SELECTED_PERCENT = (5, 20)  # of the rows, by IterIT and its controls
REPLAY_SHARES = (0.01, 0.1, 0.25)

MEASURED_EVERY_STAGE = {"phased", "random stages", "phased by IFD", "phased, replay 0.1"}  # others: after the last
# ---------------------------------------------------------------- the rows and their stages


@dataclass
class StudyData:
    """What all arms share. A stage is an array of row indices; its length is a multiple of the batch size."""

    rows: list[dict]
    stages: list[np.ndarray]  # by the score, rising
    by: dict[str, list[np.ndarray]]  # by other keys, stages of the same sizes; IFD's are filled in when it is measured
    lengths: np.ndarray  # of the answers, in characters
    batch_size: int
    epochs: int

    @property
    def everything(self) -> np.ndarray:
        return np.sort(np.concatenate(self.stages))

    @property
    def steps(self) -> int:
        return self.epochs * len(self.everything) // self.batch_size


def read_study_data(args: argparse.Namespace) -> StudyData:
    """Read the scored rows and make stages by the score and by the keys of --also. Raises InputError."""
    rows = [row for path in args.scored for row in read_good_rows(path, skip_bad=False)]
    scores = scores_of(rows, args.score_key)
    raise_if_any([row.source for row, score in zip(rows, scores) if score is None], f"rows have no {args.score_key}",
           "Score them, or leave them out of the file.")  # fmt: skip
    if sorted(set(args.bounds)) != args.bounds:
        raise InputError("--bounds must be in increasing order")
    share, stages = min(1.0, args.rows / len(rows)) if args.rows else 1.0, []
    for k, group in enumerate(cut_scores(np.array(scores), args), 1):
        batches = min(round(share * len(group) / args.batch_size), len(group) // args.batch_size)
        if not batches:  # whole batches, so that every arm has the same steps
            raise InputError(f"stage {k} has {share * len(group):.0f} rows, less than a batch of {args.batch_size}: "
                             "--batch-size, --rows, --bounds")  # fmt: skip
        stages.append(np.sort(np.random.default_rng(k).permutation(group)[: batches * args.batch_size]))
    by = {}
    for key in args.also:
        values = scores_of(rows, key)
        if key == "IFD" or all(value is None for value in values):
            raise InputError(f"--also {key}: " + ("is measured anyway" if key == "IFD" else "no row has it"))
        by[key] = restage_by(values, stages)
    lengths = np.array([len(answer_text(row)) for row in rows])
    return StudyData(list(map(to_data_row, rows)), stages, by | {"IFD": []}, lengths, args.batch_size, args.epochs)


def scores_of(rows: list[Row], key: str) -> list[float | None]:
    return [read_score(row.raw, key, row.source) for row in rows]


def cut_scores(scores: np.ndarray, args: argparse.Namespace) -> list[np.ndarray]:
    """Row indices of each stage, in the order of the file."""
    groups = split_equally(scores, args.equal) if args.equal else split_at_bounds(scores, args.bounds)
    return [np.sort(group) for group in groups]


def to_data_row(row: Row) -> dict:
    """The row in one format (`messages`, or `text`), whichever its file has."""
    if row.turns[0].role == "text":
        return {"id": row.id, "text": row.turns[0].text}
    return {"id": row.id, "messages": messages_of(row.turns)}


def restage_by(values: list[float | None], stages: list[np.ndarray]) -> list[np.ndarray]:
    """The same rows in stages of the same sizes, by rising `values`. Rows without a value come last."""
    rows = np.sort(np.concatenate(stages))
    of = np.array([np.inf if values[i] is None else values[i] for i in rows])
    return np.split(rows[np.argsort(of, kind="stable")], np.cumsum([len(s) for s in stages])[:-1])


# ---------------------------------------------------------------- arms


@dataclass
class Arm:
    stages: Callable[[np.random.Generator], list[np.ndarray]]  # of a seed: the rows of each stage
    epochs: int
    flags: list = field(default_factory=list)  # of train.py
    falling: float = 1.0  # factor of the learning rate from stage to stage
    steps: int | None = None  # None: study_data.steps


def repeat_rows(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` rows, drawn from `rows` in complete passes and a part of one."""
    times = -(-count // len(rows))
    return np.concatenate([rng.permutation(rows) for _ in range(times)])[:count]


def hold_back_rows(
    stages: list[np.ndarray], share: float, batch_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Move about `share` of each stage's rows into each later stage. Every row is trained on as often as without
    replay, and the sizes of the stages stay multiples of the batch size."""
    stages, later = [rng.permutation(s) for s in stages], [[] for _ in stages]
    out = []
    for k, stage in enumerate(stages):
        after, here = len(stages) - 1 - k, sum(map(len, later[k]))
        given = 0
        if after:  # the rows that stay and those from earlier stages fill at least one batch
            able = np.arange(here % batch_size, min(len(stage), len(stage) + here - batch_size) + 1, batch_size)
            able = able[able > 0] if able.any() else able
            given = able[np.abs(able - share * after * len(stage)).argmin()]
        for j, part in enumerate(np.array_split(stage[:given], after) if after else []):
            later[k + 1 + j].append(part)
        out.append(np.concatenate([stage[given:], *later[k]]))
    return out


def choose_subset_size(study_data: StudyData, share: float) -> tuple[int, int]:
    """(rows, passes over them): complete batches, about this share of all rows, with a number of steps as near to
    study_data.steps as possible."""
    about = share * len(study_data.everything) / study_data.batch_size
    batches = [b for b in range(1, study_data.steps + 1) if 0.8 * about <= b <= 1.25 * about] or [max(1, round(about))]
    missed = [(abs(max(1, round(study_data.steps / b)) * b - study_data.steps), abs(b - about), b) for b in batches]
    count = min(missed)[2]
    return count * study_data.batch_size, max(1, round(study_data.steps / count))


def make_arms(study_data: StudyData) -> dict[str, Arm]:
    """The arms by name. Each takes study_data.steps steps; those on few rows take complete passes, so a few more or
    less."""
    s, everything, epochs, n = study_data.stages, study_data.everything, study_data.epochs, len(study_data.everything)
    sizes = [len(stage) for stage in s]
    arms = {"one-off": Arm(lambda rng: [everything], epochs), "phased": Arm(lambda rng: s, epochs)}
    for order in list(permutations(range(len(s))))[1:] if len(s) <= 3 else [tuple(range(len(s)))[::-1]]:
        name = "stages " + "-".join(str(k + 1) for k in order)
        arms[name] = Arm(lambda rng, order=order: [s[k] for k in order], epochs)
    arms["random stages"] = Arm(lambda rng: np.split(rng.permutation(everything), np.cumsum(sizes)[:-1]), epochs)
    for k in range(len(s) - 1, 0, -1):
        arms[f"stage {k + 1} only"] = Arm(lambda rng, k=k: [repeat_rows(s[k], n, rng)], epochs)
    for share in REPLAY_SHARES:
        arms[f"phased, replay {share:g}"] = Arm(
            lambda rng, share=share: hold_back_rows(s, share, study_data.batch_size, rng), epochs
        )
    arms["phased, optimizer kept"] = Arm(lambda rng: s, epochs, ["--optimizer-state", "keep"])
    arms["phased, falling rate"] = Arm(lambda rng: s, epochs, falling=0.5)
    for key in study_data.by:
        arms[f"phased by {key}"] = Arm(lambda rng, key=key: study_data.by[key], epochs)
    longest = everything[np.argsort(-study_data.lengths[everything], kind="stable")]
    for size in SELECTED_PERCENT:
        count, passes = choose_subset_size(study_data, size / 100)
        few = {"epochs": passes, "steps": count * passes // study_data.batch_size}
        for select in ("iterit", "static"):
            flags = ["--select", select, "--ratio", count, "--scores", "ifd.jsonl"]
            arms[f"{select.replace('iterit', 'IterIT')} {size} %"] = Arm(lambda rng: [everything], flags=flags, **few)
        arms[f"longest {size} %"] = Arm(lambda rng, c=count: [longest[:c]], **few)
        arms[f"random {size} %"] = Arm(lambda rng, c=count: [rng.permutation(everything)[:c]], **few)
    return arms
