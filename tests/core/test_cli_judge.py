"""`speciarl judge`: asking any judge, and looking after a cache."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from judges import FakeJudge
from speciarl.core.cli import main
from speciarl.judge import cache_admin
from speciarl.judge.base import Pair, Verdict
from speciarl.judge.cache import VerdictCache
from speciarl.judge.registry import FACTORIES
from speciarl.kernels.codes import S_MINUS, A, S, W

SERVER = ["--kind", "openai", "--set", "model=m", "--set", "base_url=http://localhost:1/v1"]
DAY = 86400.0


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["judge", *map(str, words)])


def grade(*words: str, truth: str = "robin", prediction: str = "song bird") -> Result:
    return run("grade", *words, "--truth", truth, "--prediction", prediction)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeJudge:
    class Sure(FakeJudge):
        @staticmethod
        def verdict(category: int | None) -> Verdict:
            return Verdict(category, "timeout" if category is None else "model", 2.345)

    judge = Sure(lambda pair: None if pair.prediction == "slow" else S_MINUS, concurrent=False)
    monkeypatch.setitem(FACTORIES, "openai", lambda config, taxonomies: judge)
    return judge


def test_grade_asks_a_judge_of_any_kind(fake: FakeJudge, tmp_path: Path) -> None:
    result = grade(*SERVER)
    assert (result.exit_code, result.output) == (0, "less specific (model, margin 2.35 nats)\n")
    assert fake.events == ["sleep", "check", "wake", "grade 1", "close"]
    assert grade(*SERVER, prediction="<answer>song bird").output.startswith("format")
    assert grade(*SERVER, prediction="Robin").output == "specific (rule-name)\n"
    assert len(fake.asked) == 1
    for _ in range(2):
        assert grade(*SERVER, "--set", f"cache={tmp_path / 'c.sqlite'}").exit_code == 0
    assert len(fake.asked) == 2


def test_grade_says_why_there_is_no_verdict(fake: FakeJudge) -> None:
    result = grade(*SERVER, prediction="slow")
    assert (result.exit_code, result.output) == (1, "Error: no verdict: timeout\n")
    assert "base_url = ''" in grade(*SERVER[:4]).output
    assert "unknown key modl" in grade("--set", "modl=x").output
    assert "did you mean 'openai'" in grade("--kind", "opnai").output
    assert "needs a taxonomy file" in grade().output
    assert "has no word in it" in grade(*SERVER, truth=" ").output


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """200 old verdicts of one judge, 3 new ones of another."""
    path = tmp_path / "verdicts.sqlite"
    with closing(VerdictCache(path)) as file:
        for i in range(200):
            file.add("old-model", Pair("golden warbler", f"bird {i} " * 20), Verdict(W, "model"))
        for i, code in enumerate((A, S, S)):
            file.add("new-model", Pair("robin", f"\x1b[2J{i}"), Verdict(code, "model", 1.5))
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE verdicts SET made = made - ? WHERE judge GLOB 'old*'", (50 * DAY,))
        database.commit()
    return path


def counts(path: Path) -> dict[str, int]:
    return {row.identity: sum(row.counts) for row in cache_admin.stats(path)}


def test_stats(cache: Path) -> None:
    lines = run("cache", "stats", cache).output.splitlines()
    assert lines[0].startswith("203 verdicts of 2 judges, 0.1 MB")
    assert lines[2] == "new-model"
    expected = "wrong 0, abstain 1, generic 0, less specific 0, specific 2, more specific 0"
    assert lines[3] == f"  3 verdicts: {expected}"
    assert lines[6] == "old-model" and lines[7].startswith("  200 verdicts: wrong 200")


def test_show_filters_and_no_answer_drives_the_terminal(cache: Path) -> None:
    result = run("cache", "show", cache, "--truth", "robin")
    assert len(result.output.splitlines()) == 3 and "\x1b" not in result.output
    assert "specific: '\\x1b[2J2' for 'robin' (model, margin 1.50)" in result.output
    assert len(run("cache", "show", cache).output.splitlines()) == 20
    words = ("--limit", 0, "--json", "--judge", "old", "--prediction", "bird 19")
    rows = [json.loads(line) for line in run("cache", "show", cache, *words).output.splitlines()]
    assert len(rows) == 11 and {row["category"] for row in rows} == {W}


def test_prune_by_age_judge_and_size(cache: Path) -> None:
    before = cache_admin.size(cache)
    assert run("cache", "prune", cache, "--older-than", 60).output.startswith("0 verdicts removed")
    assert "3 verdicts removed" in run("cache", "prune", cache, "--judge", "new").output
    assert counts(cache) == {"old-model": 200}
    removed = run("cache", "prune", cache, "--max-mb", 0.03).output
    assert cache_admin.size(cache) <= 30_000 < before
    assert 0 < counts(cache)["old-model"] < 200 and removed.startswith("1")
    kept = [entry.prediction for entry in cache_admin.entries(cache, limit=0)]
    assert "bird 199 " in kept[0]  # the newest are kept
    assert "verdicts removed" in run("cache", "prune", cache, "--older-than", 49).output
    assert counts(cache) == {}
    assert run("cache", "prune", cache, "--max-mb", 0).exit_code == 0


def test_prune_wants_to_be_told_what(cache: Path) -> None:
    result = run("cache", "prune", cache)
    assert result.exit_code == 2 and "--older-than" in result.output
    assert counts(cache) == {"old-model": 200, "new-model": 3}


def test_prune_leaves_a_run_that_uses_the_file_in_peace(cache: Path) -> None:
    with closing(VerdictCache(cache)) as used:
        assert used.find("new-model", [Pair("robin", "\x1b[2J0")])
        assert run("cache", "prune", cache, "--judge", "new").exit_code == 0
        assert not used.find("new-model", [Pair("robin", "\x1b[2J0")])
        used.add("new-model", Pair("robin", "x"), Verdict(S, "model"))
    assert counts(cache)["new-model"] == 1


@pytest.mark.parametrize("command", ["stats", "show", "prune"])
def test_what_is_no_cache_is_named(command: str, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("hello" * 9)
    words = ["--older-than", 1] if command == "prune" else []
    result = run("cache", command, other, *words)
    assert result.exit_code == 1 and "other.txt cannot be used: not a database" in result.output
    assert run("cache", command, tmp_path / "none", *words).exit_code == 2


@pytest.mark.parametrize("words", [["grade"], ["cache"], ["cache", "stats"], ["cache", "show"]])
def test_help_has_examples(words: list[str]) -> None:
    result = run(*words, "--help")
    assert result.exit_code == 0 and "Example" in result.output
