"""The noise ablation: some verdicts moved one step up or down the ladder (SpeciaRL, ablations)."""

import numpy as np

from speciarl.kernels.codes import S_PLUS, W


def moved(codes: np.ndarray, share: float, draws: np.ndarray) -> np.ndarray:
    """`codes`, with a share of the judged ones moved one step.

    codes: [n] int8; ABSENT and FORMAT, which no judge gave, never move.
    share: chance of a move for each code, from 0 to 1.
    draws: [n, 2] float64, uniform in [0, 1). A code moves if its first number is below `share`,
    down if its second is below one half. From an end of the ladder there is one way only.
    Returns a new [n] int8 array.

    A move belongs to a sample, not to a pair: were it drawn from truth and prediction, the same
    mistake would come back every time, which is a biased judge and no noise. So the caller draws
    from a counter (run seed, step, group, sample), and a resumed run repeats its noise.
    """
    judged = (codes >= W) & (codes <= S_PLUS)
    down = (draws[:, 1] < 0.5) & (codes != W) | (codes == S_PLUS)
    steps = np.where(down, -1, 1)
    return np.where(judged & (draws[:, 0] < share), codes + steps, codes).astype(np.int8)
