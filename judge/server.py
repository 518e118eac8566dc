"""Judges on a server that speaks OpenAI's chat protocol: vLLM, SGLang, or a hosted one."""

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from speciarl.judge.base import Pair, Verdict, in_order
from speciarl.judge.http_retry import Backoff, Breaker, Fault, HttpClient, Pace, import_aiohttp
from speciarl.judge.loop_thread import LoopThread
from speciarl.judge.prompt import DEFAULT_VARIANT, messages, prompt_id
from speciarl.judge.replies import Plan, verdict_in
from speciarl.judge.server_probe import explained, explore
from speciarl.judge.tally import Tally

T = TypeVar("T")


class Run(Protocol):
    """Awaits the result of an attempt. Raises Fault."""

    async def __call__(self, attempt: Callable[[], Awaitable[T]]) -> T: ...


class ServerJudge:
    """One request a pair, many at a time, from a thread of its own.

    Args:
        base_url: address up to and with "/v1".
        model: name under which the server serves it. It stands for the weights in the identity of
            the judge, the address does not: give other weights another name.
        key_env: environment variable that holds the key; none is sent where it is not set.
        concurrency: requests under way at once, over all threads that call.
        timeout: seconds from connecting to the last byte of an answer.
        retries: repetitions of a request that failed but may succeed.
        variant: wording of the prompt, one of `prompt.VARIANTS`.
        pace: waits between repetitions, and when a server counts as down.

    A pair takes at most (retries + 1) x timeout and the waits between. A pair whose request fails
    for good gets category None and the reason as its source: timeout, unreachable, disconnected,
    busy, server-error, garbage, no-label, unauthorised, not-found, redirected, rejected, or down
    (not asked, because the server did not work). Reasons are counted as "fault_<reason>".

    Until `check` has found out what the server offers, it is asked for log-probabilities and
    otherwise unconstrained. Proxies of the environment are used, except for this machine's
    addresses. Raises ValueError naming the argument, ImportError where aiohttp is missing.
    """

    concurrent = True

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_env: str = "OPENAI_API_KEY",
        concurrency: int = 32,
        timeout: float = 30.0,
        retries: int = 6,
        variant: str = DEFAULT_VARIANT,
        pace: Pace | None = None,
    ) -> None:
        self.identity = f"openai:{model}:{prompt_id(variant)}"
        self._url = _completions_url(base_url)
        self._model = model
        self._key_env = key_env
        _require("model", model, bool(model.strip()), "name a model of the server")
        _require("concurrency", concurrency, concurrency >= 1, "must be at least 1")
        _require("timeout", timeout, 0 < timeout < float("inf"), "must be above 0 and finite")
        _require("retries", retries, retries >= 0, "must not be negative")
        self._key = _key(key_env)
        import_aiohttp()
        self._concurrency = concurrency
        self._timeout = timeout
        self._retries = retries
        self._variant = variant
        self._counts = Tally()
        for name in ("pairs", "faults", "model_calls", "retries", "queue_seconds"):
            self._counts.add(name, 0)
        self._plan = Plan()
        self._client: HttpClient | None = None
        pace = pace or Pace()
        self._backoff = Backoff(pace)
        self._breaker = Breaker(pace)
        self._slots = asyncio.Semaphore(concurrency)
        self._thread = LoopThread(f"judge {model}", self._close_client)

    def check(self, truths: Iterable[str]) -> None:
        """Finds out what the server offers, with a few requests.

        Raises ValueError for an empty truth, or for a server or model that cannot judge;
        PermissionError where the key is refused; ConnectionError where nothing answers.
        """
        for truth in truths:
            if not truth.strip():
                raise ValueError(f"truth {truth!r}: an empty truth cannot be judged against")
        try:
            probe = explore(self._model, self._variant, self._ask)
            self._plan = self._thread.submit(probe).result()
        except Fault as fault:
            raise explained(fault, self._url, self._model, self._key_env, bool(self._key)) from None

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict a pair, in order; category None where there is none. Any thread may call."""
        return in_order(len(pairs), self.grade_each(pairs))

    def grade_each(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Verdict]]:
        """(index, verdict) as verdicts arrive, each index once. Left early, it asks no more.

        Raises RuntimeError if the judge is closed.
        """
        if not pairs:
            return
        done: SimpleQueue[tuple[int, Verdict] | None] = SimpleQueue()
        work = self._thread.submit(self._grade_all(list(pairs), done.put))
        try:
            for _ in pairs:
                verdict = done.get()
                if verdict is None:
                    work.result()
                    raise RuntimeError("grading ended without all verdicts")
                yield verdict
        except CancelledError:
            raise RuntimeError("the judge was closed while grading") from None
        finally:
            work.cancel()

    def tally(self) -> dict[str, float]:
        """`Judge.tally`; "model_calls" are requests, "retries" those of them that repeat one,
        "request_seconds" their summed time."""
        return self._counts.snapshot()

    def sleep(self) -> None:
        """Nothing on this machine to release."""

    def wake(self) -> None:
        """Always awake."""

    def close(self) -> None:
        """Drops requests under way, closes connections, and ends the thread."""
        self._thread.close()

    # Below, everything runs in the loop's thread.

    async def _grade_all(
        self, pairs: Sequence[Pair], put: Callable[[tuple[int, Verdict] | None], None]
    ) -> None:
        async def one(index: int, pair: Pair) -> None:
            put((index, await self._verdict(pair)))

        try:
            async with asyncio.TaskGroup() as tasks:
                for index, pair in enumerate(pairs):
                    tasks.create_task(one(index, pair))
        finally:
            put(None)

    async def _verdict(self, pair: Pair) -> Verdict:
        self._counts.add("pairs")
        try:
            if not pair.truth.strip():
                raise Fault("empty-truth", retry=False, outage=False)
            body = self._plan.body(self._model, messages(pair, self._variant))
            return await self._insist(
                body,
                lambda reply: verdict_in(reply, self._variant),
                self._breaker.run,
                self._retries,
            )
        except Fault as fault:
            self._counts.add("faults")
            self._counts.add(f"fault_{fault.reason}")
            return Verdict(None, fault.reason)

    async def _insist(
        self, body: dict[str, Any], read: Callable[[Any], T], run: Run, retries: int
    ) -> T:
        """What `read` makes of the answer to `body`, asked up to 1 + `retries` times.

        run: makes an attempt, or refuses to. Raises the Fault of the last attempt.
        """
        fault: Fault | None = None
        for repetition in range(retries + 1):
            asked = time.perf_counter()
            try:
                async with self._slots:
                    self._counts.add("queue_seconds", time.perf_counter() - asked)
                    return await run(self._request(body, read, repetition > 0))
            except Fault as new:
                # The pair's own fault says more than that the server is given up.
                fault = fault if fault and new.reason == "down" else new
                if not new.retry or repetition == retries:
                    break
            await asyncio.sleep(self._backoff.delay(repetition, fault.wait))
        assert fault is not None
        raise fault

    async def _ask(self, body: dict[str, Any], read: Callable[[Any], T], once: bool) -> T:
        """As `explore` asks: past the breaker, so that it hears what the server says now."""
        return await self._insist(body, read, _straight, 1 if once else self._retries)

    def _request(
        self, body: dict[str, Any], read: Callable[[Any], T], again: bool
    ) -> Callable[[], Awaitable[T]]:
        async def request() -> T:
            if self._client is None:
                self._client = HttpClient(
                    self._url, self._key, connections=self._concurrency, timeout=self._timeout
                )
            self._counts.add("model_calls")
            self._counts.add("retries", float(again))
            start = time.perf_counter()
            try:
                return read(await self._client.post(body))
            finally:
                self._counts.add("request_seconds", time.perf_counter() - start)

        return request

    async def _close_client(self) -> None:
        if self._client is not None:
            await self._client.close()


async def _straight(attempt: Callable[[], Awaitable[T]]) -> T:
    return await attempt()


def _require(name: str, value: object, holds: bool, hint: str) -> None:
    if not holds:
        raise ValueError(f"{name} = {value!r}: {hint}")


def _completions_url(base_url: str) -> str:
    """The address that is posted to. Raises ValueError, without showing credentials."""
    if re.search(r"[@?#]", base_url):
        raise ValueError(
            "base_url carries a user name, key or query: put the key into an environment "
            "variable and name that in key_env"
        )
    try:
        parts = urlsplit(base_url)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise ValueError(f"base_url = {base_url!r}: expected http://HOST:PORT/v1") from None
    if parts.scheme not in ("http", "https") or not has_host:
        raise ValueError(f"base_url = {base_url!r}: expected http://HOST:PORT/v1")
    return base_url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"


def _key(key_env: str) -> str | None:
    """Raises ValueError, without showing the value, for one that no header can carry."""
    key = os.environ.get(key_env, "").strip() if key_env else ""
    if not re.fullmatch(r"[!-~]*", key):
        raise ValueError(
            f"key_env = {key_env!r}: the value of this variable is no key, it holds blanks or "
            "characters that no header can carry"
        )
    return key or None
