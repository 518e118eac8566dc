"""The judge bench on a few groups whose calls can be counted by hand."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from speciarl.bench.judge import PAIRS, main
from speciarl.bench.judge_record import load_steps, pack, record
from speciarl.bench.judge_report import Result, middle, ratios
from speciarl.bench.judge_serve import toy_judge
from speciarl.judge.base import Pair

# By rule: the truth, refusals, nothing, several. Of the rest "OWL" and " owl" are one question.
FIRST = ["golden owl", "Golden Owls", "none", "", "owl or duck", "owl", "OWL", " owl", "bird"]
SECOND = ["owl", "bird", "bird", "golden duck", "golden duck"]
OTHER = ["duck", "duck", "bird"]


def steps() -> list[list[list[Pair]]]:
    def group(truth: str, answers: list[str]) -> list[Pair]:
        return [Pair(truth, answer) for answer in answers]

    return [
        [group("golden owl", FIRST), group("golden owl", SECOND)],
        [group("golden owl", SECOND), group("azure duck", OTHER)],
    ]


def test_a_record_holds_what_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(pack(steps())))
    found = load_steps(path)
    assert [[sorted(g, key=str) for g in s] for s in found] == [
        [sorted(g, key=str) for g in s] for s in steps()
    ]
    path.write_text('{"truths": [], "answers": [], "steps": [[[0, 0, 1]]]}')
    with pytest.raises(ValueError, match="not a record of judge_record.py"):
        load_steps(path)


def test_the_committed_record_is_of_twenty_published_batches() -> None:
    assert PAIRS.stat().st_size < 200_000
    recorded = load_steps(PAIRS)
    assert [len(groups) for groups in recorded] == [256] * 20
    assert all(len(group) <= 10 for groups in recorded for group in groups)
    pairs = [pair for groups in recorded for group in groups for pair in group]
    assert len(pairs) > 0.99 * 20 * 2560 and len(set(pairs)) < len(pairs) / 20
    taxonomy = toy_judge().taxonomy
    assert all(taxonomy.known(truth) for truth in {pair.truth for pair in pairs})


def test_calls_of_every_way(tmp_path: Path) -> None:
    record, out = tmp_path / "pairs.json", tmp_path / "out.json"
    record.write_text(json.dumps(pack(steps())))
    words = ["--pairs", record, "--latency", 0.01, "--generate", 0.05, "--repeats", 1]
    done = CliRunner().invoke(main, [*map(str, words), "--json", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    ways = {name: runs[0] for name, runs in json.loads(out.read_text())["ways"].items()}
    total = len(FIRST) + 2 * len(SECOND) + len(OTHER)
    assert {name: way["pairs"] for name, way in ways.items()} == dict.fromkeys(ways, total)
    # Distinct: 7 of the first group ("golden owl" and "Golden Owls" differ), 1 new, 2 new.
    assert {name: way["calls"] for name, way in ways.items()} == {
        "each": total, "published": 10, "cold": 5, "warm": 0, "overlapped": 5,
    }  # fmt: skip
    assert all(way["faults"] == way["unlike_taxonomy"] == 0 for way in ways.values())
    assert ways["cold"]["counts"]["by_rule"] == ways["warm"]["counts"]["by_rule"] == 5
    # 22 pairs less 5 by rule are one batch or the cache for all but the 5 that were asked.
    shared = [ways["cold"]["counts"][f"by_{what}"] for what in ("batch", "cache")]
    assert sum(shared) == total - 5 - 5
    for word in ("each / cold", "published / cold", "verdicts/s", "unlike"):
        assert word in done.output


def test_ratios_are_of_the_run_of_median_time() -> None:
    def result(calls: int, *seconds: float) -> Result:
        return Result(100, calls, list(seconds), {}, 0, 0)

    assert middle([result(1, 3.0), result(2, 1.0), result(3, 1.0, 1.0)]).calls == 3
    ways = {"each": result(100, 8.0), "published": result(10, 2.0), "cold": result(5, 0.5)}
    found = ratios({**ways, "warm": result(0, 0.25), "overlapped": result(5, 0.1)})
    assert found["each / cold"] == {"calls": 20, "seconds": 16}
    assert found["published / warm"] == {"calls": 10, "seconds": 8}


def test_a_run_is_recorded(toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real steps of the packaged base policy."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    sets = [f"train.out={tmp_path / 'run'}", "train.prompts=2", "train.mini_batch=2"]
    sets += ["train.threads=1", "rollout.n=3", "data.toyworld="]
    for table in ("train.birds", "eval.birds", "eval.flowers", "eval.cars"):
        sets += [
            f"data.{table}.path={toy_root / table.split('.')[1]}",
            f"data.{table}.taxonomy={toy_root / 'taxonomy.json'}",
        ]
    packed = record(sets, steps=2)
    assert [len(rows) for rows in packed["steps"]] == [2, 2]
    counts = [sum(row[2::2]) for rows in packed["steps"] for row in rows]
    assert max(counts) == 3 and len(packed["truths"]) <= 4
    assert {"bird", "owl", "duck", "heron", "warbler", "swallow"} & set(packed["answers"])
