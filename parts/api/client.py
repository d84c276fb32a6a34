"""Shared by single requests and batches: the body of a request, and the records of replies.

{"key", "id", "reply", "value", "usage", "dollars", "model", "fingerprint", "finish_reason"} is an answer. `value` is
the parsed reply, None if it could not be parsed; "final" marks a reply that another request would repeat.
{"key", "id", "lost", "usage", "dollars"} is a complete reply that was billed and cannot be used. {"key", "id",
"refused"} and {"key", "id", "failed"} say why there is no answer. `dollars` is None if no price was known; "broken" is
the cost in dollars of incomplete replies before this record.
"""

from collections.abc import Callable

from parts.api.options import ApiOptions
from parts.api.pricing import Budget
from parts.api.questions import Question, estimate_tokens, last_reply, question_state
from parts.api.replies import Reply, extract_message, extract_usage, rejected_parameter
from parts.api.store import Store
from parts.api.transport import Credentials, Shutdown, Transport
from parts.cli import WorkError, valid_unicode

REASONING_TOKENS = 4000  # added to the limit of models that need max_completion_tokens: they reason before they answer


def cost_record(body: dict, prices: list[float | None], tokens_in: int, tokens_out: int) -> dict:
    """{"usage", "dollars"} of a reply; `tokens_in` and `tokens_out` are estimates for a reply without usage."""
    tokens = extract_usage(body, tokens_in, tokens_out)
    usage = dict(zip(("prompt_tokens", "completion_tokens"), tokens))
    if not extract_usage(body)[0]:
        usage["estimated"] = True
    known = None not in prices
    return {"usage": usage, "dollars": float(sum(p * n / 1e6 for p, n in zip(prices, tokens))) if known else None}


def reply_record(question: Question, body: dict, parse: Callable[[str], object], credentials: Credentials) -> dict:
    """The record of a completion without its cost, and without secrets."""
    message, reason = extract_message(body), body["choices"][0].get("finish_reason")
    text = credentials.redact(valid_unicode(message["content"] or ""))
    record = {"key": question.key, "id": question.row, "reply": text, "value": parse(text)}
    origin = {"model": body.get("model"), "fingerprint": body.get("system_fingerprint"), "finish_reason": reason}
    record |= {key: credentials.sanitize(value) if isinstance(value, str) else None for key, value in origin.items()}
    refusal = message.get("refusal")
    if reason == "content_filter" or isinstance(refusal, str):
        record |= {"refused": credentials.sanitize(f"{reason}: {refusal or 'content filter'}"), "value": None}
    return record


class Client:
    """Asks one server with one set of options and records every reply in `store` as soon as it arrives.

    `parse` returns the value of a reply's text, None if it cannot be parsed; then the question is sent again, followed
    by that reply and `reminder`. Raises InputError for unusable environment variables and options.
    """

    def __init__(self, options: ApiOptions, store: Store, parse: Callable[[str], object], reminder: str):
        self.options, self.store, self.parse, self.reminder = options, store, parse, reminder
        self.credentials, self.shutdown = Credentials(), Shutdown()
        self.transport = Transport(options, self.credentials, self.shutdown)
        self.budget = Budget(options.prices(), options.budget)
        for records in store.by_key.values():
            for record in records:
                self.budget.settle(record)
        self.unsupported: set[str] = set()  # parameters that the server rejects
        self.incomplete_dollars: dict[str, float] = {}  # by key: cost of incomplete replies, until the next record

    def needs_answer(self, question: Question) -> bool:
        """Whether the question must still be asked: it has no value yet, and has neither been refused nor failed."""
        return question_state(self.store.records(question.key)) == "open"

    def content(self, question: Question) -> list[dict] | str | list[int]:
        """The prompt or the messages of a request; after an unparsed reply, with that reply and the reminder."""
        if question.prompt is not None:
            return question.prompt
        reply = last_reply(self.store.records(question.key))
        if reply is None:
            return question.messages
        reminder = {"role": "user", "content": self.reminder}
        return [*question.messages, {"role": "assistant", "content": reply}, reminder]

    def request_body(self, question: Question) -> dict:
        options, kind = self.options, "messages" if question.prompt is None else "prompt"
        body = {"model": options.model, kind: self.content(question), "temperature": options.temperature}
        body |= {"seed": question.seed, **options.extra}
        max_tokens = question.max_tokens or options.max_tokens
        if "max_tokens" in self.unsupported:
            body["max_completion_tokens"] = max_tokens + REASONING_TOKENS
        else:
            body["max_tokens"] = max_tokens
        return {name: value for name, value in body.items() if name not in self.unsupported}

    def learn_unsupported(self, reply: Reply, sent: dict) -> bool:
        """Whether a reply to the body `sent` rejects one of its parameters, which later requests then omit."""
        names = [name for name in ("max_tokens", "temperature", "seed", *self.options.extra) if name in sent]
        name = rejected_parameter(reply.body, names) if reply.status in (400, 422) else None
        self.unsupported |= {name} - {None}
        return name is not None

    def stop_for_budget(self) -> None:
        self.shutdown.request(WorkError(self.budget.describe_exceeded()))

    def record_reply(self, question: Question, body: dict, prices: list | None = None, **more) -> None:
        """Record a completion and count its cost, at `prices` (default: the budget's); `more` goes into the record."""
        sent = self.content(question)
        record = reply_record(question, body, self.parse, self.credentials)
        length = len(record["reply"]) // 4 + 1  # an estimate, in tokens
        record |= cost_record(body, prices or self.budget.prices, estimate_tokens(sent), length)
        repeated = sent[-2:-1] == [{"role": "assistant", "content": record["reply"]}]
        if repeated and self.options.temperature == 0 and "temperature" not in self.unsupported:
            record["final"] = True  # the next request and its reply would be the same again
        self.budget.settle(record)
        self.add_record(record | more)

    def record_lost_reply(self, question: Question, reply: Reply, prices: list | None = None, **more) -> None:
        """Count the cost of an unusable reply, at its maximum length if the server does not state its usage; record the
        reply if it is complete."""
        body = self.request_body(question)
        max_tokens = body.get("max_tokens") or body["max_completion_tokens"]
        tokens = estimate_tokens(self.content(question))
        cost = cost_record(reply.body, prices or self.budget.prices, tokens, max_tokens)
        self.budget.settle(cost)
        if reply.incomplete:
            dollars = self.incomplete_dollars.get(question.key, 0.0) + (cost["dollars"] or 0.0)
            self.incomplete_dollars[question.key] = dollars
        else:
            lost = self.credentials.sanitize(f"HTTP {reply.status}: {reply.text[:200]}")
            self.add_record({"key": question.key, "id": question.row, "lost": lost, **cost, **more})

    def record_failure(self, question: Question, state: str, problem: str) -> None:
        """Record why there is no answer; `state`: refused or failed."""
        self.add_record({"key": question.key, "id": question.row, state: problem})

    def add_record(self, record: dict) -> None:
        if dollars := self.incomplete_dollars.pop(record["key"], 0.0):
            record["broken"] = dollars
        self.store.add(record)
