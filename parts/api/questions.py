"""What an LLM is asked, in which words, and what is known of it from the records that are stored."""

import hashlib
import json
import re
from dataclasses import dataclass

from parts.cli import strip_control_chars, valid_unicode

TRIES = 3  # replies to one question that are paid for, until one can be used


@dataclass(frozen=True)
class Question:
    """One thing to ask. `key` says what an answer belongs to (see key_of); `row` is for messages only."""

    key: str
    row: str
    messages: list[dict]
    seed: int = 0
    prompt: str | list[int] | None = None  # instead of messages, asked as a completion: text, or token ids
    max_tokens: int | None = None  # of this reply, where there is room for fewer than the options allow

    @property
    def endpoint(self) -> str:
        return "/chat/completions" if self.prompt is None else "/completions"


def key_of(options, asked: list[dict] | str | list[int], most: float, seed: int) -> str:
    """64 hex digits of all that shapes the answer to `asked`, of at most `most` tokens; `options`: ApiOptions."""
    about = [options.model, asked, options.temperature, most, options.extra, seed]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def make_question(options, prompt: str, row: str, vote: int = 0) -> Question:
    messages = [{"role": "user", "content": valid_unicode(prompt)}]
    return Question(key_of(options, messages, options.max_tokens, vote)[:32], row, messages, vote)


def fence(text: str, name: str) -> str:
    """`text` between two marked lines that it cannot imitate: the mark is a hash of the text itself."""
    text = valid_unicode(text)
    mark = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"<<<{name} {mark}>>>\n{text}\n<<<end of {name} {mark}>>>"


def fill(prompt: str, by_place: dict[str, str]) -> str:
    """`prompt` with texts in their places, in one pass: a place that stands in a text stays what it is."""
    return re.sub("|".join(map(re.escape, by_place)), lambda found: by_place[found[0]], prompt)


def state_of(records: list[dict]) -> str:
    """open, parsed, refused, failed or unparsed, from all records of a question."""
    if value_of(records) is not None:
        return "parsed"
    for state in ("refused", "failed"):
        if any(state in r for r in records):
            return state
    replies = [r for r in records if "reply" in r]
    if any("final" in r for r in replies) or len(replies) + sum("lost" in r for r in records) >= TRIES:
        return "unparsed" if replies else "failed"
    return "open"


def reason_of(records: list[dict]) -> str:
    """Why a question has no value: what the server said, with the state in front."""
    for kind in ("refused", "failed", "lost"):
        if said := next((r[kind] for r in reversed(records) if kind in r), None):
            return f"{'failed' if kind == 'lost' else kind}: {said}"
    return "unparsed: the reply cannot be read"


def reply_of(records: list[dict]) -> str:
    """The newest reply, its beginning on one line; "" where there is none."""
    reply = next((r["reply"] for r in reversed(records) if "reply" in r), "")
    return strip_control_chars(" ".join(reply.split()))[:100]


def describe_unparsed(unread: list[list[dict]]) -> str:
    """Three replies that cannot be read, of the records of such questions, and what to change."""
    cut = any(r.get("finish_reason") == "length" for records in unread for r in records)
    advice = "raise --max-tokens, at which they end" if cut else "change --prompt-file or --api-model"
    shown = "; ".join(repr(reply_of(records)) for records in unread[:3])
    return f"such as {shown}: {advice}; --ask-refused asks these rows again"


def value_of(records: list[dict]):
    """What was made of the first reply that could be parsed, or None."""
    return next((r["value"] for r in records if r.get("value") is not None), None)


def tokens_in(asked: list[dict] | str | list[int]) -> int:
    """Of messages or text a rough count, for pace and plan: four bytes a token; token ids are counted."""
    if isinstance(asked, list) and asked and isinstance(asked[0], int):
        return len(asked)
    return bytes_in(asked) // 4 + 8


def bytes_in(asked: list[dict] | str | list[int]) -> int:
    """Of messages or text; of token ids their number: no tokenizer makes more tokens than that."""
    if isinstance(asked, str):
        return len(asked.encode())
    return sum(1 if isinstance(m, int) else len(m["content"].encode()) for m in asked)
