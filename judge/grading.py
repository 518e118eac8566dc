"""From completions to codes: parse, judge, and keep the two kinds of failure apart."""

from collections.abc import Sequence

import numpy as np

from speciarl.judge.answers import parse_answer
from speciarl.judge.base import Judge, Pair
from speciarl.kernels.codes import ABSENT, FORMAT


def codes_of(judge: Judge, truths: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """Codes [n] int8 of n completions, in order.

    truths: n ground truths. texts: n decoded completions, tags included.
    FORMAT where a completion has no parsable answer (it is not shown to the judge), ABSENT where
    the judge could not say, the judge's category elsewhere (SpeciaRL, section 3).
    Raises ValueError if the lengths differ, RuntimeError if the judge breaks its contract.
    """
    if len(truths) != len(texts):
        raise ValueError(f"{len(truths)} truths for {len(texts)} completions")
    codes = np.full(len(texts), FORMAT, dtype=np.int8)
    answers = [parse_answer(text) for text in texts]
    asked = [i for i, answer in enumerate(answers) if answer is not None]
    pairs = [Pair(truths[i], answers[i] or "") for i in asked]
    verdicts = judge.grade(pairs) if pairs else []
    if len(verdicts) != len(pairs):
        raise RuntimeError(
            f"judge {judge.identity} returned {len(verdicts)} verdicts for {len(pairs)} pairs"
        )
    for i, verdict in zip(asked, verdicts, strict=True):
        codes[i] = ABSENT if verdict.category is None else verdict.category
    return codes
