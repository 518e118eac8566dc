"""The exp-sum under Triton's interpreter against float64: accuracy, and what could break it."""

import pytest
import torch
from torch import Tensor

from expsumcases import HeadCase, random_case
from headcases import off

pytest.importorskip("triton")
from speciarl.kernels import expsum, expsum_kernels, faults  # noqa: E402
from speciarl.kernels.expsum_tiles import TILES  # noqa: E402

# 151936 = 593 x 256 + 128 and 152064 = 594 x 256, and one that no tile divides.
QWEN_3B, QWEN_7B, RAGGED = 384, 512, 301


def run(case: HeadCase, *, tiles: str = expsum.DEFAULT) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and the finished table."""
    rows, vocab = len(case.hidden), len(case.weight)
    table = expsum.table_like(rows, vocab, "cpu")
    allowed = expsum.allowed_ids(vocab, case.banned, "cpu")
    anchor = expsum.anchors(case.hidden, case.weight, case.targets, case.temperature)
    sums = expsum.sums(
        case.hidden,
        case.weight,
        case.targets,
        anchor,
        allowed,
        case.temperature,
        with_entropy=True,
        table=table,
        tiles=tiles,
    )
    return *expsum.finish(sums, case.targets, allowed, table, total=vocab), table


def gradients(
    case: HeadCase, logp: Tensor, table: Tensor, grad_logp: Tensor
) -> tuple[Tensor, Tensor]:
    """As the module's docstring says, with operands in bf16 and products in fp32."""
    v = (-grad_logp * logp.exp() / case.temperature)[:, None]
    weighted = (v * case.hidden.float()).bfloat16().float()
    return v * (table.float() @ case.weight.float()), table.float().t() @ weighted


@pytest.mark.parametrize("vocab", [QWEN_3B, QWEN_7B, RAGGED])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_values_and_gradients_are_accurate(vocab: int, temperature: float) -> None:
    case = random_case(64, 128, vocab, temperature=temperature, seed=vocab)
    logp, entropy, table = run(case)
    right_logp, right_entropy = case.values()
    assert (logp - right_logp).abs().max() <= 2e-5
    assert (entropy - right_entropy).abs().max() <= 2e-5
    upstream = torch.randn(64, generator=torch.Generator().manual_seed(1))
    upstream[::5] = 0.0
    found = gradients(case, logp, table, upstream)
    for value, right in zip(found, case.gradients(upstream), strict=True):
        assert off(value, right) <= 4e-3


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_outliers_cost_no_more_than_in_plain_fp32(temperature: float) -> None:
    case = random_case(48, 64, RAGGED, temperature=temperature)
    case.hidden[::3] *= 16
    case.weight[7::40] *= 2
    case.targets = case.logits().argmax(dim=1)
    assert 350 < case.logits().abs().max() < 800
    logp, entropy, table = run(case)
    right = case.values()
    plain = case.values(torch.float32)
    for value, exact, usual in zip((logp, entropy), right, plain, strict=True):
        limit = max(1.2e-4, float((usual - exact).abs().max()))
        assert (value - exact).abs().max() <= limit
    upstream = torch.randn(48, generator=torch.Generator().manual_seed(1))
    found = gradients(case, logp, table, upstream)
    for value, exact in zip(found, case.gradients(upstream), strict=True):
        assert (value - exact).norm() <= 4e-3 * exact.norm() + 1e-4


@pytest.mark.parametrize("tiles", TILES)
def test_every_tile_shape_gives_the_same(tiles: str) -> None:
    case = random_case(130, 80, 530, temperature=0.9, banned=[0, 255, 256, 529], seed=3)
    if not TILES[tiles].fits(store=True):
        with pytest.raises(ValueError, match=f"tiles = '{tiles}' cannot run with a table"):
            run(case, tiles=tiles)
        return
    logp, entropy, table = run(case, tiles=tiles)
    right_logp, right_entropy = case.values()
    assert (logp - right_logp).abs().max() <= 2e-5
    assert (entropy - right_entropy).abs().max() <= 2e-5
    assert torch.equal(table[:, case.banned], torch.zeros(130, 4, dtype=torch.bfloat16))


def test_bands_visit_every_tile_once() -> None:
    for tiles_m, tiles_n, group in [(1, 1, 8), (5, 3, 2), (7, 4, 8), (16, 2, 4), (9, 5, 4)]:
        visited = [
            expsum_kernels.tile_of.fn(tile, tiles_m, tiles_n, group)
            for tile in range(tiles_m * tiles_n)
        ]
        assert sorted(visited) == [(m, n) for m in range(tiles_m) for n in range(tiles_n)]


def test_two_runs_agree_in_every_bit() -> None:
    case = random_case(70, 64, RAGGED)
    for first, second in zip(run(case), run(case), strict=True):
        assert torch.equal(first, second)


def test_the_table_changes_no_value() -> None:
    case = random_case(33, 64, RAGGED)
    anchor = expsum.anchors(case.hidden, case.weight, case.targets, 1.0)
    arguments = (case.hidden, case.weight, case.targets, anchor, None, 1.0)
    table = expsum.table_like(33, RAGGED, "cpu")
    with_table = expsum.sums(*arguments, with_entropy=True, table=table)
    assert torch.equal(expsum.sums(*arguments, with_entropy=True), with_table)
    alone = expsum.sums(*arguments, with_entropy=False)
    assert torch.equal(alone[0], with_table[0]) and not alone[1].any()


