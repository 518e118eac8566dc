"""A server that is down, dies and returns, and a grader that is killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from badserver import BadServer, expected, pairs_of
from speciarl.judge.cache import CachedJudge, VerdictCache
from speciarl.judge.http_retry import Pace
from speciarl.judge.server import ServerJudge

FAST = Pace(first=0.004, longest=0.05, failures=8, patience=0.3, cooldown=0.1)


def judge_of(server: BadServer, **options: Any) -> ServerJudge:
    settings = {"timeout": 5.0, "pace": FAST, "retries": 4, "concurrency": 16}
    return ServerJudge(server.base_url, "m", **{**settings, **options})


@pytest.mark.parametrize("act", ["hang", "reset", "500", "401"])
def test_a_server_that_does_not_work_costs_bounded_time(act: str) -> None:
    """2,560 pairs, as of a step: not retries x timeouts x pairs."""
    pairs = pairs_of(2560)
    with BadServer(lambda pair, nth: act) as server:
        judge = judge_of(server, timeout=0.15)
        start = time.perf_counter()
        verdicts = judge.grade(pairs)
        seconds = time.perf_counter() - start
        assert {v.category for v in verdicts} == {None}
        assert seconds < 20 and sum(server.asked.values()) < 150
        # And the next groups, while it still does not, cost next to nothing.
        start, before = time.perf_counter(), sum(server.asked.values())
        for at in range(0, 400, 10):
            judge.grade(pairs[at : at + 10])
        seconds = time.perf_counter() - start
        assert seconds < 10
        assert sum(server.asked.values()) - before <= 2 + seconds / FAST.cooldown
        judge.close()
    assert Counter(v.source for v in verdicts)["down"] > 2400


def test_a_server_that_was_never_there() -> None:
    with BadServer() as server:
        server.stop()
        judge = judge_of(server, retries=1)
        start = time.perf_counter()
        with pytest.raises(ConnectionError, match="unreachable.*Connect.*is it running"):
            judge.check(["robin"])
        assert {v.source for v in judge.grade(pairs_of(500))} == {"unreachable", "down"}
        assert time.perf_counter() - start < 10
        server.start()
        judge.close()


def test_a_server_that_dies_and_returns() -> None:
    """In the middle of a batch; only what is left is asked again."""
    pairs = pairs_of(200)
    with BadServer(lambda pair, nth: "late:0.02") as server:
        judge = judge_of(server)
        verdicts = {}
        for index, verdict in judge.grade_each(pairs):
            verdicts[index] = verdict
            if len(verdicts) == 60:
                server.stop()
        judged = {i for i, v in verdicts.items() if v.category is not None}
        assert 60 <= len(judged) < 180 and len(verdicts) == 200
        server.start()
        time.sleep(2 * FAST.cooldown)
        before = Counter(server.answered)
        left = [i for i in range(200) if i not in judged]
        again = judge.grade([pairs[i] for i in left])
        judge.close()
    assert [v.category for v in again] == [expected(pairs[i]) for i in left]
    assert set((server.answered - before).values()) == {1}
    assert all(verdicts[i].category == expected(pairs[i]) for i in judged)


def test_a_server_that_is_away_for_a_moment_costs_no_verdict() -> None:
    pairs = pairs_of(200)
    with BadServer(lambda pair, nth: "late:0.003") as server:
        judge = judge_of(server, retries=8, pace=Pace(0.01, 0.1, patience=5.0))
        found = {}
        for index, verdict in judge.grade_each(pairs):
            found[index] = verdict.category
            if len(found) == 50:
                server.stop()
                threading.Timer(0.2, server.start).start()
        judge.close()
    assert found == {i: expected(pair) for i, pair in enumerate(pairs)}
    assert set(server.answered.values()) == {1}


GRADE = """
import sys
from pathlib import Path
from speciarl.judge.base import Pair
from speciarl.judge.cache import CachedJudge, VerdictCache
from speciarl.judge.server import ServerJudge

judge = ServerJudge(sys.argv[1], "m", concurrency=8, timeout=5.0)
cached = CachedJudge(judge, VerdictCache(Path(sys.argv[2])))
cached.grade([Pair(f"truth {i}", f"answer {i}") for i in range(300)])
"""


def test_a_kill_loses_at_most_the_verdicts_in_flight(tmp_path: Path) -> None:
    pairs = pairs_of(300)
    with BadServer(lambda pair, nth: "late:0.01") as server:
        grader = subprocess.Popen(
            [sys.executable, "-c", GRADE, server.base_url, str(tmp_path / "verdicts.sqlite")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        wait_for(lambda: sum(server.answered.values()) >= 80 or grader.poll() is not None)
        grader.send_signal(signal.SIGKILL)
        assert grader.wait() == -signal.SIGKILL
        server.stop()
        before, asked = Counter(server.answered), Counter(server.asked)
        server.start()
        cached = CachedJudge(judge_of(server), VerdictCache(tmp_path / "verdicts.sqlite"))
        verdicts = cached.grade(pairs)
        counts = cached.tally()
        cached.close()
    assert [v.category for v in verdicts] == [expected(p) for p in pairs]
    lost = sum(before.values()) - counts["by_cache"]
    # A verdict is on its way from the server's answer to its row in the file.
    assert 0 <= lost <= 2 * 8 and counts["by_cache"] >= 60
    assert sum((server.asked - asked).values()) == 300 - counts["by_cache"]


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.perf_counter() + seconds
    while not condition() and time.perf_counter() < end:
        time.sleep(0.002)
