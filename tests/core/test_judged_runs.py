"""Runs with a judge that has a model: in turn with the engine, cached, faulty, out of reach."""

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from judges import Answer, FakeJudge
from runs import assert_same, run_config, step_lines, stored
from speciarl.core.config import Config
from speciarl.core.evaluate import evaluate_model
from speciarl.core.inputs import default_cache, open_judge
from speciarl.core.train import train
from speciarl.core.world import World
from speciarl.judge.base import Pair
from speciarl.judge.registry import FACTORIES
from speciarl.judge.settings import JudgeConfig
from speciarl.kernels.codes import S_MINUS, A, S, W

KEY = "sk-proj-0123456789abcdef"
Configure = Callable[..., Config]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeJudge]:
    """The back-ends of a run; whole completions are their answers, and their length decides."""
    back_ends: list[FakeJudge] = []

    def factory(config: JudgeConfig, taxonomies: object) -> FakeJudge:
        answers: dict[str, Answer] = {
            "length": lambda pair: (W, S_MINUS, A, S)[len(pair.prediction) % 4],
            "half": lambda pair: S if len(pair.prediction) % 2 else None,
            "nothing": lambda pair: None,
        }
        model = config.model.removesuffix("-in-turn")
        fake = FakeJudge(answers[model], model, concurrent=model == config.model)
        back_ends.append(fake)
        return fake

    monkeypatch.setitem(FACTORIES, "openai", factory)
    monkeypatch.setattr("speciarl.judge.grading.parse_answer", lambda text: text)
    # So that the random words of an untrained model get past the rules.
    monkeypatch.setattr("speciarl.judge.rules.rule", lambda truth, prediction, names: None)
    return back_ends


@pytest.fixture
def configure(toy_root: Path, toy_model_dir: Path, tmp_path: Path) -> Configure:
    def config(name: str, model: str, *words: str) -> Config:
        judge = ("kind=openai", f"model={model}", "base_url=http://localhost:1/v1")
        every = ("train.steps=2", "train.samples_every=0", "data.eval.flowers=none")
        given = [*every, *(f"judge.{word}" for word in judge), *words]
        return run_config(toy_root, toy_model_dir, tmp_path / name, *given)

    return config


