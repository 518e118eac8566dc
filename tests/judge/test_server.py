"""The judge on a server that works: what it asks, what it reads, what it leaves behind."""

import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from badserver import BadServer, expected, pairs_of
from speciarl.judge.base import Judge, Pair, Verdict
from speciarl.judge.http_retry import Pace
from speciarl.judge.replies import Plan
from speciarl.judge.server import ServerJudge
from speciarl.kernels.codes import W

KEY = "sk-Very/Secret+0123456789"
FAST = Pace(first=0.01, longest=0.05, patience=0.2, cooldown=0.1)


def judge_of(server: BadServer, **options: Any) -> ServerJudge:
    return ServerJudge(server.base_url, "m", **{"timeout": 2.0, "pace": FAST, **options})


@pytest.fixture
def server() -> Iterator[BadServer]:
    with BadServer() as server:
        yield server


def test_every_pair_gets_its_own_verdict_from_one_request() -> None:
    pairs = pairs_of(300)
    with BadServer(lambda pair, nth: "late:0.003") as server:
        judge = judge_of(server, concurrency=16)
        assert isinstance(judge, Judge)
        verdicts = judge.grade(pairs)
        judge.close()
    assert [v.category for v in verdicts] == [expected(p) for p in pairs]
    assert set(server.asked.values()) == {1} and len(server.asked) == 300
    assert 8 < server.busiest <= 16 and server.connections <= 16
    counts = judge.tally()
    assert counts["pairs"] == counts["model_calls"] == 300
    assert counts["faults"] == counts["retries"] == 0
    assert counts["queue_seconds"] > 0 and counts["request_seconds"] > 0


# What a server can do, the plan that follows, and whether verdicts have a margin.
OFFERS: list[tuple[dict[str, Any], Plan, bool]] = [
    ({}, Plan(top=20), True),
    ({"strict": True}, Plan(top=20), True),
    ({"logprobs": 5}, Plan(top=5), True),
    ({"logprobs": 0}, Plan(top=0), False),
    ({"logprobs": 0, "strict": True}, Plan(top=0), False),
    ({"guide": "structured_outputs"}, Plan(top=20, guide="structured_outputs"), True),
    ({"guide": "guided_choice", "chatty": True}, Plan(top=20, guide="guided_choice"), True),
    ({"guide": "regex", "logprobs": 0, "strict": True}, Plan(top=0, guide="regex"), False),
    ({"guide": "response_format"}, Plan(top=20), True),
    ({"guide": "response_format", "logprobs": 0}, Plan(top=0, guide="json_schema"), False),
    ({"system": False}, Plan(top=20, system=False), True),
]


@pytest.mark.parametrize(("offer", "plan", "margin"), OFFERS)
def test_check_finds_out_what_the_server_offers(
    offer: dict[str, Any], plan: Plan, margin: bool
) -> None:
    pairs = pairs_of(30)
    with BadServer(**offer) as server:
        judge = judge_of(server)
        judge.check(["robin"])
        probes = len(server.bodies)
        verdicts = judge.grade(pairs)
        judge.close()
        asked = server.bodies[probes:]
    assert probes < 12
    assert [v.category for v in verdicts] == [expected(p) for p in pairs]
    assert all((v.margin is not None) == margin for v in verdicts)
    probe = plan.body("m", [{"role": "system", "content": ""}])
    wanted = {k: v for k, v in probe.items() if k != "messages"}
    assert all({k: v for k, v in b.items() if k != "messages"} == wanted for b in asked)
    roles = ["system", "user"] if plan.system else ["user"]
    assert all([m["role"] for m in b["messages"]] == roles for b in asked)


def test_verdicts_are_handed_over_as_they_arrive() -> None:
    def script(pair: Pair, nth: int) -> str:
        return "late:0.5" if pair.prediction == "answer 0" else "good"

    with BadServer(script) as server:
        judge = judge_of(server)
        stream = judge.grade_each(pairs_of(8))
        first = [next(stream)[0] for _ in range(7)]
        assert (
            sorted(first) == list(range(1, 8)) and not server.answered[Pair("truth 0", "answer 0")]
        )
        assert next(stream)[0] == 0
        assert next(stream, None) is None
        judge.close()


def test_a_stream_that_is_left_asks_no_more() -> None:
    with BadServer(lambda pair, nth: "late:0.02") as server:
        judge = judge_of(server, concurrency=2)
        stream = judge.grade_each(pairs_of(100))
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        time.sleep(0.05)
        before = sum(server.asked.values())
        time.sleep(0.1)
        assert sum(server.asked.values()) == before < 12
        judge.close()


