"""What the replies of an OpenAI-compatible server say: body, error, usage, scores, how long to wait, at which pace."""

import json
import math
import re
import time
import zlib
from collections.abc import Awaitable, Callable
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
    """Of a server, whole."""

    status: int
    headers: httpx.Headers
    content: bytes

    @cached_property
    def body(self) -> dict:
        """The JSON object; {} where there is none."""
        try:
            body = json.loads(self.content)
        except (ValueError, RecursionError):
            return {}
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


def message_of(body: dict) -> dict | None:
    """The message of a chat completion, the text of a completion as one; None if this is neither."""
    try:
        choice = body["choices"][0]
        message = choice["message"] if "message" in choice else {"content": choice["text"]}
        return message if isinstance(message.get("content"), str | None) else None
    except (KeyError, IndexError, TypeError, AttributeError):
        return None


def is_completion(reply: Reply) -> bool:
    return message_of(reply.body) is not None


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


def read_scores(text: str, count: int, most: int) -> list[float] | None:
    """The `count` numbers from 1 to `most` that a text says and nothing else; None where it could be read otherwise.

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
    return scores if scores and all(1 <= s <= most for s in scores) else None


def without_thoughts(reply: str) -> str:
    """A reply without the <think>…</think> in front; "" where that does not end."""
    reply = reply.strip()
    return reply.partition("</think>")[2].strip() if reply.startswith("<think>") else reply


def parse_difficulty(reply: str) -> float | None:
    """The score from 1 to 5 of a reply that says nothing else."""
    scores = read_scores(without_thoughts(reply), 1, 5)
    return scores[0] if scores else None


def parse_scores(reply: str) -> list[float] | None:
    """The two scores from 1 to 10 of a reply whose first line says nothing else."""
    return read_scores(without_thoughts(reply).split("\n", 1)[0], 2, 10)


# ---------------------------------------------------------------- waits and pace


def seconds(text: str) -> float:
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


class Pace:
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
                reset = seconds(headers[f"x-ratelimit-reset-{kind}"])
            except (KeyError, ValueError):
                continue
            scarce = remaining < need * self.concurrency and limit > remaining and 0 < reset <= LONGEST
            rate = max(limit - remaining, remaining) / reset if scarce else math.inf
            self.learned[kind] = max(rate, need / LONGEST)
            if remaining < need and reset <= LONGEST:
                self.paused_until = max(self.paused_until, time.monotonic() + reset)
