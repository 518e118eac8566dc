"""The judge on a server that misbehaves: what can be judged is judged once, the rest is None."""

import random
import threading
import time
from typing import Any

import pytest

from badserver import BadServer, expected, number, pairs_of
from speciarl.judge.base import Pair
from speciarl.judge.http_retry import Pace
from speciarl.judge.server import ServerJudge

FAST = Pace(first=0.004, longest=0.05, failures=8, patience=0.3, cooldown=0.1)
# What can go wrong, and the reason that is given when it goes on.
PASSING = {
    "hang": "timeout",
    "drip": "timeout",
    "reset": "disconnected",
    "reset-body": "disconnected",
    "half-close": "disconnected",
    "half-body": "disconnected",
    "garbage": "disconnected",
    "not-json": "garbage",
    "not-chat": "garbage",
    "no-choices": "garbage",
    "endless": "garbage",
    "no-content": "no-label",
    "wrong-label": "no-label",
    "two-labels": "no-label",
    "429": "busy",
    "429:0.02": "busy",
    "429:soon": "busy",
    "500": "server-error",
    "503:0.02": "server-error",
    "408": "server-error",
}
FINAL = {"400": "rejected", "422": "rejected", "404": "not-found", "403": "unauthorised"}


TIMED = ("hang", "drip")


def patience(act: str) -> float:
    """Short where it is what ends the request, else long enough for a busy machine."""
    return 0.6 if act in TIMED else 5.0


def judge_of(server: BadServer, **options: Any) -> ServerJudge:
    settings = {"timeout": 5.0, "pace": FAST, "retries": 4, "concurrency": 16}
    return ServerJudge(server.base_url, "m", **{**settings, **options})


@pytest.mark.parametrize("act", PASSING)
def test_a_fault_that_passes_costs_a_repetition_and_no_verdict(act: str) -> None:
    pairs = pairs_of(24)
    with BadServer(lambda pair, nth: act if number(pair) % 3 == 0 and nth == 0 else "good") as s:
        judge = judge_of(s, timeout=patience(act))
        verdicts = judge.grade(pairs)
        judge.close()
    assert [v.category for v in verdicts] == [expected(p) for p in pairs]
    assert all(s.asked[p] == (2 if number(p) % 3 == 0 else 1) for p in pairs)
    assert set(s.answered.values()) == {1}
    retries = judge.tally()["retries"]
    # A machine that stalls may let other requests time out on their way, too.
    assert retries == 8 or (act in TIMED and retries > 8)


@pytest.mark.parametrize("act", [*PASSING, *FINAL])
def test_a_pair_that_fails_for_good_is_none_and_harms_no_other(act: str) -> None:
    pairs = pairs_of(40)
    bad = pairs[7]
    with BadServer(lambda pair, nth: act if pair == bad else "good") as s:
        judge = judge_of(s, retries=2, timeout=patience(act))
        start = time.perf_counter()
        verdicts = judge.grade(pairs)
        assert time.perf_counter() - start < 10
        counts = judge.tally()
        again = judge.grade(
            [pair for pair, v in zip(pairs, verdicts, strict=True) if v.category is None]
        )
        judge.close()
    reason = {**PASSING, **FINAL}[act]
    assert (verdicts[7].category, verdicts[7].source) == (None, reason)
    assert all(v.category == expected(p) for p, v in zip(pairs, verdicts, strict=True) if p != bad)
    assert s.asked.pop(bad) == (6 if act in PASSING else 2)
    assert set(s.asked.values()) == {1} and [v.category for v in again] == [None]
    assert counts["faults"] == counts[f"fault_{reason}"] == 1


