"""Evaluation: figures that can be recounted, interruptions that cost nothing, no mixed results."""

import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runs import json_of, lines, lot, run_config
from speciarl.core import evaluation
from speciarl.core.collect import Collector
from speciarl.core.config import Config
from speciarl.core.evaluate import evaluate_model
from speciarl.core.evaluation import EvaluationConfig, Predictions
from speciarl.core.inputs import open_data
from speciarl.core.train import train
from speciarl.core.world import World
from speciarl.judge.base import Pair, Verdict
from speciarl.judge.registry import FACTORIES
from speciarl.judge.settings import SAME, JudgeConfig
from speciarl.kernels.codes import ABSENT, FORMAT, NAMES, SPECIFICITY, W

Configure = Callable[..., Config]


def lot_with_failures(judge: object, truths: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """Draws from all eight codes: judge faults and format failures too."""
    return np.array([zlib.crc32(text.encode()) % 8 - 1 for text in texts], dtype=np.int8)


@pytest.fixture(autouse=True)
def judged_by_lot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speciarl.core.collect.codes_of", lot_with_failures)
    monkeypatch.setattr(evaluation, "CHUNK", 5)


@pytest.fixture
def configure(toy_root: Path, toy_model_dir: Path, tmp_path: Path) -> Configure:
    """Twelve birds and twelve flowers: configure(*words)."""
    words = ("data.eval.birds.k=12", "data.eval.flowers.k=12", "data.train.birds=none")
    return lambda *more: run_config(toy_root, toy_model_dir, tmp_path / "run", *words, *more)


def predictions_in(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in lines(folder / "predictions.rank0.jsonl")}


def recount(codes: Sequence[int]) -> dict[str, Any]:
    """n, correctness, specificity and HM by SpeciaRL's section 4, in plain Python."""
    judged = [code for code in codes if code != ABSENT]
    points = [SPECIFICITY[code] for code in judged if code not in (W, FORMAT)]
    correct = len(points) / len(judged)
    specific = sum(points) / len(points) / 4
    return {
        "n": len(judged),
        "unjudged": len(codes) - len(judged),
        "correctness": correct,
        "specificity": specific,
        "hm": 2 * correct * specific / (correct + specific),
    }


def test_metrics_are_what_the_predictions_say(
    configure: Configure, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("data.eval.birds.domain=living", "data.eval.flowers.domain=living")
    config = configure(*words, "data.eval.cars.format=cub", *cars(configure))
    report = evaluate_model(config, world, tmp_path / "out")
    record, rows = json_of(tmp_path / "out" / "metrics.json"), predictions_in(tmp_path / "out")
    assert len(rows) == 36
    for field, name_of in (("datasets", "dataset"), ("domains", "domain")):
        for name, figures in record[field].items():
            codes = [row["codes"][0] for row in rows.values() if row[name_of] == name]
            expected = recount(codes)
            assert {key: figures[key] for key in expected} == pytest.approx(expected)
            for code in range(W, FORMAT + 1):
                assert figures["rates"][NAMES[code]] == codes.count(code) / expected["n"]
    assert record["domains"].keys() == {"living", "cars"}
    hms = [figures["hm"] for figures in record["datasets"].values()]
    assert record["mean_hm"] == report.mean_hm == pytest.approx(sum(hms) / 3)
    assert f"{record['datasets']['cars']['hm']:.3f}" in capsys.readouterr().out


def cars(configure: Configure) -> list[str]:
    table = configure().data.eval["birds"]
    folder = str(Path(table.path).parent / "cars")
    values = {"path": folder, "split": "test", "k": 12, "taxonomy": table.taxonomy}
    return [f"data.eval.cars.{key}={value}" for key, value in values.items()]


def test_an_interrupted_evaluation_goes_on(
    configure: Configure, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    evaluate_model(configure(), world, whole)
    asked: list[str] = []
    collect = Collector.collect

    def counting(self: Collector, work: Sequence[Any], *given: Any) -> object:
        if len(asked) == 15:
            raise RuntimeError("power failure")
        asked.extend(example.key for example, _ in work)
        return collect(self, work, *given)

    monkeypatch.setattr(Collector, "collect", counting)
    with pytest.raises(RuntimeError, match="power failure"):
        evaluate_model(configure(), world, out)
    assert not (out / "metrics.json").exists()
    file = out / "predictions.rank0.jsonl"
    file.write_bytes(file.read_bytes()[:-20])  # the kill came in the middle of a line
    file.rename(out / "predictions.rank1.jsonl")  # which another number of ranks had written
    kept = (out / "predictions.rank1.jsonl").read_bytes().split(b"\n")[:14]
    there = [json.loads(line) for line in kept]
    unjudged = {row["key"] for row in there if ABSENT in row["codes"]}
    asked.clear()
    evaluate_model(configure(), world, out)
    assert len(asked) == 24 - 14 + len(unjudged) == len(set(asked))
    assert unjudged < set(asked)  # what got no verdict is asked about again
    rows = Predictions(out, json_of(out / "settings.json"), world).rows
    assert rows == predictions_in(whole)
    assert json_of(out / "metrics.json") == json_of(whole / "metrics.json")

    asked.clear()
    evaluate_model(configure(), world, out)
    assert set(asked) == {key for key, row in rows.items() if ABSENT in row["codes"]}


def test_a_verdict_takes_the_place_of_a_fault_in_whatever_order_the_files_are(
    world: World, tmp_path: Path
) -> None:
    first = Predictions(tmp_path, {"k": 1}, world)
    first.add([{"key": "a", "codes": [4]}, {"key": "b", "codes": [ABSENT]}])
    later = [{"key": "a", "codes": [ABSENT]}, {"key": "b", "codes": [3]}]
    text = "".join(json.dumps(row) + "\n" for row in later)
    (tmp_path / "predictions.rank1.jsonl").write_text(text)
    rows = Predictions(tmp_path, {"k": 1}, world).rows
    assert {key: row["codes"] for key, row in rows.items()} == {"a": [4], "b": [3]}


@pytest.mark.parametrize("cut", range(1, 30, 3))
def test_lines_cut_anywhere_are_done_again_and_odd_characters_survive(
    cut: int, world: World, tmp_path: Path
) -> None:
    rows = [{"key": str(i), "texts": ["é\u2028\x85\u3000" * 3], "codes": [4]} for i in range(2)]
    Predictions(tmp_path, {"k": 1}, world).add(rows)
    file = tmp_path / "predictions.rank0.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    again = Predictions(tmp_path, {"k": 1}, world)
    assert again.rows["0"] == rows[0] and again.rows.get("1", rows[1]) == rows[1]
    again.add(rows[1:])
    assert Predictions(tmp_path, {"k": 1}, world).rows == {"0": rows[0], "1": rows[1]}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("evaluation.k=2",), "k, sampling"),
        (("rollout.max_new_tokens=7",), "sampling"),
        (("data.variant=be-specific",), "variant"),
        (("data.eval.birds.path={root}/flowers",), "data"),
    ],
)
def test_other_settings_do_not_mix(
    words: tuple[str, ...], named: str, configure: Configure, world: World, toy_root: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    evaluate_model(configure("data.eval.flowers=none"), world, tmp_path / "out")
    with pytest.raises(ValueError, match=rf"other settings \({named}\): choose another folder"):
        given = [word.format(root=toy_root) for word in words]
        evaluate_model(configure("data.eval.flowers=none", *given), world, tmp_path / "out")


def test_predictions_of_a_model_trained_since_are_not_taken(
    configure: Configure, world: World, toy_model_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(toy_model_dir, tmp_path / "model")
    config = configure("data.eval.flowers=none", f"model.path={model}")
    evaluate_model(config, world, tmp_path / "out")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    with pytest.raises(ValueError, match=r"other settings \(weights\)"):
        evaluate_model(config, world, tmp_path / "out")


def test_best_of_k_is_an_oracle_over_the_same_first_samples(
    configure: Configure, world: World, tmp_path: Path
) -> None:
    few, many = (
        evaluate_model(configure(f"evaluation.k={k}"), world, tmp_path / str(k)) for k in (2, 5)
    )
    two, five = predictions_in(tmp_path / "2"), predictions_in(tmp_path / "5")
    assert all(five[key]["texts"][:2] == row["texts"] for key, row in two.items())
    best = {code: rank for rank, code in enumerate((ABSENT, FORMAT, W, 1, 2, 3, 4, 5))}
    oracle = [max(row["codes"], key=best.__getitem__) for row in five.values()]
    assert many.total.counts == tuple(oracle.count(code) for code in range(ABSENT, FORMAT + 1))
    assert many.total.correctness >= few.total.correctness
    for sample in range(5):
        single = recount([row["codes"][sample] for row in five.values()])
        assert many.total.correctness >= single["correctness"]


def test_be_specific_asks_another_question(
    configure: Configure, world: World, tmp_path: Path
) -> None:
    texts = []
    for variant in ("general", "be-specific"):
        data = open_data(configure(f"data.variant={variant}"), world, train=False)
        prompt = data.store.get(data.eval["birds"][0])
        assert prompt is not None
        texts.append(data.builder.tokenizer.decode(prompt.input_ids))
    assert "Classify the image. Answer" in texts[0]
    assert "Classify the image, be specific. Answer" in texts[1]
    assert texts[1].replace(", be specific", "") == texts[0]


class Harsh:
    """A judge for which everything is wrong."""

    identity = "harsh"
    concurrent = True

    def check(self, truths: Sequence[str]) -> None:
        assert truths

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        return [Verdict(W, "harsh") for _ in pairs]

    def tally(self) -> dict[str, float]:
        return {}

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


def test_the_judge_of_evaluation_stands_apart(
    toy_root: Path, toy_model_dir: Path, world: World, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(FACTORIES, "openai", lambda config, taxonomies: Harsh())

    def asks(judge: Any, truths: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        if "harsh" in judge.identity:
            pairs = [Pair(truth, "a quokka") for truth in truths]
            return np.array([v.category for v in judge.grade(pairs)], dtype=np.int8)
        return lot(judge, truths, texts)

    monkeypatch.setattr("speciarl.core.collect.codes_of", asks)
    examiner = ("kind=openai", "model=m", "base_url=http://localhost:1/v1", "cache=")
    words = [f"evaluation.judge.{word}" for word in examiner]
    words += ["train.steps=1", "data.eval.flowers=none"]
    out = train(run_config(toy_root, toy_model_dir, tmp_path / "run", *words), world, quiet=True)
    assert json_of(out / "evaluation" / "step-000001" / "metrics.json")["total"]["correctness"] == 0
    assert lines(out / "metrics.jsonl")[1]["rate/wrong"] < 1


def test_nothing_to_evaluate(configure: Configure, world: World, tmp_path: Path) -> None:
    none = configure("data.eval.flowers=none", "data.eval.birds=none")
    with pytest.raises(ValueError, match=r"no \[data.eval.NAME\] table"):
        evaluate_model(none, world, tmp_path / "a")
    folder = tmp_path / "images" / "golden warbler"
    folder.mkdir(parents=True)
    (folder / "empty.jpg").touch()
    words = ("path=" + str(folder.parent), "format=folder", "split=all", "k=0")
    given = [f"data.eval.birds.{word}" for word in words]
    with pytest.raises(ValueError, match=r"no \[data.eval\] table has a usable image.*zero bytes"):
        evaluate_model(configure("data.eval.flowers=none", *given), world, tmp_path / "b")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        *(({"k": 0}, "k at least 1"), ({"every": -1}, "every")),
        *(({"k": 2, **one}, "best of k") for one in ({"temperature": 0.0}, {"top_p": 0.0})),
        ({"judge": JudgeConfig(SAME, model="m")}, "'same' takes no other setting"),
    ],
)
def test_impossible_evaluation_settings(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EvaluationConfig(**given)
