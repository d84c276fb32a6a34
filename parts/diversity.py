"""Diversity as IterIT measures it: TF-IDF over the answers, and the greedy choice that lowers what is chosen
already."""

import heapq
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass
class SparseRows:
    """A sparse matrix of TF-IDF weights, row after row: row r's are `weights[starts[r]:starts[r + 1]]` of `terms`."""

    offsets: np.ndarray  # (N+1,) int64
    terms: np.ndarray  # (M,) int32, each at most once in a row
    weights: np.ndarray  # (M,) float64, of unit length in a row
    n_terms: int


def tf_idf(texts: Iterable[str]) -> SparseRows:
    """TF-IDF of word 1- to 3-grams, as scikit-learn's TfidfVectorizer(ngram_range=(1, 3)) has it by default: lower
    case, words of two characters or more, idf = ln((1 + n) / (1 + df)) + 1, rows of unit length. n-grams are numbers,
    not
    text."""
    vocabulary: dict[str, int] = {}
    find = re.compile(r"(?u)\b\w\w+\b").findall
    ids, lengths = [], []
    for text in texts:
        words = find(text.lower())
        ids += [vocabulary.setdefault(word, len(vocabulary)) for word in words]
        lengths.append(len(words))
    words, n = np.array(ids, np.int64), len(lengths)
    rows = np.repeat(np.arange(n, dtype=np.int64), lengths)
    places, gram, seen, base = [], words, len(vocabulary), 0
    for size in (1, 2, 3):
        if size > 1:  # the n-gram of a word and the (n - 1)-gram of the words before it, both in the same row
            inside = rows[: len(rows) - size + 1] == rows[size - 1 :]
            pairs = gram[: len(inside)] * max(1, len(vocabulary)) + words[size - 1 :]
            unique, gram = np.unique(pairs[inside], return_inverse=True)
            whole = np.full(len(inside), 0, np.int64)
            whole[inside] = gram
            places.append((rows[: len(inside)][inside], base + gram))
            gram, seen = whole, len(unique)
        else:
            places.append((rows, gram))
        base += seen
    key = np.concatenate([r * max(1, base) + t for r, t in places])
    key, counts = np.unique(key, return_counts=True)
    row_of, terms = np.divmod(key, max(1, base))
    idf = np.log((1 + n) / (1 + np.bincount(terms, minlength=base))) + 1
    weights = counts * idf[terms]
    norms = np.sqrt(np.bincount(row_of, weights**2, minlength=n))
    weights /= norms[row_of]
    starts = np.searchsorted(row_of, np.arange(n + 1)).astype(np.int64)
    return SparseRows(starts, terms.astype(np.int32), weights, base)


def pick_diverse(scores: np.ndarray, matrix: SparseRows, count: int, decay: float) -> list[int]:
    """IterIT's greedy choice: the row with the highest score x sum of its TF-IDF weights, then all weights of that
    row's terms times `decay`, in every row; and again. Ties go to the lowest index; rows with a NaN score are never
    chosen.

    Weights only ever shrink and scores are not negative, so a value computed earlier is an upper bound: a row whose
    fresh value still tops a heap of old ones is the best. The same choice as summing every row again at every pick.
    """
    factors = np.ones(matrix.n_terms)
    pieces = [slice(a, b) for a, b in zip(matrix.offsets[:-1], matrix.offsets[1:])]
    sums = np.add.reduceat(np.append(matrix.weights, 0.0), matrix.offsets)[:-1] * (np.diff(matrix.offsets) > 0)
    heap = [(-float(scores[r] * sums[r]), r, 0) for r in range(len(scores)) if not math.isnan(scores[r])]
    heapq.heapify(heap)
    chosen: list[int] = []
    while heap and len(chosen) < count:
        _, row, age = heap[0]
        piece = pieces[row]
        if age == len(chosen):
            heapq.heappop(heap)
            chosen.append(row)
            factors[matrix.terms[piece]] *= decay
        else:
            value = float(scores[row] * (matrix.weights[piece] * factors[matrix.terms[piece]]).sum())
            heapq.heapreplace(heap, (-value, row, len(chosen)))
    return chosen
