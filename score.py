"""Difficulty of instructions: scores from an LLM and stages of rising difficulty; IFD from a local model and selection.

    score.py difficulty IN --out F         an LLM at an OpenAI-compatible API scores each row from 1 to 5 (Phased IFT)
    score.py stages SCORED --out-dir D     s1.jsonl s2.jsonl … of rising difficulty
    score.py ifd IN --model DIR --out F    instruction-following difficulty of each row (IterIT)
    score.py select SCORED --out F         IterIT's greedy selection by score and diversity

`select_epoch_rows` selects the rows of an epoch; train.py --select calls it.
"""

import argparse
import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import data
from data import Documents
from model import Transformer, load_model
from parts.api.prompts import DIFFICULTY_REMINDER, difficulty_prompt
from parts.api.questions import failure_reason, fence, fill, make_question, parsed_value, question_state
from parts.api.store import Store
from parts.checkpoints.weights import checksum
from parts.cli import (
    EXIT_CODES,
    HelpFormatter,
    InputError,
    exit_process,
    fraction_or_count,
    positive_int,
    print_list,
    print_summary,
    print_table,
    progress,
    raise_if_any,
    run_program,
)
from parts.distributed import DistributedEnv, broadcast, compute_dtype, init_distributed, is_first_rank, reshard
from parts.diversity import pick_diverse, tf_idf
from parts.files import check_output_paths, write_lines
from parts.report.figures import plot_histogram, print_histogram
from parts.selection import Score, Selection, SelectionOptions, choose_rows, plan_scoring
from parts.text.rows import Row, each_row, finite_number, messages_of, read_good_rows
from parts.text.templates import TEMPLATES, choose_template
from parts.text.tokenizers import load_tokenizer

# ---------------------------------------------------------------- difficulty from an LLM


def format_conversation(row: Row) -> list[str]:
    """User and assistant texts in turn, as in the paper's files; a system text precedes the first turn."""
    texts = [turn.text for turn in row.turns]
    return [f"{texts[0]}\n\n{texts[1]}", *texts[2:]] if row.turns[0].role == "system" else texts


def fill_difficulty_prompt(prompt: str, row: Row) -> str:
    """The prompt about a row: its user texts as the instruction, its assistant texts as the response."""
    instruction, response = ("\n\n".join(format_conversation(row)[k::2]) for k in (0, 1))
    return fill(prompt, {"{instruction}": fence(instruction, "instruction"), "{answer}": fence(response, "response")})


def difficulty_command(args: argparse.Namespace) -> None:
    from parts.api.ask import ask_questions  # imported here, so that training needs no httpx
    from parts.api.options import api_options
    from parts.api.replies import parse_difficulty

    options = api_options(args)
    check_output_paths([args.out], [args.input, *([args.prompt_file] if args.prompt_file else [])])
    rows = read_good_rows(args.input, args.skip_bad_rows)
    if any(row.turns[0].role == "text" for row in rows):
        raise InputError(f"{args.input}: plain text has no instruction that could be scored")
    prompt = difficulty_prompt(args.prompt_file, args.instruction_only)
    if args.votes > 1 and options.temperature == 0:
        options = replace(options, temperature=1.0)  # at temperature 0 all votes would be equal
    questions = []  # for each row, one per vote
    for row in rows:
        text = fill_difficulty_prompt(prompt, row)
        questions.append([make_question(options, text, row.id, vote) for vote in range(args.votes)])
    flat = [q for of_row in questions for q in of_row]
    store = ask_questions(options, args.out, flat, parse_difficulty, DIFFICULTY_REMINDER)
    if store is None:
        return
    as_pairs = all(turn.role != "system" and turn.trained for row in rows for turn in row.turns)  # the paper's format
    lines, unscored, failed = [], [], {"refused": 0, "failed": 0, "unparsed": 0}
    for i, (row, of_row) in enumerate(zip(rows, questions)):
        records = [store.records(q.key) for q in of_row]
        scores = [parsed_value(r) for r in records if parsed_value(r) is not None]
        line = {
            "id": row.raw.get("id", str(i)),
            "score": sum(scores) / len(scores) if scores else None,
            **({"data": format_conversation(row)} if as_pairs else {"messages": messages_of(row.turns)}),
            "model": args.api_model,
        }
        if args.votes > 1:
            line["votes"] = scores
        if not scores:
            line["unscored"] = failure_reason(records[0])
            failed[question_state(records[0])] += 1
            unscored.append(f"{row.source}: {line['unscored']}")
        lines.append(line)
    write_lines(args.out, lines)
    print_list("rows have no score", unscored)
    print_summary(f"{args.out}: {len(lines):,} rows", len(lines), failed)


