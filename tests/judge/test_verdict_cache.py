"""The file of verdicts: many processes, kills, damage, and disks that cannot be written."""

import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from judges import FakeJudge, StreamingJudge
from speciarl.judge.base import Pair, Verdict
from speciarl.judge.cache import SCHEMA_VERSION, CachedJudge, VerdictCache
from speciarl.judge.cache_admin import prune
from speciarl.kernels.codes import S_MINUS, A, S, W

PAIRS = [Pair("robin", f"bird {i}") for i in range(5)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sub" / "verdicts.sqlite"


def test_what_is_written_is_read_by_another_process_and_another_judge_finds_nothing(
    path: Path,
) -> None:
    odd = "F/A-18 \x00 \ud800 'quoted\" \u202e né"
    full = Verdict(S_MINUS, "model", 1 / 3, (0.1, 0.2, 1e-300, 0.3, 1 / 3, 0.0))
    with closing(VerdictCache(path)) as cache:
        cache.add("one", Pair(odd, odd), full)
        cache.add("one", Pair("robin", ""), Verdict(W, "rule"))
        cache.add("one", Pair("robin", ""), Verdict(S, "late"))  # the first stays
        cache.add("one", Pair("robin", "thrush"), Verdict(None, "timeout"))
    with closing(VerdictCache(path)) as cache:
        pairs = [Pair("robin", "thrush"), Pair("robin", ""), Pair(odd, odd), Pair("Robin", "")]
        assert cache.find("one", pairs) == {1: Verdict(W, "rule"), 2: full}
        assert cache.find("two", pairs) == {}


def test_only_what_is_missing_is_asked_for_and_faults_are_asked_for_again(path: Path) -> None:
    codes = {pair: code for pair, code in zip(PAIRS, (W, A, None, S_MINUS, S), strict=True)}
    inner = StreamingJudge(codes.__getitem__)
    cache = VerdictCache(path)
    judge = CachedJudge(inner, cache)
    expected = [inner.verdict(code) for code in codes.values()]
    assert judge.grade(PAIRS[:4]) == expected[:4]
    assert judge.grade(PAIRS) == expected
    assert judge.grade(PAIRS[:2]) == expected[:2]
    assert inner.asked == [*PAIRS[3::-1], PAIRS[4], PAIRS[2]]
    assert judge.tally() == {"pairs": 11, "by_cache": 5}
    judge.close()
    judge.close()
    other = CachedJudge(FakeJudge(codes.__getitem__, "fake-v2"), VerdictCache(path))
    assert other.grade(PAIRS) == expected and other.tally()["by_cache"] == 0
    other.close()


def test_each_verdict_is_in_the_file_before_the_next_is_made(path: Path) -> None:
    judge = CachedJudge(StreamingJudge(lambda pair: S), VerdictCache(path))
    for done, _ in enumerate(judge.grade_each(PAIRS), 1):
        with closing(sqlite3.connect(path)) as reader:
            assert reader.execute("SELECT count(*) FROM verdicts").fetchone() == (done,)
    judge.close()


WRITER = """
import sys
from pathlib import Path
from speciarl.judge.base import Pair, Verdict
from speciarl.judge.cache import VerdictCache
path, me = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
cache = VerdictCache(path)
for i in range(150):
    cache.add("own", Pair(str(me), str(i)), Verdict(me % 6, "model"))
    cache.add("shared", Pair("all", str(i)), Verdict(me % 6, str(me)))
pairs = [Pair("all", str(i)) for i in range(150)]
found = cache.find("shared", pairs)
assert len(found) == 150 and found == cache.find("shared", pairs)
mine = cache.find("own", [Pair(str(me), str(i)) for i in range(150)])
assert len(mine) == 150 and {v.category for v in mine.values()} == {me % 6}
cache.close()
"""


def script(text: str, *words: object) -> "subprocess.Popen[str]":
    """A process in which every warning is an error."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", text, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_eight_processes_lose_and_double_nothing(path: Path) -> None:
    writers = [script(WRITER, path, me) for me in range(8)]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:  # all open the file, which is not there yet, at once
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        assert writer.communicate()[1] == "" and writer.returncode == 0
    with closing(sqlite3.connect(path)) as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        counts = "SELECT judge, count(*), count(DISTINCT truth || '/' || prediction) FROM verdicts"
        assert file.execute(f"{counts} GROUP BY judge").fetchall() == [
            ("own", 1200, 1200),
            ("shared", 150, 150),
        ]


ENDLESS = """
import itertools, sys
from pathlib import Path
from speciarl.judge.base import Pair, Verdict
from speciarl.judge.cache import CachedJudge, VerdictCache
class Endless:
    identity, concurrent = "endless", True
    def grade_each(self, pairs):
        for i in range(len(pairs)):
            yield i, Verdict(i % 6, "model")
judge = CachedJudge(Endless(), VerdictCache(Path(sys.argv[1])))
for start in itertools.count(step=20):
    for i, _ in judge.grade_each([Pair("robin", str(start + i)) for i in range(20)]):
        print(start + i, flush=True)
"""


def test_a_kill_loses_at_most_the_verdict_in_flight(path: Path) -> None:
    grader = script(ENDLESS, path)
    assert grader.stdout is not None
    seen = [grader.stdout.readline() for _ in range(300)]
    os.kill(grader.pid, signal.SIGKILL)
    # Not communicate(), which does not look into what readline() has read ahead.
    seen += [line for line in grader.stdout.read().splitlines(True) if line.endswith("\n")]
    grader.wait()
    printed = len(seen)
    assert [int(line) for line in seen] == list(range(printed))
    pairs = [Pair("robin", str(i)) for i in range(printed + 5)]
    with closing(VerdictCache(path)) as cache:
        found = cache.find("endless", pairs)
        assert list(found) in (list(range(printed)), list(range(printed + 1)))
        assert all(verdict.category == i % 20 % 6 for i, verdict in found.items())
        inner = FakeJudge(lambda pair: S, "endless")
        CachedJudge(inner, cache).grade(pairs)
        assert inner.asked == pairs[len(found) :]


def database(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as file:
        for statement in statements:
            file.execute(statement)
        file.commit()


def filled(path: Path) -> None:
    with closing(VerdictCache(path)) as cache:
        for i in range(400):
            cache.add("judge " * 20, Pair("robin", str(i)), Verdict(S, "model"))


def broken_page(path: Path) -> None:
    filled(path)
    content = bytearray(path.read_bytes())
    content[4096 * 2 : 4096 * 4] = b"\xff" * 8192
    path.write_bytes(content)


def other_version(path: Path) -> None:
    filled(path)
    database(path, f"PRAGMA user_version = {SCHEMA_VERSION + 1}")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_text("truth,prediction\n" * 9), "not a database"),
        (lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(9000)), "malformed|not a data"),
        (lambda path: database(path, "CREATE TABLE mine (x)"), "not one of verdicts"),
        (other_version, f"schema {SCHEMA_VERSION + 1}, this package has {SCHEMA_VERSION}"),
        (broken_page, "malformed|Tree|page|btree"),
        (lambda path: path.mkdir(), "is a folder: name a file in it"),
    ],
)
def test_an_unusable_file_is_named_and_left_as_it_is(damage, said: str, path: Path) -> None:  # type: ignore[no-untyped-def]
    path.parent.mkdir()
    damage(path)
    before = None if path.is_dir() else path.read_bytes()
    with pytest.raises(ValueError, match=said) as refused:
        VerdictCache(path)
    assert str(path) in str(refused.value)
    if before is not None:
        assert "set judge.cache to another file" in str(refused.value)
        assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(ValueError, match="taken.* cannot be used"):
        VerdictCache(tmp_path / "taken" / "verdicts.sqlite")


def test_a_full_disk_is_no_fault_of_the_file(path: Path) -> None:
    path.parent.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(ValueError, match="cannot be opened: .*Make room on its disk"):
            VerdictCache(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with closing(VerdictCache(path)) as cache:  # what that left behind is no hindrance
        cache.add("j", PAIRS[0], Verdict(S, "model"))
    with closing(VerdictCache(path)) as cache:
        assert cache.find("j", PAIRS[:1]) == {0: Verdict(S, "model")}


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without root's right to write everywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def locked() -> Iterator[Path]:
    """A cache file, and its folder, that may be read and not written."""
    folder = Path(tempfile.mkdtemp())
    path = folder / "verdicts.sqlite"
    with closing(VerdictCache(path)) as cache:
        cache.add("j", PAIRS[0], Verdict(S, "model"))
    path.chmod(0o444)
    folder.chmod(0o555)
    yield path
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("exists", [True, False])
def test_a_disk_that_cannot_be_written_costs_a_warning(locked: Path, exists: bool) -> None:
    path = locked if exists else locked.parent / "new" / "other.sqlite"
    with unprivileged():
        with pytest.warns(RuntimeWarning, match=f"{path.name} cannot be written"):
            cache = VerdictCache(path)
        with closing(cache), warnings.catch_warnings():
            warnings.simplefilter("error")
            cache.add("j", PAIRS[1], Verdict(A, "model"))
            found = {0: Verdict(S, "model")} if exists else {}
            assert cache.find("j", PAIRS) == found | {1: Verdict(A, "model")}


def test_what_cannot_be_written_is_not_pruned(locked: Path) -> None:
    with unprivileged(), pytest.raises(ValueError, match="not pruned: .* must be writable"):
        prune(locked, days=0.0)


def test_a_file_that_breaks_while_in_use_costs_a_warning(path: Path) -> None:
    filled(path)
    with closing(VerdictCache(path)) as cache:
        # Another's write makes this connection forget the pages that it knows.
        database(path, "DELETE FROM verdicts WHERE prediction = '0'")
        database(path, "PRAGMA wal_checkpoint(TRUNCATE)")
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * (path.stat().st_size - 4096))
        with pytest.warns(RuntimeWarning, match="failed .*: new verdicts are lost when the run"):
            assert cache.find("judge " * 20, [Pair("robin", str(i)) for i in range(400)]) == {}
        cache.add("judge", PAIRS[0], Verdict(S, "model"))
        assert cache.find("judge", PAIRS) == {0: Verdict(S, "model")}


def test_a_row_that_makes_no_sense_is_asked_for_again(path: Path) -> None:
    with closing(VerdictCache(path)) as cache:
        cache.add("j", PAIRS[0], Verdict(S, "model", None, (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)))
        cache.add("j", PAIRS[1], Verdict(S, "model"))
        database(path, "UPDATE verdicts SET probabilities = '[1' WHERE prediction = 'bird 0'")
        assert cache.find("j", PAIRS) == {1: Verdict(S, "model")}
