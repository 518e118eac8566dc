"""Requests to a server that may be slow, busy, broken or gone: one attempt, back-off, a breaker.

Every failure is a `Fault` that says what it means for the next attempt. Nothing here knows what is
asked, and nothing it raises or keeps for show holds a header, so no key can get out.
"""

import asyncio
import email.utils
import json
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")
LARGEST = 1 << 20  # bytes of an answer that are read; a verdict takes a few thousand
IDLE = 4.0  # seconds an unused connection is kept; uvicorn, which vLLM and SGLang run on, keeps 5


class Fault(Exception):
    """An attempt that brought no answer.

    reason: one word, for counting and showing. detail: what the server or the system said.
    retry: whether the same request may succeed later. outage: whether it speaks against the
    server, not against this request. wait: seconds the server wants to be left alone.
    """

    def __init__(
        self, reason: str, detail: str = "", *, retry: bool, outage: bool, wait: float = 0.0
    ) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.retry = retry
        self.outage = outage
        self.wait = wait


@dataclass(frozen=True)
class Pace:
    """How failures are met; seconds. Raises ValueError naming the field."""

    first: float = 0.5
    """Most that is waited before the first repetition; doubles with each."""
    longest: float = 30.0
    """Most that is waited before any repetition, even if the server asks for more."""
    failures: int = 8
    """Outages in a row after which the server is only probed, one request at a time."""
    patience: float = 20.0
    """How long probing holds the others up before they are given up."""
    cooldown: float = 5.0
    """After that: the time between probes, in which everything fails at once."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("first", "longest", "patience", "cooldown"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} = {getattr(self, name)}: must be finite, 0 or more")
        if self.failures < 1:
            raise ValueError(f"failures = {self.failures}: must be at least 1")


class Backoff:
    """Exponential with full jitter: uniform in [0, first x 2^n], capped.

    (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.)
    """

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self._draw = random.Random(pace.seed)

    def delay(self, repetition: int, wait: float = 0.0) -> float:
        """Seconds before the n-th repetition, n from 0; not before `wait`, as far as the cap lets.

        A server's wait is jittered upwards only, by up to a tenth.
        """
        longest = self.pace.longest
        drawn = self._draw.uniform(0, min(longest, self.pace.first * 2.0 ** min(repetition, 60)))
        return min(longest, max(drawn, wait * self._draw.uniform(1.0, 1.1)))


class Breaker:
    """Lets attempts through while the server works, and spares all of them when it does not.

    After `Pace.failures` outages in a row it opens: attempts are made one at a time, each by
    whoever is next, so that a request which is itself the trouble cannot stand for the server. One
    answer closes it. After `Pace.patience` of that the server counts as down: attempts fail at
    once as "down", except one every `Pace.cooldown`. Belongs to one event loop.
    """

    def __init__(self, pace: Pace, clock: Callable[[], float] = time.monotonic) -> None:
        self.pace = pace
        self._clock = clock
        self._backoff = Backoff(pace)
        self._turn = asyncio.Lock()
        self._failed = 0
        self._last = ""
        self._opened: float | None = None
        self._probes = 0
        self._next_probe = 0.0
        self._held_until = 0.0

    async def run(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """The result of `attempt`, when it is let through. Raises its Fault, or Fault "down"."""
        while self._opened is not None:
            async with self._turn:
                if self._opened is None:
                    break
                now = self._clock()
                if now < self._next_probe and now > self._opened + self.pace.patience:
                    raise Fault("down", self._last, retry=False, outage=False)
                await asyncio.sleep(max(0.0, self._next_probe - now))
                return await self._watched(attempt, probe=True)
        await asyncio.sleep(max(0.0, self._held_until - self._clock()))
        return await self._watched(attempt, probe=False)

    async def _watched(self, attempt: Callable[[], Awaitable[T]], probe: bool) -> T:
        try:
            result = await attempt()
        except Fault as fault:
            if fault.outage:
                self._last = str(fault)
                self._outage(probe)
            else:
                self._alive()
            if fault.wait:  # it speaks to all of us
                wait = min(fault.wait, self.pace.longest)
                self._held_until = max(self._held_until, self._clock() + wait)
            raise
        self._alive()
        return result

    def _alive(self) -> None:
        self._failed = 0
        self._opened = None

    def _outage(self, probe: bool) -> None:
        now = self._clock()
        self._failed += 1
        if self._opened is None and self._failed >= self.pace.failures:
            self._opened, self._probes, probe = now, 0, True
        if self._opened is not None and probe:
            patient = now <= self._opened + self.pace.patience
            pause = self._backoff.delay(self._probes) if patient else self.pace.cooldown
            self._next_probe = now + pause
            self._probes += 1


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date; 0 without a usable one."""
    text = headers.get("Retry-After", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def is_local(url: str) -> bool:
    """Whether `url` is on this machine, where no proxy of the environment is asked."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


class HttpClient:
    """Posts JSON to one address. Made and used inside one event loop; `close` it there.

    Proxies are those of the environment (HTTPS_PROXY, NO_PROXY, ...) except for this machine's own
    addresses. Redirects are not followed. `key` goes into the Authorization header only.
    """

    def __init__(self, url: str, key: str | None, *, connections: int, timeout: float) -> None:
        self._aiohttp = import_aiohttp()
        self._url = url
        self._timeout = timeout
        self._key = key.encode() if key else None
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self._session = self._aiohttp.ClientSession(
            headers=headers,
            trust_env=not is_local(url),
            cookie_jar=self._aiohttp.DummyCookieJar(),
            connector=self._aiohttp.TCPConnector(limit=connections, keepalive_timeout=IDLE),
            timeout=self._aiohttp.ClientTimeout(total=None),  # `post` holds the deadline
        )

    async def post(self, body: Mapping[str, Any]) -> Any:
        """The JSON of one answer: connecting, waiting and reading end within the timeout.

        Raises Fault.
        """
        try:
            async with asyncio.timeout(self._timeout):
                async with self._session.post(
                    self._url, data=json.dumps(body).encode(), allow_redirects=False
                ) as response:
                    content = self._without_key(await _read(response.content))
        except TimeoutError:
            raise Fault(
                "timeout", f"none within {self._timeout:g} s", retry=True, outage=True
            ) from None
        except self._aiohttp.ClientConnectorError as error:
            raise Fault("unreachable", str(error.os_error), retry=True, outage=True) from None
        except (self._aiohttp.ClientError, OSError, ValueError) as error:
            raise Fault("disconnected", type(error).__name__, retry=True, outage=True) from None
        if response.status != 200:
            location = response.headers.get("Location", "nowhere").encode()
            target = self._without_key(location).decode()[:200]
            raise _fault_of(response.status, response.headers, content, target)
        try:
            return json.loads(content)
        except ValueError:
            raise Fault("garbage", _shown(content), retry=True, outage=True) from None

    def _without_key(self, content: bytes) -> bytes:
        """Servers quote what they refuse."""
        return content.replace(self._key, b"***") if self._key else content

    async def close(self) -> None:
        """Closes the connections."""
        await self._session.close()


async def _read(stream: Any) -> bytes:
    content = b""
    async for chunk in stream.iter_any():
        content += chunk
        if len(content) > LARGEST:
            raise Fault("garbage", f"over {LARGEST} bytes", retry=True, outage=True)
    return content


def _fault_of(status: int, headers: Mapping[str, str], content: bytes, target: str) -> Fault:
    detail = f"HTTP {status}, {_shown(content)}"
    wait = retry_after(headers)
    if status == 429:
        return Fault("busy", detail, retry=True, outage=False, wait=wait)
    if status == 408 or status >= 500:
        return Fault("server-error", detail, retry=True, outage=True, wait=wait)
    if status in (401, 403):
        return Fault("unauthorised", detail, retry=False, outage=True)
    if status == 404:
        return Fault("not-found", detail, retry=False, outage=True)
    if 300 <= status < 400:
        return Fault("redirected", f"HTTP {status} to {target}", retry=False, outage=True)
    return Fault("rejected", detail, retry=False, outage=False)


def _shown(content: bytes) -> str:
    """The start of an answer, as one line."""
    return " ".join(content[:300].decode(errors="replace").split()) or "nothing"


def import_aiohttp() -> Any:
    """The HTTP library. Raises ImportError naming the extra that brings it."""
    try:
        import aiohttp
    except ImportError:
        raise ImportError(
            "a judge on a server needs aiohttp: pip install 'speciarl[judge]'"
        ) from None
    return aiohttp
