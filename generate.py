"""Answers from a checkpoint: `generate.py --model out/stage3 --prompts vicuna.jsonl --out answers.json`.

Prompts are tokenized as in training, `decode` (parts/decoding.py) generates the answers, and each finished answer is
saved. The same prompts can be sent to a server instead.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import check_vocabulary
from model import Transformer, load_model
from parts.api.questions import question_state
from parts.api.store import Store
from parts.checkpoints.config import read_config
from parts.checkpoints.weights import checksum
from parts.cli import (
    EXIT_CODES,
    HelpFormatter,
    InputError,
    WorkError,
    dataclass_from_args,
    exit_process,
    positive_int,
    print_list,
    print_summary,
    print_table,
    progress,
    run_program,
    strip_control_chars,
)
from parts.decoding import Options, activation_dtype, decode, plan_slots
from parts.distributed import compute_dtype, init_distributed, is_first_rank
from parts.files import atomic_write, check_output_paths, read_json_object
from parts.kv_cache import describe_groups, raise_oom_with_advice
from parts.memory import free_memory, oom_message
from parts.text.rows import Turn, has_exact_answer
from parts.text.templates import TEMPLATES, choose_template, render, stop_ids
from parts.text.testsets import Prompt, exceeds_context, read_prompts
from parts.text.tokenizers import load_tokenizer

# ---------------------------------------------------------------- prompts and answers as tokens


def render_prompts(prompts: list[Prompt], tokenizer, template: str) -> list[int]:
    """Tokenize each prompt; returns the highest token id of each."""
    for prompt in prompts:
        prompt.tokens = render(prompt.turns, TEMPLATES[template], tokenizer)[0]
    return [max(prompt.tokens) for prompt in prompts]


def print_later_turns(prompts: list[Prompt]) -> None:
    """Print which prompts contain further questions, as MT-bench's do; these are not answered."""
    later = [f"{p.source}: {p.later_turns} more" for p in prompts if p.later_turns]
    print_list("prompts contain further questions; only the first of each is answered", later)


def generate(
    model: Transformer, tokenizer, prompts: list[list[Turn]], template: str, options: Options
) -> list[list[int]]:
    """The tokens of the answer to each conversation (turns that end with a user's), without the end token; empty for a
    prompt that fills the model's context."""
    rendered = [render(turns, TEMPLATES[template], tokenizer)[0] for turns in prompts]
    stop = set(stop_ids(TEMPLATES[template], tokenizer))
    answers: list[list[int]] = [[] for _ in prompts]
    fitting = [i for i, tokens in enumerate(rendered) if len(tokens) < model.config.max_positions]
    for i, token, _ in decode(model, [rendered[i] for i in fitting], stop, options):
        if token is not None:
            answers[fitting[i]].append(token)
    return answers


# ---------------------------------------------------------------- files of answers


def set_keys(prompts: list[Prompt], model: Transformer, options: Options, template: str) -> None:
    """Set the key of each prompt: a hash of everything that its answer depends on."""
    sampling, weights = asdict(replace(options, batch_size=0, compile=False)), checksum(dict(model.named_parameters()))
    for p in prompts:
        content = json.dumps([sampling, weights, template, str(activation_dtype(model)), p.tokens])
        p.key = hashlib.sha256(content.encode()).hexdigest()[:32]


def answer_all(
    model: Transformer,
    tokenizer,
    prompts: list[Prompt],
    stop: set[int],
    options: Options,
    out: Path,
    rank: int,
    world_size: int,
) -> dict[str, dict]:
    """Answer this rank's share of the prompts: those that fit into the context and are not in OUT.partial.*.jsonl yet.
    Each answer is saved when it ends. Returns the answers of all ranks by key."""
    done = read_partial_answers(out)
    dist.barrier()  # all ranks have read before one of them writes
    unanswered = {p.key: p for p in prompts if p.key not in done and len(p.tokens) < model.config.max_positions}
    todo = list(unanswered.values())[rank::world_size]
    rendered, limits = [p.tokens for p in todo], [options.max_new_tokens] * len(todo)
    groups = plan_slots(model, rendered, limits, options)
    if rank == 0 and todo:
        print(describe_groups(groups, rendered, model.config, activation_dtype(model)), flush=True)
    store = Store(out.with_name(f"{out.name}.partial.{rank}.jsonl"))
    answers: list[list[int]] = [[] for _ in todo]
    new_tokens, started = 0, time.monotonic()
    with progress(len(todo), out.name, "answer", shown=rank == 0) as bar:
        for i, token, reason in raise_oom_with_advice(decode(model, rendered, stop, options, groups=groups), groups):
            if token is not None:
                answers[i].append(token)
                new_tokens += 1
                continue
            record = {"output": tokenizer.decode(answers[i]), "output_tokens": len(answers[i]), "finish_reason": reason}
            store.add({"key": todo[i].key, **record})
            bar.set_postfix_str(f"{new_tokens / (time.monotonic() - started):,.0f} tokens/s", refresh=False)
            bar.update()
    store.close()
    dist.barrier()
    if rank == 0:
        seconds = time.monotonic() - started
        speed = new_tokens / max(seconds, 1e-9)
        print(f"{len(todo):,} answers made now on rank 0 in {seconds:.1f} s, {speed:,.0f} tokens/s")
    done = read_partial_answers(out)
    for p in prompts:
        if error := exceeds_context(len(p.tokens), model.config.max_positions):
            done[p.key] = {"output_tokens": 0, "finish_reason": "error", "error": error}
    return done


