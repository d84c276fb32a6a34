"""One request to an OpenAI-compatible server: address and key, limits of a reply, retries, shutdown."""

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
from parts.api.replies import Reply, extract_error
from parts.cli import InputError, Interrupted, WorkError, strip_control_chars

MAX_REPLY_BYTES = 8 * 2**20
TRANSPORT_ERRORS = (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError, ValueError, asyncio.TimeoutError)
CONNECTION_ERRORS = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)
FATAL_STATUS = {401: "the key is not accepted (OPENAI_API_KEY)", 402: "the account cannot pay"}
STATUS_HINTS = {403: " (not allowed)", 404: " (no such model or address: --api-model, OPENAI_BASE_URL?)"}


class Stopped(Exception):
    """The run is shutting down; the request was not sent."""


class Refused(WorkError):
    """The server permanently refuses this request. `status`: the HTTP status."""

    def __init__(self, problem: str, status: int):
        super().__init__(problem)
        self.status = status


class NoAnswer(WorkError):
    """The retries of a request are used up. `unreachable`: because of failed connections or HTTP 429, which do not
    depend on the request."""

    def __init__(self, problem: str, unreachable: bool):
        super().__init__(problem)
        self.unreachable = unreachable


class Shutdown:
    """Whether the run is shutting down, and why (`reason`): no further request is sent, those in flight may finish."""

    def __init__(self):
        self.reason: Exception | None = None
        self.requested = asyncio.Event()

    def request(self, reason: Exception) -> None:
        self.reason = self.reason or reason
        self.requested.set()

    async def sleep(self, seconds: float) -> None:
        """Sleep; raises Stopped as soon as a shutdown is requested."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.requested.wait(), seconds)
        if self.reason:
            raise Stopped

    def on_signals(self) -> None:
        """Request a shutdown at the first SIGINT or SIGTERM; the second one ends the process immediately."""
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
            raise InputError("OPENAI_API_KEY contains characters that are not valid in a key")
        try:
            url = httpx.URL(self.base_url)
            (url.raw_host or b"").decode().encode("idna")
            usable = url.scheme in ("http", "https") and url.host and 0 < (url.port or 80) < 2**16
        except (httpx.InvalidURL, ValueError):
            usable = False
        if not usable or re.search(r"\s", self.base_url):
            raise InputError("OPENAI_BASE_URL must be an http:// or https:// address")
        login = f"{url.username}:{url.password}"
        encoded = base64.b64encode(login.encode()).decode()  # of the Authorization header
        texts = {self.key, url.username, url.password, url.userinfo.decode(), login, encoded} - {""}
        secrets = [text for text in texts if len(text) >= 8 or text == url.password]  # "x" or "EMPTY" is no secret
        self.secrets = sorted(secrets, key=len, reverse=True)

    def redact(self, text: str) -> str:
        """Replace the key, and user name and password of the address, also in their encoded forms."""
        for secret in self.secrets:
            text = text.replace(secret, "[key]")
        return text

    def sanitize(self, text: str) -> str:
        """Make text safe for messages: one line, at most 300 characters, without secrets and control characters."""
        text = re.sub(r"(?<=//)[^/\s@]+@", "", self.redact(text))
        return strip_control_chars(" ".join(text.split()))[:300]


class Transport:
    """Sends requests; `retries` counts those that were sent again."""

    def __init__(self, options: ApiOptions, credentials: Credentials, shutdown: Shutdown):
        self.options, self.credentials, self.shutdown = options, credentials, shutdown
        self.retries = 0
        try:
            self.ssl = httpx.create_ssl_context()
        except OSError as e:
            names = [f"{k}={os.environ[k]}" for k in ("SSL_CERT_FILE", "SSL_CERT_DIR") if k in os.environ]
            raise InputError(f"cannot read {' and '.join(names) or 'the certificates'}: {e.strerror or e}") from None

    def connect(self) -> httpx.AsyncClient:
        """A pool of connections. Raises InputError if the environment's proxy cannot be used."""
        headers = {"Authorization": f"Bearer {self.credentials.key}"} if self.credentials.key else {}
        headers["Accept-Encoding"] = "identity"
        timeout = httpx.Timeout(self.options.timeout, connect=15.0)
        base_url = self.credentials.base_url
        try:
            return httpx.AsyncClient(base_url=base_url, headers=headers, verify=self.ssl, timeout=timeout)
        except (ValueError, ImportError, httpx.InvalidURL) as e:
            raise InputError(self.credentials.sanitize(f"the proxy of the environment cannot be used: {e}")) from None

    async def fetch(self, http, method, path, max_bytes=MAX_REPLY_BYTES, timeouts=REPLY_TIMEOUTS, **request) -> Reply:
        """The reply to one request, of at most `max_bytes` and within `timeouts` times the timeout; `incomplete` if it
        arrived only in part. Raises one of TRANSPORT_ERRORS if nothing arrived."""
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
        still_needed: Callable[[], bool] = lambda: True,
    ) -> Reply:
        """Call `send` until its reply has status 200 and is usable.

        Retries, as the official client does, after connection errors, timeouts, 408, 409, 429, >= 500 and unusable
        replies, unless x-should-retry says otherwise. Waits 0.5 s doubling to 8 s, with jitter, or as long as the
        server asks. Raises Refused; NoAnswer after `retries` retries or if the reply is not `still_needed`; WorkError
        for what would make every request fail: 401, 402, redirections, a used-up quota, a wait above MAX_WAIT.
        """
        for failures in count():
            wait = min(0.5 * 2**failures, 8.0) * random.uniform(0.75, 1.0)
            try:
                reply = await send()
            except TRANSPORT_ERRORS as e:
                problem = self.credentials.sanitize(f"{type(e).__name__} {e}")
                unreachable = isinstance(e, CONNECTION_ERRORS)
            else:
                if reply.status == 200 and usable(reply):
                    return reply
                problem = self.describe_problem(reply)
                if not reply.incomplete and not self.should_retry(reply):
                    raise Refused(problem, reply.status)
                unreachable, wait = reply.status == 429, retry_after(reply.headers) or wait
                if wait > MAX_WAIT:
                    raise WorkError(f"no answer from the server: {problem} (it asks to wait {wait:,.0f} s)")
            if failures == retries or not still_needed():
                raise NoAnswer(f"{problem} ({failures + 1} tries)", unreachable)
            self.retries += 1
            await self.shutdown.sleep(wait)

    def describe_problem(self, reply: Reply) -> str:
        message = reply.incomplete or extract_error(reply.body).get("message") or reply.text[:200]
        return self.credentials.sanitize(f"HTTP {reply.status}{STATUS_HINTS.get(reply.status, '')}: {message}")

    def should_retry(self, reply: Reply) -> bool:
        """Whether another try of this request could succeed. Raises WorkError if every request would fail."""
        status, error = reply.status, extract_error(reply.body)
        quota = "insufficient_quota" in (error.get("code"), error.get("type"))
        if status in FATAL_STATUS or quota or 300 <= status < 400:
            reason = FATAL_STATUS.get(status, "the address answers with a redirection")
            reason = "the quota is used up" if quota else reason
            message = self.credentials.sanitize(str(error.get("message") or reply.text))[:200]
            raise WorkError(f"HTTP {status}: {reason}: {message}")
        if reply.headers.get("x-should-retry") in ("true", "false"):
            return reply.headers["x-should-retry"] == "true"
        return status in (200, 408, 409, 429) or status >= 500
