"""The client of an OpenAI-compatible server: asks, retries, keeps to pace and budget, stores what was paid at once."""

import argparse
import asyncio
import gc
import math
import os
import random
import re
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import httpx

from parts.program import InputError, Interrupted, WorkError, above_zero, positive, printable, progress, whole
from parts.questions import Question, bytes_in, state_of, tokens_in, value_of
from parts.replies import (
    LONGEST,
    BadReply,
    Pace,
    Reply,
    error_of,
    is_completion,
    message_of,
    retry_after,
    unpack,
    usage_of,
)
from parts.store import Store

# ---------------------------------------------------------------- options and prices

# Dollars per million tokens, in and out; the longest name that a model's begins with counts.
PRICES = {
    "gpt-4": (30, 60),
    "gpt-4-32k": (60, 120),
    "gpt-4-turbo": (10, 30),
    "gpt-4o": (2.5, 10),
    "gpt-4o-mini": (0.15, 0.6),
    "gpt-4.1": (2, 8),
    "gpt-4.1-mini": (0.4, 1.6),
    "gpt-4.1-nano": (0.1, 0.4),
    "gpt-3.5-turbo": (0.5, 1.5),
    "gpt-5": (1.25, 10),
    "gpt-5-mini": (0.25, 2),
    "gpt-5-nano": (0.05, 0.4),
    "o1": (15, 60),
    "o3": (2, 8),
    "o3-mini": (1.1, 4.4),
    "o4-mini": (1.1, 4.4),
}
THINKING = 4000  # tokens which models that want max_completion_tokens may think before they answer
FIRST = 20  # rows that go ahead alone; if nothing can be made of any of them, no more is paid for
PATIENCE = 5  # timeouts that a whole reply may take
REPLY_BYTES = 8 * 2**20  # that the reply to a question may have


@dataclass(frozen=True)
class ApiOptions:
    """What the client keeps to; the address and the key come from OPENAI_BASE_URL and OPENAI_API_KEY."""

    model: str = "gpt-4-0613"
    concurrency: int = 64  # requests in flight at once
    rpm: float = math.inf  # requests a minute
    tpm: float = math.inf  # tokens a minute
    max_tokens: int = 16  # of a reply
    temperature: float = 0.0
    timeout: float = 120.0  # seconds without a byte of an answer; PATIENCE times as many for the whole of it
    retries: int = 8  # of a request that fails
    budget: float = math.inf  # dollars
    price_in: float | None = None  # dollars per million tokens; None: as in PRICES
    price_out: float | None = None
    batch: bool = False  # use the Batch API
    batch_poll: float = 30.0  # seconds between looks at a batch
    ask_refused: bool = False  # ask again what was refused or could not be read before
    dry_run: bool = False  # print the plan, send nothing
    extra: dict = field(default_factory=dict)  # what else goes into every request: top_p …

    def prices(self) -> list[float | None]:
        """Dollars per million tokens in and out, half of them in batches; None where they are not known."""
        known = max((name for name in PRICES if self.model.startswith(name)), key=len, default=None)
        listed = PRICES[known] if known else (None, None)
        given = [p if mine is None else mine for p, mine in zip(listed, (self.price_in, self.price_out))]
        return [p / 2 if p and self.batch else p for p in given]