# ---------------------------------------------------------------- stages


def read_score(row: dict, key: str, where: str) -> float | None:
    """The number under `key`, None if there is none. Raises InputError."""
    try:
        return None if row.get(key) is None else finite_number(row[key], key)
    except InputError as e:
        raise InputError(f"{where}: {e}") from None


def choose_score_key(rows: list[Row], default: str) -> str:
    """`score` or SELECTION_SCORE.key if only one of them is in the file; `default` if both or neither are."""
    present = [key for key in ("score", SELECTION_SCORE.key) if any(row.raw.get(key) is not None for row in rows)]
    return present[0] if len(present) == 1 else default


def split_equally(scores: np.ndarray, parts: int) -> list[np.ndarray]:
    """Row indices of `parts` groups of rising score and nearly equal size; equal scores stay together if possible."""
    order = np.argsort(scores, kind="stable")
    ranked, n = scores[order], len(scores)
    cuts = [0]
    for k in range(1, parts):
        ideal = round(n * k / parts)
        ends = (int(np.searchsorted(ranked, ranked[ideal], side)) for side in ("left", "right"))
        low, high = cuts[-1] + 1, n - (parts - k)  # no stage may be empty
        possible = [c for c in ends if low <= c <= high]
        cuts.append(min(possible, key=lambda c: abs(c - ideal)) if possible else min(max(ideal, low), high))
    return [order[a:b] for a, b in zip(cuts, [*cuts[1:], n])]


def split_at_bounds(scores: np.ndarray, bounds: list[float]) -> list[np.ndarray]:
    """Row indices of the groups below the first bound, from the first to below the second, …"""
    stages = np.searchsorted(np.array(bounds), scores, side="right")
    return [np.flatnonzero(stages == k) for k in range(len(bounds) + 1)]


def assign_stages(scores: np.ndarray, args: argparse.Namespace) -> list[np.ndarray]:
    """Row indices of each stage, as --equal, --bounds, --random and --reverse ask. Raises InputError."""
    if len(scores) < (args.equal or 1):
        problem = f"{len(scores)} scored rows cannot make {args.equal} stages" if len(scores) else "no row has a score"
        raise InputError(problem)
    groups = split_equally(scores, args.equal) if args.equal else split_at_bounds(scores, args.bounds)
    empty = [str(k) for k, group in enumerate(groups, 1) if not len(group)]
    if empty and not args.allow_empty:
        raise InputError(
            f"stage {', '.join(empty)} would be empty with --bounds {' '.join(map(str, args.bounds))}: the scores go "
            f"from {scores.min():g} to {scores.max():g}. "
            "Other --bounds, --equal K, or --allow-empty to write the others"
        )
    if args.random:
        shuffled = np.random.default_rng(args.seed).permutation(len(scores))
        groups = np.split(shuffled, np.cumsum([len(g) for g in groups])[:-1])
    return groups[::-1] if args.reverse else groups


def describe_stage(name: str, rows: list[Row], scores: np.ndarray) -> tuple[str, ...]:
    """A row of the table of stages."""
    tokens = sum(len(turn.text.encode()) for row in rows for turn in row.turns) // 4
    answer_length = np.mean([len(answer_text(row)) for row in rows])
    score_range = f"{scores.min():.3g} to {scores.max():.3g}"
    return name, f"{len(rows):,}", f"{tokens:,}", score_range, f"{scores.mean():.2f}", f"{answer_length:,.0f}"


