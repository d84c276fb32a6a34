"""Parse replies of an OpenAI-compatible server: body, error, message, usage, and the scores in a text."""

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property

import httpx


@dataclass
class Reply:
    """An HTTP reply. `incomplete`: why only a part of it arrived; "" for a complete reply."""

    status: int
    headers: httpx.Headers
    content: bytes | bytearray
    incomplete: str = ""

    @cached_property
    def body(self) -> dict:
        """The JSON object; {} if there is none. Google wraps an error in a list."""
        try:
            body = json.loads(self.content)
        except (ValueError, RecursionError):
            return {}
        body = body[0] if isinstance(body, list) and len(body) == 1 else body
        return body if isinstance(body, dict) else {}

    @property
    def text(self) -> str:
        return self.content.decode("utf-8", "replace")


def extract_error(body: dict) -> dict:
    """The error object of a body; {} if there is none."""
    error = (body.get("error") or body.get("detail")) if isinstance(body, dict) else None  # "detail": FastAPI's
    return error if isinstance(error, dict) else {"message": error} if isinstance(error, str) else {}


UNSUPPORTED = re.compile(  # in messages of servers about a parameter that they do not know or accept
    "unsupported|not support|unrecognized|unknown|unexpected|extra_forbidden|extra (inputs|fields)|additional propert"
    "|cannot find field|not a valid field"
)


def rejected_parameter(body: dict, sent: list[str]) -> str | None:
    """Which of the parameters `sent` an error rejects as unknown or unsupported; None if it rejects none.

    Servers differ: OpenAI's error has `param`, FastAPI's and Mistral's a detail with `loc`, others name the parameter
    in a text. Of several names in a text the first one counts: the others are those that the server knows.
    """
    param = extract_error(body).get("param")
    for text in collect_texts(body):
        if UNSUPPORTED.search(text):
            matches = {name: re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) for name in sent}
            named = sorted((match.start(), name) for name, match in matches.items() if match)
            if param in sent or named:
                return param if param in sent else named[0][1]
    return None


def collect_texts(value) -> list[str]:
    """The strings in a JSON value, in lower case, without those under `input` (the request). An object with a `loc` is
    one text."""
    if isinstance(value, dict):
        texts = [text for key, v in value.items() if key != "input" for text in collect_texts(v)]
        return [" ".join(texts)] if "loc" in value else texts
    if isinstance(value, list):
        return [text for v in value for text in collect_texts(v)]
    return [value.lower()] if isinstance(value, str) else []


def extract_message(body: dict) -> dict | None:
    """The message of a chat completion, or one made from a completion's text; None for an error and anything else.
    Content in parts is joined: those of type text only, without thoughts."""
    try:
        choice = body["choices"][0]
        message = choice["message"] if "message" in choice else {"content": choice["text"]}
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part.get("type", "text") == "text")
        usable = isinstance(content, str | None) and choice.get("finish_reason") != "error"
        return {**message, "content": content} if usable else None
    except (KeyError, IndexError, TypeError, AttributeError):
        return None


def is_completion(reply: Reply) -> bool:
    return not reply.incomplete and extract_message(reply.body) is not None


def is_billed(reply: Reply) -> bool:
    """Whether the reply contains a completion, usable or not. Errors and gateways' pages are not billed."""
    truncated = not reply.body and reply.content.lstrip()[:1] == b"{"
    return reply.status == 200 and (truncated or "choices" in reply.body or "usage" in reply.body)


def extract_usage(body: dict, tokens_in: int = 0, tokens_out: int = 0) -> tuple[int, int]:
    """Tokens in and out of a reply or a record; the given estimates for counts that are missing or not plausible."""
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    counts = [usage.get(k) for k in ("prompt_tokens", "completion_tokens")]
    valid = [isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n <= 1e9 for n in counts]
    valid[0] = valid[0] and counts[0] > 0  # no prompt is free
    return tuple(math.ceil(n) if ok else estimate for n, ok, estimate in zip(counts, valid, (tokens_in, tokens_out)))


# ---------------------------------------------------------------- scores

EMPHASIS = re.compile(r"(\*{1,3}|__?|`{1,3})(?=\S)(.+?)(?<=\S)\1")
SCORE_LABEL = r"(?:(?:overall|final|difficulty)\s+)?(?:scores?|ratings?|difficulty)\s*[:=]\s*"


def parse_numbers(text: str, count: int, low: int, high: int) -> list[float] | None:
    """The `count` numbers from `low` to `high` in a text that contains nothing else; None if the text is ambiguous.

    `**4**`, `4.`, `4/5`, `Score: **4.5**`, `{"score": 4.5}`; for two `7 8`, `7/10, 8/10`, `[7, 8]`, `**7** 8`.
    """
    text = text.strip()
    if len(text) > 200:
        return None
    text = re.sub(r"^```\w*\n(.*)\n```$", r"\1", text, flags=re.DOTALL).strip()
    for _ in range(2):  # **Score: `4`**
        text = EMPHASIS.sub(r"\2", text)
    text = re.sub(r'^\{\s*"score"\s*:\s*([0-9.]+)\s*\}$' if count == 1 else r"^[\[(](.*)[\])]$", r"\1", text)
    number = rf"([0-9]{{1,2}}(?:\.[0-9]+)?)(?:\s*/\s*{high}|\s+out\s+of\s+{high})?"
    separator = r"(?:\s+|\s*,\s*)"
    match = re.fullmatch(rf"(?:{SCORE_LABEL})?{separator.join([number] * count)}\.?", text.strip(), re.IGNORECASE)
    scores = [float(n) for n in match.groups()] if match else []
    return scores if scores and all(low <= s <= high for s in scores) else None


def strip_thoughts(reply: str) -> str:
    """Remove a leading <think>…</think>; a template may have opened it in the prompt, then only the end is there. "" if
    it does not end."""
    while True:
        thought, end, rest = reply.partition("</think>")
        if not thought.lstrip().startswith("<think>") and ("<think>" in thought or not end):
            return reply  # no thought, or not a leading one
        reply = rest.strip()


def parse_difficulty(reply: str) -> float | None:
    """The score from 1 to 5 of a reply that contains nothing else."""
    scores = parse_numbers(strip_thoughts(reply), 1, 1, 5)
    return scores[0] if scores else None


def parse_scores(reply: str) -> list[float] | None:
    """The two scores of a reply whose first line, or first line of code, contains nothing else. From 0 to 10: judges
    asked for 1 to 10 give 0 to useless answers."""
    text = re.sub(r"^```\w*[ \t]*\n\s*", "", strip_thoughts(reply).strip())
    return parse_numbers(text.split("\n", 1)[0], 2, 0, 10)