def test_every_fault_at_once_for_many_pairs_and_threads() -> None:
    """Each pair meets up to three faults of any kind and is then judged: once, and rightly."""
    draw = random.Random(3)
    pairs = pairs_of(160)
    fates = {
        p: [draw.choice(list(PASSING)) for _ in range(draw.choice([0, 0, 1, 2, 3]))] for p in pairs
    }

    def script(pair: Pair, nth: int) -> str:
        return fates[pair][nth] if nth < len(fates[pair]) else "good"

    found: dict[Pair, int | None] = {}
    with BadServer(script) as server:
        judge = judge_of(server, retries=8, concurrency=32, timeout=1.0)

        def work(part: list[Pair]) -> None:
            for pair, verdict in zip(part, judge.grade(part), strict=True):
                found[pair] = verdict.category

        threads = [threading.Thread(target=work, args=(pairs[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = judge.tally()
        judge.close()
    assert found == {pair: expected(pair) for pair in pairs}
    assert server.asked == {pair: len(fates[pair]) + 1 for pair in pairs}
    assert set(server.answered.values()) == {1} and counts["faults"] == 0
    assert counts["retries"] == sum(map(len, fates.values()))


def test_poisonous_pairs_do_not_close_the_server_to_others() -> None:
    """A tenth of the pairs crash whatever they meet, more than enough to open the breaker."""
    pairs = pairs_of(300)
    with BadServer(lambda pair, nth: "reset" if number(pair) < 30 else "good") as server:
        judge = judge_of(server, retries=2, pace=Pace(0.004, 0.02, failures=4, patience=5.0))
        verdicts = judge.grade(pairs)
        judge.close()
    assert [v.category for v in verdicts] == [None] * 30 + [expected(p) for p in pairs[30:]]
    assert {server.asked[p] for p in pairs[:30]} == {3}
    assert {server.asked[p] for p in pairs[30:]} == {1}


def test_a_server_that_wants_to_be_left_alone_is_left_alone() -> None:
    """One refusal with Retry-After holds all requests back for that long."""
    calls: list[float] = []

    def script(pair: Pair, nth: int) -> str:
        calls.append(time.perf_counter())
        return "429:0.3" if len(calls) == 1 else "good"

    with BadServer(script) as server:
        judge = judge_of(server, concurrency=1, pace=Pace(0.004, 1.0))
        verdicts = judge.grade(pairs_of(10))
        judge.close()
    assert all(v.category is not None for v in verdicts)
    assert calls[1] - calls[0] > 0.29 and calls[-1] - calls[1] < 2


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        ("404", ValueError, "no model 'm', or base_url lacks its /v1"),
        ("401", PermissionError, "wants a key"),
        ("302", ValueError, "redirected.*set base_url to the address itself"),
        ("400", ValueError, "rejected.*does base_url name a server of"),
        ("429", ConnectionError, "busy.*lower concurrency or raise retries"),
        ("500", ConnectionError, "server-error.*Its own log says more"),
        ("hang", ConnectionError, "timeout .none within 0.6 s"),
        ("not-json", ValueError, "garbage .<html>It works"),
        ("wrong-label", ValueError, "model 'm' answers 'Z' where one of A, B, C, D, E, F"),
    ],
)
def test_check_says_what_to_do(act: str, error: type[Exception], words: str) -> None:
    with BadServer(lambda pair, nth: act) as server:
        timeout = patience(act)
        judge = judge_of(server, timeout=timeout, retries=1, key_env="NO_SUCH_KEY")
        with pytest.raises(error, match=words) as raised:
            judge.check(["robin"])
        judge.close()
    assert server.base_url in str(raised.value)


def test_a_server_that_wants_a_key_where_no_variable_is_named() -> None:
    with BadServer(key="secret") as server:
        judge = judge_of(server, retries=0, key_env="")
        with pytest.raises(PermissionError, match="the environment variable that holds it in key"):
            judge.check(["robin"])
        judge.close()


def test_check_outlasts_a_server_that_is_still_starting() -> None:
    calls: list[int] = []

    def script(pair: Pair, nth: int) -> str:
        calls.append(nth)
        return "503" if len(calls) < 4 else "good"

    with BadServer(script) as server:
        judge = judge_of(server)
        judge.check(["robin"])
        judge.close()


def test_a_redirection_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pairs, and the key, stay with the server that was named, whatever it quotes."""
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with BadServer() as other:
        elsewhere = f"307:{other.base_url}/chat/completions?key=secret"
        with BadServer(lambda pair, nth: elsewhere) as server:
            judge = judge_of(server, key_env="JUDGE_KEY")
            assert [v.source for v in judge.grade(pairs_of(3))] == ["redirected"] * 3
            with pytest.raises(ValueError, match=f"redirected.*307 to {other.base_url}") as raised:
                judge.check(["robin"])
            judge.close()
    assert "secret" not in str(raised.value)
    assert not other.bodies