def stages_command(args: argparse.Namespace) -> None:
    names = [f"s{k}.jsonl" for k in range(1, (args.equal or len(args.bounds) + 1) + 1)]
    check_output_paths([args.out_dir / name for name in (*names, *["scores.png"] * args.plots)], [args.scored])
    all_rows = read_good_rows(args.scored, args.skip_bad_rows)
    key = args.score_key or choose_score_key(all_rows, "score")
    all_scores = [read_score(row.raw, key, row.source) for row in all_rows]
    unscored = [row.source for row, score in zip(all_rows, all_scores) if score is None]
    if not args.allow_unscored:
        advice = "Score them, or leave them out with --allow-unscored."
        raise_if_any(unscored, f"of {len(all_rows):,} rows have no {key}", advice)
    rows = [row for row, score in zip(all_rows, all_scores) if score is not None]
    scores = np.array([score for score in all_scores if score is not None])
    groups = assign_stages(scores, args)
    table = []
    for name, group in zip(names, groups):
        if len(group):
            chosen = [rows[i] for i in sorted(group)]
            write_lines(args.out_dir / name, [row.raw for row in chosen])
            table.append(describe_stage(name, chosen, scores[group]))
    print_table(("stage", "rows", "tokens (est.)", key, "mean", "mean answer, characters"), table)
    print_histogram(scores, key)
    if unscored:
        print(f"{len(unscored):,} rows without {key} are left out.")
    if args.plots:
        plot_histogram(scores, key, groups, args.out_dir / "scores.png")


def answer_text(row: Row) -> str:
    """The supervised text of a row: its answers (except context-only ones), or its plain text."""
    return "\n".join(turn.text for turn in row.turns if turn.role in ("assistant", "text") and turn.trained)


# ---------------------------------------------------------------- IFD from a local model


def answers_alone(documents: Documents) -> Documents:
    """Each document without its prompt: its first token (BOS), then all its supervised tokens, which are the targets.
    A document has as many targets as before."""
    offsets = documents.offsets
    supervised, first = documents.loss_mask.copy(), np.zeros_like(documents.loss_mask)
    supervised[offsets[:-1]] = False
    first[offsets[:-1]] = True
    kept = supervised | first
    ends = np.cumsum([0, *np.add.reduceat(kept, offsets[:-1], dtype=np.int64)]).astype(np.int64)
    return Documents(documents.tokens[kept], supervised[kept], ends, documents.ids, documents.source, [])


@torch.no_grad()
def measure_ifd(
    model: Transformer, documents: Documents, micro_batch_tokens: int = 4096, rank: int = 0, world_size: int = 1
) -> Tensor:
    """Instruction-following difficulty of each document, (D,) fp32 on the CPU; NaN if it has none.

    IFD = exp(mean NLL of the answer given the prompt) / exp(mean NLL of the answer alone) (Cherry LLM; IterIT, section
    3). The answer is the supervised tokens, including the end token; alone, it follows the document's first token
    (BOS). Both means are over the same targets. A document without a prompt, or whose answer has no predicted token,
    has no IFD. The ranks share the work and all get the result; each must have the full model or a shard of it.
    """
    D, alone = len(documents), answers_alone(documents)
    documents_and_answers, counts = data.concat([documents, alone]), documents.target_counts
    device = next(model.parameters()).device
    scores = torch.zeros(D, dtype=torch.float64, device=device)
    lengths = documents.lengths + alone.lengths
    for part in data.micro_batches(np.arange(D), lengths, world_size, micro_batch_tokens)[rank]:
        pairs = np.concatenate([part, D + part])  # each document, then each answer alone
        _, losses = model(*(torch.from_numpy(a).to(device) for a in documents_and_answers.pack(pairs)))
        if len(part):
            n = torch.from_numpy(np.tile(counts[part], 2)).to(device)
            owner = torch.arange(len(n), device=device).repeat_interleave(n)
            means = torch.zeros(len(n), dtype=torch.float64, device=device).index_add_(0, owner, losses.double()) / n
            given_prompt, answer_alone = means.split(len(part))
            scores[torch.from_numpy(part).to(device)] = (given_prompt - answer_alone).exp()
    reshard(model)
    if world_size > 1:
        dist.all_reduce(scores)
    scores = scores.float().cpu()
    scores[torch.from_numpy(~data.has_prompt_and_answer(documents))] = math.nan
    scores[~scores.isfinite()] = math.nan
    return scores


def ifd_worth(ifd: np.ndarray) -> np.ndarray:
    """IterIT, section 3: higher is better, but at 1 or above the prompt does not help, and the row is worthless."""
    return np.where(ifd < 1, ifd, -ifd)


