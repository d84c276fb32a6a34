"""Diversity as in IterIT: TF-IDF of the answers, and a greedy choice that reduces the weights of terms chosen
already."""

import heapq
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass
class SparseRows:
    """A sparse matrix of TF-IDF weights in CSR format: row r has the `weights` and `terms` from offsets[r] to
    offsets[r + 1]."""

    offsets: np.ndarray  # (N+1,) int64
    terms: np.ndarray  # (M,) int32, each at most once in a row
    weights: np.ndarray  # (M,) float64; the norm of a row is 1
    n_terms: int


def tf_idf(texts: Iterable[str]) -> SparseRows:
    """TF-IDF of word 1- to 3-grams, as scikit-learn's TfidfVectorizer(ngram_range=(1, 3)): lower case, words of two or
    more characters, idf = ln((1 + n) / (1 + df)) + 1, rows of norm 1. An n-gram is a number, not a text."""
    vocabulary: dict[str, int] = {}
    find_words = re.compile(r"(?u)\b\w\w+\b").findall
    ids, lengths = [], []
    for text in texts:
        words = find_words(text.lower())
        ids += [vocabulary.setdefault(word, len(vocabulary)) for word in words]
        lengths.append(len(words))
    words, n_rows = np.array(ids, np.int64), len(lengths)
    rows = np.repeat(np.arange(n_rows, dtype=np.int64), lengths)  # the row of each word
    n_words = max(1, len(vocabulary))
    gram_rows, gram_terms = [rows], [words]
    grams, n_terms = words, len(vocabulary)  # grams[i]: the n-gram that begins at word i
    for size in (2, 3):
        # An n-gram is an (n - 1)-gram and the word after it, in the same row.
        inside = rows[: len(rows) - size + 1] == rows[size - 1 :]
        pairs = grams[: len(inside)] * n_words + words[size - 1 :]
        unique, numbers = np.unique(pairs[inside], return_inverse=True)
        gram_rows.append(rows[: len(inside)][inside])
        gram_terms.append(n_terms + numbers)
        grams = np.zeros(len(inside), np.int64)
        grams[inside] = numbers
        n_terms += len(unique)
    keys = np.concatenate(gram_rows) * max(1, n_terms) + np.concatenate(gram_terms)
    keys, counts = np.unique(keys, return_counts=True)
    row_of, terms = np.divmod(keys, max(1, n_terms))
    idf = np.log((1 + n_rows) / (1 + np.bincount(terms, minlength=n_terms))) + 1
    weights = counts * idf[terms]
    weights /= np.sqrt(np.bincount(row_of, weights**2, minlength=n_rows))[row_of]
    offsets = np.searchsorted(row_of, np.arange(n_rows + 1)).astype(np.int64)
    return SparseRows(offsets, terms.astype(np.int32), weights, n_terms)


def pick_diverse(scores: np.ndarray, matrix: SparseRows, count: int, decay: float) -> list[int]:
    """IterIT's greedy choice of up to `count` rows: choose the row with the highest product of its score and the sum of
    its TF-IDF weights, multiply the weights of its terms by `decay` in every row, and repeat. Ties go to the lowest
    index; a row whose score is NaN is never chosen.

    Weights never increase and scores are not negative, so an old product is an upper bound. A row is the best if its
    product is up to date and at the top of a heap that otherwise may contain old products.
    """
    factors = np.ones(matrix.n_terms)
    pieces = [slice(a, b) for a, b in zip(matrix.offsets[:-1], matrix.offsets[1:])]
    sums = np.add.reduceat(np.append(matrix.weights, 0.0), matrix.offsets)[:-1] * (np.diff(matrix.offsets) > 0)
    # (negative product, row, number of rows chosen when it was computed)
    heap = [(-float(scores[r] * sums[r]), r, 0) for r in range(len(scores)) if not math.isnan(scores[r])]
    heapq.heapify(heap)
    chosen: list[int] = []
    while heap and len(chosen) < count:
        _, row, computed_at = heap[0]
        piece = pieces[row]
        if computed_at == len(chosen):
            heapq.heappop(heap)
            chosen.append(row)
            factors[matrix.terms[piece]] *= decay
        else:
            value = float(scores[row] * (matrix.weights[piece] * factors[matrix.terms[piece]]).sum())
            heapq.heapreplace(heap, (-value, row, len(chosen)))
    return chosen