def add_api_arguments(parser: argparse.ArgumentParser, sampling: bool = True) -> None:
    """`sampling`: also the model's name and how it answers, for programs that have no such flags of their own."""
    group, default = parser.add_argument_group("API (OPENAI_API_KEY and OPENAI_BASE_URL are honoured)"), ApiOptions()
    if sampling:
        group.add_argument("--api-model", default=default.model, metavar="M", help="name of the model that is asked")
    for name, kind, metavar, text in (
        ("concurrency", positive, "N", "requests in flight at once"),
        ("rpm", above_zero, "N", "requests a minute, at most"),
        ("tpm", above_zero, "N", "tokens a minute, at most"),
        ("max_tokens", positive, "N", "of a reply"),
        ("temperature", float, "X", "of the sampling"),
        ("timeout", above_zero, "S", f"seconds without a byte of an answer; {PATIENCE} times as many for the whole"),
        ("retries", positive, "N", "of a request that fails, before it is given up"),
        ("budget", float, "USD", "stop before more is spent"),
        ("price_in", float, "USD", "per million tokens (default: a table of known models)"),
        ("price_out", float, "USD", "the same, of replies"),
        ("batch_poll", above_zero, "S", "seconds between looks at a batch"),
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


# ---------------------------------------------------------------- the client

FATAL = {401: "the key is not accepted (OPENAI_API_KEY)", 402: "the account cannot pay"}
HINTS = {403: " (not allowed)", 404: " (no such model or address: --api-model, OPENAI_BASE_URL?)"}
NO_REPLY = (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError, ValueError)


class Stopped(Exception):
    """No more shall be asked; of what waits only."""


class Client:
    """Asks request by request; keeps to pace and budget; counts what it costs.

    Each reply becomes a record of the store the moment it comes: {"key", "id", "reply", "value", "usage", "dollars",
    "model", "fingerprint", "finish_reason"} or {"key", "id", "refused"}; `value` is what `parse` makes of the reply,
    None where it cannot be parsed: then `reminder` is sent behind it, up to twice. `dollars` is what it cost, None
    where no price is known.
    """

    def __init__(self, options: ApiOptions, store: Store, parse: Callable[[str], object], reminder: str):
        self.options, self.store, self.parse, self.reminder = options, store, parse, reminder
        self.base = address(os.environ.get("OPENAI_BASE_URL"))
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch(r"[!-~]*", self.key):
            raise InputError("OPENAI_API_KEY holds characters that no key has")
        self.prices = options.prices()
        if None in self.prices and options.budget < math.inf:
            raise InputError(f"the price of {options.model} is not known: --budget needs --price-in and --price-out")
        self.pace = Pace(options.rpm, options.tpm, options.concurrency, self.pause)
        self.ssl = httpx.create_ssl_context()
        self.unsupported: set[str] = set()  # parameters that this model rejects
        self.end: Exception | None = None  # why no more is asked
        self.stopping, self.go = asyncio.Event(), asyncio.Event()  # go: all may ask, not the FIRST alone
        self.answers = self.retries = self.tokens_in = self.tokens_out = 0
        self.failed: list[str] = []  # rows whose retries are used up
        self.fruitless: list[str] = []  # what was said to the first rows, until a reply can be parsed
        self.cut = False  # whether such a reply ended at max_tokens
        self.proven, self.ended = False, 0  # whether a reply could be parsed; rows that are done with
        self.in_flight, self.reserved = 0, 0.0  # requests, and the most dollars that they can cost
        self.spent = sum(self.paid(r) for records in store.by_key.values() for r in records)

    def stop(self, why: Exception) -> None:
        """Ask no more; what is in flight may come home."""
        self.end = self.end or why
        self.stopping.set()
        self.go.set()

    async def pause(self, seconds: float) -> None:
        """Raises Stopped as soon as no more shall be asked."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)
        if self.end:
            raise Stopped

    # -------- money

    def dollars(self, tokens_in: int, tokens_out: int) -> float:
        return sum((price or 0) * n / 1e6 for price, n in zip(self.prices, (tokens_in, tokens_out)))

    def paid(self, record: dict) -> float:
        """What a record cost when it came; at today's price where it was not known then."""
        dollars = record.get("dollars")
        return dollars if isinstance(dollars, float) else self.dollars(*usage_of(record))

    def most_dollars(self, payload: dict) -> float:
        """The most that a request can cost: no tokenizer makes more tokens than there are bytes."""
        asked = payload.get("messages") or payload["prompt"]
        sent = bytes_in(asked) + 16 * len(payload.get("messages", ()))
        return self.dollars(sent, payload.get("max_tokens") or payload["max_completion_tokens"])

    def stop_for_the_budget(self) -> None:
        spent = f"${self.spent:.2f} are spent"
        self.stop(WorkError(f"the budget of ${self.options.budget:g} could be passed ({spent})"))

    # -------- one request

    def http(self) -> httpx.AsyncClient:
        """httpcore looks for sniffio at every request: where it is not installed, that takes 0.4 ms of each."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        headers["Accept-Encoding"] = "identity"  # what is unpacked could be a thousand times what came
        timeout = httpx.Timeout(self.options.timeout, connect=15.0)
        try:
            return httpx.AsyncClient(base_url=self.base, headers=headers, verify=self.ssl, timeout=timeout)
        except (ValueError, ImportError, httpx.InvalidURL) as e:
            raise InputError(f"the proxy of the environment cannot be used: {self.clean(str(e))}") from None

    async def fetch(
        self, http: httpx.AsyncClient, method: str, path: str, most=REPLY_BYTES, patience=PATIENCE, **more
    ) -> Reply:
        """The whole reply: at most so many bytes, in at most so many times the timeout."""

        async def read() -> Reply:
            content, size = [], 0
            async with http.stream(method, path, **more) as reply:
                async for chunk in reply.aiter_raw():
                    content.append(chunk)
                    size += len(chunk)
                    if size > most:
                        raise BadReply(f"the reply is longer than {most:,} bytes")
            packed = reply.headers.get("content-encoding", "").lower()
            return Reply(reply.status_code, reply.headers, unpack(b"".join(content), packed, most))

        deadline = patience * self.options.timeout
        try:
            return await asyncio.wait_for(read(), deadline)
        except asyncio.TimeoutError:
            raise BadReply(f"the reply was not whole after {deadline:,.0f} s") from None

    async def retrying(
        self, send: Callable[[], Awaitable[Reply]], retries: int, usable: Callable = bool
    ) -> tuple[Reply | None, str]:
        """`send()` until its reply is 200 and usable: (reply, ""). (reply, problem) where trying again is pointless for
        this row, (None, problem) when the retries are used up or the wait would be too long. WorkError where it is
        pointless for every row: 401, 402, redirections and insufficient_quota.

        As the official client does: again after connections, timeouts, 408, 409, 429, >= 500 and 200 with something
        else than what was asked for; x-should-retry decides where present. The wait is 0.5 s doubling to 8 s, with
        jitter, or what retry-after-ms or retry-after say (up to LONGEST).
        """
        for failures in range(retries + 1):
            wait = min(0.5 * 2**failures, 8.0) * random.uniform(0.75, 1.0)
            try:
                reply = await send()
            except NO_REPLY as e:
                problem = self.clean(f"{type(e).__name__} {e}")
            else:
                if reply.status == 200 and usable(reply):
                    return reply, ""
                message = error_of(reply.body).get("message") or reply.text[:200]
                problem = self.clean(f"HTTP {reply.status}{HINTS.get(reply.status, '')}: {message}")
                if self.is_final(reply):
                    return reply, problem
                wait = retry_after(reply.headers) or wait
                if wait > LONGEST:
                    return None, f"{problem} (it asks to wait {wait:,.0f} s)"
            if failures < retries:
                self.retries += 1
                await self.pause(wait)
        return None, f"{problem} ({retries + 1} tries)"

    def is_final(self, reply: Reply) -> bool:
        """Whether trying again is pointless; raises WorkError where it is so for every row."""
        status, error = reply.status, error_of(reply.body)
        quota = "insufficient_quota" in (error.get("code"), error.get("type"))
        if status in FATAL or quota or 300 <= status < 400:
            reason = "the quota is used up" if quota else FATAL.get(status, "the address answers with a redirection")
            raise WorkError(f"HTTP {status}: {reason}: {self.clean(str(error.get('message') or reply.text))[:200]}")
        if reply.headers.get("x-should-retry") in ("true", "false"):
            return reply.headers["x-should-retry"] == "false"
        return not (status in (200, 408, 409, 429) or status >= 500)

    async def post(self, http: httpx.AsyncClient, question: Question) -> Reply:
        """One try of a completion when the pace allows it; again at once without what the server does not support."""
        tokens = tokens_in(self.asked_of(question)) + self.options.max_tokens
        while True:
            await self.pace.wait(tokens)
            payload = self.payload(question)
            reply = await self.fetch(http, "POST", question.endpoint, json=payload)
            self.pace.learn(reply.headers, tokens)
            if reply.status not in (400, 422) or not self.adapt(error_of(reply.body), payload):
                return reply

    def payload(self, question: Question) -> dict:
        options, asked = self.options, "messages" if question.prompt is None else "prompt"
        body = {"model": options.model, asked: self.asked_of(question), "temperature": options.temperature}
        body |= {"seed": question.seed, **options.extra}
        most = question.max_tokens or options.max_tokens
        if "max_tokens" in self.unsupported:
            body["max_completion_tokens"] = most + THINKING
        else:
            body["max_tokens"] = most
        return {k: v for k, v in body.items() if k not in self.unsupported}

    def adapt(self, error: dict, payload: dict) -> bool:
        """Whether the server rejected a parameter that can be left out or renamed; remembered for all requests."""
        text = str(error.get("message", "")).lower()
        if not any(word in text for word in ("unsupported", "not support", "unrecognized", "unexpected field")):
            return False
        for name in ("max_tokens", "temperature", "seed", *self.options.extra):
            if name in payload and (error.get("param") == name or f"'{name}'" in text):
                self.unsupported.add(name)
                return True
        return False

    def clean(self, text: str) -> str:
        """For people: one line, without the key and without what could command a terminal."""
        return printable(" ".join(self.without_key(text).split()))[:300]

    def without_key(self, text: str) -> str:
        return text.replace(self.key, "[key]") if len(self.key) >= 8 else text  # "x" and "EMPTY" are no secrets

    # -------- one question

    def asked_of(self, question: Question) -> list[dict] | str | list[int]:
        """The question; after a reply that could not be parsed, that reply and a reminder of what is wanted."""
        records = self.store.of(question.key)
        if question.prompt is not None:
            return question.prompt
        if not records or "reply" not in records[-1]:
            return question.messages
        reply = {"role": "assistant", "content": records[-1]["reply"]}
        return [*question.messages, reply, {"role": "user", "content": self.reminder}]

    def is_open(self, question: Question) -> bool:
        return state_of(self.store.of(question.key)) == "open"

    async def ask(self, http: httpx.AsyncClient, question: Question) -> None:
        """Ask until there is a value, a refusal or an end of the tries; everything that comes is kept at once."""
        answers_before = self.answers
        while self.is_open(question) and not self.end:
            cost = self.most_dollars(self.payload(question))
            while self.spent + self.reserved + cost > self.options.budget:
                if not self.in_flight:  # else what is in flight costs less, in the end, than it could
                    return self.stop_for_the_budget()
                await self.pause(0.02)
            self.in_flight += 1
            self.reserved += cost
            try:
                send = partial(self.post, http, question)
                reply, problem = await self.retrying(send, self.options.retries, is_completion)
            finally:
                self.in_flight -= 1
                self.reserved -= cost
            if reply is None:
                if self.answers == answers_before:
                    raise WorkError(f"no answer from the server: {problem}")
                self.failed.append(question.row)
                return
            if problem:
                self.keep_refusal(question, problem)
            else:
                self.keep(question, reply.body)

    def keep(self, question: Question, body: dict) -> None:
        """Record a chat completion, without the key wherever it stands."""
        choice, message = body["choices"][0], message_of(body)
        text = self.without_key(whole(message.get("content") or ""))
        sent, back = usage_of(body, tokens_in(self.asked_of(question)), len(text) // 4 + 1)
        dollars = None if None in self.prices else float(self.dollars(sent, back))
        record = {"key": question.key, "id": question.row, "reply": text, "value": self.parse(text)}
        record |= {"usage": {"prompt_tokens": sent, "completion_tokens": back}, "dollars": dollars}
        if not usage_of(body)[0]:  # the server does not say
            record["usage"]["estimated"] = True
        for name, said in (("model", body.get("model")), ("fingerprint", body.get("system_fingerprint"))):
            record[name] = self.clean(said) if isinstance(said, str) else None
        reason, refusal = choice.get("finish_reason"), message.get("refusal")
        record["finish_reason"] = self.clean(reason) if isinstance(reason, str) else None
        if reason == "content_filter" or isinstance(refusal, str):
            record |= {"refused": self.clean(f"{reason}: {refusal or 'content filter'}"), "value": None}
        self.store.add(record)
        self.answers += 1
        self.tokens_in += sent
        self.tokens_out += back
        self.spent += self.paid(record)
        self.cut |= reason == "length"
        self.look_at_the_first(question)

    def keep_refusal(self, question: Question, problem: str) -> None:
        self.store.add({"key": question.key, "id": question.row, "refused": problem})
        self.look_at_the_first(question)

    def look_at_the_first(self, question: Question) -> None:
        """Stop when nothing can be made of what the FIRST rows got; as soon as of one it can, all the others may go."""
        records = self.store.of(question.key)
        state = state_of(records)
        if state == "parsed":
            self.proven = True
            self.go.set()
        if self.proven or state == "open":
            return
        said = records[-1].get("refused")
        self.fruitless.append(f"refused: {said}" if said else repr(self.clean(records[-1]["reply"])[:100]))
        if len(self.fruitless) < FIRST:
            return
        again = "--ask-refused asks these rows again"
        if all(x.startswith("refused: ") for x in self.fruitless):
            self.stop(WorkError(f"the first {FIRST} rows are all {self.fruitless[-1]} (when that is mended, {again})"))
            return
        advice = "raise --max-tokens, at which they end" if self.cut else "change --prompt-file or --api-model"
        shown = "; ".join([x for x in self.fruitless if not x.startswith("refused: ")][:3])
        self.stop(WorkError(f"of the first {FIRST} rows no reply can be read, such as {shown}: {advice}; {again}"))

    # -------- all questions

    async def ask_all(self, questions: list[Question]) -> None:
        """Ask with `concurrency` requests in flight, each replaced by the next as soon as it ends."""
        self.stop_on_signals()
        waiting = iter(enumerate(questions))
        with progress(len(questions), self.options.model, "row") as bar:

            async def worker():
                async with self.http() as http:  # a connection of its own: a shared pool's work grows with its square
                    for number, question in waiting:
                        if number >= FIRST:
                            await self.go.wait()
                        if self.end:
                            return
                        try:
                            await self.ask(http, question)
                        except WorkError as e:
                            self.stop(e)
                        except Stopped:
                            pass
                        bar.set_postfix_str(f"${self.spent:.2f}, {self.retries} retries", refresh=False)
                        bar.update()
                        self.ended += 1
                        if self.ended == FIRST:  # whatever became of them
                            self.go.set()

            workers = [asyncio.create_task(worker()) for _ in range(min(self.options.concurrency, len(questions)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for task in workers:
                    task.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    def stop_on_signals(self) -> None:
        """The first Ctrl-C lets the requests in flight come home, the second does not."""
        asked = []

        def note():
            if asked:
                raise KeyboardInterrupt
            asked.append(True)
            self.stop(Interrupted("no more is asked"))

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, note)


def address(given: str | None) -> str:
    """OPENAI_BASE_URL, or OpenAI's own. Raises InputError."""
    base = (given or "https://api.openai.com/v1").strip().rstrip("/")
    try:
        url = httpx.URL(base)
        usable = (
            url.scheme in ("http", "https") and url.host and 0 < (url.port or 80) < 2**16 and not re.search(r"\s", base)
        )
        (url.raw_host or b"").decode().encode("idna")
    except (httpx.InvalidURL, ValueError):
        usable = False
    if not usable:
        raise InputError("OPENAI_BASE_URL must be an http:// or https:// address")
    return base


# ---------------------------------------------------------------- the whole work


def ask_questions(
    options: ApiOptions, out: Path, questions: list[Question], parse: Callable[[str], object], reminder: str
) -> Store | None:
    """Ask what is not answered yet; the store OUT.partial.jsonl with all answers, closed, or None after a dry run.

    Raises WorkError when the work stopped before its end, Interrupted after a signal; nothing paid is lost.
    """
    store = Store(out.with_name(out.name + ".partial.jsonl"), read_only=options.dry_run)
    from parts.batch import BatchClient  # here, because it builds on what stands above

    client = (BatchClient if options.batch else Client)(options, store, parse, reminder)
    for records in store.by_key.values():
        for record in records:
            if "reply" in record:
                record["reply"] = whole(str(record["reply"]))
            record["value"] = None if "refused" in record else parse(record.get("reply", ""))
        if options.ask_refused and value_of(records) is None:
            records.clear()
    unique = {q.key: q for q in questions}
    todo = [q for q in unique.values() if client.is_open(q)]
    print_plan(client, len(questions), len(unique), todo)
    if options.dry_run:
        return None
    if todo and not client.key and "api.openai.com" in client.base:
        raise InputError("set OPENAI_API_KEY, or OPENAI_BASE_URL to a server that needs none")
    gc.freeze()  # what is there already need not be looked through while requests wait
    started = time.monotonic()
    try:
        if todo:
            asyncio.run(client.ask_all(todo))
    finally:
        gc.unfreeze()
        store.close()
        states = [state_of(store.of(key)) for key in unique]
        asked = len(todo) - states.count("open")
        print_end(client, states, asked / max(time.monotonic() - started, 1e-9))
    if client.end or "open" in states:
        why = client.end or WorkError(f"{states.count('open')} rows got no answer ({', '.join(client.failed[:5])} …)")
        raise type(why)(f"{why}; what came is in {store.path}, the same command goes on from there")
    return store


def print_plan(client: Client, questions: int, unique: int, todo: list[Question]) -> None:
    sent = sum(tokens_in(q.messages if q.prompt is None else q.prompt) for q in todo)
    back = len(todo) * client.options.max_tokens
    price = "price unknown: --price-in, --price-out"
    if None not in client.prices:
        each = f"${client.prices[0]:g} and ${client.prices[1]:g} per million tokens"
        price = f"${client.dollars(sent, back):,.2f} at {each}"
    known = f"{questions:,} questions, {unique - len(todo):,} answered before"
    cost = f"about {sent:,} tokens in and at most {back:,} out: {price}"
    print(f"{known}, {len(todo):,} to ask {client.options.model}; {cost}", flush=True)


def print_end(client: Client, states: list[str], rate: float) -> None:
    counts = ", ".join(f"{states.count(state):,} {state}" for state in ("parsed", "refused", "unparsed", "open"))
    tokens = f"{client.tokens_in:,} tokens in, {client.tokens_out:,} out, ${client.spent:,.2f} in all"
    without = f"; without {', '.join(sorted(client.unsupported))}, which it does not take" if client.unsupported else ""
    print(f"{counts}; {client.retries:,} retries, {tokens}; {rate:,.1f} rows/s{without}", flush=True)