IFD = Score("ifd", "IFD", measure_ifd, ifd_worth, "1 or above")
# Of train.py --select and `score.py ifd`; `score.py select` applies its rule to the field SELECTION_SCORE.key.
SELECTION_SCORE = IFD

CHUNK = 64  # documents that a rank scores between two saves


def ifd_command(args: argparse.Namespace) -> None:
    check_output_paths([args.out], [args.input, *args.model.glob("*")])
    rows = list(each_row(args.input))  # including rows without a usable answer
    raise_if_any(
        [f"{where}: {problem}" for where, raw, _, problem in rows if not isinstance(raw, dict)], "lines are not rows"
    )
    args.template, notes = choose_template(args.model, load_tokenizer(args.model), args.template)
    documents = data.tokenize_files([args.input], args.model, args.template, args.max_len, shown=is_first_rank())
    if is_first_rank():
        print("\n".join(notes))
        data.print_unencodable([documents])
    with init_distributed() as ranks:
        started = time.monotonic()
        dtype = compute_dtype(args.dtype)
        model = load_model(args.model, dtype, ranks.device)
        data.check_vocabulary(int(documents.tokens.max(initial=0)), model.config.vocab_size, args.model)
        store = Store(args.out.with_name(args.out.name + ".partial.jsonl")) if ranks.rank == 0 else None
        context = f"{checksum(dict(model.named_parameters()))} {args.template} {dtype} {SELECTION_SCORE.key}".encode()
        keys = [content_key(context, documents, d) for d in range(len(documents))]
        todo, tokens = measure_missing(model, documents, keys, store, args.micro_batch_tokens, ranks)
        if store is None:
            return
        store.close()
    seconds = time.monotonic() - started
    score_key, name = SELECTION_SCORE.key, SELECTION_SCORE.name
    scores = {where: store.records(key)[-1][score_key] for where, key in zip(documents.source, keys)}
    lines = [add_score(where, raw, problem, scores, args.max_len) for where, raw, _, problem in rows]
    reason = f"{score_key}_reason"
    unscored = [f"{where}: {line[reason]}" for (where, *_), line in zip(rows, lines) if line[score_key] is None]
    values = np.array([s for s in scores.values() if s is not None])
    print_list("rows have no score", unscored)
    if not len(values):
        raise InputError(f"{args.input}: none of {len(lines):,} rows has an {name}; {args.out} is not written")
    write_lines(args.out, lines)
    share = np.mean(SELECTION_SCORE.worth(values) < 0)
    note = f"; {share:.1%} at {SELECTION_SCORE.worthless}" if SELECTION_SCORE.worthless else ""
    print(f"{name}: median {np.median(values):.3f}, from {values.min():.3f} to {values.max():.3f}{note}")
    print(
        f"{args.out}: {len(lines):,} rows, {todo:,} scored now in {seconds:,.1f} s ({todo / seconds:,.1f} rows/s, "
        f"{tokens / seconds:,.0f} tokens/s)"
    )


def measure_missing(
    model: Transformer,
    documents: Documents,
    keys: list[str],
    store: Store | None,
    micro_batch_tokens: int,
    ranks: DistributedEnv,
) -> tuple[int, int]:
    """Score the documents whose keys are not in rank 0's store, and save the scores there after every chunk. Returns
    the number of documents and tokens scored."""
    known = broadcast(set(store.by_key) if store else None)
    todo, tokens = np.array([d for d, key in enumerate(keys) if key not in known], np.int64), 0
    with progress(len(todo), SELECTION_SCORE.key, "row", shown=ranks.rank == 0) as bar:
        for a in range(0, len(todo), CHUNK * ranks.world_size):
            chosen = todo[a : a + CHUNK * ranks.world_size]
            chunk = data.subset(documents, chosen)
            scores = SELECTION_SCORE.measure(model, chunk, micro_batch_tokens, ranks.rank, ranks.world_size)
            tokens += int(chunk.lengths.sum() + chunk.target_counts.sum())
            for d, score in zip(chosen, scores.tolist()):
                if store:
                    store.add({"key": keys[d], SELECTION_SCORE.key: None if math.isnan(score) else score})
            bar.update(len(chosen))
    return len(todo), tokens


