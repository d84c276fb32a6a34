"""One request to an OpenAI-compatible server: address and key, limits of a reply, retries, the end of a run."""

import asyncio
import base64
import os
import random
import re
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import count

import httpx

from parts.api.options import REPLY_TIMEOUTS, ApiOptions
from parts.api.rate_limit import MAX_WAIT, retry_after
from parts.api.replies import Reply, error_of
from parts.cli import InputError, Interrupted, WorkError, strip_control_chars

MAX_REPLY_BYTES = 8 * 2**20
TRANSPORT_ERRORS = (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError, ValueError, asyncio.TimeoutError)
UNREACHABLE = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)
FATAL = {401: "the key is not accepted (OPENAI_API_KEY)", 402: "the account cannot pay"}
HINTS = {403: " (not allowed)", 404: " (no such model or address: --api-model, OPENAI_BASE_URL?)"}


class Stopped(Exception):
    """The run ends: the request was not sent."""


class Refused(WorkError):
    """The server refuses this request, however often it is sent. `status`: the HTTP status."""

    def __init__(self, problem: str, status: int):
        super().__init__(problem)
        self.status = status


class NoAnswer(WorkError):
    """The retries of a request are used up. `unreachable`: for lack of a connection or by HTTP 429, which say nothing
    about the request itself."""

    def __init__(self, problem: str, unreachable: bool):
        super().__init__(problem)
        self.unreachable = unreachable


