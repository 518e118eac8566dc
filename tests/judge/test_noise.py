"""The noise ablation: how many verdicts move, which, and where to."""

import numpy as np
import pytest

from speciarl.judge.noise import moved
from speciarl.kernels.codes import ABSENT, FORMAT, S_PLUS, W

COUNT = 60_000


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_right_share_moves_one_step_either_way(share: float) -> None:
    draw = np.random.default_rng(1)
    for code in range(W, S_PLUS + 1):
        codes = np.full(COUNT, code, dtype=np.int8)
        after = moved(codes, share, draw.random((COUNT, 2)))
        assert after.dtype == np.int8 and (codes == code).all()
        steps = after - codes
        sigma = (share * (1 - share) / COUNT) ** 0.5
        assert abs((steps != 0).mean() - share) <= 4 * sigma
        down = (steps[steps != 0] < 0).mean() if share else 0.5
        expected = {W: 0.0, S_PLUS: 1.0}.get(code, 0.5)
        assert set(steps) <= {-1, 0, 1} and abs(down - expected * bool(share)) < 0.02 or not share


def test_what_no_judge_gave_never_moves() -> None:
    codes = np.array([ABSENT, FORMAT, W, S_PLUS], dtype=np.int8)
    after = moved(codes, 1.0, np.zeros((4, 2)))
    assert after.tolist() == [ABSENT, FORMAT, W + 1, S_PLUS - 1]
    assert moved(codes[:0], 1.0, np.zeros((0, 2))).shape == (0,)


def test_a_code_depends_on_its_own_draws_alone() -> None:
    draws = np.random.default_rng(2).random((100, 2))
    codes = (np.arange(100) % 8 - 1).astype(np.int8)
    order = np.random.default_rng(3).permutation(100)
    assert (moved(codes, 0.4, draws)[order] == moved(codes[order], 0.4, draws[order])).all()