def add_score(where: str, raw: dict, problem: str | None, scores: dict[str, float | None], max_len: int) -> dict:
    """The row with its score, or with the reason for a missing score."""
    line = raw | {SELECTION_SCORE.key: scores.get(where)}
    if line[SELECTION_SCORE.key] is None:
        line[f"{SELECTION_SCORE.key}_reason"] = problem or (
            "the answer has no predicted token, or there is no prompt"
            if where in scores
            else f"no answer is left within --max-len {max_len}"
        )
    return line


def content_key(context: bytes, documents: Documents, d: int) -> str:
    """The key of a stored score: a hash of `context` (model, template and options) and the tokens of document `d`."""
    row = slice(documents.offsets[d], documents.offsets[d + 1])
    content = documents.tokens[row].tobytes() + documents.loss_mask[row].tobytes()
    return hashlib.sha256(context + content).hexdigest()[:32]


# ---------------------------------------------------------------- IterIT: selection before every epoch


def read_precomputed_scores(scored: dict[Path, Documents]) -> dict[str, float]:
    """The scores in files of `score.py ifd`, keyed by the content of the tokenized rows; NaN for rows without a score.
    Raises InputError for a score that is negative or not finite."""
    given, key = {}, SELECTION_SCORE.key
    for path, documents in scored.items():
        scores = {where: read_score(raw, key, where) for where, raw, row, _ in each_row(path) if row}
        negative = [f"{where}: {key} {value:g}" for where, value in scores.items() if value is not None and value < 0]
        raise_if_any(negative, f"rows of --scores have a negative {key}, which is not valid")
        for d, where in enumerate(documents.source):
            given[content_key(b"", documents, d)] = math.nan if scores[where] is None else scores[where]
    return given


def match_precomputed_scores(documents: Documents, given: dict[str, float], source: str) -> list[float]:
    """The given score of each document; NaN for documents that cannot have a score. Raises InputError for missing
    ones."""
    keys = [content_key(b"", documents, d) for d in range(len(documents))]
    missing = [where for where, key in zip(documents.source, keys) if key not in given]
    raise_if_any(missing, f"of {len(documents)} rows of {source} are not in --scores")
    return [given[key] if possible else math.nan for key, possible in zip(keys, data.has_prompt_and_answer(documents))]


def score_candidates(
    selection: Selection, model: Transformer, documents: Documents, ranks: DistributedEnv, micro_batch_tokens: int
) -> Iterator[None]:
    """Score the remaining candidates, on all ranks; yields after every chunk."""
    if not selection.scores:
        selection.scores = [math.nan] * len(documents)
    while selection.n_scored < len(selection.candidates):
        chunk = np.array(selection.candidates[selection.n_scored :][: CHUNK * ranks.world_size])
        rows = data.subset(documents, chunk)
        scores = SELECTION_SCORE.measure(model, rows, micro_batch_tokens, ranks.rank, ranks.world_size)
        for d, value in zip(chunk.tolist(), scores.tolist()):
            selection.scores[d] = value
        selection.n_scored += len(chunk)
        yield


def choose_candidates(
    selection: Selection, options: SelectionOptions, documents: Documents, tokenizer, epoch: int, count: int
) -> None:
    """Choose among the scored candidates: sets `selection.chosen`. Rank 0 chooses and broadcasts."""
    candidates, best = np.array(selection.candidates), None
    if is_first_rank():
        answers = [decode_answer(documents, d, tokenizer) for d in candidates] if options.score_type == "both" else None
        worth = SELECTION_SCORE.worth(selection.candidate_scores())
        worth[np.isnan(worth)] = -math.inf  # scored as NaN: rank last
        best = choose_rows(worth, answers, count, options.diversity_decay)
    selection.chosen, selection.epoch = candidates[broadcast(best)].tolist(), epoch