def partial_files(out: Path) -> list[Path]:
    """The files with the answers of the ranks until all are complete. Answers from a server have another file."""
    name = re.compile(re.escape(out.name) + r"\.partial\.\d+\.jsonl")
    return [path for path in sorted(out.parent.glob("*.jsonl")) if name.fullmatch(path.name)]


def read_partial_answers(out: Path) -> dict[str, dict]:
    """The answers in the partial files, by key."""
    answers = {}
    for path in partial_files(out):
        answers |= {key: records[-1] for key, records in Store(path, read_only=True).by_key.items()}
    return answers


def write_answers(prompts: list[Prompt], done: dict[str, dict], generator: str, out: Path) -> None:
    """Write the answers in AlpacaEval's format, in the order of the prompts, and print a table by dataset."""
    rows, errors = [], []
    for prompt in prompts:
        row = {"id": prompt.id, "dataset": prompt.dataset, "instruction": prompt.instruction, "output": ""}
        row |= {"generator": generator, "prompt_tokens": len(prompt.tokens)}
        row |= {k: v for k, v in done[prompt.key].items() if k != "key"}
        if "error" in row:
            errors.append(f"{prompt.source}: {row['error']}")
        rows.append(row if prompt.expected is None else row | {"expected": prompt.expected})
    atomic_write(out, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    for path in partial_files(out):
        path.unlink()
    print_list("prompts could not be answered", errors)
    print_answer_statistics(rows)
    print(f"{out}: {len(rows):,} answers")


def print_answer_statistics(rows: list[dict]) -> None:
    """Print number and mean lengths of the answers by dataset, and the share that is as expected."""
    by_dataset: dict[str, list[dict]] = {}
    for row in rows:
        by_dataset.setdefault(row["dataset"], []).append(row)
    table = []
    for name, of_dataset in by_dataset.items():
        answered, numbers = [r for r in of_dataset if "error" not in r], ("–", "–", "–")
        if answered:
            sizes = [f"{np.mean([r[k] for r in answered]):,.0f}" for k in ("prompt_tokens", "output_tokens")]
            numbers = (*sizes, f"{np.mean([r['finish_reason'] == 'length' for r in answered]):.0%}")
        right = [has_exact_answer(r["output"], r["expected"]) for r in of_dataset if "expected" in r]
        table.append((name, f"{len(answered):,}", *numbers, f"{np.mean(right):.0%}" if right else "–"))
    print_table(("dataset", "answers", "prompt tokens", "output tokens", "cut at the limit", "as expected"), table)


def answer_samples(model: Transformer, tokenizer, template: str, prompts: Path) -> Iterator[list[dict]]:
    """Greedy answers to the prompts in a file, by a model that may be sharded: every rank must iterate in step. Yields
    all rows after each finished answer; those not finished yet are empty."""
    questions = read_prompts(prompts)
    render_prompts(questions, tokenizer, template)
    rows = [{"id": p.id, "instruction": p.instruction, "output": ""} for p in questions]
    fitting = [i for i, p in enumerate(questions) if len(p.tokens) < model.config.max_positions]
    answers: list[list[int]] = [[] for _ in fitting]
    stop, options = set(stop_ids(TEMPLATES[template], tokenizer)), Options(max_new_tokens=256)
    rendered, limits = [questions[k].tokens for k in fitting], [options.max_new_tokens] * len(fitting)
    free = torch.tensor(float(free_memory(model.embed.weight.device)), dtype=torch.float64)
    dist.all_reduce(free, dist.ReduceOp.MIN)  # all ranks must make the same plan
    try:
        groups = plan_slots(model, rendered, limits, options, free.item())
    except WorkError:  # training must not fail because of samples
        groups = plan_slots(model, rendered, limits, replace(options, batch_size=1))
    for i, token, _ in decode(model, rendered, stop, options, groups=groups):
        if token is not None:
            answers[i].append(token)
        else:
            rows[fitting[i]]["output"] = tokenizer.decode(answers[i])
            yield rows


# ---------------------------------------------------------------- answers from a server


def answer_by_server(prompts: list[Prompt], args: argparse.Namespace, template: str | None, tokenizer) -> None:
    """Ask the model `--server` at OPENAI_BASE_URL; each reply is saved in OUT.partial.jsonl when it arrives."""
    from parts.api import ask, server_answers  # imported here: train.py imports this file and needs no httpx
    from parts.api import options as api

    extra = {"top_p": args.top_p} | ({"top_k": args.top_k} if args.top_k else {})
    context, texts, specials = math.inf, [], []
    if args.completions:
        render_prompts(prompts, tokenizer, template)
        adds_bos = read_json_object(args.model / "tokenizer_config.json").get("add_bos_token") is not False
        as_text, context = server_answers.TextTokenizer(tokenizer, adds_bos), read_config(args.model).max_positions
        texts = [as_text.text(render(p.turns, TEMPLATES[template], as_text)[0]) for p in prompts]
        specials = list(as_text.specials)
        stop = stop_ids(TEMPLATES[template], tokenizer)
        if stop[0] not in tokenizer.eos_ids:  # servers stop at EOS by default; vLLM and SGLang accept this field too
            extra["stop_token_ids"] = stop
    options = api.api_options(
        args, model=args.server, max_tokens=args.max_new_tokens, temperature=args.temperature, extra=extra
    )
    questions, done = server_answers.make_questions(
        prompts, options, args.seed, args.completions, context, texts, specials
    )
    store = ask.ask_questions(options, args.out, questions, len, "")  # every reply is usable, also an empty one
    if store is None:
        return
    done |= {q.key: server_answers.build_answer(store.records(q.key)) for q in questions}
    write_answers(prompts, done, args.name, args.out)
    if args.completions:
        estimated = {r["key"] for q in questions for r in store.records(q.key) if r.get("usage", {}).get("estimated")}
        counts = [(p, done[p.key].get("prompt_tokens", len(p.tokens))) for p in prompts if p.key not in estimated]
        different = [f"{p.source}: {len(p.tokens)}, by the server {n}" for p, n in counts if n != len(p.tokens)]
        print_list("prompts have another number of tokens at the server: its BOS or tokenizer differs", different)
    states = [question_state(store.records(q.key)) for q in questions]
    failed = {kind: states.count(kind) for kind in ("refused", "failed", "unparsed")}
    print_summary(f"{len(questions):,} prompts asked", len(questions), failed)


# ---------------------------------------------------------------- in the terminal


def chat(model: Transformer, tokenizer, template: str, stop: set[int], options: Options) -> None:
    """Chat in the terminal. Ctrl-C stops the answer, not the program; Ctrl-D or an empty line ends the program."""
    turns: list[Turn] = []
    print("Ctrl-C stops an answer; an empty line or Ctrl-D ends.")
    while True:
        try:
            text = input("> ")
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            return print()
        if not text.strip():
            return
        prompt = render([*turns, Turn("user", text)], TEMPLATES[template], tokenizer)[0]
        if len(prompt) >= model.config.max_positions:
            print(f"[{len(prompt)} tokens, the context is {model.config.max_positions}: starting a new conversation]")
            turns = []
            continue
        turns += [Turn("user", text), Turn("assistant", print_answer(model, tokenizer, prompt, stop, options))]


def print_answer(model: Transformer, tokenizer, prompt: list[int], stop: set[int], options: Options) -> str:
    """Print an answer as it is generated; returns its text."""
    tokens, shown = [], ""
    try:
        for _, token, _ in decode(model, [prompt], stop, options):
            if token is not None:
                tokens.append(token)
                text = tokenizer.decode(tokens)
                if not text.endswith("\ufffd"):  # an incomplete character
                    print(strip_control_chars(text[len(shown) :]), end="", flush=True)
                    shown = text
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    text = tokenizer.decode(tokens)
    print(strip_control_chars(text[len(shown) :]))
    return text


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    from parts.api.options import add_api_arguments  # imported here: train.py imports this file and needs no httpx

    parser = argparse.ArgumentParser(
        description="Answer prompts with a Llama or Mistral checkpoint.",
        formatter_class=HelpFormatter,
        epilog=EXIT_CODES,
    )
    add, default = parser.add_argument, Options()
    add("--model", type=Path, metavar="DIR", help="HF folder, for example out/stage3")
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    prompts_help = "test sets, data files, or plain text with one prompt per line"
    source("--prompts", type=Path, nargs="+", metavar="F", help=prompts_help)
    source("--prompt", metavar="TEXT", help="one prompt; the answer is printed to stdout")
    source("--chat", action="store_true", help="chat in the terminal")
    add("--out", type=Path, metavar="F", help="JSON list of answers (needed with --prompts)")
    add("--name", help="generator name in the answers file (default: the model's folder, or --server)")
    template_help = "chat template (default: the one that the model folder's own resembles, else phased)"
    add("--template", choices=TEMPLATES, help=template_help)
    add("--max-new-tokens", type=positive_int, default=default.max_new_tokens, metavar="N", help="per answer")
    add("--temperature", type=float, default=default.temperature, help="0: greedy")
    add("--top-k", type=int, default=default.top_k, help="sample from the K most likely tokens (0: from all)")
    add("--top-p", type=float, default=default.top_p, help="sample from the fewest tokens with this total probability")
    batch_help = "prompts per batch; it may change bf16 answers by rounding (default: as memory allows, at most 128)"
    add("--batch-size", type=positive_int, metavar="N", help=batch_help)
    add("--seed", type=int, default=default.seed, help="random seed of sampling")
    compile_help = "torch.compile the decode step (on CUDA as a CUDA graph); with --prompts"
    add("--compile", action="store_true", help=compile_help)
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 if the device supports it")
    add("--debug", action="store_true", help="show tracebacks")
    add("--server", metavar="NAME", help="use the model of this name at OPENAI_BASE_URL instead of a local --model")
    add(
        "--completions",
        nargs="?",
        const="ids",
        choices=["ids", "text"],
        help="with --server: render each prompt with --model's tokenizer and template and request its completion, sent "
        "as token ids (the default) or as text, instead of chat messages",
    )
    add_api_arguments(parser, sampling=False)
    args = parser.parse_args(argv)
    if args.prompts and args.out is None:
        parser.error("--prompts needs --out")
    if args.server:
        if not args.prompts or args.compile or args.batch_size:
            parser.error("--server needs --prompts, and does not support --batch-size and --compile")
        if bool(args.model) != bool(args.completions) or (args.template and not args.completions):
            parser.error("with --server: --model and --template need --completions, and --completions needs --model")
    elif args.completions or not args.model or args.dry_run or args.batch or args.budget < math.inf:
        parser.error("--model or --server is required; --completions, --dry-run, --budget and --batch need --server")
    if not (0 <= args.temperature < math.inf and 0 < args.top_p <= 1 and args.top_k >= 0 and args.seed >= 0):
        parser.error("--temperature, --top-k and --seed must be at least 0, --top-p above 0 and at most 1")
    args.name = args.name or args.server or os.path.relpath(args.model)
    return args


def generate_command(args: argparse.Namespace) -> None:
    if args.out:
        check_output_paths([args.out], [*(args.prompts or []), *(args.model.glob("*") if args.model else [])])
    prompts = [p for path in args.prompts or [] for p in read_prompts(path)]
    if is_first_rank():
        print_later_turns(prompts)
    if args.server and not args.completions:
        return answer_by_server(prompts, args, None, None)
    tokenizer = load_tokenizer(args.model)
    template, notes = choose_template(args.model, tokenizer, args.template)
    if is_first_rank():
        print("\n".join(notes), file=sys.stderr if args.prompt is not None else sys.stdout)
    if args.server:
        return answer_by_server(prompts, args, template, tokenizer)
    stop, options = set(stop_ids(TEMPLATES[template], tokenizer)), dataclass_from_args(Options, args)
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read at the first matrix product
        os.environ.setdefault(name, "32")  # oneDNN compiles a kernel per number of tokens: 1000 would take 0.6 GiB
    with init_distributed() as ranks:
        try:
            model = load_model(args.model, compute_dtype(args.dtype), ranks.device).requires_grad_(False)
            if args.chat:
                chat(model, tokenizer, template, stop, options)
            elif args.prompt is not None:
                tokens = render([Turn("user", args.prompt)], TEMPLATES[template], tokenizer)[0]
                if error := exceeds_context(len(tokens), model.config.max_positions):
                    raise InputError(error)
                print_answer(model, tokenizer, tokens, stop, options)
            else:
                highest = max(render_prompts(prompts, tokenizer, template))
                check_vocabulary(highest, model.config.vocab_size, args.model)
                set_keys(prompts, model, options, template)
                done = answer_all(model, tokenizer, prompts, stop, options, args.out, ranks.rank, ranks.world_size)
                if ranks.rank == 0:
                    write_answers(prompts, done, args.name, args.out)
        except (RuntimeError, MemoryError) as e:
            if not oom_message(e):
                raise
            advice = "try --dtype bf16, or an inference server (--server)"
            raise WorkError(f"out of memory with the weights alone: {advice} ({oom_message(e)})") from None


def main(argv: list[str] | None = None) -> int:
    return run_program("generate.py", generate_command, parse_args(argv))


if __name__ == "__main__":
    exit_process(main())
