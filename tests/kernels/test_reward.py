"""Rewards and group advantages against a plain Python oracle over every small group."""

import math

import numpy as np
import pytest
import torch

from rewardcases import SPECS, by_hand, groups_of, name_of
from speciarl.kernels.codes import ABSENT, CODES, FORMAT, NAMES, S_MINUS, SPECIFICITY, A, S, W
from speciarl.kernels.reward import GroupResult, RewardSpec, best_of_n, best_of_n_numpy


def both(codes: np.ndarray, spec: RewardSpec, normalize: bool) -> list[GroupResult]:
    device = best_of_n(torch.from_numpy(codes), spec, normalize=normalize)
    assert [t.dtype for t in device] == [torch.float32, torch.float32, torch.bool, torch.int32]
    host = best_of_n_numpy(codes, spec, normalize=normalize)
    assert [a.dtype for a in host] == [np.float32, np.float32, np.bool_, np.int32]
    return [host, GroupResult(*(t.numpy() for t in device))]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_every_group_up_to_five(spec: RewardSpec, normalize: bool) -> None:
    for size in range(1, 6):
        codes = groups_of(size)
        expected = [by_hand(row, spec, normalize) for row in codes.tolist()]
        rewards = np.array([r for r, _ in expected])
        advantages = np.array([a for _, a in expected])
        for result in both(codes, spec, normalize):
            np.testing.assert_allclose(result.rewards, rewards, rtol=1e-6, atol=0)
            np.testing.assert_allclose(result.advantages, advantages, rtol=1e-6, atol=1e-7)
            # Exactly zero where the oracle is: constant groups must carry no signal at all.
            np.testing.assert_array_equal(result.live, (advantages != 0).any(axis=1))
            assert (result.advantages[~result.live] == 0).all()
            assert (result.advantages[codes == ABSENT] == 0).all()
            assert (result.rewards[codes == ABSENT] == 0).all()
            columns = [(codes == code).sum(axis=1) for code in range(-1, 7)]
            np.testing.assert_array_equal(result.counts, np.stack(columns, axis=1))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "spec",
    [s for s in SPECS if s.rule != "speciarl" and not s.rule.endswith("-published")],
    ids=name_of,
)
def test_a_wrong_answer_is_never_reinforced(spec: RewardSpec, normalize: bool) -> None:
    for size in range(1, 6):
        codes = groups_of(size)
        for result in both(codes, spec, normalize):
            assert (result.advantages[codes == W] <= 0).all()
            assert (result.advantages[codes == FORMAT] == np.float32(spec.format_penalty)).all()


def test_published_rule_reinforces_wrong_answers_beside_a_format_failure() -> None:
    codes = np.array([[W, W, W, W, FORMAT]], dtype=np.int8)
    for rule in ("speciarl", "static-binary-published"):
        for result in both(codes, RewardSpec(rule=rule), True):
            assert result.advantages[0, 0] == pytest.approx(0.4472, abs=1e-4)
            assert result.advantages[0, 4] == pytest.approx(-1.7889, abs=1e-4)
    for rule in ("speciarl-guarded", "speciarl-ordered", "static-binary"):
        for result in both(codes, RewardSpec(rule=rule), True):
            np.testing.assert_array_equal(result.advantages[0], [0, 0, 0, 0, -1])
            assert result.live[0]


def test_ordered_rule_separates_errors_from_answers_below_the_bar() -> None:
    codes = np.array([[S, S_MINUS, W, A]], dtype=np.int8)
    for result in both(codes, RewardSpec(rule="speciarl-ordered"), False):
        np.testing.assert_allclose(result.rewards[0], [1, 0, -0.5, 0])
    for result in both(codes, RewardSpec(rule="speciarl-guarded"), False):
        np.testing.assert_allclose(result.rewards[0], [1, 0, 0, 0])


def test_group_in_which_nothing_was_scored() -> None:
    codes = np.full((2, 4), ABSENT, dtype=np.int8)
    for spec in SPECS:
        for result in both(codes, spec, True):
            assert not result.live.any()
            assert not result.rewards.any() and not result.advantages.any()
            assert (result.counts[:, 0] == 4).all() and not result.counts[:, 1:].any()


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_large_random_groups_agree_on_device_and_host(spec: RewardSpec) -> None:
    codes = np.random.default_rng(0).integers(-1, 7, size=(300, 16)).astype(np.int8)
    host, device = both(codes, spec, True)
    for one, other in zip(host, device, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_no_groups() -> None:
    for result in both(np.empty((0, 5), dtype=np.int8), RewardSpec(), True):
        assert result.rewards.shape == (0, 5) and result.counts.shape == (0, 8)


def test_no_value_is_read_on_the_host() -> None:
    # A meta tensor has no values: reading one, or a mask of unknown size, raises.
    for spec in SPECS:
        result = best_of_n(torch.empty(3, 4, dtype=torch.int8, device="meta"), spec, normalize=True)
        assert result.advantages.shape == (3, 4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rule": "speciarl-orderd"}, "speciarl-ordered"),
        ({"rule": "static"}, "static-binary"),
        ({"format_penalty": 0.5}, "format_penalty"),
        ({"format_penalty": math.nan}, "format_penalty"),
        ({"wrong_penalty": -1.0}, "wrong_penalty"),
        ({"rule": "table"}, "table"),
        ({"table": (0.0,) * 6}, "table"),
        ({"rule": "table", "table": (0.0,) * 5}, "6 values"),
        ({"rule": "table", "table": (0.0, 0.0, -0.1, 1.0, 1.0, 1.0)}, "wrong answer"),
        ({"rule": "table", "table": (-math.inf, 0.0, 0.1, 1.0, 1.0, 1.0)}, "finite"),
    ],
)
def test_bad_rules_are_named(changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RewardSpec(**changes)


def test_bad_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="int8"):
        best_of_n(torch.zeros(2, 3), RewardSpec(), normalize=True)
    with pytest.raises(ValueError, match="int8"):
        best_of_n_numpy(np.zeros((2, 0), dtype=np.int8), RewardSpec(), normalize=True)
    for code in (7, -2):
        with pytest.raises(ValueError, match=rf"codes holds {code}; it must be in \[-1, 7\)"):
            best_of_n(torch.tensor([[0, code]], dtype=torch.int8), RewardSpec(), normalize=True)
    with pytest.raises(ValueError, match="auto, reference, triton"):
        best_of_n(torch.zeros(2, 3, dtype=torch.int8), RewardSpec(), normalize=True, route="x")
    with pytest.raises(ValueError, match="7"):
        best_of_n_numpy(np.array([[0, 7]], dtype=np.int8), RewardSpec(), normalize=True)


def test_every_code_has_a_name_and_the_ladder_its_points() -> None:
    assert sorted(NAMES) == list(CODES) == list(range(-1, 7))
    assert {NAMES[c]: p for c, p in SPECIFICITY.items()} == {
        "abstain": 1,
        "generic": 2,
        "less specific": 3,
        "specific": 4,
        "more specific": 4,
    }