def test_logits_of_minus_ten_thousand() -> None:
    case = random_case(16, 64, RAGGED)
    case.hidden[:, 0], case.weight[:, 0] = 1.0, -1e4
    logp, entropy, _ = run(case)
    plain = case.values(torch.float32)
    for value, exact, usual in zip((logp, entropy), case.values(), plain, strict=True):
        assert (value - exact).abs().max() <= 2 * (usual - exact).abs().max()


def test_a_certain_token_keeps_its_tiny_log_prob_and_gradient() -> None:
    case = random_case(8, 64, RAGGED)
    case.targets = torch.arange(8) * 30
    # The target's logit gains 16 to 23: 1 - p down to 1e-10, where 1 + S' rounds to 1.
    for row, target in enumerate(case.targets):
        direction = case.hidden[row].float() / case.hidden[row].float().square().sum()
        case.weight[target] = ((16 + row) * direction).bfloat16()
    others = torch.ones(RAGGED, dtype=torch.bool)
    others[case.targets] = False
    case.weight[others] *= 0.05
    logp, entropy, table = run(case)
    right_logp, right_entropy = case.values()
    assert right_logp.abs().min() < 1e-6
    assert ((logp - right_logp) / right_logp).abs().max() < 1e-5
    assert ((entropy - right_entropy) / right_entropy).abs().max() < 1e-5
    # 1 - p at the target is one bf16 rounding away, not a difference of two numbers near 1.
    at_target = -table.float().gather(1, case.targets[:, None]).squeeze(1) * logp.exp()
    right = -torch.expm1(right_logp)
    assert ((at_target - right) / right).abs().max() < 2**-8


def test_targets_at_the_edges_of_tiles() -> None:
    case = random_case(6, 64, RAGGED, std=1.0)
    case.targets = torch.tensor([0, 127, 255, 256, 299, RAGGED - 1])
    logp, entropy, table = run(case)
    assert (logp - case.values()[0]).abs().max() <= 2e-5
    # S', the negative of the target's entry, is what all other ids have in the table.
    at_target = table.float().gather(1, case.targets[:, None]).squeeze(1)
    others = table.double().sum(dim=1) - at_target
    assert ((others + at_target) / others).abs().max() < 1e-2


def test_banned_ids_count_for_nothing_however_large() -> None:
    case = random_case(20, 64, RAGGED, banned=[3, 256, RAGGED - 1])
    case.weight[case.banned] *= 50
    logp, entropy, table = run(case)
    for value, right in zip((logp, entropy), case.values(), strict=True):
        assert (value - right).abs().max() <= 2e-5
    assert not table[:, case.banned].any()


def test_a_banned_target_and_one_that_is_no_id_have_minus_infinity() -> None:
    case = random_case(4, 64, RAGGED, banned=[3, 7])
    right_entropy = case.values()[1]
    case.targets[1:3] = torch.tensor([7, RAGGED])
    logp, entropy, table = run(case)
    assert logp.isneginf().tolist() == [False, True, True, False]
    assert (entropy - right_entropy).abs().max() <= 1e-4
    assert table.isfinite().all() and table[1, 7] == 0
    assert faults.take("cpu").sum() == 0  # whoever takes the ids has counted them


def test_a_clamped_row_is_counted_and_stays_finite() -> None:
    case = random_case(5, 64, RAGGED)
    case.hidden[2] *= 40
    case.targets[2] = case.logits()[2].argmin()
    faults.take("cpu")
    logp, entropy, table = run(case)
    counts = faults.take("cpu")
    assert counts[faults.LOGPROB_CLAMPED] == 1 and counts.sum() == 1
    assert logp.isfinite().all() and entropy.isfinite().all() and table.isfinite().all()
    assert logp[2] < -100 * 0.69


def test_a_banned_target_is_no_clamp() -> None:
    case = random_case(5, 64, RAGGED, banned=[7])
    case.targets[2] = 7
    case.weight[7] = -20 * case.hidden[2]
    faults.take("cpu")
    logp, _, table = run(case)
    assert logp[2].isneginf() and table.isfinite().all()
    assert faults.take("cpu").sum() == 0


def test_not_a_number_stays_in_its_row_and_is_no_clamp() -> None:
    case = random_case(6, 64, RAGGED)
    right = case.values()[0]
    case.hidden[4, 11] = float("nan")
    faults.take("cpu")
    logp, entropy, _ = run(case)
    assert logp.isnan().tolist() == [False] * 4 + [True, False] and entropy[4].isnan()
    assert (logp - right)[[0, 1, 2, 3, 5]].abs().max() <= 2e-5
    assert faults.take("cpu").sum() == 0


@pytest.mark.parametrize("logp_too", [True, False])
def test_gradient_of_the_entropy(logp_too: bool) -> None:
    case = random_case(40, 128, RAGGED, temperature=0.8, banned=[5, 290], std=2.0)
    logp, entropy, table = run(case)
    draw = torch.Generator().manual_seed(2)
    c, g = torch.randn(2, 40, generator=draw)
    c = c if logp_too else torch.zeros(40)
    expsum.entropy_table(table, logp, entropy, case.targets, c, g, case.temperature)
    right = case.gradients(c, g)
    assert off(table.float() @ case.weight.float(), right[0]) <= 4e-3
    assert off(table.float().t() @ case.hidden.float(), right[1]) <= 4e-3
    assert not table[:, case.banned].any()


def test_gradient_of_the_entropy_is_zero_where_the_log_prob_is_minus_infinity() -> None:
    case = random_case(3, 64, RAGGED, banned=[5])
    case.targets[1] = 5
    logp, entropy, table = run(case)
    ones = torch.ones(3)
    expsum.entropy_table(table, logp, entropy, case.targets, ones, ones, 1.0)
    assert not table[1].any() and table[0].any() and table.isfinite().all()
