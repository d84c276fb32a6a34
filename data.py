"""From rows to batches: documents, stages, micro-batches. Numpy only, no torch.

A row of a data file is a list of turns (parts/text/rows.py). `render` (parts/text/templates.py) converts the turns to
tokens and a mask of the supervised ones: a document. The documents of a file are concatenated in flat arrays
(`Documents`).
"""

import hashlib
import heapq
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parts.cli import InputError, ignore_terminal_signals, progress, raise_if_any
from parts.files import sha256
from parts.text.memmap import StringArray, map_arrays, save_arrays
from parts.text.rows import SKIP_ADVICE, Row, find_files, read_rows
from parts.text.templates import TEMPLATES, render
from parts.text.tokenizers import load_tokenizer, tokenizer_files

# ---------------------------------------------------------------- documents


@dataclass
class Documents:
    """Tokenized rows, concatenated."""

    tokens: np.ndarray  # (N,) int32
    loss_mask: np.ndarray  # (N,) bool: this token is a target
    offsets: np.ndarray  # (D+1,) int64: document d is tokens[offsets[d]:offsets[d+1]]
    ids: Sequence[str]
    source: Sequence[str]  # file:line
    bad: list[str]  # unusable rows, "file:line: reason"
    truncated: int = 0  # rows cut to max_len …
    truncated_tokens: int = 0  # … and the tokens removed from them
    unencodable: int = 0  # rows with characters that the tokenizer cannot represent

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(D,) in tokens."""
        return np.diff(self.offsets)

    @cached_property
    def target_counts(self) -> np.ndarray:
        """(D,) predicted tokens of each document: supervised, and not the document's first token."""
        return np.add.reduceat(self.loss_mask, self.offsets[:-1], dtype=np.int64) - self.loss_mask[self.offsets[:-1]]

    def pack(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The model's input: tokens, positions (T,) int64, cu_seqlens (D+1,) int32, targets (T,) int64 of the chosen
        documents, concatenated. The target of a token is the document's next token if that is supervised, else -100.

        Without documents: one token without a target, so that a rank without data still takes part in every all-gather
        of weights.
        """
        if not len(chosen):
            return np.array([0]), np.array([0]), np.array([0, 1], np.int32), np.array([-100])
        pieces = [slice(self.offsets[d], self.offsets[d + 1]) for d in chosen]
        tokens = np.concatenate([self.tokens[p] for p in pieces]).astype(np.int64)
        supervised = np.concatenate([self.loss_mask[p] for p in pieces])
        cu_seqlens = np.cumsum([0, *self.lengths[chosen]]).astype(np.int32)
        supervised[cu_seqlens[:-1]] = False  # a document's first token is not predicted
        targets = np.append(np.where(supervised, tokens, -100)[1:], -100)
        positions = np.concatenate([np.arange(n) for n in self.lengths[chosen]])
        return tokens, positions, cu_seqlens, targets


def concat(parts: list[Documents]) -> Documents:
    """Concatenate several Documents, in order."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum(np.concatenate([[0], *(p.lengths for p in parts)]))
    return Documents(
        np.concatenate([p.tokens for p in parts]),
        np.concatenate([p.loss_mask for p in parts]),
        starts.astype(np.int64),
        [i for p in parts for i in p.ids],
        [w for p in parts for w in p.source],
        [b for p in parts for b in p.bad],
        sum(p.truncated for p in parts),
        sum(p.truncated_tokens for p in parts),
        sum(p.unencodable for p in parts),
    )


def subset(documents: Documents, chosen: np.ndarray) -> Documents:
    """The chosen documents, in the given order."""
    pieces = [slice(documents.offsets[d], documents.offsets[d + 1]) for d in chosen]
    return Documents(
        np.concatenate([np.zeros(0, np.int32), *(documents.tokens[p] for p in pieces)]),
        np.concatenate([np.zeros(0, bool), *(documents.loss_mask[p] for p in pieces)]),
        np.cumsum([0, *documents.lengths[chosen]]).astype(np.int64),
        [documents.ids[d] for d in chosen],
        [documents.source[d] for d in chosen],
        [],
    )


cached_tokenizer = lru_cache(maxsize=1)(load_tokenizer)  # so that a worker process loads it once


class TokenizedRow(NamedTuple):
    tokens: np.ndarray  # int32
    loss_mask: np.ndarray  # bool
    truncated_tokens: int
    unencodable: bool  # the tokenizer cannot represent all its characters


def tokenize_rows(rows: list[Row], folder: Path, template: str, max_len: int) -> list[TokenizedRow]:
    """Render and truncate rows; run in a worker process."""
    tokenizer, tokenized = cached_tokenizer(folder), []
    for row in rows:
        tokens, loss_mask = render(row.turns, TEMPLATES[template], tokenizer)
        arrays = np.array(tokens[:max_len], np.int32), np.array(loss_mask[:max_len], bool)
        unencodable = any(tokenizer.loses(turn.text) for turn in row.turns)
        tokenized.append(TokenizedRow(*arrays, max(0, len(tokens) - max_len), unencodable))
    return tokenized


def tokenize_files(paths: list[Path], folder: Path, template: str, max_len: int, shown: bool) -> Documents:
    """Read, check, render and truncate every row of the files, on all cores if there are many rows; `shown`: show a
    progress bar."""
    read = [read_rows(path) for path in paths]
    rows, bad = [row for good, _ in read for row in good], [line for _, lines in read for line in lines]
    chunks = [rows[i : i + 200] for i in range(0, len(rows), 200)]
    tokenize = partial(tokenize_rows, folder=folder.resolve(), template=template, max_len=max_len)
    cached_tokenizer(folder.resolve())  # loaded before the fork, shared after it
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    use_pool = len(chunks) > 20 and cores > 1 and sys.platform == "linux"
    pool = get_context("fork").Pool(min(cores, len(chunks)), initializer=ignore_terminal_signals) if use_pool else None
    tokenized = []
    try:
        with progress(len(rows), f"tokenize {paths[0].name}", "row", shown=shown) as bar:
            for part in pool.imap(tokenize, chunks) if pool else map(tokenize, chunks):
                tokenized += part
                bar.update(len(part))
    finally:
        if pool:
            pool.terminate()
    kept, kept_rows = [], []
    for row, document in zip(rows, tokenized):
        if document.loss_mask[1:].any():
            kept.append(document)
            kept_rows.append(row)
        else:
            total = len(document.tokens) + document.truncated_tokens
            bad.append(f"{row.source}: nothing supervised is left of its {total} tokens within --max-len {max_len}")
    return Documents(
        tokens=np.concatenate([np.zeros(0, np.int32), *(d.tokens for d in kept)]),
        loss_mask=np.concatenate([np.zeros(0, bool), *(d.loss_mask for d in kept)]),
        offsets=np.cumsum([0, *(len(d.tokens) for d in kept)]).astype(np.int64),
        ids=StringArray.of([row.id for row in kept_rows]),
        source=StringArray.of([row.source for row in kept_rows]),
        bad=bad,
        truncated=sum(d.truncated_tokens > 0 for d in kept),
        truncated_tokens=sum(d.truncated_tokens for d in kept),
        unencodable=sum(d.unencodable for d in kept),
    )


def load_documents(
    paths: list[Path],
    hashes: list[str],
    folder: Path,
    template: str,
    max_len: int,
    cache: Path,
    keep: bool,
    shown: bool,
) -> Documents:
    """`tokenize_files` with a cache: a result in the folder `cache` is memory-mapped. Its key includes all that the
    tokens depend on.

    `hashes`: of the files. `keep`: write the cache if it is missing or damaged.
    """
    code = [Path(__file__), *sorted((Path(__file__).parent / "parts" / "text").glob("*.py"))]
    sources = [*code, *folder.glob("config.json"), *tokenizer_files(folder)]
    key = json.dumps([list(map(str, paths)), template, max_len, hashes, [sha256(p) for p in sources]])
    file = cache / (hashlib.sha256(key.encode()).hexdigest()[:32] + ".arrays")
    cached = map_arrays(file)
    if cached is None:
        documents = tokenize_files(paths, folder, template, max_len, shown)
        if not keep:
            return documents
        arrays = {"tokens": documents.tokens, "loss_mask": documents.loss_mask, "offsets": documents.offsets}
        for name in ("ids", "source"):
            texts = getattr(documents, name)
            arrays |= {f"{name} content": texts.content, f"{name} offsets": texts.offsets}
        rest = {name: getattr(documents, name) for name in ("bad", "truncated", "truncated_tokens", "unencodable")}
        save_arrays(file, arrays, rest)
        cached = map_arrays(file)
    arrays, rest = cached
    ids, source = (StringArray(arrays[f"{name} content"], arrays[f"{name} offsets"]) for name in ("ids", "source"))
    return Documents(arrays["tokens"], arrays["loss_mask"], arrays["offsets"], ids, source, **rest)


def clear_cache(folder: Path) -> None:
    """Remove the cache of `load_documents`, and the folder if it is then empty."""
    for path in folder.glob("*.arrays*"):
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def read_documents(
    names: list[str],
    folders: list[Path],
    model: Path,
    template: str,
    max_len: int,
    cache: Path,
    keep: bool = True,
    shown: bool = False,
) -> tuple[dict[str, Documents], dict[str, str]]:
    """The documents of each name (a file or a folder of files), and the sha256 of every file read."""
    files = {name: find_files(name, folders) for name in names}
    hashes = {str(path): sha256(path) for paths in files.values() for path in paths}
    documents = {
        name: load_documents(paths, [hashes[str(p)] for p in paths], model, template, max_len, cache, keep, shown)
        for name, paths in files.items()
    }
    return documents, hashes


def check_bad_rows(documents: dict[str, Documents], skip_bad_rows: bool) -> None:
    """Raise one InputError that lists the bad rows of all files. With `skip_bad_rows`: only if no good row is left."""
    bad = [line for d in documents.values() for line in d.bad]
    empty = [f"{name}: no usable rows" for name, d in documents.items() if not len(d)]
    if not skip_bad_rows:
        raise_if_any(bad, "rows cannot be used", SKIP_ADVICE)
    raise_if_any(empty, "files cannot be used")


def print_unencodable(documents: list[Documents]) -> None:
    """Print how many rows contain characters that the tokenizer cannot represent."""
    lossy = sum(d.unencodable for d in documents)
    if lossy:
        print(f"{lossy:,} rows contain characters that the tokenizer drops or replaces by its unknown token.")


def check_vocabulary(highest: int, vocab_size: int, folder: Path) -> None:
    """Raise InputError if the highest token id is outside the model's vocabulary."""
    if highest >= vocab_size:
        raise InputError(
            f"the tokenizer in {folder} produces token {highest}, the model's vocabulary ends at {vocab_size - 1}: "
            "they do not belong together"
        )


def has_prompt_and_answer(documents: Documents) -> np.ndarray:
    """(D,) bool: whether a document has both a prompt after its first token and an answer with at least one predicted
    token."""
    first = np.zeros_like(documents.loss_mask)
    first[documents.offsets[:-1]] = True
    prompt = np.add.reduceat(~(documents.loss_mask | first), documents.offsets[:-1], dtype=np.int64)
    return (documents.target_counts > 0) & (prompt > 0)


# ---------------------------------------------------------------- stages


@dataclass
class Stage:
    name: str  # stage1, stage2, …
    source: str  # as given to --stages
    own: Documents  # the rows that --select chooses from
    documents: Documents  # these, followed by rows of other stages
    epochs: int
    lr: float
    batch_size: int
    rows: int  # number of rows that an epoch trains on
    scores: list[float]  # of its own documents, if --scores was given

    @property
    def mixed_in(self) -> int:
        return len(self.documents) - len(self.own)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // self.batch_size)

    @property
    def expected_tokens(self) -> int:
        """Tokens that all epochs train on. With a selection, an estimate from the average length of a row."""
        return round(self.documents.lengths.mean() * self.rows) * self.epochs

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


def rows_to_choose(ratio: float, rows: int) -> int:
    """The number of rows for a ratio: below 1 a fraction of `rows`, from 1 on a count."""
    return max(1, round(ratio * rows)) if ratio < 1 else min(rows, int(ratio))


def make_stage(
    name: str,
    source: str,
    own: Documents,
    others: list[Documents],
    epochs: int,
    lr: float,
    batch_size: int,
    ratio: float | None,
    scores: list[float],
) -> Stage:
    """A stage that trains on its `own` documents and on all documents of `others`. `ratio` (see `rows_to_choose`): how
    many of its own an epoch uses (None: all). Raises InputError if none can be chosen."""
    rows, documents = len(own), concat([own, *others])
    if ratio is not None:
        usable = ~np.isnan(scores) if scores else has_prompt_and_answer(own)
        if not usable.any():
            raise InputError(f"{source}: nothing to choose from, no row has both a prompt and an answer")
        rows = min(rows_to_choose(ratio, rows), int(usable.sum()))
    rows += len(documents) - len(own)
    return Stage(name, source, own, documents, epochs, lr, batch_size, rows, scores)


def rows_of_other_stages(k: int, of_stages: list[Documents], replay: float, seed: int) -> list[Documents]:
    """The rows that stage k trains on in addition to its own: a fraction of every earlier stage (--replay). Overlapping
    stages would also add rows of the next stage here. --select does not score these rows: every epoch uses all."""
    rng = np.random.default_rng([seed, k])
    earlier = of_stages[:k] if replay else []
    return [subset(d, rng.permutation(len(d))[: round(replay * len(d))]) for d in earlier]


# ---------------------------------------------------------------- batches


def epoch_batches(
    documents: Documents, rows: np.ndarray, batch_size: int, seed: int, stage: int, epoch: int
) -> list[np.ndarray]:
    """Batches of document indices: `rows` in this epoch's random order, divided into batches; the last may be smaller.
    Resuming calls it again: the same arguments must give the same batches."""
    order = rows[np.random.default_rng([seed, stage, epoch]).permutation(len(rows))]
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def micro_batches(
    chosen: np.ndarray, lengths: np.ndarray, world_size: int, micro_batch_tokens: int
) -> list[list[np.ndarray]]:
    """Distribute a batch over the ranks: per rank a list of micro-batches of at most `micro_batch_tokens` tokens (a
    longer document is a micro-batch of its own).

    Every rank gets the same number of micro-batches, with nearly the same number of tokens; some may be empty.
    Documents are assigned longest first, each to the bin with the fewest tokens, using nearly the fewest bins possible.
    """
    order = chosen[np.argsort(-lengths[chosen], kind="stable")]
    limit = max(micro_batch_tokens, int(lengths[order[0]]))
    alone = int((lengths[order] > limit / 2).sum())  # no two of these share a bin
    per_rank = max(1, -(-alone // world_size), -(-int(lengths[order].sum()) // (limit * world_size)))
    while True:
        bins = [[] for _ in range(per_rank * world_size)]
        loads = [(0, i) for i in range(len(bins))]
        for d in order:
            load, i = loads[0]
            bins[i].append(d)
            heapq.heapreplace(loads, (load + int(lengths[d]), i))
        if max(loads)[0] <= limit:
            return [[np.array(b, np.int64) for b in bins[r::world_size]] for r in range(world_size)]
        per_rank += 1 + per_rank // 16


def largest_micro_batch(stages: list[Stage], world_size: int, micro_batch_tokens: int) -> tuple[int, int]:
    """The most tokens and the most supervised tokens in a micro-batch, over a hundred batches of each stage."""
    tokens, supervised = [], []
    for stage in stages:
        documents = stage.documents
        for batch in epoch_batches(documents, np.arange(len(documents)), stage.batch_size, 0, 0, 0)[:100]:
            for rank in micro_batches(batch, documents.lengths, world_size, micro_batch_tokens):
                tokens += [int(documents.lengths[part].sum()) for part in rank]
                supervised += [int(documents.target_counts[part].sum()) for part in rank]
    return max(tokens), max(supervised)