class Shutdown:
    """Why no further request is sent (`reason`), once that is decided. Requests in flight may finish."""

    def __init__(self):
        self.reason: Exception | None = None
        self.requested = asyncio.Event()

    def request(self, reason: Exception) -> None:
        self.reason = self.reason or reason
        self.requested.set()

    async def sleep(self, seconds: float) -> None:
        """Raises Stopped as soon as a shutdown is requested."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.requested.wait(), seconds)
        if self.reason:
            raise Stopped

    def on_signals(self) -> None:
        """Request a shutdown at the first SIGINT or SIGTERM; the second one ends the process at once."""
        signals = count(1)

        def handle():
            if next(signals) > 1:
                raise KeyboardInterrupt
            self.request(Interrupted("no further request is sent"))

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, handle)


class Credentials:
    """Address and key of the server, from OPENAI_BASE_URL and OPENAI_API_KEY. Raises InputError."""

    def __init__(self):
        self.base_url = (os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1").strip().rstrip("/")
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch(r"[!-~]*", self.key):
            raise InputError("OPENAI_API_KEY holds characters that no key has")
        try:
            url = httpx.URL(self.base_url)
            (url.raw_host or b"").decode().encode("idna")
            usable = url.scheme in ("http", "https") and url.host and 0 < (url.port or 80) < 2**16
        except (httpx.InvalidURL, ValueError):
            usable = False
        if not usable or re.search(r"\s", self.base_url):
            raise InputError("OPENAI_BASE_URL must be an http:// or https:// address")
        both = f"{url.username}:{url.password}"
        encoded = base64.b64encode(both.encode()).decode()
        found = {self.key, url.username, url.password, url.userinfo.decode(), both, encoded} - {""}
        self.secrets = [text for text in found if len(text) >= 8 or text == url.password]  # "x", "EMPTY" are no secrets
        self.secrets.sort(key=len, reverse=True)

    def redact(self, text: str) -> str:
        """The text without the key, and without name and password of the address, also as they are sent."""
        for secret in self.secrets:
            text = text.replace(secret, "[key]")
        return text

    def sanitize(self, text: str) -> str:
        """For messages: one line of at most 300 characters, without secrets and control characters."""
        text = re.sub(r"(?<=//)[^/\s@]+@", "", self.redact(text))
        return strip_control_chars(" ".join(text.split()))[:300]


class Transport:
    """Sends requests; `retries` is how many had to be sent again."""

    def __init__(self, options: ApiOptions, credentials: Credentials, shutdown: Shutdown):
        self.options, self.credentials, self.shutdown = options, credentials, shutdown
        self.retries = 0
        try:
            self.ssl = httpx.create_ssl_context()
        except OSError as e:
            names = [f"{k}={os.environ[k]}" for k in ("SSL_CERT_FILE", "SSL_CERT_DIR") if k in os.environ]
            raise InputError(f"cannot read {' and '.join(names) or 'the certificates'}: {e.strerror or e}") from None

    def connect(self) -> httpx.AsyncClient:
        """A pool of connections. Raises InputError for a proxy of the environment that cannot be used."""
        headers = {"Authorization": f"Bearer {self.credentials.key}"} if self.credentials.key else {}
        headers["Accept-Encoding"] = "identity"
        timeout = httpx.Timeout(self.options.timeout, connect=15.0)
        base_url = self.credentials.base_url
        try:
            return httpx.AsyncClient(base_url=base_url, headers=headers, verify=self.ssl, timeout=timeout)
        except (ValueError, ImportError, httpx.InvalidURL) as e:
            raise InputError(self.credentials.sanitize(f"the proxy of the environment cannot be used: {e}")) from None

    async def fetch(self, http, method, path, max_bytes=MAX_REPLY_BYTES, timeouts=REPLY_TIMEOUTS, **request) -> Reply:
        """The reply to one request: of at most `max_bytes`, within so many `timeouts`; `incomplete` where only a part
        of it came. Raises one of TRANSPORT_ERRORS where nothing came."""
        reply = Reply(0, httpx.Headers(), bytearray())

        async def read() -> None:
            async with http.stream(method, path, **request) as response:
                reply.status, reply.headers = response.status_code, response.headers
                async for chunk in response.aiter_bytes():
                    reply.content += chunk
                    if len(reply.content) > max_bytes:
                        raise httpx.StreamError(f"the reply is longer than {max_bytes:,} bytes")

        try:
            await asyncio.wait_for(read(), timeouts * self.options.timeout)
        except TRANSPORT_ERRORS as e:
            if not reply.status:
                raise
            reply.incomplete = f"{type(e).__name__} {e}"
        return reply

    async def retry(
        self,
        send: Callable[[], Awaitable[Reply]],
        retries: int,
        usable: Callable[[Reply], bool] = lambda reply: not reply.incomplete,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Reply:
        """Call `send` until its reply has status 200 and is usable.

        Tries again, as the official client does, after connection errors, timeouts, 408, 409, 429, >= 500 and unusable
        replies, unless x-should-retry says otherwise. Waits 0.5 s doubling to 8 s, with jitter, or as long as the
        server asks. Raises Refused; NoAnswer after so many `retries` or when the reply is no longer `wanted`; WorkError
        for what would fail every request: 401, 402, redirections, a used-up quota, a wait above MAX_WAIT.
        """
        for failures in count():
            wait = min(0.5 * 2**failures, 8.0) * random.uniform(0.75, 1.0)
            try:
                reply = await send()
            except TRANSPORT_ERRORS as e:
                problem = self.credentials.sanitize(f"{type(e).__name__} {e}")
                unreachable = isinstance(e, UNREACHABLE)
            else:
                if reply.status == 200 and usable(reply):
                    return reply
                problem = self.problem_of(reply)
                if not reply.incomplete and self.is_final(reply):
                    raise Refused(problem, reply.status)
                unreachable, wait = reply.status == 429, retry_after(reply.headers) or wait
                if wait > MAX_WAIT:
                    raise WorkError(f"no answer from the server: {problem} (it asks to wait {wait:,.0f} s)")
            if failures == retries or not wanted():
                raise NoAnswer(f"{problem} ({failures + 1} tries)", unreachable)
            self.retries += 1
            await self.shutdown.sleep(wait)

    def problem_of(self, reply: Reply) -> str:
        said = reply.incomplete or error_of(reply.body).get("message") or reply.text[:200]
        return self.credentials.sanitize(f"HTTP {reply.status}{HINTS.get(reply.status, '')}: {said}")

    def is_final(self, reply: Reply) -> bool:
        """Whether another try of this request is pointless. Raises WorkError where it is so for every request."""
        status, error = reply.status, error_of(reply.body)
        quota = "insufficient_quota" in (error.get("code"), error.get("type"))
        if status in FATAL or quota or 300 <= status < 400:
            reason = "the quota is used up" if quota else FATAL.get(status, "the address answers with a redirection")
            said = self.credentials.sanitize(str(error.get("message") or reply.text))[:200]
            raise WorkError(f"HTTP {status}: {reason}: {said}")
        if reply.headers.get("x-should-retry") in ("true", "false"):
            return reply.headers["x-should-retry"] == "false"
        return not (status in (200, 408, 409, 429) or status >= 500)
