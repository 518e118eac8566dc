"""Back-off and the breaker, on a clock of their own."""

import asyncio
import email.utils
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from speciarl.judge.http_retry import Backoff, Breaker, Fault, Pace, is_local, retry_after


def test_back_off_doubles_with_full_jitter_up_to_the_cap() -> None:
    backoff = Backoff(Pace(first=1.0, longest=8.0))
    drawn = [[backoff.delay(n) for _ in range(2000)] for n in range(6)]
    for n, delays in enumerate(drawn):
        most = min(8.0, 2.0**n)
        assert 0 <= min(delays) < 0.05 * most and 0.95 * most < max(delays) <= most
        assert sum(delays) / len(delays) == pytest.approx(most / 2, rel=0.1)
    assert Backoff(Pace()).delay(10_000) <= Pace().longest


def test_back_off_follows_its_seed() -> None:
    def draw(seed: int) -> list[float]:
        backoff = Backoff(Pace(seed=seed))
        return [backoff.delay(n) for n in range(5)]

    assert draw(1) == draw(1) != draw(2)


def test_what_the_server_asks_for_is_waited_within_the_cap() -> None:
    backoff = Backoff(Pace(first=0.1, longest=5.0))
    assert all(3.0 <= backoff.delay(0, wait=3.0) <= 3.3 for _ in range(100))
    assert backoff.delay(0, wait=3600.0) == 5.0


def test_retry_after() -> None:
    assert retry_after({"Retry-After": " 2.5 "}) == 2.5
    date = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 57 < retry_after({"Retry-After": date}) <= 60
    for text in ("-3", "soon", "nan", "inf", "", "Wed, 21 Oct 2015 07:28:00 GMT", "9" * 400):
        assert retry_after({"Retry-After": text}) == 0
    assert retry_after({}) == 0


def test_pace_names_the_field() -> None:
    with pytest.raises(ValueError, match="patience = -1"):
        Pace(patience=-1)
    with pytest.raises(ValueError, match="longest = nan"):
        Pace(longest=float("nan"))
    with pytest.raises(ValueError, match="failures = 0"):
        Pace(failures=0)


def test_this_machine_is_local() -> None:
    for host in ("localhost", "127.0.0.1", "127.1.2.3", "[::1]"):
        assert is_local(f"http://{host}:8000/v1")
    for host in ("example.org", "localhost.example.org", "10.0.0.1", "1.127.0.0"):
        assert not is_local(f"http://{host}/v1")


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr("speciarl.judge.http_retry.asyncio.sleep", clock.sleep)
    yield clock


OUT = Fault("unreachable", "refused", retry=True, outage=True)
MINE = Fault("rejected", retry=False, outage=False)
PACE = Pace(first=1.0, longest=4.0, failures=3, patience=10.0, cooldown=5.0)


class Server:
    """Attempts that end as they are told, and are counted."""

    def __init__(self) -> None:
        self.attempts = 0
        self.outcome: Fault | None = None

    async def __call__(self) -> str:
        self.attempts += 1
        if self.outcome:
            raise self.outcome
        return "verdict"


def ends(breaker: Breaker, attempt: Callable[[], Awaitable[Any]], times: int = 1) -> list[str]:
    """The result or reason of so many attempts, one after another."""

    async def run() -> list[str]:
        out = []
        for _ in range(times):
            try:
                out.append(await breaker.run(attempt))
            except Fault as fault:
                out.append(fault.reason)
        return out

    return asyncio.run(run())


def test_a_breaker_opens_after_outages_in_a_row_and_gives_up_in_bounded_time(clock: Clock) -> None:
    breaker, server = Breaker(PACE, clock), Server()
    assert ends(breaker, server, 5) == ["verdict"] * 5
    server.outcome = OUT
    start = clock.now
    found = ends(breaker, server, 1000)
    probes = found.index("down")
    assert 3 < probes < 60 and set(found[:probes]) == {"unreachable"}
    assert set(found[probes:]) == {"down"} and server.attempts == 5 + probes
    assert clock.now - start <= PACE.patience + PACE.longest


def test_a_breaker_probes_once_per_cooldown_and_closes_with_the_first_answer(clock: Clock) -> None:
    breaker, server = Breaker(PACE, clock), Server()
    server.outcome = OUT
    ends(breaker, server, 1000)
    clock.now += PACE.cooldown
    before = server.attempts
    assert ends(breaker, server, 3) == ["unreachable", "down", "down"]
    assert server.attempts == before + 1
    clock.now += PACE.cooldown
    server.outcome = None
    assert ends(breaker, server, 20) == ["verdict"] * 20


def test_what_speaks_against_a_request_does_not_open_it(clock: Clock) -> None:
    breaker, server = Breaker(PACE, clock), Server()
    server.outcome = MINE
    assert ends(breaker, server, 50) == ["rejected"] * 50
    for _ in range(10):
        server.outcome = OUT
        assert ends(breaker, server, 2) == ["unreachable"] * 2
        server.outcome = MINE
        assert ends(breaker, server) == ["rejected"]
    assert clock.now == 100.0


def test_a_poisonous_request_does_not_stand_for_the_server(clock: Clock) -> None:
    """Three of its attempts open the breaker; the next in turn closes it."""
    breaker, poison, good = Breaker(PACE, clock), Server(), Server()
    poison.outcome = OUT
    assert ends(breaker, poison, 3) == ["unreachable"] * 3
    assert ends(breaker, good, 5) == ["verdict"] * 5


def test_a_busy_server_is_left_alone_by_everybody(clock: Clock) -> None:
    breaker, server = Breaker(PACE, clock), Server()
    server.outcome = Fault("busy", retry=True, outage=False, wait=2.0)
    ends(breaker, server)
    server.outcome = None
    assert ends(breaker, server) == ["verdict"] and clock.now == 102.0
    server.outcome = Fault("busy", retry=True, outage=False, wait=9999.0)
    ends(breaker, server)
    server.outcome = None
    assert ends(breaker, server) == ["verdict"] and clock.now == 102.0 + PACE.longest


def test_probes_are_made_one_at_a_time() -> None:
    """All wait for the one that probes; its answer lets the others go at once."""
    pace = Pace(first=0.0, failures=1, patience=5.0)
    under_way = most = 0

    async def attempt() -> str:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.02)
        under_way -= 1
        return "verdict"

    async def down() -> str:
        raise OUT

    async def run() -> list[str]:
        nonlocal most
        breaker = Breaker(pace)
        with pytest.raises(Fault):
            await breaker.run(down)
        first = asyncio.create_task(breaker.run(attempt))
        others = [asyncio.create_task(breaker.run(attempt)) for _ in range(10)]
        await asyncio.sleep(0.01)
        assert most == 1
        return list(await asyncio.gather(first, *others))

    assert asyncio.run(run()) == ["verdict"] * 11 and most == 10
