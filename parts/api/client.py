"""The client of an OpenAI-compatible server: asks, retries, keeps to pace and budget, stores what was paid at once."""

import asyncio
import base64
import math
import os
import random
import re
import signal
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import httpx

from parts.api.questions import Question, bytes_in, describe_unparsed, reason_of, state_of, tokens_in
from parts.api.replies import (
    LONGEST,
    BadReply,
    RateLimiter,
    Reply,
    error_of,
    is_completion,
    is_paid,
    message_of,
    rejected_parameter,
    retry_after,
    unpack,
    usage_of,
)
from parts.api.store import Store
from parts.cli import InputError, Interrupted, WorkError, progress, strip_control_chars, valid_unicode

# ---------------------------------------------------------------- options and prices

# Dollars per million tokens, in and out; the longest name that a model's begins with counts.
PRICES_OF = "August 2025"
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
SILENT = 5  # rows whose retries are used up while no row gets an answer: then it is the server that fails
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


# ---------------------------------------------------------------- the client

FATAL = {401: "the key is not accepted (OPENAI_API_KEY)", 402: "the account cannot pay"}
HINTS = {403: " (not allowed)", 404: " (no such model or address: --api-model, OPENAI_BASE_URL?)"}
NO_REPLY = (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError, ValueError)


class Stopped(Exception):
    """No more shall be asked; of what waits only."""


class NoAnswer(WorkError):
    """The retries are used up. `by_server`: as no row can be to blame for it; `since`: how many answers there were when
    it began."""

    def __init__(self, problem: str, by_server: bool, since: int):
        super().__init__(problem)
        self.by_server, self.since = by_server, since


