"""Questions to a model, and the state of a question by its stored records."""

import hashlib
import json
import re
from dataclasses import dataclass

from parts.cli import strip_control_chars, valid_unicode

MAX_REPLIES = 3  # billed replies to one question before it counts as unparsed or failed


@dataclass(frozen=True)
class Question:
    """One question to the model. `key` identifies its answer (see question_key); `row` is used in messages only."""

    key: str
    row: str
    messages: list[dict]
    seed: int = 0
    prompt: str | list[int] | None = None  # text or token ids to complete, instead of messages
    max_tokens: int | None = None  # of this reply, if the context has room for fewer than the options allow

    @property
    def endpoint(self) -> str:
        return "/chat/completions" if self.prompt is None else "/completions"


def question_key(options, asked: list[dict] | str | list[int], max_tokens: float, seed: int) -> str:
    """A hash (64 hex digits) of everything that the answer to `asked` depends on; `options`: ApiOptions."""
    content = [options.model, asked, options.temperature, max_tokens, options.extra, seed]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def make_question(options, prompt: str, row: str, vote: int = 0) -> Question:
    messages = [{"role": "user", "content": valid_unicode(prompt)}]
    return Question(question_key(options, messages, options.max_tokens, vote)[:32], row, messages, vote)


def fence(text: str, name: str) -> str:
    """Put `text` between two marked lines that it cannot contain, since the mark is a hash of the text."""
    text = valid_unicode(text)
    mark = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"<<<{name} {mark}>>>\n{text}\n<<<end of {name} {mark}>>>"


def fill(prompt: str, texts: dict[str, str]) -> str:
    """Replace the placeholders in `prompt` by `texts` in one pass: placeholders inside the texts stay."""
    return re.sub("|".join(map(re.escape, texts)), lambda match: texts[match[0]], prompt)


def estimate_tokens(asked: list[dict] | str | list[int]) -> int:
    """The number of token ids; for messages and text an estimate from four bytes per token."""
    if isinstance(asked, list) and asked and isinstance(asked[0], int):
        return len(asked)
    return max_token_count(asked) // 4 + 8


def max_token_count(asked: list[dict] | str | list[int]) -> int:
    """An upper bound of the number of tokens: the bytes of messages or text, or the number of token ids."""
    if isinstance(asked, str):
        return len(asked.encode())
    return sum(1 if isinstance(m, int) else len(m["content"].encode()) for m in asked)


# ---------------------------------------------------------------- the records of a question


def parsed_value(records: list[dict]):
    """The value of the first parsed reply, or None."""
    return next((r["value"] for r in records if r.get("value") is not None), None)


def last_reply(records: list[dict]) -> str | None:
    return next((r["reply"] for r in reversed(records) if "reply" in r), None)


def question_state(records: list[dict]) -> str:
    """The state of a question: open, parsed, refused, failed or unparsed."""
    if parsed_value(records) is not None:
        return "parsed"
    for state in ("refused", "failed"):
        if any(state in r for r in records):
            return state
    replies = [r for r in records if "reply" in r]
    if any("final" in r for r in replies) or len(replies) + sum("lost" in r for r in records) >= MAX_REPLIES:
        return "unparsed" if replies else "failed"
    return "open"


def failure_reason(records: list[dict]) -> str:
    """Why a question has no value: its state and the server's message."""
    for kind in ("refused", "failed", "lost"):
        if message := next((r[kind] for r in reversed(records) if kind in r), None):
            return f"{'failed' if kind == 'lost' else kind}: {message}"
    return "unparsed: the reply cannot be read"


def describe_unparsed(unparsed: list[list[dict]]) -> str:
    """Up to three unparsed replies as examples, and what to change. `unparsed`: the records of each such question."""
    truncated = any(r.get("finish_reason") == "length" for records in unparsed for r in records)
    advice = "raise --max-tokens, which cuts them off" if truncated else "change --prompt-file or --api-model"
    replies = [last_reply(records) for records in unparsed[:3]]
    shown = "; ".join(repr(strip_control_chars(" ".join(reply.split()))[:100]) for reply in replies)
    return f"such as {shown}: {advice}; --ask-refused asks these rows again"