def select_epoch_rows(
    selection: Selection,
    options: SelectionOptions,
    model: Transformer,
    documents: Documents,
    tokenizer,
    epoch: int,
    count: int,
    ranks: DistributedEnv,
    micro_batch_tokens: int,
) -> Iterator[tuple[int, int]]:
    """Select the `count` documents that `epoch` trains on (IterIT, section 3): sets `selection.chosen`.

    Before the first epoch every document with a prompt and an answer is scored, unless `selection.scores` is given.
    Before a later epoch the best `update_ratio * count` documents are scored again. The selection is among those just
    scored. Yields (number scored, number to score) after every chunk; `selection` may be saved there, and a new call
    resumes from it. Every rank must exhaust the generator.
    """
    if selection.scoring_epoch != epoch:
        usable = np.flatnonzero(data.has_prompt_and_answer(documents))
        plan_scoring(selection, usable, epoch, round(options.update_ratio * count), SELECTION_SCORE)
    for _ in score_candidates(selection, model, documents, ranks, micro_batch_tokens):
        yield selection.n_scored, len(selection.candidates)
    choose_candidates(selection, options, documents, tokenizer, epoch, count)


def decode_answer(documents: Documents, d: int, tokenizer) -> str:
    row = slice(documents.offsets[d], documents.offsets[d + 1])
    return tokenizer.decode(documents.tokens[row][documents.loss_mask[row]].tolist())


def select_command(args: argparse.Namespace) -> None:
    check_output_paths([args.out], [args.scored])
    rows = read_good_rows(args.scored, args.skip_bad_rows)
    answers = [answer_text(row) for row in rows]
    count, started, note = data.rows_to_choose(args.ratio, len(rows)), time.monotonic(), ""
    if args.by == "random":
        chosen = np.random.default_rng(args.seed).permutation(len(rows))[:count]
    elif args.by == "length":
        chosen = np.argsort([-len(a) for a in answers], kind="stable")[:count]
    else:
        args.score_key = args.score_key or choose_score_key(rows, SELECTION_SCORE.key)
        values = [read_score(row.raw, args.score_key, row.source) for row in rows]
        scores = np.array([math.nan if value is None else value for value in values])
        if (scores < 0).any():
            raise InputError(f"{rows[int(np.argmax(scores < 0))].source}: {args.score_key} is negative")
        note = f" {int(np.isnan(scores).sum()):,} without {args.score_key} left out;"
        if args.score_key == SELECTION_SCORE.key:
            worth = SELECTION_SCORE.worth(scores)
            chosen = choose_rows(worth, answers if args.by == "diversity" else None, count, args.diversity_decay)
            worthless = int((worth[chosen] < 0).sum())
            if worthless:
                values = f"{SELECTION_SCORE.name} {SELECTION_SCORE.worthless}"
                note += f" {worthless:,} chosen at {values}, since no better rows were left;"
        elif args.by == "score":
            chosen = choose_rows(scores, None, count)
        else:
            chosen = pick_diverse(scores, tf_idf(answers), count, args.diversity_decay)
    if not len(chosen):
        keys = dict.fromkeys(key for row in rows for key in row.raw)
        advice = f"--score-key names the field with the score; the rows have {', '.join(keys)}"
        raise InputError(f"{args.scored}: nothing can be chosen: no row has a number as {args.score_key}. {advice}")
    write_lines(args.out, [rows[i].raw for i in chosen])
    seconds = time.monotonic() - started
    print(f"{args.out}: {len(chosen):,} of {len(rows):,} rows by {args.by}, best first;{note} {seconds:.1f} s")
    if len(chosen) < count:
        print(f"{count - len(chosen):,} rows fewer than --ratio {args.ratio:g} asks for: no other rows can be chosen.")


# ---------------------------------------------------------------- command line


def add_difficulty_arguments(p: argparse.ArgumentParser) -> None:
    from parts.api.options import add_api_arguments  # imported here, so that training needs no httpx

    p.add_argument("input", type=Path, metavar="IN")
    p.add_argument("--out", type=Path, required=True, metavar="F", help="JSONL: id, score, data or messages, model")
    p.add_argument("--instruction-only", action="store_true", help="show the instruction without its response")
    p.add_argument(
        "--prompt-file", type=Path, metavar="F", help="replaces the built-in prompt; with {instruction} and {answer}"
    )
    p.add_argument("--votes", type=positive_int, default=1, metavar="N", help="average N replies (at temperature 1)")
    p.add_argument("--skip-bad-rows", action="store_true", help="skip unusable rows instead of stopping")
    add_api_arguments(p)
    p.set_defaults(work=difficulty_command)


