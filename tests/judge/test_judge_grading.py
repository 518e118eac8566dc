"""From completions to codes, and judges by name."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from speciarl.judge.base import Pair, Verdict
from speciarl.judge.grading import codes_of
from speciarl.judge.registry import make_judge
from speciarl.kernels.codes import ABSENT, FORMAT, S_MINUS, A, S, W


class Recorder:
    """A judge that keeps what it was asked and answers from a list."""

    identity = "recorder"
    concurrent = True

    def __init__(self, verdicts: Sequence[Verdict]) -> None:
        self.verdicts = list(verdicts)
        self.asked: list[Pair] = []

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        self.asked += pairs
        return self.verdicts

    def check(self, truths: Iterable[str]) -> None: ...

    def tally(self) -> dict[str, float]:
        return {}

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def taxonomy(tmp_path: Path) -> Path:
    nodes = [{"name": "bird"}, {"name": "robin", "parent": "bird"}]
    path = tmp_path / "taxonomy.json"
    path.write_text(json.dumps({"nodes": nodes}))
    return path


def test_codes_of_completions(taxonomy: Path) -> None:
    texts = [
        "<think>red</think><answer>Robins</answer>",
        "<answer>bird</answer>",
        "<answer>None</answer>",
        "<answer></answer>",
        "robin",
        "<answer>robin</answer><answer>bird</answer>",
    ]
    codes = codes_of(make_judge("taxonomy", taxonomy=taxonomy), ["robin"] * 6, texts)
    assert codes.dtype == np.int8
    assert codes.tolist() == [S, S_MINUS, A, W, FORMAT, FORMAT]


def test_faults_are_absent_and_failures_are_not_shown() -> None:
    judge = Recorder([Verdict(None, "timeout"), Verdict(S, "model", 2.5)])
    codes = codes_of(judge, ["a", "b", "c"], ["<answer>x</answer>", "y", "<answer>z</answer>"])
    assert codes.tolist() == [ABSENT, FORMAT, S]
    assert judge.asked == [Pair("a", "x"), Pair("c", "z")]


def test_nothing_to_grade() -> None:
    judge = Recorder([])
    assert codes_of(judge, [], []).shape == (0,)
    assert codes_of(judge, ["a"], ["no tags"]).tolist() == [FORMAT]
    assert judge.asked == []


def test_broken_contracts() -> None:
    with pytest.raises(ValueError, match="2 truths for 1 completions"):
        codes_of(Recorder([]), ["a", "b"], ["x"])
    with pytest.raises(RuntimeError, match="recorder returned 0 verdicts for 1 pairs"):
        codes_of(Recorder([]), ["a"], ["<answer>x</answer>"])


def test_make_judge(taxonomy: Path) -> None:
    one = make_judge("taxonomy", taxonomy=str(taxonomy))
    assert one.identity == make_judge("taxonomy", taxonomy=[taxonomy]).identity
    with pytest.raises(ValueError, match="kind = 'taxnomy': did you mean 'taxonomy'"):
        make_judge("taxnomy", taxonomy=taxonomy)
    with pytest.raises(ValueError, match="known: taxonomy"):
        make_judge("qqq")
    with pytest.raises(ValueError, match="no setting 'modl'; did you mean 'model'"):
        make_judge("transformers", modl="x")
    with pytest.raises(ValueError, match="no setting 'path'; .*known: kind, model"):
        make_judge("taxonomy", taxonomy=taxonomy, path=taxonomy)
    with pytest.raises(ValueError, match="needs a taxonomy file"):
        make_judge("taxonomy")
