"""IterIT's selection of rows: options and state, the rows to score before an epoch, and the choice among them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from parts.diversity import pick_diverse, tf_idf
from parts.files import write_lines


@dataclass
class Score:
    """A score that rows are selected by, and the rule for its values."""

    key: str  # of the field in files
    name: str  # in messages
    measure: Callable[..., Tensor]  # as `measure_ifd`: of each document; zero or above, NaN where there is none
    worth: Callable[[np.ndarray], np.ndarray]  # higher is chosen first; below zero only when no others are left
    worthless: str = ""  # in words: the values whose worth is below zero


@dataclass(frozen=True)
class SelectionOptions:
    """Options of train.py --select."""

    select: str  # none, iterit or static
    ratio: float  # of the stage's rows below 1, a count from 1 on
    update_ratio: float  # rows scored again before a later epoch, as a multiple of the rows per epoch
    score_type: str  # both: by score times diversity; ifd: by the score alone, whichever it is
    diversity_decay: float  # decay of the weights of terms in rows chosen already


@dataclass
class Selection:
    """Scores and selection of a stage's documents; part of a run's saved state."""

    epoch: int = -1  # the epoch of `chosen`
    chosen: list[int] = field(default_factory=list)  # best first
    scores: list[float] = field(default_factory=list)  # (D,) the latest score of each document; NaN: none
    scoring_epoch: int = -1  # the epoch for which …
    candidates: list[int] = field(default_factory=list)  # … these are scored …
    n_scored: int = 0  # … and the number of them scored so far

    def candidate_scores(self) -> np.ndarray:
        return np.array(self.scores, np.float32)[self.candidates]


def choose_rows(worth: np.ndarray, answers: list[str] | None, count: int, decay: float = 0.1) -> np.ndarray:
    """Select at most `count` rows as IterIT does, best first (int64): by `worth` (N,) times diversity of the `answers`,
    or without answers by worth alone.

    TF-IDF and diversity use the rows with worth >= 0 only. If these are fewer than `count`, rows with negative worth
    follow, highest first. Rows whose worth is NaN are never chosen.
    """
    good, others = np.flatnonzero(worth >= 0), np.flatnonzero(worth < 0)
    if answers is None or not len(good):
        best = np.argsort(-worth[good], kind="stable")
    else:
        best = pick_diverse(worth[good].astype(np.float64), tf_idf(answers[i] for i in good), count, decay)
    return np.concatenate([good[best], others[np.argsort(-worth[others], kind="stable")]])[:count].astype(np.int64)


def plan_scoring(selection: Selection, usable: np.ndarray, epoch: int, max_count: int, score: Score) -> None:
    """Set the documents to score for `epoch`. Before the first epoch: all `usable` ones (none if scores are given).
    Before a later one: at most `max_count`, first those chosen last, then the others by their latest score."""
    candidates, given = usable, epoch == 0 and bool(selection.scores)
    if epoch > 0:
        known = np.array(selection.scores, np.float32)
        ranked = choose_rows(score.worth(known), None, len(known)).tolist()
        candidates = np.array(list(dict.fromkeys([*selection.chosen, *ranked]))[:max_count])
    selection.scoring_epoch, selection.candidates = epoch, candidates.tolist()
    selection.n_scored = len(candidates) if given else 0


def describe_selection(selection: Selection, score: Score) -> str:
    """A summary line: how many of the candidates were chosen, and their range of scores."""
    values = np.array(selection.scores)[selection.chosen]
    worthless = int((score.worth(values) < 0).sum())
    chosen = f"{len(values):,} of {len(selection.candidates):,} chosen"
    note = f"; {worthless:,} of them at {score.worthless}, since no better rows were left"
    return f"{chosen}, {score.name} {values.min():.3f} to {values.max():.3f}{note if worthless else ''}"


def write_selection(path: Path, ids: list[str], sources: list[str], selection: Selection, score: Score) -> None:
    """Write a line per scored document, with its id and source: the chosen ones, best first; the others by score."""
    chosen, candidates = set(selection.chosen), np.array(selection.candidates)
    worth = score.worth(selection.candidate_scores())
    worth = np.nan_to_num(worth, nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    ranked = candidates[choose_rows(worth, None, len(candidates))].tolist()
    lines = []
    for rank, d in enumerate(dict.fromkeys([*selection.chosen, *ranked]), 1):
        value = selection.scores[d] if math.isfinite(selection.scores[d]) else None
        lines.append({"id": ids[d], "where": sources[d], score.key: value, "rank": rank, "chosen": d in chosen})
    write_lines(path, lines)