def add_ifd_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("input", type=Path, metavar="IN")
    p.add_argument("--model", type=Path, required=True, metavar="DIR", help="HF folder")
    p.add_argument("--out", type=Path, required=True, metavar="F", help="JSONL: the input rows with the field ifd")
    template_help = "chat template (default: the one that the model folder's own resembles, else phased)"
    p.add_argument("--template", choices=TEMPLATES, help=template_help)
    p.add_argument("--max-len", type=positive_int, default=2048, help="tokens; longer rows are cut at the end")
    p.add_argument(
        "--micro-batch-tokens", "--micro-tokens", type=positive_int, default=4096, help="tokens per forward pass"
    )
    dtype_help = "dtype of the computation; auto: bf16 if the device supports it. The losses are fp32"
    p.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help=dtype_help)
    p.set_defaults(work=ifd_command)


def add_stages_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("scored", type=Path, metavar="SCORED")
    p.add_argument("--out-dir", type=Path, required=True, metavar="D", help="output folder of s1.jsonl s2.jsonl …")
    bounds_help = "upper bounds of the stages, exclusive (the defaults are Alpaca's)"
    p.add_argument("--bounds", type=float, nargs="+", default=[1.5, 3.5], metavar="X", help=bounds_help)
    p.add_argument("--equal", type=positive_int, metavar="K", help="K stages of nearly equal size, instead of --bounds")
    p.add_argument("--random", action="store_true", help="same sizes, random rows (the paper's control)")
    p.add_argument("--reverse", action="store_true", help="hardest stage first")
    p.add_argument("--seed", type=int, default=0, help="seed of --random")
    key_help = "the field with the score (default: score or ifd, whichever the file has; score if it has both)"
    p.add_argument("--score-key", metavar="KEY", help=key_help)
    p.add_argument("--allow-unscored", action="store_true", help="skip rows without a score instead of stopping")
    p.add_argument("--allow-empty", action="store_true", help="skip empty stages instead of stopping")
    p.add_argument("--skip-bad-rows", action="store_true", help="skip unusable rows instead of stopping")
    p.add_argument("--plots", action="store_true", help="also draw scores.png (needs matplotlib)")
    p.set_defaults(work=stages_command)


def add_select_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("scored", type=Path, metavar="SCORED")
    p.add_argument("--out", type=Path, required=True, metavar="F", help="JSONL: the chosen rows, best first")
    ratio_help = "below 1 a fraction of the rows, from 1 on a number"
    p.add_argument("--ratio", type=fraction_or_count, default=0.05, help=ratio_help)
    by_help = "score x diversity (IterIT), score alone (Superfiltering), longest answers, or random"
    p.add_argument("--by", choices=["diversity", "score", "length", "random"], default="diversity", help=by_help)
    p.add_argument("--diversity-decay", type=float, default=0.1, help="factor on the weights of terms already chosen")
    key_help = "the field with the score (default: score or ifd, whichever the file has; ifd if it has both)"
    p.add_argument("--score-key", metavar="KEY", help=key_help)
    p.add_argument("--seed", type=int, default=0, help="seed of --by random")
    p.add_argument("--skip-bad-rows", action="store_true", help="skip unusable rows instead of stopping")
    p.set_defaults(work=select_command)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Difficulty of instructions; stages and selections made from it.", epilog=EXIT_CODES
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = partial(commands.add_parser, formatter_class=HelpFormatter)
    add_difficulty_arguments(make("difficulty", help="an LLM scores each instruction with its response from 1 to 5"))
    add_ifd_arguments(make("ifd", help="instruction-following difficulty (IFD) of each row by a local model"))
    add_stages_arguments(make("stages", help="split scored rows into stages of rising difficulty"))
    add_select_arguments(make("select", help="select the best rows by score and diversity"))
    for p in commands.choices.values():
        p.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if args.command == "stages" and sorted(set(args.bounds)) != args.bounds:
        parser.error("--bounds must be in increasing order")
    if args.command == "select" and not 0 <= args.diversity_decay <= 1:
        parser.error("--diversity-decay must be from 0 to 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_program("score.py", args.work, args)


if __name__ == "__main__":
    exit_process(main())
