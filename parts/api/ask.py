"""Questions to an OpenAI-compatible server: the flags, the plan, what is asked, and what came of it."""

import argparse
import asyncio
import gc
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from parts.api.batch import BatchClient, rows_of
from parts.api.client import PATIENCE, PRICES_OF, ApiOptions, Client
from parts.api.questions import Question, describe_unparsed, state_of, tokens_in, value_of
from parts.api.store import Store
from parts.cli import InputError, Interrupted, WorkError, positive_float, positive_int, valid_unicode
from parts.files import read_json_object

# ---------------------------------------------------------------- the command line


def add_api_arguments(parser: argparse.ArgumentParser, sampling: bool = True) -> None:
    """`sampling`: also the model's name and how it answers, for programs that have no such flags of their own."""
    group, default = parser.add_argument_group("API (OPENAI_API_KEY and OPENAI_BASE_URL are honoured)"), ApiOptions()
    if sampling:
        group.add_argument("--api-model", default=default.model, metavar="M", help="name of the model that is asked")
    for name, kind, metavar, text in (
        ("concurrency", positive_int, "N", "requests in flight at once"),
        ("rpm", positive_float, "N", "requests a minute, at most"),
        ("tpm", positive_float, "N", "tokens a minute, at most"),
        ("max_tokens", positive_int, "N", "of a reply"),
        ("temperature", float, "X", "of the sampling"),
        (
            "timeout",
            positive_float,
            "S",
            f"seconds without a byte of an answer; {PATIENCE} times as many for the whole",
        ),
        ("retries", positive_int, "N", "of a request that fails, before it is given up"),
        ("budget", float, "USD", "stop before more is spent"),
        ("price_in", float, "USD", f"per million tokens (default: a table of {PRICES_OF})"),
        ("price_out", float, "USD", "the same, of replies"),
        ("batch_poll", positive_float, "S", "seconds between looks at a batch"),
    ):
        if name in ("max_tokens", "temperature") and not sampling:
            continue
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, default=getattr(default, name), metavar=metavar, help=text)
    group.add_argument("--batch", action="store_true", help="use the Batch API: half the price, within 24 hours")
    group.add_argument("--dry-run", action="store_true", help="print rows, tokens and dollars, send nothing")
    again = "ask again what was refused or could not be read before"
    group.add_argument("--ask-refused", action="store_true", help=again)


def api_options(args: argparse.Namespace, **own) -> ApiOptions:
    """The arguments that add_api_arguments added, and those of the program's own."""
    named = {f.name: getattr(args, f.name) for f in fields(ApiOptions) if hasattr(args, f.name)}
    return ApiOptions(**named | {"model": getattr(args, "api_model", "")} | own)


# ---------------------------------------------------------------- the whole work


def ask_questions(
    options: ApiOptions, out: Path, questions: list[Question], parse: Callable[[str], object], reminder: str
) -> Store | None:
    """Ask what is not answered yet; the store OUT.partial.jsonl with all answers, closed, or None after a dry run.

    Raises InputError where a batch is under way that nobody waits for, WorkError when the work stopped before its end,
    Interrupted after a signal; nothing paid is lost.
    """
    store = Store(out.with_name(out.name + ".partial.jsonl"), read_only=options.dry_run)
    try:
        client = (BatchClient if options.batch else Client)(options, store, parse, reminder)
        read_again(store, parse, options.ask_refused)
        unique = {q.key: q for q in questions}
        todo = [q for q in unique.values() if client.is_open(q)]
        print_plan(client, len(questions), len(unique), todo)
        pending = read_json_object(client.batch_file)
        if pending:
            about = f"{client.batch_file}: a batch of {rows_of(pending):,} rows is under way, and paid for"
            if not (options.batch or options.dry_run):
                raise InputError(f"{about}: the same command with --batch collects it. To do without, delete this file")
            print(f"{about}: --batch collects it first", flush=True)
        if options.dry_run:
            return None
        if (todo or pending) and not client.key and "api.openai.com" in client.base:
            raise InputError("set OPENAI_API_KEY, or OPENAI_BASE_URL to a server that needs none")
        states = ask(client, list(unique), todo, bool(pending))
    finally:
        store.close()
    if client.end or "open" in states:
        why = client.end or WorkError(f"{states.count('open')} rows got no answer ({', '.join(client.left[:5])} …)")
        but = f" but for {len(store.unwritten):,} records that could not be written" if store.unwritten else ""
        kind = Interrupted if isinstance(why, Interrupted) else WorkError
        raise kind(f"{why}; what came is in {store.path}{but}, the same command goes on from there")
    unread = [store.of(key) for key, state in zip(unique, states) if state == "unparsed"]
    if len(unread) > 0.05 * len(unique):
        told = f"{len(unread):,} of {len(unique):,} replies cannot be read, {describe_unparsed(unread)}"
        print(told, file=sys.stderr)
    return store


def read_again(store: Store, parse: Callable[[str], object], ask_refused: bool) -> None:
    """Parse what is stored; forget, for this run, what came to nothing if that is to be asked again."""
    for records in store.by_key.values():
        for record in records:
            if "reply" in record:
                record["reply"] = valid_unicode(str(record["reply"]))
            record["value"] = parse(record["reply"]) if "reply" in record and "refused" not in record else None
        if ask_refused and value_of(records) is None:
            records.clear()


def ask(client: Client, keys: list[str], todo: list[Question], pending: bool) -> list[str]:
    """Ask, and say what came of it: the state of each of `keys`. `pending`: a batch is to be collected first."""
    gc.freeze()  # what is there already need not be looked through while requests wait
    started = time.monotonic()
    try:
        if todo or pending:
            asyncio.run(client.ask_all(todo))
    finally:
        gc.unfreeze()
        with suppress(OSError):  # the client has ended with it
            client.store.flush()
        states = [state_of(client.store.of(key)) for key in keys]
        print_end(client, states, (len(todo) - states.count("open")) / max(time.monotonic() - started, 1e-9))
    return states


def print_plan(client: Client, questions: int, unique: int, todo: list[Question]) -> None:
    sent = sum(tokens_in(q.messages if q.prompt is None else q.prompt) for q in todo)
    back = len(todo) * client.options.max_tokens
    price = "price unknown: --price-in, --price-out"
    if None not in client.prices:
        each = f"${client.prices[0]:g} and ${client.prices[1]:g} per million tokens"
        listed = f" (a list of {PRICES_OF})" if None in (client.options.price_in, client.options.price_out) else ""
        price = f"${client.dollars(sent, back):,.2f} at {each}{listed}"
    known = f"{questions:,} questions, {unique - len(todo):,} answered before"
    cost = f"about {sent:,} tokens in and at most {back:,} out: {price}"
    print(f"{known}, {len(todo):,} to ask {client.options.model}; {cost}", flush=True)


def print_end(client: Client, states: list[str], rate: float) -> None:
    counts = ", ".join(
        f"{states.count(state):,} {state}" for state in ("parsed", "refused", "unparsed", "failed", "open")
    )
    tokens = f"{client.tokens_in:,} tokens in, {client.tokens_out:,} out, ${client.spent:,.2f} in all"
    without = f"; without {', '.join(sorted(client.unsupported))}, which it does not take" if client.unsupported else ""
    print(f"{counts}; {client.retries:,} retries, {tokens}; {rate:,.1f} rows/s{without}", flush=True)
