"""A real HTTP server that speaks OpenAI's chat protocol and misbehaves on purpose, per request.

    with BadServer(lambda pair, nth: "hang" if nth == 0 else "good") as server:
        judge = ServerJudge(server.base_url, "m", timeout=0.05)

A script names what the nth request (from 0) for a pair meets:

    good            the verdict of `expected(pair)`, as the request asks for it
    late:SECONDS    good, after a while
    STATUS[:VALUE]  an error status with Retry-After: VALUE, or a redirection to VALUE
    hang            nothing, ever
    drip            a good answer, a byte every 5 ms
    reset, reset-body          the connection is reset before, in the middle of the answer
    half-close, half-body      the server ends its side in the middle of the head, of the body
    garbage, endless, not-json, not-chat, no-choices, no-content
    wrong-label, two-labels

`stop` and `start` let it die and return on the same port.
"""

from __future__ import annotations

import asyncio
import json
import threading
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from badwire import ANSWERS, BREAKS, reset, send
from speciarl.judge.base import Pair
from speciarl.judge.prompt import DEFAULT_VARIANT, LABELS, category_of

Script = Callable[[Pair, int], str]
GUIDE_FIELDS = ("structured_outputs", "guided_choice", "regex", "response_format")


def expected(pair: Pair) -> int:
    """The category that the server gives, a different one for most pairs."""
    return zlib.crc32(f"{pair.truth}|{pair.prediction}".encode()) % 6


def pairs_of(count: int) -> list[Pair]:
    """Distinct pairs; `number` tells which one of them."""
    return [Pair(f"truth {i}", f"answer {i}") for i in range(count)]


def number(pair: Pair) -> int:
    return int(pair.truth.split()[1])


def good(pair: Pair, nth: int) -> str:
    """The script of a server that works."""
    return "good"


class BadServer:
    """Serves from a thread of its own.

    Args:
        script: what each request meets.
        logprobs: whether it knows them, and how many at most.
        guide: the field by which it constrains answers, if any.
        strict: refuses fields that it does not know, and does not ignore them.
        key: wanted in the Authorization header.
        system: whether its template takes a system text.
        chatty: answers in words, unless it is constrained.

    asked: requests for each pair. answered: good answers sent in full for each. busiest: most
    requests at once. bodies: of all requests.
    """

    def __init__(
        self,
        script: Script = good,
        *,
        logprobs: int = 20,
        guide: str = "",
        strict: bool = False,
        key: str = "",
        system: bool = True,
        chatty: bool = False,
    ) -> None:
        self.script = script
        self.logprobs = logprobs
        self.guide = guide
        self.strict = strict
        self.key = key
        self.system = system
        self.chatty = chatty
        self.asked: Counter[Pair] = Counter()
        self.answered: Counter[Pair] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.busy = self.busiest = self.connections = 0
        self._port = 0
        self._server: asyncio.Server
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="badserver")

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> BadServer:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def start(self) -> None:
        """Listens, on the port it had before."""
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    def stop(self) -> None:
        """Dies: open connections are reset, new ones refused."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        for writer in list(self._writers):
            reset(writer)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self.connections += 1
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and what it meets; whether the connection goes on."""
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        head = {name.lower(): value for name, _, value in (x.partition(": ") for x in lines)}
        size = int(head["content-length"])
        body = json.loads(await reader.readexactly(size))
        self.bodies.append(body)
        sent = head.get("authorization", "")
        if self.key and sent != f"Bearer {self.key}":
            await send(writer, {"error": f"this key is wrong: {sent}"}, 401)
            return True
        pair = _pair_of(body)
        nth = 0
        if pair is not None:
            nth = self.asked[pair]
            self.asked[pair] += 1
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        try:
            return await self._act(self.script(pair or Pair("", ""), nth), pair, body, writer)
        finally:
            self.busy -= 1

    async def _act(
        self, act: str, pair: Pair | None, body: dict[str, Any], writer: asyncio.StreamWriter
    ) -> bool:
        name, _, value = act.partition(":")
        if name in BREAKS:
            return await BREAKS[name](writer, self._completion(pair, body))
        if name in ANSWERS:
            await send(writer, ANSWERS[name])
            return True
        if name.isdigit():
            field = "Location" if name.startswith("3") else "Retry-After"
            headers = {field: value} if value else {}
            await send(writer, {"error": {"message": "not now"}}, int(name), headers)
            return True
        if name == "late":
            await asyncio.sleep(float(value))
        elif name != "good":
            raise ValueError(f"no such act: {act}")
        if (problem := self._problem(body)) is not None:
            await send(writer, {"error": {"message": problem}}, 400)
            return True
        await send(writer, self._completion(pair, body))
        if pair is not None:
            self.answered[pair] += 1
        return True

    def _problem(self, body: dict[str, Any]) -> str | None:
        if not self.system and body["messages"][0]["role"] == "system":
            return "System role not supported"
        if body.get("top_logprobs", 0) > self.logprobs > 0:
            return f"top_logprobs must be at most {self.logprobs}"
        if self.strict:
            unknown = {f for f in GUIDE_FIELDS if f in body} - {self.guide}
            unknown |= {"logprobs"} if body.get("logprobs") and not self.logprobs else set()
            if unknown:
                return f"unknown fields: {', '.join(sorted(unknown))}"
        return None

    def _completion(self, pair: Pair | None, body: dict[str, Any]) -> dict[str, Any]:
        guided = bool(self.guide) and self.guide in body
        codes = [category_of(letter, DEFAULT_VARIANT) for letter in LABELS]
        letter = LABELS[codes.index(expected(pair))] if pair else "F"
        text = letter if pair or guided else "hello"
        if self.chatty and not guided:
            text = f"The answer is {letter}"
        if guided and self.guide == "response_format":
            text = json.dumps({"label": letter})
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}}
        if body.get("logprobs") and self.logprobs:
            first = {"token": text.split()[0], "logprob": -0.2}
            others = [" A", *(x for x in LABELS if x != letter), "The"]
            rest = [{"token": x, "logprob": -3.0 - i} for i, x in enumerate(others)]
            listed = [first, *rest] if pair or guided else [first]
            first = {**first, "top_logprobs": listed[: body["top_logprobs"]]}
            choice["logprobs"] = {"content": [first]}
        return {"id": "x", "object": "chat.completion", "choices": [choice]}


def _pair_of(body: dict[str, Any]) -> Pair | None:
    """The pair that a request asks about; None for one that asks about none."""
    last = body["messages"][-1]["content"].splitlines()[-1]
    try:
        pair = json.loads(last)
    except ValueError:
        return None
    return Pair(pair["ground_truth"], pair["prediction"])
