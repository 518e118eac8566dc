from pathlib import Path

import pytest

from speciarl.bench.rollout import measure, report
from speciarl.bench.rollout_work import Work


@pytest.mark.parametrize("fixed_length", [True, False])
def test_both_sides_do_the_same_work(toy_model_dir: Path, fixed_length: bool) -> None:
    work = Work(
        prompts=3, samples=2, max_new_tokens=5, fixed_length=fixed_length, repeats=2,
        dtype="float32", device="cpu",
    )  # fmt: skip
    runs = measure(toy_model_dir, "Answer.", work, ["native", "generate"])
    assert set(runs) == {"native", "generate"}
    for done in runs.values():
        assert [run.samples for run in done] == [6, 6]
        assert all(6 <= run.tokens <= 30 for run in done)
        assert not fixed_length or {run.tokens for run in done} == {30}
    result = report(runs, work, "test")
    ratio = result["ratios"]["generate"]
    assert ratio["min"] <= ratio["median"] <= ratio["max"]
