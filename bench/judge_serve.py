"""A local OpenAI-compatible judge of fixed speed, for `judge.py`.

    python bench/judge_serve.py --latency 0.05 --slots 32

Each request is held for `latency` seconds in one of `slots` slots and waits for a slot before, so
the server answers at most slots / latency requests a second, however they come. Verdicts are those
of a taxonomy, with log-probabilities. The address is printed when it listens; GET /calls tells how
many requests it has answered. It ends when its standard input is closed.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any

import click

from speciarl.core.toyworld import taxonomy as toy_taxonomy
from speciarl.judge.base import Pair
from speciarl.judge.http_retry import import_aiohttp
from speciarl.judge.prompt import LABELS, category_of
from speciarl.judge.taxonomy import Node, Taxonomy, TaxonomyJudge
from speciarl.kernels.codes import W

LIKELY, UNLIKELY = -0.01, -6.0  # log-probabilities of the verdict's label and of the others


def toy_judge() -> TaxonomyJudge:
    """The exact judge of the toy world."""
    nodes = [Node(n["name"], n["parent"], (), "toyworld") for n in toy_taxonomy()["nodes"]]
    return TaxonomyJudge(Taxonomy(nodes, origin="toyworld"))


def completion(label: str, logprobs: bool) -> dict[str, Any]:
    """A chat completion of one token."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": label}}
    if logprobs:
        top = [{"token": x, "logprob": LIKELY if x == label else UNLIKELY} for x in LABELS]
        chosen = top[LABELS.index(label)]
        choice["logprobs"] = {"content": [{**chosen, "top_logprobs": top}]}
    return {"object": "chat.completion", "choices": [choice]}


class FixedSpeed:
    """The request handlers and what they share."""

    def __init__(self, latency: float, slots: int) -> None:
        self.latency = latency
        self.free = asyncio.Semaphore(slots)
        self.judge = toy_judge()
        self.letters = {category_of(letter): letter for letter in LABELS}
        self.calls = 0

    def label_for(self, messages: Sequence[dict[str, str]]) -> str:
        """The label of the pair that the last message holds; W where it holds none."""
        try:
            pair = json.loads(messages[-1]["content"])
            verdict = self.judge.grade([Pair(pair["ground_truth"], pair["prediction"])])[0]
        except (ValueError, KeyError, TypeError):
            return self.letters[W]
        return self.letters[W if verdict.category is None else verdict.category]

    async def complete(self, request: Any) -> Any:
        """POST /v1/chat/completions."""
        body = await request.json()
        async with self.free:
            await asyncio.sleep(self.latency)
        self.calls += 1
        label = self.label_for(body["messages"])
        return import_aiohttp().web.json_response(completion(label, bool(body.get("logprobs"))))

    async def count(self, request: Any) -> Any:
        """GET /calls."""
        return import_aiohttp().web.json_response({"calls": self.calls})


async def serve(latency: float, slots: int) -> None:
    """Until standard input ends."""
    from aiohttp import web

    handlers = FixedSpeed(latency, slots)
    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", handlers.complete)])
    app.add_routes([web.get("/calls", handlers.count)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


@click.command()
@click.option("--latency", default=0.05, show_default=True, help="Seconds of every request.")
@click.option("--slots", default=32, show_default=True, help="Requests served at once.")
def main(latency: float, slots: int) -> None:
    """Serve until standard input is closed."""
    asyncio.run(serve(latency, slots))


if __name__ == "__main__":
    main()
