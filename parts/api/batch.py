"""The Batch API of an OpenAI-compatible server: half the price, within 24 hours."""

import json
import re
from collections import Counter
from contextlib import suppress
from functools import partial

import httpx

from parts.api.client import Client, NoAnswer, Stopped
from parts.api.questions import Question, tokens_in
from parts.api.replies import Reply, error_of, is_completion, is_paid
from parts.cli import WorkError, progress
from parts.files import atomic_write, read_json_object

BATCH_ROWS, BATCH_BYTES = 50_000, 190 * 10**6  # what the API takes at once
BATCH_TRIES = 6  # batches in which a row may get an error of the server; half as many in which it may get nothing
FILE_BYTES, FILE_PATIENCE = 2**30, 30  # that a file may have; timeouts that its way may take


class BatchClient(Client):
    """Asks by the Batch API: upload, create, poll, download; what failed goes into the next batch, a few times over.

    `batch_file` remembers the upload and the batch that are under way, with their rows and prices, so that a later run
    picks them up, whatever it asks itself; a batch created just before a kill is found again by its upload.
    """

    def __init__(self, *given):
        super().__init__(*given)
        self.tries: Counter[str] = Counter()  # by key, how often a row got no answer: by nothing at all, counted twice
        self.kept = {(r.get("batch"), r["key"]) for records in self.store.by_key.values() for r in records}

    async def ask_all(self, questions: list[Question]) -> None:
        self.stop_on_signals()
        by_key = {q.key: q for q in questions}
        with suppress(Stopped):  # the file knows
            async with self.http() as http:
                if state := read_json_object(self.batch_file):
                    await self.collect(http, state, by_key)
                while not self.end:
                    todo = [q for q in questions if self.is_open(q)]
                    lines = self.request_lines(todo)
                    if not lines:
                        return
                    state = await self.create(http, lines, todo[: len(lines)])
                    await self.collect(http, state, by_key)

    async def call(
        self, http: httpx.AsyncClient, method: str, path: str, retries: int | None = None, unknown: str = "", **more
    ) -> Reply:
        """The reply to a request to /files or /batches. Raises WorkError; `unknown` is what a 404 means."""
        retries = self.options.retries if retries is None else retries
        send = partial(self.fetch, http, method, path, FILE_BYTES, FILE_PATIENCE, **more)
        try:
            reply, problem = await self.retrying(send, retries)
        except NoAnswer as e:
            raise WorkError(f"{method} {path}: {e}") from None
        if problem:
            raise WorkError(unknown if unknown and reply.status == 404 else f"{method} {path}: {problem}")
        return reply

    def forgotten(self, state: dict) -> str:
        """What it means when the server does not know the batch."""
        return (
            f"{self.batch_file} remembers batch {state['batch']} of {rows_of(state):,} rows, which this server does "
            "not know, or whose files it no longer has (HTTP 404). The OPENAI_BASE_URL and OPENAI_API_KEY that it was "
            f"created with collect it. To do without its answers, and ask its rows anew, delete that file"
        )

    def request_lines(self, todo: list[Question]) -> list[bytes]:
        """The lines of a batch's upload: as many questions as the API takes at once and the budget allows."""
        lines, size, cost = [], 0, self.spent
        for question in todo:
            payload = self.payload(question)
            request = {"custom_id": question.key, "method": "POST", "url": f"/v1{question.endpoint}", "body": payload}
            line = json.dumps(request).encode() + b"\n"
            size, cost = size + len(line), cost + self.most_dollars(payload)
            if len(lines) == BATCH_ROWS or size > BATCH_BYTES:
                break
            if cost > self.options.budget:
                if not lines:
                    self.stop_for_the_budget()
                break
            lines.append(line)
        return lines

    async def create(self, http: httpx.AsyncClient, lines: list[bytes], asked: list[Question]) -> dict:
        """Upload the lines and create a batch of them, which is remembered before and after."""
        file = ("questions.jsonl", b"".join(lines))
        uploaded = await self.call(http, "POST", "/files", data={"purpose": "batch"}, files={"file": file})
        rows = {q.key: [q.row, tokens_in(self.asked_of(q))] for q in asked}
        state = {"file": self.id_of(uploaded.body), "rows": rows, "prices": self.prices}
        atomic_write(self.batch_file, json.dumps(state))
        wanted = {"input_file_id": state["file"], "endpoint": f"/v1{asked[0].endpoint}", "completion_window": "24h"}
        state["batch"] = self.id_of((await self.call(http, "POST", "/batches", retries=0, json=wanted)).body)
        atomic_write(self.batch_file, json.dumps(state))
        return state

    def id_of(self, body: dict) -> str:
        """Of a file or batch. Raises WorkError."""
        name = body.get("id")
        if not isinstance(name, str) or self.without_key(name) != name or not re.fullmatch(r"[\w.-]{1,200}", name):
            raise WorkError(f"the server gave no id of a file or batch, but {self.clean(str(name))!r}")
        return name

    async def find(self, http: httpx.AsyncClient, file: str) -> str | None:
        """The id of the batch that was made of an uploaded file, if one was."""
        after = ""
        while True:
            body = (await self.call(http, "GET", f"/batches?limit=100{after}")).body
            batches = [b for b in body.get("data") or [] if isinstance(b, dict)]
            for batch in batches:
                if batch.get("input_file_id") == file:
                    return self.id_of(batch)
            if not batches or body.get("has_more") is not True:
                return None
            after = f"&after={self.id_of(batches[-1])}"

    async def collect(self, http: httpx.AsyncClient, state: dict, by_key: dict[str, Question]) -> None:
        """Wait for a batch and keep all its answers, also those that are not asked for now."""
        if "batch" not in state:  # killed between the upload and the note of what was made of it
            state["batch"] = await self.find(http, state["file"])
        if state["batch"]:
            await self.take(http, await self.wait_for(http, state), state, by_key)
        self.batch_file.unlink()

    async def wait_for(self, http: httpx.AsyncClient, state: dict) -> dict:
        """The batch when it has ended."""
        with progress(rows_of(state), f"batch {state['batch']}", "row") as bar:
            while True:
                path = f"/batches/{state['batch']}"
                batch = (await self.call(http, "GET", path, unknown=self.forgotten(state))).body
                counts = batch.get("request_counts")
                done = [counts.get(k) for k in ("completed", "failed")] if isinstance(counts, dict) else []
                bar.set_postfix_str(self.clean(str(batch.get("status"))), refresh=False)
                bar.update(sum(n for n in done if isinstance(n, int)) - bar.n)
                if batch.get("status") in ("completed", "failed", "expired", "cancelled"):
                    return batch
                await self.pause(self.options.batch_poll)

    async def take(self, http: httpx.AsyncClient, batch: dict, state: dict, by_key: dict[str, Question]) -> None:
        """Keep every answer of a batch that has ended. Raises WorkError when it failed as a whole."""
        files = [batch.get("output_file_id"), batch.get("error_file_id")]
        if batch.get("status") == "failed" or not any(files):
            self.batch_file.unlink()
            reason = self.clean(str(batch.get("errors") or "without a reason"))
            raise WorkError(f"the batch {batch.get('status')}: {reason}")
        known = state["rows"] if isinstance(state.get("rows"), dict) else {}
        missing = known or {key: ["", 0] for key in by_key}
        missing = {key: by_key.get(key) or foreign_batch_error(key, *about) for key, about in missing.items()}
        could_go = self.payload(
            next(iter(by_key.values()), foreign_batch_error("", "", 0))
        )  # as it was, whatever is learnt below
        prices, self.prices = self.prices, state.get("prices", self.prices)
        for file in filter(None, files):
            path = f"/files/{self.id_of({'id': file})}/content"
            for line in (await self.call(http, "GET", path, unknown=self.forgotten(state))).content.split(b"\n"):
                key, reply, problem = read_line(line)
                question = missing.pop(key, None)
                if question and (state["batch"], key) not in self.kept:  # else kept before a kill
                    self.take_line(question, reply, problem, could_go, state["batch"], key in by_key)
        self.prices = prices
        for key, question in missing.items():
            self.came_to_nothing(question, "the batch has no line for it", 2, key in by_key)

    def take_line(
        self, question: Question, reply: Reply, problem: str, could_go: dict, batch: str, wanted: bool
    ) -> None:
        """Keep what a line of a batch says: an answer, what was paid for and cannot be used, a refusal; or ask again in
        the next batch."""
        if reply.status == 200 and is_completion(reply):
            self.keep(question, reply.body, batch=batch)
        elif is_paid(reply):
            self.keep_lost(question, reply, self.payload(question), batch=batch)
        elif not (reply.status in (400, 422) and self.adapt(reply.body, could_go)):
            try:
                answered = f"HTTP {reply.status}: {error_of(reply.body).get('message')}"
                said = self.clean(answered if reply.status else problem)
                if wanted and reply.status and self.is_final(reply):
                    self.keep_end(question, "refused", said)
                else:
                    self.came_to_nothing(question, said, 2 if reply.status in (0, 200) else 1, wanted)
            except WorkError as e:
                self.stop(e)

    def came_to_nothing(self, question: Question, problem: str, times: int, wanted: bool) -> None:
        """Asked again in the next batch, until it has failed."""
        self.tries[question.key] += times
        if wanted and self.tries[question.key] >= BATCH_TRIES and self.is_open(question):
            self.keep_end(question, "failed", f"{problem} (in every batch)")


def read_line(line: bytes) -> tuple[str, Reply, str]:
    """A line of a batch's file: key of the question, the reply with status 0 where there is none, and why."""
    try:
        answer = json.loads(line)
        key = str(answer["custom_id"]).partition("-")[0]
        response = answer.get("response") or {}
        status, body = response.get("status_code"), response.get("body")
        problem = str(error_of(answer).get("message") or "a line without a response")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", Reply(0, httpx.Headers(), b""), ""
    return key, Reply(status if isinstance(status, int) else 0, httpx.Headers(), json.dumps(body).encode()), problem


def rows_of(pending: dict) -> int:
    """How many rows the batch has that a batch file remembers."""
    rows = pending.get("rows")
    return len(rows) if isinstance(rows, dict) else rows if isinstance(rows, int) else 0


def foreign_batch_error(key: str, row: str, tokens: int) -> Question:
    """A question of an earlier run, of which only its length is known."""
    return Question(key, row, [], prompt=[0] * tokens)
