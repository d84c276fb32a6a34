"""When the next request may be sent: limits per minute, and the rate-limit headers of the server."""

import math
import re
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

import httpx

MAX_WAIT = 120  # in seconds; a server that asks for a longer wait ends the run


def parse_seconds(text: str) -> float:
    """Durations of rate-limit headers: 1s, 6m0s, 250ms, 1h2m3.5s or plain seconds. Raises ValueError."""
    if not re.fullmatch(r"(\d+(\.\d*)?(ms|s|m|h|d))+|\d+(\.\d*)?", text.strip()):
        raise ValueError(text)
    parts = re.findall(r"([\d.]+)(ms|s|m|h|d)?", text.strip())
    return sum(float(n) * {"ms": 1e-3, "": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[unit] for n, unit in parts)


def retry_after(headers: httpx.Headers) -> float | None:
    """The seconds that the server asks to wait, or None."""
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
    """Spaces requests to stay within `rpm` and `tpm` (requests and tokens per minute) and within the limits in the
    server's headers. `sleep(seconds)` may raise to end a wait."""

    def __init__(self, rpm: float, tpm: float, concurrency: int, sleep: Callable[[float], Awaitable[None]]):
        self.concurrency, self.sleep = concurrency, sleep
        self.limits = {"requests": rpm / 60, "tokens": tpm / 60}  # per second
        self.learned = {"requests": math.inf, "tokens": math.inf}  # per second
        self.next_free = {"requests": 0.0, "tokens": 0.0}
        self.paused_until = 0.0

    async def wait(self, tokens: int) -> None:
        """Wait until a request of `tokens` tokens may be sent."""
        start = now = time.monotonic()
        for kind, need in (("requests", 1), ("tokens", tokens)):
            start = max(start, self.next_free[kind])
            rate = min(self.limits[kind], self.learned[kind])
            self.next_free[kind] = max(now, self.next_free[kind]) + need / rate
        while (wait := max(start, self.paused_until) - time.monotonic()) > 0:
            await self.sleep(min(wait, 60.0))

    def learn(self, headers: httpx.Headers, tokens: int) -> None:
        """Learn the rate from the x-ratelimit-* headers: the used part of the limit is refilled within the reset time,
        or all of it at the end of that time. A reset later than MAX_WAIT, such as an epoch, is ignored."""
        for kind, need in (("requests", 1), ("tokens", tokens)):
            try:
                limit, remaining = (float(headers[f"x-ratelimit-{k}-{kind}"]) for k in ("limit", "remaining"))
                reset = parse_seconds(headers[f"x-ratelimit-reset-{kind}"])
            except (KeyError, ValueError):
                continue
            scarce = remaining < need * self.concurrency and limit > remaining and 0 < reset <= MAX_WAIT
            rate = max(limit - remaining, remaining) / reset if scarce else math.inf
            self.learned[kind] = max(rate, need / MAX_WAIT)
            if remaining < need and reset <= MAX_WAIT:
                self.paused_until = max(self.paused_until, time.monotonic() + reset)
