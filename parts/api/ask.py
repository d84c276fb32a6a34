"""Ask a program's questions: print the plan, send the unanswered questions, print the outcome."""

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from parts.api.batch import BatchRunner
from parts.api.client import Client
from parts.api.options import ApiOptions
from parts.api.pricing import PRICES_DATE
from parts.api.questions import Question, describe_unparsed, estimate_tokens, parsed_value, question_state
from parts.api.scheduler import Scheduler
from parts.api.store import Store
from parts.cli import InputError, Interrupted, WorkError
from parts.files import read_json_object


def ask_questions(
    options: ApiOptions, out: Path, questions: list[Question], parse: Callable[[str], object], reminder: str
) -> Store | None:
    """Ask the questions that have no answer in OUT.partial.jsonl yet. Returns the store with all answers, or None after
    a dry run.

    `parse` and `reminder` are passed to Client. Raises InputError for unusable settings and for a pending batch that
    this run does not collect, WorkError if rows remain without an answer, Interrupted after a signal. A reply to a
    question is stored before the next request for this question is sent; other requests are in flight meanwhile.
    """
    store = Store(out.with_name(out.name + ".partial.jsonl"), read_only=options.dry_run)
    try:
        client = Client(options, store, parse, reminder)
        reparse_records(store, parse, options.ask_refused)
        unique = {question.key: question for question in questions}
        todo = [question for question in unique.values() if client.needs_answer(question)]
        print_plan(client, len(questions), len(unique), todo)
        batch_path = out.with_name(out.name + ".batch.json")
        pending = read_json_object(batch_path)
        if pending:
            status = f"{batch_path}: a batch of {len(pending['rows']):,} rows is pending and paid for"
            if not (options.batch or options.dry_run):
                raise InputError(f"{status}: the same command with --batch collects it. To discard it, delete the file")
            print(f"{status}: --batch collects it first", flush=True)
        if options.dry_run:
            return None
        if (todo or pending) and not client.credentials.key and "api.openai.com" in client.credentials.base_url:
            raise InputError("set OPENAI_API_KEY, or OPENAI_BASE_URL to a server that needs none")
        runner = BatchRunner(client, batch_path) if options.batch else Scheduler(client)
        send_all(client, runner, todo, list(unique))
    finally:
        store.close()
    unanswered = [question.row for question in unique.values() if client.needs_answer(question)]
    if client.shutdown.reason or unanswered:
        error = Interrupted if isinstance(client.shutdown.reason, Interrupted) else WorkError
        examples = ", ".join(unanswered[:5]) + ", …" * (len(unanswered) > 5)
        problem = client.shutdown.reason or f"{len(unanswered)} rows got no answer ({examples})"
        lost = f" except for {len(store.unwritten):,} records that could not be written" if store.unwritten else ""
        raise error(f"{problem}; the replies are in {store.path}{lost}. The same command continues from there")
    unparsed = [store.records(key) for key in unique if question_state(store.records(key)) == "unparsed"]
    if len(unparsed) > 0.05 * len(unique):
        examples = describe_unparsed(unparsed)
        print(f"{len(unparsed):,} of {len(unique):,} replies cannot be read, {examples}", file=sys.stderr)
    return store


def reparse_records(store: Store, parse: Callable[[str], object], ask_refused: bool) -> None:
    """Parse the stored replies again; with `ask_refused`, drop the records of questions without a value from memory."""
    for records in store.by_key.values():
        for record in records:
            record["value"] = parse(record["reply"]) if "reply" in record and "refused" not in record else None
        if ask_refused and parsed_value(records) is None:
            records.clear()


def send_all(client: Client, runner: BatchRunner | Scheduler, todo: list[Question], keys: list[str]) -> None:
    """Send the questions; then print the states of all `keys`, tokens, dollars and speed."""
    started = time.monotonic()
    try:
        asyncio.run(runner.run(todo))
    except WorkError as e:
        client.shutdown.request(e)
    finally:
        with suppress(OSError):  # this error has ended the run already
            client.store.flush()
        states = [question_state(client.store.records(key)) for key in keys]
        counts = [f"{states.count(s):,} {s}" for s in ("parsed", "refused", "unparsed", "failed", "open")]
        budget, retries = client.budget, client.transport.retries
        tokens = f"{budget.tokens_in:,} tokens in, {budget.tokens_out:,} out, ${budget.spent:,.2f} in all"
        speed = (len(todo) - states.count("open")) / max(time.monotonic() - started, 1e-9)
        without = f"; without {', '.join(sorted(client.unsupported))}, which it rejects" if client.unsupported else ""
        print(f"{', '.join(counts)}; {retries:,} retries, {tokens}; {speed:,.1f} rows/s{without}", flush=True)


def print_plan(client: Client, questions: int, unique: int, todo: list[Question]) -> None:
    options, budget = client.options, client.budget
    tokens_in = sum(estimate_tokens(q.messages if q.prompt is None else q.prompt) for q in todo)
    tokens_out = len(todo) * options.max_tokens
    price = "price unknown: --price-in, --price-out"
    if None not in budget.prices:
        per_token = f"${budget.prices[0]:g} and ${budget.prices[1]:g} per million tokens"
        listed = f" (a list of {PRICES_DATE})" if None in (options.price_in, options.price_out) else ""
        price = f"${budget.dollars(tokens_in, tokens_out):,.2f} at {per_token}{listed}"
    print(
        f"{questions:,} questions, {unique - len(todo):,} answered before, {len(todo):,} to ask {options.model}; "
        f"about {tokens_in:,} tokens in and at most {tokens_out:,} out: {price}",
        flush=True,
    )
