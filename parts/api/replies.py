"""What the replies of an OpenAI-compatible server say: body, error, usage, scores, how long to wait, at which pace."""

import json
import math
import re
import time
import zlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import cached_property

import httpx

LONGEST = 120  # seconds that a server may ask to wait


class BadReply(ValueError):
    """Too long, or not what its headers say."""


@dataclass
class Reply:
    """Of a server; `broken`: why it is not whole."""

    status: int
    headers: httpx.Headers
    content: bytes | bytearray
    broken: str = ""

    @cached_property
    def body(self) -> dict:
        """The JSON object, which Google puts into a list when it is an error; {} where there is none."""
        try:
            body = json.loads(self.content)
        except (ValueError, RecursionError):
            return {}
        body = body[0] if isinstance(body, list) and len(body) == 1 else body
        return body if isinstance(body, dict) else {}

    @property
    def text(self) -> str:
        return self.content.decode("utf-8", "replace")


def unpack(content: bytes, encoding: str, most: int) -> bytes:
    """The content of a reply that is packed although nobody asked for that. Raises BadReply above `most` bytes."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        return content
    unpacker = zlib.decompressobj(wbits=47)
    try:
        content = unpacker.decompress(content, most)
    except zlib.error as e:
        raise BadReply(f"the reply is no {encoding}: {e}") from None
    if unpacker.unconsumed_tail:
        raise BadReply(f"the reply is longer than {most:,} bytes")
    return content


def error_of(body: dict) -> dict:
    error = (body.get("error") or body.get("detail")) if isinstance(body, dict) else None  # "detail": FastAPI's
    return error if isinstance(error, dict) else {"message": error} if isinstance(error, str) else {}


# How servers say that they do not know a parameter, or do not take it.
NOT_TAKEN = re.compile(
    "unsupported|not support|unrecognized|unknown|unexpected|extra_forbidden|extra (inputs|fields)|additional propert"
    "|cannot find field|not a valid field"
)


def rejected_parameter(body: dict, sent: list[str]) -> str | None:
    """Which of the parameters `sent` an error's body says to be unknown or not supported, if one of them.

    Bodies differ: OpenAI's error with `param`, FastAPI's and Mistral's detail with `loc`, also nested as an object or a
    text in `message`, "Unknown name" with Google, "unknown field" with Go and Rust. Of several names in a text the
    first counts: the others are those that are known.
    """
    param = error_of(body).get("param")
    for text in texts_in(body):
        if NOT_TAKEN.search(text):
            places = {name: re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) for name in sent}
            named = [name for name in sent if places[name]]
            if param in sent or named:
                return param if param in sent else min(named, key=lambda name: places[name].start())
    return None


def texts_in(value) -> list[str]:
    """The texts of a JSON value, in lower case; an object with a `loc` as one, JSON in a text as what it is. What was
    sent (`input`) is left out."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            if value.lstrip()[:1] in ("{", "["):
                return texts_in(json.loads(value))
        return [value.lower()]
    if isinstance(value, dict):
        found = [text for key, v in value.items() if key != "input" for text in texts_in(v)]
        return [" ".join(found)] if "loc" in value else found
    return [text for v in value for text in texts_in(v)] if isinstance(value, list) else []


def message_of(body: dict) -> dict | None:
    """The message of a chat completion, the text of a completion as one; None if this is neither, or an error.

    Content as a list of parts becomes the text of those that are text: thoughts are others.
    """
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
    return not reply.broken and message_of(reply.body) is not None


def is_paid(reply: Reply) -> bool:
    """Whether a completion was made for this reply, usable or not: an error or a gateway's page costs nothing."""
    cut = not reply.body and reply.content.lstrip()[:1] == b"{"
    return reply.status == 200 and (cut or "choices" in reply.body or "usage" in reply.body)


def usage_of(record: dict, sent: int = 0, back: int = 0) -> tuple[int, int]:
    """Tokens in and out; `sent` and `back`, our own estimates, where what the server says cannot be."""
    usage = record.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    said = [usage.get(k) for k in ("prompt_tokens", "completion_tokens")]
    possible = [isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n <= 1e9 for n in said]
    possible[0] = possible[0] and said[0] > 0  # no prompt is free
    return tuple(math.ceil(n) if good else mine for n, good, mine in zip(said, possible, (sent, back)))


# ---------------------------------------------------------------- scores

EMPHASIS = re.compile(r"(\*{1,3}|__?|`{1,3})(?=\S)(.+?)(?<=\S)\1")
LABEL = r"(?:(?:overall|final|difficulty)\s+)?(?:scores?|ratings?|difficulty)\s*[:=]\s*"


def read_scores(text: str, count: int, least: int, most: int) -> list[float] | None:
    """The `count` numbers from `least` to `most` that a text says and nothing else; None where it could be read
    otherwise.

    `**4**`, `4.`, `4/5`, `Score: **4.5**`, `{"score": 4.5}`; for two `7 8`, `7/10, 8/10`, `[7, 8]`, `**7** 8`.
    """
    text = text.strip()
    if len(text) > 200:
        return None
    text = re.sub(r"^```\w*\n(.*)\n```$", r"\1", text, flags=re.DOTALL).strip()
    for _ in range(2):  # **Score: `4`**
        text = EMPHASIS.sub(r"\2", text)
    text = re.sub(r'^\{\s*"score"\s*:\s*([0-9.]+)\s*\}$' if count == 1 else r"^[\[(](.*)[\])]$", r"\1", text)
    number = rf"([0-9]{{1,2}}(?:\.[0-9]+)?)(?:\s*/\s*{most}|\s+out\s+of\s+{most})?"
    separator = r"(?:\s+|\s*,\s*)"
    found = re.fullmatch(rf"(?:{LABEL})?{separator.join([number] * count)}\.?", text.strip(), re.IGNORECASE)
    scores = [float(n) for n in found.groups()] if found else []
    return scores if scores and all(least <= s <= most for s in scores) else None


def without_thoughts(reply: str) -> str:
    """A reply without the <think>…</think> in front, which a template may have opened in the prompt: then there is an
    end alone. "" where it does not end."""
    while True:
        thought, end, rest = reply.partition("</think>")
        if not thought.lstrip().startswith("<think>") and ("<think>" in thought or not end):
            return reply  # none, or not in front
        reply = rest.strip()


def parse_difficulty(reply: str) -> float | None:
    """The score from 1 to 5 of a reply that says nothing else."""
    scores = read_scores(without_thoughts(reply), 1, 1, 5)
    return scores[0] if scores else None


def parse_scores(reply: str) -> list[float] | None:
    """The two scores of a reply whose first line, or first line of code, says nothing else. From 0 to 10: judges who
    are asked for 1 to 10 give 0 to useless answers."""
    said = re.sub(r"^```\w*[ \t]*\n\s*", "", without_thoughts(reply).strip())
    return read_scores(said.split("\n", 1)[0], 2, 0, 10)


# ---------------------------------------------------------------- waits and pace


def parse_seconds(text: str) -> float:
    """Durations of rate-limit headers: 1s, 6m0s, 250ms, 1h2m3.5s or plain seconds. Raises ValueError."""
    if not re.fullmatch(r"(\d+(\.\d*)?(ms|s|m|h|d))+|\d+(\.\d*)?", text.strip()):
        raise ValueError(text)
    parts = re.findall(r"([\d.]+)(ms|s|m|h|d)?", text.strip())
    return sum(float(n) * {"ms": 1e-3, "": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[unit] for n, unit in parts)


def retry_after(headers: httpx.Headers) -> float | None:
    """Seconds that the server asks to wait, if it does."""
    try:
        if "retry-after-ms" in headers:
            wait = float(headers["retry-after-ms"]) / 1000
        elif re.fullmatch(r"\s*[\d.]+\s*", text := headers["retry-after"]):
            wait = float(text)
        else:
            wait = (parsedate_to_datetime(text) - datetime.now(timezone.utc)).total_seconds()
    except (KeyError, ValueError, TypeError, OverflowError):
        return None
    return wait if wait > 0 else None


class RateLimiter:
    """When the next request may go: under `rpm` and `tpm` (requests and tokens a minute), at the rate that the server's
    headers taught, after its pauses. `pause(seconds)` waits, and may raise to end the wait."""

    def __init__(self, rpm: float, tpm: float, concurrency: int, pause: Callable[[float], Awaitable[None]]):
        self.concurrency, self.pause = concurrency, pause
        self.limits = {"requests": rpm / 60, "tokens": tpm / 60}  # a second
        self.learned = {"requests": math.inf, "tokens": math.inf}  # a second
        self.next_free = {"requests": 0.0, "tokens": 0.0}
        self.paused_until = 0.0

    async def wait(self, tokens: int) -> None:
        """Wait for the turn of a request of so many tokens."""
        start = now = time.monotonic()
        for kind, need in (("requests", 1), ("tokens", tokens)):
            start = max(start, self.next_free[kind])
            rate = min(self.limits[kind], self.learned[kind])
            self.next_free[kind] = max(now, self.next_free[kind]) + need / rate
        while (wait := max(start, self.paused_until) - time.monotonic()) > 0:
            await self.pause(min(wait, 60.0))

    def learn(self, headers: httpx.Headers, tokens: int) -> None:
        """From x-ratelimit-*: what is missing from the limit comes back within the reset time, or all of it at its end.

        A reset later than LONGEST, an epoch for one, says nothing of the pace; the server will say when it is too fast.
        """
        for kind, need in (("requests", 1), ("tokens", tokens)):
            try:
                limit, remaining = (float(headers[f"x-ratelimit-{k}-{kind}"]) for k in ("limit", "remaining"))
                reset = parse_seconds(headers[f"x-ratelimit-reset-{kind}"])
            except (KeyError, ValueError):
                continue
            scarce = remaining < need * self.concurrency and limit > remaining and 0 < reset <= LONGEST
            rate = max(limit - remaining, remaining) / reset if scarce else math.inf
            self.learned[kind] = max(rate, need / LONGEST)
            if remaining < need and reset <= LONGEST:
                self.paused_until = max(self.paused_until, time.monotonic() + reset)
