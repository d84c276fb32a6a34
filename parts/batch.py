"""The Batch API of an OpenAI-compatible server: half the price, within 24 hours."""

import json
import re
from contextlib import suppress
from functools import partial

import httpx

from parts.api import Client, Stopped
from parts.program import WorkError, progress, read_json_object, write_file
from parts.questions import TRIES, Question
from parts.replies import Reply, error_of, message_of

BATCH_ROWS, BATCH_BYTES = 50_000, 190 * 10**6  # what the API takes at once
FILE_BYTES, FILE_PATIENCE = 2**30, 30  # that a file may have; timeouts that its way may take


class BatchClient(Client):
    """Asks by the Batch API: upload, create, poll, download; what failed goes into the next batch, a few times over.

    `batch_file` remembers the upload and the batch that are under way, so that a run that was interrupted picks them
    up; a batch created just before a kill is found again by its upload.
    """

    async def ask_all(self, questions: list[Question]) -> None:
        self.stop_on_signals()
        self.batch_file = self.store.path.with_name(self.store.path.name.replace(".partial.jsonl", ".batch.json"))
        with suppress(Stopped):  # the file knows
            await self.ask_in_batches(questions)

    async def ask_in_batches(self, questions: list[Question]) -> None:
        self.endpoint = f"/v1{questions[0].endpoint}"
        async with self.http() as http:
            for _ in range(2 * TRIES * (1 + len(questions) // BATCH_ROWS)):
                todo = {f"{q.key}-{len(self.store.of(q.key))}": q for q in questions if self.is_open(q)}
                state = read_json_object(self.batch_file)
                if not state:
                    lines = self.request_lines(todo)
                    if not lines:
                        return
                    state = {"file": await self.upload(http, lines), "rows": len(lines)}
                    write_file(self.batch_file, json.dumps(state))
                if "batch" not in state:
                    state["batch"] = await self.find_or_create(http, state["file"])
                    write_file(self.batch_file, json.dumps(state))
                batch = await self.wait_for(http, state["batch"], state["rows"])
                await self.take(http, batch, todo)
                self.batch_file.unlink()
                if self.end:
                    return

    async def call(self, http: httpx.AsyncClient, method: str, path: str, retries: int | None = None, **more) -> Reply:
        """The reply to a request to /files or /batches. Raises WorkError."""
        retries = self.options.retries if retries is None else retries
        send = partial(self.fetch, http, method, path, FILE_BYTES, FILE_PATIENCE, **more)
        reply, problem = await self.retrying(send, retries)
        if problem:
            raise WorkError(f"{method} {path}: {problem}")
        return reply

    def request_lines(self, todo: dict[str, Question]) -> list[bytes]:
        """The lines of a batch's upload: as many questions as the API takes at once and the budget allows."""
        lines, size, cost = [], 0, self.spent
        for name, question in todo.items():
            payload = self.payload(question)
            request = {"custom_id": name, "method": "POST", "url": f"/v1{question.endpoint}", "body": payload}
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

    async def upload(self, http: httpx.AsyncClient, lines: list[bytes]) -> str:
        file = ("questions.jsonl", b"".join(lines))
        reply = await self.call(http, "POST", "/files", data={"purpose": "batch"}, files={"file": file})
        return self.id_of(reply.body)

    def id_of(self, body: dict) -> str:
        """Of a file or batch. Raises WorkError."""
        name = body.get("id")
        if not isinstance(name, str) or self.without_key(name) != name or not re.fullmatch(r"[\w.-]{1,200}", name):
            raise WorkError(f"the server gave no id of a file or batch, but {self.clean(str(name))!r}")
        return name

    async def find_or_create(self, http: httpx.AsyncClient, file: str) -> str:
        """The id of the batch that was made of an uploaded file."""
        batches = (await self.call(http, "GET", "/batches?limit=100")).body.get("data")
        for batch in batches if isinstance(batches, list) else []:
            if isinstance(batch, dict) and batch.get("input_file_id") == file:
                return self.id_of(batch)
        wanted = {"input_file_id": file, "endpoint": self.endpoint, "completion_window": "24h"}
        return self.id_of((await self.call(http, "POST", "/batches", retries=0, json=wanted)).body)

    async def wait_for(self, http: httpx.AsyncClient, name: str, rows: int) -> dict:
        """The batch when it has ended."""
        with progress(rows, f"batch {name}", "row") as bar:
            while True:
                batch = (await self.call(http, "GET", f"/batches/{name}")).body
                counts = batch.get("request_counts")
                done = [counts.get(k) for k in ("completed", "failed")] if isinstance(counts, dict) else []
                bar.set_postfix_str(self.clean(str(batch.get("status"))), refresh=False)
                bar.update(sum(n for n in done if isinstance(n, int)) - bar.n)
                if batch.get("status") in ("completed", "failed", "expired", "cancelled"):
                    return batch
                await self.pause(self.options.batch_poll)

    async def take(self, http: httpx.AsyncClient, batch: dict, todo: dict[str, Question]) -> None:
        """Keep every answer of a batch that has ended. Raises WorkError when it failed as a whole."""
        files = [batch.get("output_file_id"), batch.get("error_file_id")]
        if batch.get("status") == "failed" or not any(files):
            self.batch_file.unlink()
            reason = self.clean(str(batch.get("errors") or "without a reason"))
            raise WorkError(f"the batch {batch.get('status')}: {reason}")
        for file in filter(None, files):
            name = self.id_of({"id": file})
            for line in (await self.call(http, "GET", f"/files/{name}/content")).content.split(b"\n"):
                try:
                    answer = json.loads(line)
                    question = todo.pop(answer["custom_id"], None)
                    response = answer.get("response") or {}
                    body, status = response.get("body") or {}, response.get("status_code")
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    continue
                if question is None:
                    continue  # kept before a kill
                if status == 200 and message_of(body) is not None:
                    self.keep(question, body)
                elif status in (400, 422) and self.adapt(error_of(body), self.payload(question)):
                    continue  # the next batch asks it without what is not supported
                elif isinstance(status, int):
                    self.judge_line(question, Reply(status, httpx.Headers(), json.dumps(body).encode()))

    def judge_line(self, question: Question, reply: Reply) -> None:
        """A line of a batch that is no answer: a refusal, or asked again in the next batch."""
        try:
            if self.is_final(reply):
                message = error_of(reply.body).get("message")
                self.keep_refusal(question, self.clean(f"HTTP {reply.status}: {message}"))
        except WorkError as e:
            self.stop(e)