def test_many_threads_share_one_judge(server: BadServer) -> None:
    judge = judge_of(server, concurrency=8)
    found: dict[int, list[int | None]] = {}

    def work(thread: int) -> None:
        pairs = [Pair(f"truth {thread}", f"answer {i}") for i in range(20)]
        found[thread] = [v.category for v in judge.grade(pairs)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    judge.close()
    for i, categories in found.items():
        assert categories == [expected(Pair(f"truth {i}", f"answer {n}")) for n in range(20)]
    assert len(found) == 12 and set(server.asked.values()) == {1} and server.busiest <= 8


def sockets() -> int:
    targets = []
    for name in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return sum(target.startswith(("socket:", "anon_inode:[eventpoll]")) for target in targets)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("act", ["good", "hang"])
def test_nothing_is_left_after_close(act: str) -> None:
    with BadServer(lambda pair, nth: act) as server:
        threads, before = set(threading.enumerate()), sockets()
        # A name, so that the threads of the resolver are there to be ended too.
        judge = ServerJudge(server.base_url.replace("127.0.0.1", "localhost"), "m", timeout=5.0)
        failed: list[BaseException] = []

        def work() -> None:
            try:
                judge.grade(pairs_of(40))
            except RuntimeError as error:
                failed.append(error)

        grading = threading.Thread(target=work)
        grading.start()
        time.sleep(0.1)
        if act == "good":
            grading.join()
        start = time.perf_counter()
        judge.close()
        judge.close()
        grading.join()
        assert time.perf_counter() - start < 4
        assert len(failed) == (act == "hang")
        with pytest.raises(RuntimeError, match="closed"):
            judge.grade(pairs_of(1))
        server.stop()  # its own side of the connections
        assert set(threading.enumerate()) == threads and sockets() <= before
        server.start()


def test_a_judge_that_was_never_used_closes() -> None:
    judge = ServerJudge("http://127.0.0.1:9/v1", "m")
    assert judge.grade([]) == []
    judge.sleep()
    judge.wake()
    judge.close()


def test_the_key_is_sent_and_never_shown(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever is printed, logged, raised or kept as an identity, right key or wrong."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", KEY + "\n")
    shown: list[str] = []
    with BadServer(key=KEY) as server:
        judge = judge_of(server, key_env="JUDGE_KEY")
        judge.check(["robin"])
        verdicts = judge.grade(pairs_of(5))
        assert all(v.category is not None for v in verdicts)
        shown += [repr(judge), judge.identity, repr(judge.tally()), repr(verdicts)]
        judge.close()
    with BadServer(key="another") as server:  # its refusal quotes the key
        judge = judge_of(server, key_env="JUDGE_KEY")
        with pytest.raises(PermissionError, match="JUDGE_KEY is not accepted") as refused:
            judge.check(["robin"])
        verdicts = judge.grade(pairs_of(20))
        assert all(v.category is None for v in verdicts)
        assert verdicts[0].source == "unauthorised" and judge.tally()["faults"] == 20
        shown += [repr(refused.getrepr(showlocals=False)), str(refused.value)]
        shown += [repr(judge.tally()), repr(verdicts)]
        judge.close()
    shown += [*capfd.readouterr(), caplog.text]
    assert "***" in shown[5]
    assert not [text for text in shown if KEY in text or KEY[:12] in text or KEY.lower() in text]


def test_a_server_that_wants_a_key_and_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with BadServer(key=KEY) as server:
        judge = judge_of(server, key_env="NO_SUCH_KEY")
        with pytest.raises(PermissionError, match="wants a key.* variable NO_SUCH_KEY"):
            judge.check(["robin"])
        judge.close()


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://127.0.0.1:9/v1"
    for name, value in {"concurrency": 0, "timeout": 0, "retries": -1, "variant": "x"}.items():
        with pytest.raises(ValueError, match=f"{name}"):
            ServerJudge(url, "m", **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model = ''"):
        ServerJudge(url, "")
    for bad in ("127.0.0.1:9/v1", "ftp://host/v1", "http://", "http://host:99999/v1", "http://["):
        with pytest.raises(ValueError, match="base_url.*expected http://HOST:PORT/v1"):
            ServerJudge(bad, "m")
    for secret in (f"http://me:{KEY}@host/v1", f"http://host/v1?key={KEY}", f"me:{KEY}@host"):
        with pytest.raises(ValueError, match="key_env") as raised:
            ServerJudge(secret, "m")
        assert KEY not in str(raised.value)
    monkeypatch.setenv("JUDGE_KEY", "two\nlines and a ☃")
    with pytest.raises(ValueError, match="JUDGE_KEY") as raised:
        ServerJudge(url, "m", key_env="JUDGE_KEY")
    assert "lines" not in str(raised.value)


def test_an_empty_truth_is_refused_before_and_skipped_during_a_run(server: BadServer) -> None:
    judge = judge_of(server)
    with pytest.raises(ValueError, match="truth ' '"):
        judge.check(["robin", " "])
    verdicts = judge.grade([Pair("", "x"), Pair("truth", "y")])
    assert verdicts[0] == Verdict(None, "empty-truth")
    assert verdicts[1].category == expected(Pair("truth", "y"))
    judge.close()


def test_strange_answers_are_sent_as_one_line_of_json(server: BadServer) -> None:
    nasty = ["", "\x00", "\ud800", "a\nb", '"}', "<|im_end|>", "x" * 100_000, "\U0001f426"]
    judge = judge_of(server)
    verdicts = judge.grade([Pair("robin", text) for text in nasty])
    judge.close()
    assert all(v.category is not None and W <= v.category for v in verdicts)
    assert max(len(str(body)) for body in server.bodies) < 10_000