class Client:
    """Asks request by request; keeps to pace and budget; counts what it costs.

    Each reply becomes a record of the store the moment it comes: {"key", "id", "reply", "value", "usage", "dollars",
    "model", "fingerprint", "finish_reason"}; `value` is what `parse` makes of the reply, None where it cannot be
    parsed: then `reminder` is sent behind it, up to twice, and "final" says where that would bring the same again.
    `dollars` is what it cost, None where no price is known, and "broken" what replies before it cost of which only a
    part came. {"key", "id", "lost", "usage", "dollars"} is a whole reply that was paid for and cannot be used;
    {"key", "id", "refused"} and {"key", "id", "failed"} say why there is none.
    """

    def __init__(self, options: ApiOptions, store: Store, parse: Callable[[str], object], reminder: str):
        self.options, self.store, self.parse, self.reminder = options, store, parse, reminder
        self.base = address(os.environ.get("OPENAI_BASE_URL"))
        self.batch_file = store.path.with_name(store.path.name.removesuffix(".partial.jsonl") + ".batch.json")
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch(r"[!-~]*", self.key):
            raise InputError("OPENAI_API_KEY holds characters that no key has")
        self.prices = options.prices()
        if None in self.prices and options.budget < math.inf:
            raise InputError(f"the price of {options.model} is not known: --budget needs --price-in and --price-out")
        self.pace = RateLimiter(options.rpm, options.tpm, options.concurrency, self.pause)
        self.secrets = secrets_of(self.key, self.base)
        self.ssl = certificates()
        self.unsupported: set[str] = set()  # parameters that this model rejects
        self.end: Exception | None = None  # why no more is asked
        self.stopping = asyncio.Event()
        self.known = asyncio.Event()  # the server has taken a request's parameters, or failed for another reason: until
        self.go = asyncio.Event()  # then one row asks alone; until `go` the FIRST do
        self.answers = self.retries = self.tokens_in = self.tokens_out = 0
        self.left: list[str] = []  # rows that wait for another day
        self.silent: list[tuple[Question, str]] = []  # and those whose retries are used up since the last answer
        self.fruitless: list[Question] = []  # the first rows, until a reply can be parsed
        self.broken: dict[str, float] = {}  # dollars for replies of which a part came, until their row has a record
        self.proven, self.ended = False, 0  # whether a reply could be parsed; rows that are done with
        self.waiting = 0  # rows that nobody has begun with
        self.in_flight, self.reserved = 0, 0.0  # requests, and the most dollars that they can cost
        self.spent = sum(self.paid(r) for records in store.by_key.values() for r in records)

    def stop(self, why: Exception) -> None:
        """Ask no more; requests in flight may finish."""
        self.end = self.end or why
        for event in (self.stopping, self.known, self.go):
            event.set()

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
        dollars, before = record.get("dollars"), record.get("broken")
        now = dollars if isinstance(dollars, float) else self.dollars(*usage_of(record))
        return now + (before if isinstance(before, float) else 0)

    def most_dollars(self, payload: dict) -> float:
        """The most that a request can cost: no tokenizer makes more tokens than there are bytes."""
        asked = payload.get("messages") or payload["prompt"]
        sent = bytes_in(asked) + 16 * len(payload.get("messages", ()))
        return self.dollars(sent, payload.get("max_tokens") or payload["max_completion_tokens"])

    def bill(self, body: dict, sent: int, back: int) -> dict:
        """Count what a reply cost, for its record; `sent` and `back`, our own estimates, where the server does not
        say."""
        tokens_in, tokens_out = usage_of(body, sent, back)
        usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
        if not usage_of(body)[0]:
            usage["estimated"] = True
        dollars = self.dollars(tokens_in, tokens_out)
        self.tokens_in += tokens_in
        self.tokens_out += tokens_out
        self.spent += dollars
        return {"usage": usage, "dollars": None if None in self.prices else float(dollars)}

    async def reserve(self, question: Question) -> tuple[dict, float]:
        """The request as it will be sent, and the most dollars that it can cost, set aside. Raises Stopped where the
        budget does not allow it."""
        while True:
            payload = self.payload(question)
            cost = self.most_dollars(payload)
            if self.spent + self.reserved + cost <= self.options.budget:
                self.in_flight += 1
                self.reserved += cost
                return payload, cost
            if not self.in_flight:  # else what is in flight costs less, in the end, than it could
                self.stop_for_the_budget()
            await self.pause(0.02)

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
        """The reply: at most so many bytes, in at most so many times the timeout. One of which only a part comes is
        `broken`; raises what the connection does where nothing comes."""
        reply = Reply(0, httpx.Headers(), bytearray())

        async def read() -> None:
            async with http.stream(method, path, **more) as answer:
                reply.status, reply.headers = answer.status_code, answer.headers
                async for chunk in answer.aiter_raw():
                    reply.content += chunk
                    if len(reply.content) > most:
                        raise BadReply(f"the reply is longer than {most:,} bytes")
            reply.content = unpack(bytes(reply.content), answer.headers.get("content-encoding", "").lower(), most)

        deadline = patience * self.options.timeout
        try:
            await asyncio.wait_for(read(), deadline)
            return reply
        except asyncio.TimeoutError:
            error = BadReply(f"the reply was not whole after {deadline:,.0f} s")
        except NO_REPLY as e:
            error = e
        if not reply.status:
            raise error
        reply.broken = f"{type(error).__name__} {error}"
        return reply

    async def retrying(
        self,
        send: Callable[[], Awaitable[Reply]],
        retries: int,
        usable: Callable = lambda reply: not reply.broken,
        wanted: Callable = lambda: True,
    ) -> tuple[Reply, str]:
        """`send()` until its reply is 200 and usable: (reply, ""); (reply, problem) where trying again is pointless for
        this row. Raises NoAnswer when the retries are used up, the wait would be too long, or the reply is no longer
        `wanted`; WorkError where it is pointless for every row: 401, 402, redirections and insufficient_quota.

        As the official client does: again after connections, timeouts, 408, 409, 429, >= 500 and 200 with something
        else than what was asked for; x-should-retry decides where present. The wait is 0.5 s doubling to 8 s, with
        jitter, or what retry-after-ms or retry-after say (up to LONGEST).
        """
        since = None
        for failures in count():
            wait, by_server = min(0.5 * 2**failures, 8.0) * random.uniform(0.75, 1.0), False
            try:
                reply = await send()
            except NO_REPLY as e:
                problem = self.clean(f"{type(e).__name__} {e}")
                by_server = isinstance(e, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError)
            else:
                if reply.status == 200 and usable(reply):
                    return reply, ""
                said = reply.broken or error_of(reply.body).get("message") or reply.text[:200]
                problem = self.clean(f"HTTP {reply.status}{HINTS.get(reply.status, '')}: {said}")
                if not reply.broken and self.is_final(reply):
                    return reply, problem
                by_server = reply.status == 429
                wait = retry_after(reply.headers) or wait
                if wait > LONGEST:
                    raise NoAnswer(f"{problem} (it asks to wait {wait:,.0f} s)", True, self.answers)
            since = self.answers if since is None else since
            if failures == retries or not wanted():
                raise NoAnswer(f"{problem} ({failures + 1} tries)", by_server, since)
            self.retries += 1
            await self.pause(wait)

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
        """One try of a completion when pace and budget allow it; again without what the server does not take."""
        tokens = tokens_in(self.asked_of(question)) + self.options.max_tokens
        while True:
            await self.pace.wait(tokens)
            payload, cost = await self.reserve(question)
            try:
                reply = await self.fetch(http, "POST", question.endpoint, json=payload)
            except NO_REPLY:
                self.known.set()
                raise
            finally:
                self.in_flight -= 1
                self.reserved -= cost
            self.pace.learn(reply.headers, tokens)
            if reply.status in (400, 422) and self.adapt(reply.body, payload):
                continue
            self.known.set()
            if is_paid(reply) and not is_completion(reply):
                self.keep_lost(question, reply, payload)
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

    def adapt(self, body: dict, payload: dict) -> bool:
        """Whether the server rejected a parameter that can be left out or renamed; remembered for all requests."""
        can_go = [name for name in ("max_tokens", "temperature", "seed", *self.options.extra) if name in payload]
        name = rejected_parameter(body, can_go)
        self.unsupported |= {name} - {None}
        return name is not None

    def clean(self, text: str) -> str:
        """For people: one line, without key and credentials, and without what could command a terminal."""
        text = re.sub(r"(?<=//)[^/\s@]+@", "", self.without_key(text))
        return strip_control_chars(" ".join(text.split()))[:300]

    def without_key(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "[key]")
        return text

    # -------- one question

    def asked_of(self, question: Question) -> list[dict] | str | list[int]:
        """The question; after a reply that could not be parsed, that reply and a reminder of what is wanted."""
        if question.prompt is not None:
            return question.prompt
        said = next((r["reply"] for r in reversed(self.store.of(question.key)) if "reply" in r), None)
        if said is None:
            return question.messages
        reply = {"role": "assistant", "content": said}
        return [*question.messages, reply, {"role": "user", "content": self.reminder}]

    def is_open(self, question: Question) -> bool:
        return state_of(self.store.of(question.key)) == "open"

    async def ask(self, http: httpx.AsyncClient, question: Question) -> None:
        """Ask until there is a value, a refusal or an end of the tries; everything that comes is kept at once."""
        while self.is_open(question) and not self.end:
            send, wanted = partial(self.post, http, question), partial(self.is_open, question)
            try:
                reply, problem = await self.retrying(send, self.options.retries, is_completion, wanted)
            except NoAnswer as e:
                return self.without_answer(question, e)
            if problem:
                self.keep_end(question, "refused", problem)
            else:
                self.keep(question, reply.body)

    def without_answer(self, question: Question, e: NoAnswer) -> None:
        """Say that the row has failed, if the server answered others meanwhile. Raises WorkError where it is the server
        that fails."""
        others_answered = self.answers > e.since
        if e.by_server and not others_answered:
            raise WorkError(f"no answer from the server: {e}")
        if e.by_server:
            self.left.append(question.row)
        elif others_answered:
            self.keep_end(question, "failed", str(e))
        else:
            self.silent.append((question, str(e)))
            if len(self.silent) >= SILENT and (self.waiting or not self.has_answered()):
                raise WorkError(f"no answer from the server: {e}")

    def has_answered(self) -> bool:
        """Whether the server gave any reply, now or in an earlier run."""
        return self.answers > 0 or any("reply" in r for records in self.store.by_key.values() for r in records)

    def settle_silent(self) -> None:
        """The rows that got no answer while no other did: they have failed, if the server answers at all."""
        silent, self.silent = self.silent, []
        for question, problem in silent:
            if not self.has_answered():
                raise WorkError(f"no answer from the server: {problem}")
            self.keep_end(question, "failed", problem)

    def keep(self, question: Question, body: dict, **more) -> None:
        """Record a chat completion, without the key wherever it stands."""
        choice, message = body["choices"][0], message_of(body)
        text = self.without_key(valid_unicode(message["content"] or ""))
        asked = self.asked_of(question)
        record = {"key": question.key, "id": question.row, "reply": text, "value": self.parse(text)}
        record |= self.bill(body, tokens_in(asked), len(text) // 4 + 1) | more
        for name, said in (("model", body.get("model")), ("fingerprint", body.get("system_fingerprint"))):
            record[name] = self.clean(said) if isinstance(said, str) else None
        reason, refusal = choice.get("finish_reason"), message.get("refusal")
        record["finish_reason"] = self.clean(reason) if isinstance(reason, str) else None
        if reason == "content_filter" or isinstance(refusal, str):
            record |= {"refused": self.clean(f"{reason}: {refusal or 'content filter'}"), "value": None}
        same = asked[-2:-1] == [{"role": "assistant", "content": text}]  # the next reminder would be this one again
        if same and self.options.temperature == 0 and "temperature" not in self.unsupported:
            record["final"] = True
        self.answers += 1
        self.add(record)
        self.settle_silent()
        self.look_at_the_first(question)

    def keep_lost(self, question: Question, reply: Reply, payload: dict, **more) -> None:
        """Count a reply that was paid for and cannot be used, at most as long as it was asked to be; record it if it is
        whole."""
        most = payload.get("max_tokens") or payload["max_completion_tokens"]
        cost = self.bill(reply.body, tokens_in(self.asked_of(question)), most)
        if reply.broken:
            self.broken[question.key] = self.broken.get(question.key, 0.0) + (cost["dollars"] or 0.0)
        else:
            problem = self.clean(f"HTTP {reply.status}: {reply.text[:200]}")
            self.add({"key": question.key, "id": question.row, "lost": problem, **cost, **more})

    def keep_end(self, question: Question, kind: str, problem: str) -> None:
        """Record why there is no answer; kind: refused or failed."""
        self.add({"key": question.key, "id": question.row, kind: problem})
        self.look_at_the_first(question)

    def add(self, record: dict) -> None:
        before = self.broken.pop(record["key"], 0.0)
        self.store.add(record | ({"broken": before} if before else {}))

    def look_at_the_first(self, question: Question) -> None:
        """Stop when nothing can be made of what the FIRST rows got; as soon as of one it can, all the others may go."""
        state = state_of(self.store.of(question.key))
        if state == "parsed":
            self.proven = True
            self.go.set()
        if self.proven or state == "open":
            return
        self.fruitless.append(question)
        if len(self.fruitless) < FIRST:
            return
        found = [self.store.of(q.key) for q in self.fruitless]
        if unread := [records for records in found if state_of(records) == "unparsed"]:
            self.stop(WorkError(f"of the first {FIRST} rows no reply can be read, {describe_unparsed(unread)}"))
        else:
            advice = "when that is mended, --ask-refused asks these rows again"
            self.stop(WorkError(f"the first {FIRST} rows are all {reason_of(found[-1])} ({advice})"))

    # -------- all questions

    async def ask_all(self, questions: list[Question]) -> None:
        """Ask with `concurrency` requests in flight, each replaced by the next as soon as it ends."""
        self.stop_on_signals()
        waiting, self.waiting = iter(enumerate(questions)), len(questions)
        with progress(len(questions), self.options.model, "row") as bar:

            async def worker():
                async with self.http() as http:  # a connection of its own: a shared pool's work grows with its square
                    for number, question in waiting:
                        if number:
                            await self.known.wait()
                        if number >= FIRST:
                            await self.go.wait()
                        self.waiting -= 1
                        if self.end:
                            return
                        try:
                            await self.ask(http, question)
                        except (WorkError, OSError) as e:  # OSError: the disk is full
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
                if not self.end:
                    self.settle_silent()
            except WorkError as e:
                self.stop(e)
            finally:
                for task in workers:
                    task.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    def stop_on_signals(self) -> None:
        """The first Ctrl-C lets the requests in flight finish, the second does not."""
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


def secrets_of(key: str, base: str) -> list[str]:
    """What may stand in no file and no message: the key, and credentials in the address, also as they are sent. What is
    short is none: "x", "EMPTY"."""
    url = httpx.URL(base)
    both = f"{url.username}:{url.password}"
    found = [key, url.username, url.password, url.userinfo.decode(), both, base64.b64encode(both.encode()).decode()]
    return sorted({text for text in found if len(text) >= 8 or (text and text == url.password)}, key=len, reverse=True)


def certificates() -> ssl.SSLContext:
    """The certificates that servers are checked with. Raises InputError where the environment names some that cannot be
    read."""
    try:
        return httpx.create_ssl_context()
    except OSError as e:
        named = " and ".join(f"{k}={os.environ[k]}" for k in ("SSL_CERT_FILE", "SSL_CERT_DIR") if k in os.environ)
        raise InputError(f"{named or 'the certificates'} cannot be read: {e.strerror or e}") from None
