"""Ask questions through the Batch API of an OpenAI-compatible server: half the price, within 24 hours."""

import json
import re
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx

from parts.api.client import Client
from parts.api.questions import Question, estimate_tokens
from parts.api.replies import Reply, extract_error, is_billed, is_completion
from parts.api.transport import NoAnswer, Refused, Stopped
from parts.cli import WorkError, progress
from parts.files import atomic_write, read_json_object

MAX_BATCH_ROWS, MAX_BATCH_BYTES = 50_000, 190 * 10**6  # limits of the API
BATCH_TRIES = 5  # batches in which a row may get a server error or no result
MAX_FILE_BYTES, FILE_TIMEOUTS = 2**30, 30  # of one file transfer: its size, and its duration in timeouts


class BatchRunner:
    """Uploads questions, waits for the batch and records its results; rows without a result go into the next batch.

    The file `path` describes the pending upload and batch, with rows and prices: {"file", "batch", "rows": {key: [row,
    tokens]}, "prices"}. A later run collects that batch first, whichever questions it has itself; a batch that was
    created just before a kill is found by its upload.
    """

    def __init__(self, client: Client, path: Path):
        self.client, self.path = client, path
        self.failures: Counter[str] = Counter()  # by key
        self.recorded = {(r.get("batch"), r["key"]) for records in client.store.by_key.values() for r in records}
        self.http = client.transport.connect()
        self.questions: dict[str, Question] = {}  # of this run, by key

    async def run(self, questions: list[Question]) -> None:
        self.client.shutdown.on_signals()
        self.questions = {question.key: question for question in questions}
        with suppress(Stopped):
            async with self.http:
                if state := read_json_object(self.path):
                    await self.collect(state)
                while not self.client.shutdown.reason:
                    todo = [question for question in questions if self.client.needs_answer(question)]
                    lines = self.request_lines(todo)
                    if not lines:
                        return
                    await self.collect(await self.create(lines, todo[: len(lines)]))

    async def call(self, method: str, path: str, **request) -> Reply:
        """The reply to a request to /files or /batches. Raises Refused, NoAnswer and WorkError."""
        send = partial(self.client.transport.fetch, self.http, method, path, MAX_FILE_BYTES, FILE_TIMEOUTS, **request)
        retries = 0 if (method, path) == ("POST", "/batches") else self.client.options.retries  # no second batch
        try:
            return await self.client.transport.retry(send, retries)
        except (Refused, NoAnswer) as e:
            e.args = (f"{method} {path}: {e}",)
            raise

    def request_lines(self, todo: list[Question]) -> list[bytes]:
        """The lines to upload for a batch: as many questions as the API accepts and the budget allows."""
        lines, size, dollars = [], 0, 0.0
        for question in todo:
            body = self.client.request_body(question)
            request = {"custom_id": question.key, "method": "POST", "url": f"/v1{question.endpoint}", "body": body}
            line = json.dumps(request).encode() + b"\n"
            size, dollars = size + len(line), dollars + self.client.budget.max_dollars(body)
            if len(lines) == MAX_BATCH_ROWS or size > MAX_BATCH_BYTES:
                break
            if not self.client.budget.allows(dollars):
                if not lines:
                    self.client.stop_for_budget()
                break
            lines.append(line)
        return lines

    async def create(self, lines: list[bytes], questions: list[Question]) -> dict:
        """Upload the lines and create a batch of them. The state is saved after the upload and after the creation."""
        file = ("questions.jsonl", b"".join(lines))
        uploaded = await self.call("POST", "/files", data={"purpose": "batch"}, files={"file": file})
        rows = {question.key: [question.row, estimate_tokens(self.client.content(question))] for question in questions}
        state = {"file": self.validate_id(uploaded.body.get("id")), "rows": rows, "prices": self.client.budget.prices}
        atomic_write(self.path, json.dumps(state))
        batch = {"input_file_id": state["file"], "endpoint": f"/v1{questions[0].endpoint}", "completion_window": "24h"}
        state["batch"] = self.validate_id((await self.call("POST", "/batches", json=batch)).body.get("id"))
        atomic_write(self.path, json.dumps(state))
        return state

    def validate_id(self, name) -> str:
        """Return the id of a file or a batch, which becomes part of a path. Raises WorkError for anything else."""
        redact, sanitize = self.client.credentials.redact, self.client.credentials.sanitize
        if not isinstance(name, str) or redact(name) != name or not re.fullmatch(r"[\w.-]{1,200}", name):
            raise WorkError(f"the server gave no id of a file or batch, but {sanitize(str(name))!r}")
        return name

    async def find_batch(self, file: str) -> str | None:
        """The id of the batch that was created from an uploaded file, if one of the latest 100 was."""
        batches = (await self.call("GET", "/batches?limit=100")).body.get("data") or []
        ids = [batch["id"] for batch in batches if batch.get("input_file_id") == file]
        return self.validate_id(ids[0]) if ids else None

    async def collect(self, state: dict) -> None:
        """Wait for a batch and record all its results, including those of rows that this run does not ask."""
        if "batch" not in state:  # killed between the upload and the second save
            state["batch"] = await self.find_batch(state["file"])
        try:
            if state["batch"]:
                await self.record_results(state, await self.wait_for_end(state))
        except Refused as e:
            if e.status != 404:
                raise
            raise WorkError(
                f"the server does not know batch {state['batch']} ({len(state['rows'])} rows) or its files: HTTP 404; "
                "set OPENAI_BASE_URL and OPENAI_API_KEY as they were when it was created, "
                f"or delete {self.path} to ask its rows again"
            ) from None
        self.path.unlink()

    async def wait_for_end(self, state: dict) -> dict:
        """Poll the batch until it has ended; returns it."""
        with progress(len(state["rows"]), f"batch {state['batch']}", "row") as bar:
            while True:
                batch = (await self.call("GET", f"/batches/{state['batch']}")).body
                bar.set_postfix_str(self.client.credentials.sanitize(str(batch.get("status"))))
                if batch.get("status") in ("completed", "failed", "expired", "cancelled"):
                    return batch
                await self.client.shutdown.sleep(self.client.options.batch_poll)

    async def record_results(self, state: dict, batch: dict) -> None:
        """Record every result of a batch that has ended. Raises WorkError when it failed as a whole."""
        files = [name for name in (batch.get("output_file_id"), batch.get("error_file_id")) if name]
        if batch.get("status") == "failed" or not files:
            self.path.unlink()
            reason = self.client.credentials.sanitize(str(batch.get("errors") or "the server gave no reason"))
            raise WorkError(f"the batch {batch.get('status')}: {reason}")
        missing = {key: Question(key, row, [], prompt=[0] * tokens) for key, (row, tokens) in state["rows"].items()}
        missing |= {key: question for key, question in self.questions.items() if key in missing}
        sent = self.client.request_body(Question("", "", []))  # the parameters that were sent
        for name in files:
            content = (await self.call("GET", f"/files/{self.validate_id(name)}/content")).content
            for key, reply, problem in map(read_result, content.split(b"\n")):
                question = missing.pop(key, None)
                if question and (state["batch"], key) not in self.recorded:  # else recorded before a kill
                    self.record_result(question, reply, problem, sent, state)
        for question in missing.values():
            self.count_failure(question, "the batch has no line for it")

    def record_result(self, question: Question, reply: Reply, problem: str, sent: dict, state: dict) -> None:
        """Record a completion, a lost reply or a refusal, or count a failure: then the next batch asks again."""
        client, batch = self.client, {"prices": state["prices"], "batch": state["batch"]}
        if reply.status == 200 and is_completion(reply):
            client.record_reply(question, reply.body, **batch)
        elif is_billed(reply):
            client.record_lost_reply(question, reply, **batch)
        elif not client.learn_unsupported(reply, sent):
            problem = client.transport.describe_problem(reply) if reply.status else client.credentials.sanitize(problem)
            try:
                if question.key in self.questions and reply.status and not client.transport.should_retry(reply):
                    client.record_failure(question, "refused", problem)
                else:
                    self.count_failure(question, problem)
            except WorkError as e:  # the other results are recorded, too
                client.shutdown.request(e)

    def count_failure(self, question: Question, problem: str) -> None:
        self.failures[question.key] += 1
        wanted = question.key in self.questions and self.client.needs_answer(question)
        if wanted and self.failures[question.key] >= BATCH_TRIES:
            self.client.record_failure(question, "failed", f"{problem} (in {BATCH_TRIES} batches)")


def read_result(line: bytes) -> tuple[str, Reply, str]:
    """Parse a line of a batch's results: the question's key, its reply (status 0 if there is none), and the error."""
    try:
        result = json.loads(line)
        key = str(result["custom_id"]).partition("-")[0]
        response = result.get("response") or {}
        status, body = response.get("status_code"), response.get("body")
        problem = str(extract_error(result).get("message") or "a line without a response")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", Reply(0, httpx.Headers(), b""), ""
    return key, Reply(status if isinstance(status, int) else 0, httpx.Headers(), json.dumps(body).encode()), problem
