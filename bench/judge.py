"""What judging a run costs: model calls and seconds of three ways to use one server.

The work is that of a recorded toy run (judge_pairs.json, made by judge_record.py): 20 steps of
2,560 completions, 256 images x 10. The server (judge_serve.py) runs in a process of its own and
takes --latency seconds for a request, --slots at a time; its verdicts are those of the taxonomy.
All ways ask it with the same client, up to --slots requests at once:

    each        every completion is a request
    published   one blocking request a step: its distinct pairs are looked up in a key-value store
                that lasts from step to step, and the missing ones are asked in chunks of 32, one
                call a pair, each chunk when the one before is done (SpeciaRL's judge service)
    cold        ours, with an empty cache file: rules, equal pairs, cache, server; groups are graded
                by threads, as they are in a run
    warm        ours again, a new run on the file that cold has left
    overlapped  ours, with an empty cache file, while the step is still generating: its groups come
                evenly over --generate seconds, and what counts is what is left after the last one

All but the first are repeated; the run of median time is shown.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click

from speciarl.bench.judge_record import Groups, load_steps
from speciarl.bench.judge_report import Measured, Result, middle, ratios, show
from speciarl.bench.judge_serve import toy_judge
from speciarl.judge.base import Judge, Pair
from speciarl.judge.registry import build_judge
from speciarl.judge.server import ServerJudge
from speciarl.judge.settings import JudgeConfig
from speciarl.judge.unique import canonical

PAIRS = Path(__file__).resolve().parent / "judge_pairs.json"
SERVE = Path(__file__).resolve().parent / "judge_serve.py"
CHUNK = 32  # of the published service
MODEL = "fixed-speed"

Grade = Callable[[Groups], tuple[list[int | None], float]]
"""Categories of all pairs of a step, and the seconds that count."""


class Server:
    """The address of the server, and what it has counted."""

    def __init__(self, address: str) -> None:
        self.address = address

    def config(self, slots: int) -> JudgeConfig:
        """Settings that all ways share."""
        return JudgeConfig(
            "openai",
            model=MODEL,
            base_url=f"{self.address}/v1",
            key_env="NO_KEY",
            concurrency=slots,
            cache="auto",
        )

    def judge(self, slots: int) -> ServerJudge:
        """The client alone."""
        config = self.config(slots)
        return ServerJudge(
            config.base_url, MODEL, key_env=config.key_env, concurrency=config.concurrency
        )

    def calls(self) -> int:
        """Requests answered so far."""
        with urllib.request.urlopen(f"{self.address}/calls") as answer:
            return json.load(answer)["calls"]


@contextmanager
def serving(latency: float, slots: int) -> Iterator[Server]:
    """The server in a process of its own."""
    command = [sys.executable, str(SERVE), "--latency", str(latency), "--slots", str(slots)]
    env = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdin and process.stdout
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"the server did not start: exit code {process.wait()}")
        yield Server(address)
    finally:
        process.stdin.close()
        process.wait()


def each_pair(judge: ServerJudge) -> Grade:
    """Every completion is a request."""

    def grade(groups: Groups) -> tuple[list[int | None], float]:
        start = time.perf_counter()
        verdicts = judge.grade([pair for group in groups for pair in group])
        seconds = time.perf_counter() - start
        return [verdict.category for verdict in verdicts], seconds

    return grade


def published(judge: ServerJudge) -> Grade:
    """Distinct pairs, a store over all steps, misses in chunks, one chunk after another."""
    store: dict[Pair, int | None] = {}

    def grade(groups: Groups) -> tuple[list[int | None], float]:
        start = time.perf_counter()
        keys = [Pair(p.truth, canonical(p.prediction)) for group in groups for p in group]
        missing = [key for key in dict.fromkeys(keys) if key not in store]
        for at in range(0, len(missing), CHUNK):
            chunk = missing[at : at + CHUNK]
            verdicts = judge.grade(chunk)
            store.update({k: v.category for k, v in zip(chunk, verdicts, strict=True)})
        return [store[key] for key in keys], time.perf_counter() - start

    return grade


def measure(steps: Sequence[Groups], grade: Grade, server: Server) -> Result:
    """Grades all steps, one after another."""
    exact = toy_judge()
    before, seconds, faults, unlike = server.calls(), [], 0, 0
    for groups in steps:
        found, taken = grade(groups)
        seconds.append(taken)
        right = exact.grade([pair for group in groups for pair in group])
        faults += found.count(None)
        unlike += sum(a != b.category for a, b in zip(found, right, strict=True))
    pairs = sum(len(group) for groups in steps for group in groups)
    return Result(pairs, server.calls() - before, seconds, {}, faults, unlike)


def in_groups(judge: Judge, pool: ThreadPoolExecutor, over: float) -> Grade:
    """Groups go to the pool evenly `over` so many seconds; the time counts from the last one."""

    def grade(groups: Groups) -> tuple[list[int | None], float]:
        start, waiting = time.perf_counter(), []
        for i, group in enumerate(groups, 1):
            if over:
                time.sleep(max(0.0, start + over * i / len(groups) - time.perf_counter()))
            waiting.append(pool.submit(judge.grade, group))
        if over:
            start = time.perf_counter()
        found = [v.category for future in waiting for v in future.result()]
        return found, time.perf_counter() - start

    return grade


def measure_ours(
    steps: Sequence[Groups], server: Server, slots: int, folder: Path, over: float = 0.0
) -> Result:
    """Ours, with the cache file in `folder`; starting and checking are not timed."""
    config = server.config(slots)
    truths = sorted({pair.truth for groups in steps for group in groups for pair in group})
    file = folder / "verdicts.sqlite"
    judge = build_judge(config, names=toy_judge().taxonomy.names, cache=file)
    judge.check(truths)
    before = judge.tally()
    with ThreadPoolExecutor(config.threads) as pool:
        result = measure(steps, in_groups(judge, pool, over), server)
    after = judge.tally()
    judge.close()
    result.counts = {name: value - before.get(name, 0) for name, value in after.items()}
    return result


def measure_plain(
    steps: Sequence[Groups], server: Server, slots: int, way: Callable[[ServerJudge], Grade]
) -> Result:
    """A way that uses the client alone."""
    judge = server.judge(slots)
    judge.check([])
    result = measure(steps, way(judge), server)
    judge.close()
    return result


def measure_all(
    steps: Sequence[Groups], latency: float, slots: int, generate: float, repeats: int
) -> Measured:
    """All ways on one server, one after another."""
    runs: Measured = {"each": [], "published": [], "cold": [], "warm": [], "overlapped": []}
    with serving(latency, slots) as server:
        runs["each"].append(measure_plain(steps, server, slots, each_pair))
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as name:
                first, second = Path(name) / "first", Path(name) / "second"
                runs["published"].append(measure_plain(steps, server, slots, published))
                runs["cold"].append(measure_ours(steps, server, slots, first))
                runs["warm"].append(measure_ours(steps, server, slots, first))
                runs["overlapped"].append(measure_ours(steps, server, slots, second, generate))
    return runs


@click.command(
    epilog="""\b
