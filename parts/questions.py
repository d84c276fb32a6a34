"""What an LLM is asked, in which words, and what is known of it from the records that are stored."""

import hashlib
import json
import re
from dataclasses import dataclass

from parts.program import whole

TRIES = 3  # a reply that cannot be parsed is asked for again up to twice


@dataclass(frozen=True)
class Question:
    """One thing to ask. `key` says what an answer belongs to: model, prompt and vote; `row` is for messages only."""

    key: str
    row: str
    messages: list[dict]
    seed: int = 0
    prompt: str | list[int] | None = None  # instead of messages, asked as a completion: text, or token ids
    max_tokens: int | None = None  # of this reply, where there is room for fewer than the options allow

    @property
    def endpoint(self) -> str:
        return "/chat/completions" if self.prompt is None else "/completions"


def make_question(model: str, prompt: str, row: str, vote: int = 0) -> Question:
    prompt = whole(prompt)
    key = hashlib.sha256(json.dumps([model, prompt, vote]).encode()).hexdigest()[:32]
    return Question(key, row, [{"role": "user", "content": prompt}], vote)


def fence(text: str, name: str) -> str:
    """`text` between two marked lines that it cannot imitate: the mark is a hash of the text itself."""
    text = whole(text)
    mark = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"<<<{name} {mark}>>>\n{text}\n<<<end of {name} {mark}>>>"


def fill(prompt: str, by_place: dict[str, str]) -> str:
    """`prompt` with texts in their places, in one pass: a place that stands in a text stays what it is."""
    return re.sub("|".join(map(re.escape, by_place)), lambda found: by_place[found[0]], prompt)


def state_of(records: list[dict]) -> str:
    """open, parsed, refused or unparsed, from all records of a question."""
    if value_of(records) is not None:
        return "parsed"
    if any("refused" in r for r in records):
        return "refused"
    return "unparsed" if len(records) >= TRIES else "open"


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