def test_a_judge_in_turn_changes_nothing_but_the_order(
    made: list[FakeJudge], configure: Configure, world: World
) -> None:
    words = ("judge.cache=", "objective.algorithm=dapo", "evaluation.every=1")
    plain = train(configure("plain", "length", *words), world, quiet=True)
    for name, word in (("awake", "rollout.sleep=false"), ("asleep", "rollout.sleep=true")):
        out = train(configure(name, "length-in-turn", *words, word), world, quiet=True)
        assert_same(stored(plain, 2), stored(out, 2))
    # As in the first run, evaluations and refills included, but for what was in flight together.
    assert set(made[1].asked) == set(made[2].asked) == set(made[0].asked)
    assert made[1].events[:3] == ["sleep", "check", "sleep"]
    asked = [event for event in made[1].events[3:-1] if not event.startswith("grade")]
    assert asked == ["wake", "sleep"] * (len(asked) // 2) and made[1].events[-1] == "close"


def test_a_second_run_asks_nothing_and_learns_the_same(
    made: list[FakeJudge], configure: Configure, world: World, tmp_path: Path
) -> None:
    first = train(configure("first", "length"), world, quiet=True)
    second = train(configure("second", "length"), world, quiet=True)
    assert (tmp_path / "verdicts.sqlite").exists()
    assert made[0].asked and len(set(made[0].asked)) == len(made[0].asked)
    assert not made[1].asked
    assert_same(stored(first, 2), stored(second, 2))
    for line in step_lines(second):
        assert line["judge/model_calls"] == 0 and line["judge/verdicts_per_s"] > 0
        assert line["judge/by_batch"] + line["judge/by_cache"] == pytest.approx(1)
    for line in step_lines(first):
        ways = [line[f"judge/by_{way}"] for way in ("rule", "batch", "cache")]
        assert sum(ways) * 6 + line["judge/model_calls"] == pytest.approx(6)
    record = json.loads((second / "versions.json").read_text())
    assert record["judge"].endswith("(length)")


def test_faults_below_the_limit_cost_only_their_own_answers(
    made: list[FakeJudge], configure: Configure, world: World
) -> None:
    words = ("judge.max_fault_share=1", "data.eval.birds=none")
    out = train(configure("run", "half", *words), world, quiet=True)
    steps = step_lines(out)
    assert [line["rate/unscored"] * 6 for line in steps] == [line["judge/faults"] for line in steps]
    assert all(0 < line["judge/faults"] < 6 for line in steps)


def test_a_server_that_fails_for_some_pairs_judges_all_others_exactly_once(
    configure: Configure, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two runs, the evaluations and groups of both; the failed pairs alone are asked again."""
    pytest.importorskip("aiohttp")
    badserver = pytest.importorskip("badserver")
    monkeypatch.setattr("speciarl.judge.grading.parse_answer", lambda text: text)
    monkeypatch.setattr("speciarl.judge.rules.rule", lambda truth, prediction, names: None)
    monkeypatch.setenv("JUDGE_KEY", KEY)

    probes = {Pair("European Robin", "European Robin")}  # of the check at every start

    def fails(pair: Pair) -> bool:
        return pair not in probes and badserver.expected(pair) < S_MINUS

    words = ["judge.key_env=JUDGE_KEY", "judge.max_fault_share=1"]
    with badserver.BadServer(lambda pair, nth: "400" if fails(pair) else "good", key=KEY) as server:
        words.append(f"judge.base_url={server.base_url}")
        first = train(configure("first", "m", *words), world, quiet=True)
        asked = {pair: n for pair, n in server.asked.items() if pair not in probes}
        second = train(configure("second", "m", *words), world, quiet=True)
    failed = {pair for pair in asked if fails(pair)}
    assert failed and set(server.asked) == set(asked) | probes
    assert {pair for pair in asked if server.asked[pair] > asked[pair]} == failed
    judged = {pair: count for pair, count in server.answered.items() if pair in asked}
    assert judged == {pair: 1 for pair in asked if pair not in failed}
    faults = [line["judge/faults"] for line in step_lines(first)]
    assert faults == [line["rate/unscored"] * 6 for line in step_lines(first)] and any(faults)
    assert_same(stored(first, 2), stored(second, 2))


def test_a_judge_that_says_nothing_stops_run_and_evaluation(
    made: list[FakeJudge], configure: Configure, world: World, tmp_path: Path
) -> None:
    config = configure("run", "nothing", "data.eval.birds=none")
    with pytest.raises(RuntimeError, match="step 0: 6 of 6 .*the judge reported broken .6."):
        train(config, world, quiet=True)
    assert (tmp_path / "run" / "checkpoints" / "step-0").is_dir()
    config = configure("run", "nothing")
    with pytest.raises(RuntimeError, match="evaluation stopped: 4 of 4 answers got no verdict"):
        evaluate_model(config, world, tmp_path / "evaluation")
    assert not (tmp_path / "evaluation" / "predictions.rank0.jsonl").exists()


def test_a_server_out_of_reach_is_named_before_the_run_and_its_key_is_not(
    configure: Configure, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    words = ("judge.key_env=JUDGE_KEY", "judge.retries=0", "judge.timeout=2")
    with pytest.raises(ConnectionError, match="localhost:1") as refused:
        train(configure("run", "length", *words), world, quiet=True)
    assert KEY not in str(refused.value)


def test_a_key_is_in_no_file_of_a_run(
    made: list[FakeJudge], configure: Configure, world: World, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("JUDGE_KEY", KEY)
    train(configure("run", "length", "judge.key_env=JUDGE_KEY", "train.steps=1"), world, quiet=True)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.json", "versions.json", "metrics.jsonl"} <= {path.name for path in files}
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_hosts_of_one_run_do_not_share_a_file(world: World, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "one"
    assert default_cache(out, world) == tmp_path / "runs" / "verdicts.sqlite"
    several = default_cache(out, replace(world, size=16, local_size=8))
    assert several == tmp_path / "runs" / f"verdicts.{socket.gethostname()}.sqlite"


def test_a_model_needs_no_taxonomy_and_the_exact_judge_does(made: list[FakeJudge]) -> None:
    config = JudgeConfig("openai", "length", "http://localhost:1/v1")
    judge = open_judge(config, {}, ["robin"])
    assert made[0].events == ["check"] and judge.grade([Pair("robin", "bird")])[0].category == W
    with pytest.raises(ValueError, match="a label is empty|has no word"):
        open_judge(config, {}, ["robin", ""])
    assert made[1].events[-1] == "close"
    with pytest.raises(ValueError, match="needs a taxonomy: set taxonomy = FILE"):
        open_judge(JudgeConfig(), {}, ["robin"])
