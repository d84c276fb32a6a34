"""Ask each question in a request of its own, with many requests in flight at once."""

import asyncio
from contextlib import AsyncExitStack, suppress
from functools import partial

import httpx

from parts.api.client import Client
from parts.api.questions import (
    Question,
    describe_unparsed,
    estimate_tokens,
    failure_reason,
    parsed_value,
    question_state,
)
from parts.api.rate_limit import RateLimiter
from parts.api.replies import Reply, is_billed, is_completion
from parts.api.transport import TRANSPORT_ERRORS, NoAnswer, Refused, Stopped
from parts.cli import WorkError, progress

PROBE_ROWS = 20  # rows asked before the others; if none of them gets a usable answer, the run stops
MAX_UNANSWERED = 5  # rows in succession that may use up their retries before the run stops


class Scheduler:
    """Keeps `concurrency` requests in flight, within the rate limit and the budget.

    Only the first row is asked until the server has accepted the parameters of a request; then only PROBE_ROWS, until
    one of them has a usable answer.
    """

    def __init__(self, client: Client):
        self.client, self.options, self.shutdown = client, client.options, client.shutdown
        self.limiter = RateLimiter(self.options.rpm, self.options.tpm, self.options.concurrency, self.shutdown.sleep)
        self.connections: asyncio.Queue[httpx.AsyncClient] = asyncio.Queue()  # idle ones
        self.parameters_known = self.probe_passed = False
        self.probe: list[Question] = []
        self.waiting = self.finished = 0  # numbers of rows not started, and of rows finished
        self.unanswered: list[tuple[Question, NoAnswer]] = []  # since the last answer: rows whose retries are used up

    async def run(self, questions: list[Question]) -> None:
        self.shutdown.on_signals()
        self.probe, self.waiting, tasks = questions[:PROBE_ROWS], len(questions), []
        async with AsyncExitStack() as stack:
            # One client for each request in flight: one large pool would be slow.
            for _ in range(min(self.options.concurrency, len(questions))):
                self.connections.put_nowait(await stack.enter_async_context(self.client.transport.connect()))
            bar = stack.enter_context(progress(len(questions), self.options.model, "row"))
            with suppress(Stopped):
                for number, question in enumerate(questions):
                    while not self.may_start(number):
                        await self.shutdown.sleep(0.01)
                    http = await self.connections.get()
                    if self.shutdown.reason:
                        break
                    self.waiting -= 1
                    tasks.append(asyncio.create_task(self.ask_row(http, question, bar)))
            await asyncio.gather(*tasks)
            if not self.shutdown.reason:
                self.settle_unanswered(at_end=True)

    def may_start(self, number: int) -> bool:
        return number == 0 or (self.parameters_known and (number < PROBE_ROWS or self.probe_passed))

    async def ask_row(self, http: httpx.AsyncClient, question: Question, bar) -> None:
        try:
            await self.ask(http, question)
        except Stopped:
            pass
        except (WorkError, OSError) as e:  # OSError: the disk is full
            self.shutdown.request(e)
        except Exception as e:
            self.shutdown.request(e)  # so that run() gets to raise it
            raise
        finally:
            self.connections.put_nowait(http)
            self.finished += 1
        self.check_probe()
        spent, retries = self.client.budget.spent, self.client.transport.retries
        bar.set_postfix_str(f"${spent:.2f}, {retries} retries", refresh=False)
        bar.update()

    async def ask(self, http: httpx.AsyncClient, question: Question) -> None:
        """Ask until there is a value, a refusal or a failure. Raises WorkError for what would make every row fail."""
        client = self.client
        while client.needs_answer(question) and not self.shutdown.reason:
            send, still_needed = partial(self.send, http, question), partial(client.needs_answer, question)
            try:
                reply = await client.transport.retry(send, self.options.retries, is_completion, still_needed)
            except Refused as e:
                client.record_failure(question, "refused", str(e))
            except NoAnswer as e:
                return self.add_unanswered(question, e)
            else:
                client.record_reply(question, reply.body)
                self.settle_unanswered()

    async def send(self, http: httpx.AsyncClient, question: Question) -> Reply:
        """Send one request, when rate limit and budget allow it, without parameters that the server rejects."""
        tokens = estimate_tokens(self.client.content(question)) + self.options.max_tokens
        while True:
            await self.limiter.wait(tokens)
            body, dollars = await self.reserve(question)
            try:
                reply = await self.client.transport.fetch(http, "POST", question.endpoint, json=body)
            except TRANSPORT_ERRORS:
                self.parameters_known = True  # no reason to assume a rejection: the other rows need not wait
                raise
            finally:
                self.client.budget.release(dollars)
            self.limiter.learn(reply.headers, tokens)
            if self.client.learn_unsupported(reply, body):
                continue
            self.parameters_known = True
            if is_billed(reply) and not is_completion(reply):
                self.client.record_lost_reply(question, reply)
            return reply

    async def reserve(self, question: Question) -> tuple[dict, float]:
        """Reserve the maximum cost of a request; returns its body and this cost. Waits while requests are in flight, as
        they will cost less than reserved. Raises Stopped if the budget is exceeded and none is in flight."""
        budget = self.client.budget
        while True:
            body = self.client.request_body(question)
            dollars = budget.max_dollars(body)
            if budget.reserve(dollars):
                return body, dollars
            if not budget.in_flight:
                self.client.stop_for_budget()
            await self.shutdown.sleep(0.02)

    def add_unanswered(self, question: Question, e: NoAnswer) -> None:
        """Remember a row whose retries are used up. Raises WorkError if the server fails rather than this row."""
        self.unanswered.append((question, e))
        if len(self.unanswered) >= MAX_UNANSWERED and (self.waiting or not self.has_answered()):
            raise WorkError(f"no answer from the server: {e}")

    def settle_unanswered(self, at_end: bool = False) -> None:
        """Record the unanswered rows as failed, since the server answers others; rows without a connection stay open.
        Raises WorkError if the server has never answered, or if it could not be reached at the end."""
        unanswered, self.unanswered = self.unanswered, []
        for question, e in unanswered:
            if not self.has_answered() or (at_end and e.unreachable):
                raise WorkError(f"no answer from the server: {e}")
            if not e.unreachable:
                self.client.record_failure(question, "failed", str(e))

    def has_answered(self) -> bool:
        """Whether the server has ever replied, in this or an earlier run."""
        return any("reply" in r for records in self.client.store.by_key.values() for r in records)

    def check_probe(self) -> None:
        """Start the other rows when a probe row has a value; stop if all probe rows have finished without one."""
        if self.probe_passed:
            return
        records = [self.client.store.records(q.key) for q in self.probe if not self.client.needs_answer(q)]
        parsed = any(parsed_value(r) is not None for r in records)
        self.probe_passed = parsed or self.finished == PROBE_ROWS
        if parsed or not self.probe_passed or not records:
            return
        unparsed = [r for r in records if question_state(r) == "unparsed"]
        problem = f"of the first {PROBE_ROWS} rows no reply can be read, {describe_unparsed(unparsed)}"
        if not unparsed:
            advice = "when that is corrected, --ask-refused asks these rows again"
            problem = f"the first {PROBE_ROWS} rows are all {failure_reason(records[-1])} ({advice})"
        self.shutdown.request(WorkError(problem))