Examples:
  python bench/judge.py
  python bench/judge.py --steps 2 --latency 0.005 --generate 0.2 --repeats 1
  python bench/judge.py --latency 0.2 --slots 64 --json results.json"""
)
@click.option(
    "--pairs",
    "file",
    default=PAIRS,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Record of a run, as judge_record.py writes it.",
)
@click.option("--steps", default=0, help="Only so many steps of it; 0: all.")
@click.option("--latency", default=0.05, show_default=True, help="Seconds of a request.")
@click.option("--slots", default=32, show_default=True, help="Requests served at once.")
@click.option("--generate", default=1.0, show_default=True, help="Seconds a step generates.")
@click.option("--repeats", default=3, show_default=True, help="Runs of all ways but the first.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    file: Path,
    steps: int,
    latency: float,
    slots: int,
    generate: float,
    repeats: int,
    json_file: Path | None,
) -> None:
    """Model calls and verdicts per second of ours, of one call a pair, and of the published way.

    The default takes about four minutes, nearly two of them for one call a pair.
    """
    work = load_steps(file)[: steps or None]
    machine = f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}"
    click.echo(
        f"{len(work)} steps of {file.name}; server: {latency:g} s a request, {slots} at once, "
        f"{slots / latency:g} requests/s; {machine}"
    )
    runs = measure_all(work, latency, slots, generate, repeats)
    results = {name: middle(done) for name, done in runs.items()}
    show(results)
    if json_file is not None:
        record = {
            "machine": machine,
            "steps": len(work),
            "latency": latency,
            "slots": slots,
            "generate": generate,
            "ways": {name: [asdict(run) for run in done] for name, done in runs.items()},
            "ratios": ratios(results),
        }
        json_file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
