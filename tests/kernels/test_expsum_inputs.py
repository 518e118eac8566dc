"""The exp-sum's arguments: layouts, sizes, cut vocabularies, and what it must refuse."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expsumcases import random_case
from headcases import Record, off

pytest.importorskip("triton")
from speciarl.kernels import expsum, expsum_kernels  # noqa: E402

LARGE_STRIDE = 2**30 + 8  # elements; two rows are past int32


def values(
    hidden: Tensor, weight: Tensor, targets: Tensor, table: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    anchor = expsum.anchors(hidden, weight, targets, 1.0)
    sums = expsum.sums(hidden, weight, targets, anchor, None, 1.0, with_entropy=True, table=table)
    return expsum.finish(sums, targets, None, table)


def shifted(matrix: Tensor) -> Tensor:
    """The same values, rows together, at an address that is 2 bytes off."""
    storage = torch.empty(matrix.numel() + 1, dtype=matrix.dtype)
    return storage[1:].view(matrix.shape).copy_(matrix)


def strided(matrix: Tensor) -> Tensor:
    """The same values, every second row and column of a larger matrix."""
    wide = torch.full((2 * len(matrix), 2 * matrix.shape[1]), 9.0, dtype=matrix.dtype)
    wide[::2, ::2] = matrix
    return wide[::2, ::2]


LAYOUTS = {
    "shifted": shifted,
    "strided": strided,
    "transposed": lambda matrix: matrix.t().contiguous().t(),
    "row stride of 3 mod 8": lambda matrix: torch.nn.functional.pad(matrix, (0, 3))[:, :-3],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_works(layout: str) -> None:
    case = random_case(9, 40, 50)
    right = values(case.hidden, case.weight, case.targets)
    arrange = LAYOUTS[layout]
    for hidden, weight in [
        (arrange(case.hidden), case.weight),
        (case.hidden, arrange(case.weight)),
    ]:
        found = values(hidden, weight, case.targets)
        assert all(map(torch.equal, found, right))


@pytest.mark.parametrize("width", [1, 7, 20, 65])
def test_any_width_works(width: int) -> None:
    case = random_case(5, width, 33)
    logp, entropy = values(case.hidden, case.weight, case.targets)
    assert (logp - case.values()[0]).abs().max() <= 2e-5
    assert (entropy - case.values()[1]).abs().max() <= 2e-5


def test_targets_of_any_integer_type_and_address() -> None:
    case = random_case(9, 16, 50)
    right = values(case.hidden, case.weight, case.targets)[0]
    padded = torch.cat((torch.zeros(1, dtype=torch.int64), case.targets))
    for targets in (
        case.targets.to(torch.int32),
        case.targets.to(torch.uint8),
        padded[1:],
        case.targets.repeat_interleave(2)[::2],
    ):
        assert torch.equal(values(case.hidden, case.weight, targets)[0], right)


@pytest.mark.parametrize(("rows", "vocab"), [(0, 50), (1, 1), (1, 50), (127, 2), (129, 257)])
def test_any_number_of_rows_and_ids_works(rows: int, vocab: int) -> None:
    case = random_case(rows, 16, vocab)
    table = expsum.table_like(rows, vocab, "cpu")
    logp, entropy = values(case.hidden, case.weight, case.targets, table)
    assert logp.shape == entropy.shape == (rows,)
    assert torch.allclose(logp.double(), case.values()[0], rtol=0, atol=2e-5)


def test_more_rows_than_a_grids_second_axis_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter would take minutes for so many rows: only how they are numbered is looked at.
    grids = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *arguments, **constants: None

    for name in ("anchor", "expsum", "reduce", "finish", "entropy"):
        monkeypatch.setattr(expsum_kernels, f"{name}_kernel", Recorder())
    rows = 70_000
    hidden, weight = torch.zeros(rows, 8).bfloat16(), torch.zeros(300, 8).bfloat16()
    row, targets = torch.zeros(rows), torch.zeros(rows, dtype=torch.int32)
    table = torch.zeros(rows, 1).bfloat16()
    values(hidden, weight, targets)
    expsum.entropy_table(table, row, row, targets, row, row, 1.0)
    assert len(grids) == 5
    assert all(second <= 2 for _, *others in grids for second in others)


def test_a_table_larger_than_int32() -> None:
    case = random_case(3, 16, 20)
    # 4 GB of address space, of which three short rows are touched.
    storage = torch.empty(2 * LARGE_STRIDE + 24, dtype=torch.bfloat16)
    table = storage.as_strided((3, 20), (LARGE_STRIDE, 1))
    small = expsum.table_like(3, 20, "cpu")
    for each in (table, small):
        logp, entropy = values(case.hidden, case.weight, case.targets, each)
        ones = torch.ones(3)
        expsum.entropy_table(each, logp, entropy, case.targets, ones, ones, 1.0)
    assert torch.equal(table, small) and small.any(dim=1).all()


def test_a_worker_thread_can_call_it() -> None:
    case = random_case(9, 16, 50)
    arguments = (case.hidden, case.weight, case.targets)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(values, *arguments).result()
    assert all(map(torch.equal, found, values(*arguments)))


def test_forward_only_makes_nothing_of_the_tables_size() -> None:
    case = random_case(200, 8, 900, banned=[4])
    allowed = expsum.allowed_ids(900, case.banned, "cpu")
    with Record() as record:
        anchor = expsum.anchors(case.hidden, case.weight, case.targets, 1.0)
        sums = expsum.sums(
            case.hidden, case.weight, case.targets, anchor, allowed, 1.0, with_entropy=True
        )
        expsum.finish(sums, case.targets, allowed)
    # The largest is the weight, which the interpreter looks at byte by byte.
    assert record.largest <= 900 * 8 * 2 < 200 * 900 / 10


@pytest.mark.parametrize("cut", [1, 100, 256, 299])
def test_a_cut_vocabulary_adds_up_to_the_whole(cut: int) -> None:
    case = random_case(20, 32, 300, temperature=0.7, banned=[0, 150, 257])
    allowed = expsum.allowed_ids(300, case.banned, "cpu")
    parts = [(0, case.weight[:cut]), (cut, case.weight[cut:])]
    tables = [expsum.table_like(20, len(weight), "cpu") for _, weight in parts]
    anchor = sum(
        expsum.anchors(case.hidden, weight, case.targets, 0.7, first_id=first)
        for first, weight in parts
    )
    sums = sum(
        expsum.sums(
            case.hidden,
            weight,
            case.targets,
            anchor,
            allowed,
            0.7,
            with_entropy=True,
            table=table,
            first_id=first,
        )
        for (first, weight), table in zip(parts, tables, strict=True)
    )
    for (first, _), table in zip(parts, tables, strict=True):
        logp, entropy = expsum.finish(sums, case.targets, allowed, table, first_id=first)
        for value, right in zip((logp, entropy), case.values(), strict=True):
            assert (value - right).abs().max() <= 2e-5
    gradient = torch.cat(tables, dim=1).float() * -logp.exp()[:, None] / 0.7
    right = case.logit_gradient(torch.ones(20))
    assert off(gradient, right) <= 4e-3


def test_a_banned_id_deep_in_a_shards_tile() -> None:
    # Ids 100 to 699: the first tile of 256 spans two blocks of 256 ids, the second has id 300.
    case = random_case(3, 16, 700, banned=[300])
    case.targets = torch.tensor([650, 651, 652])
    table = expsum.table_like(3, 600, "cpu")
    expsum.sums(
        case.hidden,
        case.weight[100:],
        case.targets,
        torch.zeros(3),
        expsum.allowed_ids(700, case.banned, "cpu"),
        1.0,
        with_entropy=False,
        table=table,
        first_id=100,
    )
    assert (table == 0).nonzero()[:, 1].tolist() == [200, 550, 200, 551, 200, 552]


@settings(max_examples=20)
@given(data=st.data())
def test_any_shape_and_mask(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    vocab = data.draw(st.integers(2, 540))
    banned = data.draw(st.none() | st.sets(st.integers(0, vocab - 1), max_size=vocab - 1))
    case = random_case(
        rows,
        width,
        vocab,
        temperature=data.draw(st.sampled_from([0.5, 0.7, 1.0, 1.3])),
        banned=None if banned is None else sorted(banned),
        std=data.draw(st.sampled_from([0.1, 1.0, 4.0])),
        seed=data.draw(st.integers(0, 99)),
    )
    allowed = expsum.allowed_ids(vocab, case.banned, "cpu")
    table = expsum.table_like(rows, vocab, "cpu").fill_(float("nan"))
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
    )
    logp, entropy = expsum.finish(sums, case.targets, allowed, table)
    for value, right in zip((logp, entropy), case.values(), strict=True):
        assert (value - right).abs().max() <= 2e-5
    gradient = table.double() * -logp.double().exp()[:, None] / case.temperature
    right = case.logit_gradient(torch.ones(rows))
    assert (gradient - right).abs().max() <= 2**-8 / case.temperature


def test_what_it_refuses() -> None:
    case = random_case(4, 16, 20)
    arguments = (case.hidden, case.weight, case.targets, torch.zeros(4))
    for table in (
        torch.empty(4, 20, dtype=torch.bfloat16),  # rows of 40 bytes
        torch.empty(4, 24, dtype=torch.bfloat16),
        torch.empty(4, 24)[:, :20],
        torch.empty(3, 24, dtype=torch.bfloat16)[:, :20],
    ):
        with pytest.raises(ValueError, match="table .* make it with table_like"):
            expsum.sums(*arguments, None, 1.0, with_entropy=False, table=table)
    with pytest.raises(ValueError, match="tiles = '1x1' cannot run without a table"):
        expsum.sums(*arguments, None, 1.0, with_entropy=False, tiles="1x1")
    allowed = expsum.allowed_ids(30, torch.tensor([2]), "cpu")
    with pytest.raises(ValueError, match="allowed has 30 ids, fewer than first_id . V = 31"):
        expsum.sums(*arguments, allowed, 1.0, with_entropy=False, first_id=11)


def test_what_is_unsupported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(4, 16, 20)
    assert expsum.unsupported(case.hidden, case.weight) is None
    assert "torch.float32" in (expsum.unsupported(case.hidden.float(), case.weight) or "")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "CUDA" in (expsum.unsupported(case.hidden, case.weight) or "")
