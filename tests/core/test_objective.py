"""The algorithms' settings, and the weights that hold the global denominators."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speciarl.core.objective import AGGREGATIONS, ObjectiveConfig, sequence_weights
from speciarl.kernels.loss import LossSpec


@pytest.mark.parametrize(
    ("algorithm", "clip_high", "kl_coef", "normalize", "aggregation", "dynamic"),
    [
        ("grpo", 0.2, 0.01, True, "token-mean", False),
        ("dr-grpo", 0.2, 0.0, False, "constant", False),
        ("dapo", 0.28, 0.0, True, "token-mean", True),
    ],
)
def test_an_algorithm_fills_in_what_is_left_open(
    algorithm: str,
    clip_high: float,
    kl_coef: float,
    normalize: bool,
    aggregation: str,
    dynamic: bool,
) -> None:
    objective = ObjectiveConfig(algorithm)
    assert objective.normalize is normalize
    assert objective.aggregation == aggregation
    assert objective.dynamic_sampling is dynamic
    assert objective.loss == LossSpec(
        clip_low=0.2, clip_high=clip_high, dual_clip=3.0, kl="k3", kl_coef=kl_coef
    )


@pytest.mark.parametrize(
    ("algorithm", "clip_low", "clip_high", "aggregation", "dynamic"),
    [("cispo", 1.0, 4.0, "token-mean", True), ("gspo", 3e-4, 4e-4, "sequence-mean", False)],
)
def test_algorithms_with_a_loss_of_their_own(
    algorithm: str, clip_low: float, clip_high: float, aggregation: str, dynamic: bool
) -> None:
    objective = ObjectiveConfig(algorithm)
    assert objective.normalize is True
    assert objective.aggregation == aggregation and objective.dynamic_sampling is dynamic
    assert objective.loss == LossSpec(
        kind=algorithm, clip_low=clip_low, clip_high=clip_high, kl_coef=0.0
    )
    assert ObjectiveConfig(algorithm, clip_high=0.1, kl_coef=0.01).loss == LossSpec(
        kind=algorithm, clip_low=clip_low, clip_high=0.1, kl_coef=0.01
    )


def test_a_given_value_is_kept_even_where_it_is_zero() -> None:
    objective = ObjectiveConfig(
        "grpo",
        clip_low=0.0,
        kl_coef=0.0,
        kl="k1",
        dual_clip=None,
        normalize=False,
        aggregation="sequence-mean",
        importance_cap=2.0,
        entropy_coef=0.01,
    )
    assert objective.normalize is False
    assert objective.aggregation == "sequence-mean"
    assert objective.loss == LossSpec(
        clip_low=0.0,
        clip_high=0.2,
        dual_clip=None,
        kl="k1",
        kl_coef=0.0,
        importance_cap=2.0,
        entropy_coef=0.01,
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"algorithm": "ppo"}, "'ppo'.*grpo, dr-grpo, dapo, cispo, gspo"),
        ({"aggregation": "mean"}, "'mean'.*token-mean, sequence-mean, constant"),
        ({"max_refills": -1}, "max_refills=-1"),
        ({"clip_high": -1.0}, "clip_high = -1.0"),
        ({"clip_low": -0.1}, "clip_low = -0.1"),
        ({"dual_clip": 1.0}, "dual_clip = 1.0"),
        ({"kl": "k4"}, "'k4'"),
        ({"importance_cap": 0.0}, "importance_cap = 0.0"),
        ({"entropy_coef": float("nan")}, "entropy_coef"),
    ],
)
def test_impossible_values_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**values)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(40, 60), st.data())
def test_weights_against_the_formulas(lengths: list[int], limit: int, data: st.DataObject) -> None:
    draws = [
        data.draw(st.lists(st.floats(-3, 3), min_size=n, max_size=n), label="token losses")
        for n in lengths
    ]
    every = [loss for sequence in draws for loss in sequence]
    wanted = {
        "token-mean": sum(every) / len(every),
        "sequence-mean": sum(sum(s) / len(s) for s in draws) / len(draws),
        "constant": sum(sum(s) / limit for s in draws) / len(draws),
    }
    for aggregation in AGGREGATIONS:
        weights = sequence_weights(lengths, aggregation, limit)
        found = sum(w * sum(s) for w, s in zip(weights, draws, strict=True))
        assert found == pytest.approx(wanted[aggregation], abs=1e-9)
