"""The Triton route of best-of-N, under the interpreter, against the rules in plain Python."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardcases import SPECS, by_hand, groups_of, name_of
from speciarl.kernels import faults
from speciarl.kernels.codes import ABSENT, FORMAT, S_MINUS, S_PLUS, W
from speciarl.kernels.reward import GroupResult, RewardSpec, best_of_n, best_of_n_numpy

pytest.importorskip("triton")
from speciarl.kernels import reward_kernel  # noqa: E402

# Every multiset of six codes; with ABSENT among them, that is every smaller group too.
SIX = groups_of(6)


def triton(codes: np.ndarray, spec: RewardSpec, normalize: bool) -> GroupResult[torch.Tensor]:
    return best_of_n(torch.from_numpy(codes), spec, normalize=normalize, route="triton")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes one program after the other, of whatever size."""
    monkeypatch.setattr(reward_kernel, "TILE", 1 << 14)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_every_group_of_six(spec: RewardSpec, normalize: bool) -> None:
    found = triton(SIX, spec, normalize)
    expected = [by_hand(row, spec, normalize) for row in SIX.tolist()]
    rewards = np.array([r for r, _ in expected])
    advantages = np.array([a for _, a in expected])
    np.testing.assert_allclose(found.rewards, rewards, rtol=1e-6, atol=0)
    np.testing.assert_allclose(found.advantages, advantages, rtol=1e-6, atol=1e-7)
    # Exactly zero where the oracle is: constant groups must carry no signal at all.
    np.testing.assert_array_equal(found.live, (advantages != 0).any(axis=1))
    assert not found.advantages[~found.live].any()
    columns = [(SIX == code).sum(axis=1) for code in range(-1, 7)]
    np.testing.assert_array_equal(found.counts, np.stack(columns, axis=1))
    if spec.rule != "speciarl" and not spec.rule.endswith("-published"):
        assert (found.advantages[SIX == W] <= 0).all()
        assert (found.advantages[SIX == FORMAT] == np.float32(spec.format_penalty)).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("spec", SPECS[:3], ids=name_of)
def test_every_smaller_group(spec: RewardSpec, size: int) -> None:
    codes = groups_of(size)
    found = triton(codes, spec, True)
    advantages = np.array([by_hand(row, spec, True)[1] for row in codes.tolist()])
    np.testing.assert_allclose(found.advantages, advantages, rtol=1e-6, atol=1e-7)


@settings(max_examples=30)
@given(
    groups=st.integers(0, 40),
    size=st.integers(1, 300),
    tile=st.sampled_from((128, 2048)),
    spec=st.sampled_from(SPECS),
    normalize=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_device_and_host_agree_at_any_size(
    groups: int, size: int, tile: int, spec: RewardSpec, normalize: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    kinds = rng.choice(np.arange(ABSENT, FORMAT + 1), rng.integers(1, 9))  # often few of them
    codes = rng.choice(kinds, (min(groups, tile // 64), size)).astype(np.int8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward_kernel, "TILE", tile)
        device = triton(codes, spec, normalize)
    host = best_of_n_numpy(codes, spec, normalize=normalize)
    for one, other in zip(device, host, strict=True):
        assert one.numpy().dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-12)
    np.testing.assert_array_equal(device.live, host.live)


def test_two_runs_have_equal_bits() -> None:
    codes = np.random.default_rng(0).integers(-1, 7, (50, 33)).astype(np.int8)
    for one, other in zip(
        triton(codes, RewardSpec(), True), triton(codes, RewardSpec(), True), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("route", ["triton", "reference"])
def test_unknown_codes_are_counted_and_taken_as_absent(route: str) -> None:
    codes = torch.from_numpy(SIX[::40]).clone()
    known = codes.clone()
    for row, column, code in ((0, 0, 7), (3, 5, -2), (3, 1, 100), (9, 2, -128)):
        codes[row, column], known[row, column] = code, ABSENT
    with pytest.raises(ValueError, match="codes holds -128"):
        best_of_n(codes, RewardSpec(), normalize=True, route=route)
    with faults.deferred():
        found = best_of_n(codes, RewardSpec(), normalize=True, route=route)
    assert faults.take("cpu").tolist() == [0, 0, 0, 0, 4]
    for one, other in zip(found, best_of_n(known, RewardSpec(), normalize=True), strict=True):
        assert torch.equal(one, other)
    assert not found.advantages[codes == 7].any()


def test_strided_codes() -> None:
    codes = torch.from_numpy(SIX[::40]).clone()
    for case in (codes.t().contiguous().t(), torch.cat([codes, codes], dim=1)[:, :6]):
        assert not case.is_contiguous()
        found = best_of_n(case, RewardSpec(), normalize=True, route="triton")
        for one, other in zip(found, triton(codes.numpy(), RewardSpec(), True), strict=True):
            assert torch.equal(one, other)


def test_the_values_of_a_rule_are_not_rounded_to_fp32() -> None:
    """With rewards a few ulp of fp32 apart the advantages would be off by far more than that."""
    table = (0.1, 0.1 + 1e-8, 0.1 + 2e-8, 0.1 + 3e-8, 0.1 + 4e-8, 0.1 + 5e-8)
    spec = RewardSpec(rule="table", table=table)
    codes = np.array([[W, S_MINUS, S_PLUS]], dtype=np.int8)
    host = best_of_n_numpy(codes, spec, normalize=True)
    np.testing.assert_allclose(triton(codes, spec, True).advantages, host.advantages, rtol=1e-6)
