from pathlib import Path

import numpy as np
import pytest

from speciarl.judge.agreement import compare, labels_of, load_pairs, report
from speciarl.kernels.codes import ABSENT, A, G, S, W
from speciarl.kernels.reward import RewardSpec

RULE = RewardSpec("speciarl-guarded")
SHIPPED = Path(__file__).parent / "data" / "pairs.csv"


def codes(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int8)


def test_confusion_counts_pairs_that_both_judged() -> None:
    found = compare(codes(W, S, S, ABSENT), codes(W, S, G, S), ["a", "a", "b", "b"], RULE)
    assert found.pairs == 3 and found.unscored == (1, 0)
    assert found.confusion[W, W] == found.confusion[S, S] == found.confusion[S, G] == 1
    assert found.same == pytest.approx(2 / 3)
    assert found.by_category["specific"] == (2, 0.5, 1.0)
    assert found.by_category["generic"][0] == 0


def test_rewards_change_only_where_the_bar_or_a_place_moves() -> None:
    first = codes(W, S, G, S)
    # Group a: the bar falls from S to G, and a G reaches it either way: its reward changes.
    found = compare(first, codes(W, G, G, S), ["a", "a", "b", "c"], RULE)
    assert (found.groups, found.changed_groups) == (3, 0)
    found = compare(codes(S, G, S), codes(G, G, S), ["a", "a", "b"], RULE)
    assert (found.groups, found.changed_groups) == (2, 1)
    assert found.changed_rewards == pytest.approx(1 / 3)


def kappa_by_hand(first: np.ndarray, second: np.ndarray, power: int) -> float:
    """From pairs of pairs, not from a table: disagreement seen over disagreement by chance."""
    seen = np.mean([abs(int(a) - int(b)) ** power for a, b in zip(first, second, strict=True)])
    chance = np.mean([abs(int(a) - int(b)) ** power for a in first for b in second])
    return 1 - float(seen / chance)


@pytest.mark.parametrize("power", [1, 2])
def test_weighted_kappa(power: int) -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 6, 60).astype(np.int8)
    second = np.where(rng.random(60) < 0.7, first, rng.integers(0, 6, 60)).astype(np.int8)
    found = compare(first, second, ["g"] * 60, RULE)
    assert found.kappa(power) == pytest.approx(kappa_by_hand(first, second, power))
    assert compare(first, first, ["g"] * 60, RULE).kappa(power) == 1.0
    assert np.isnan(compare(codes(S, S), codes(S, S), ["g"] * 2, RULE).kappa(power))


def test_a_file_is_read_with_its_groups(tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text(
        '# made by hand\ntruth,prediction,category,domain\nrobin,"a bird, or so",generic,birds\n'
        "robin,None,abstain,birds\nrobin,robin,,toys\n"
    )
    pairs = load_pairs(file)
    assert pairs[0].pair.prediction == "a bird, or so"
    assert labels_of(pairs).tolist() == [G, A, ABSENT]
    assert pairs[0].group == pairs[1].group != pairs[2].group


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("truth,answer\na,b\n", "no column 'prediction'"),
        ("truth,prediction\n", "no pairs"),
        ("truth,prediction\n ,b\n", "pair 1: the truth is empty"),
        ("truth,prediction,category\na,b,right\n", "pair 1: category 'right' is none of wrong"),
        ("truth,prediction\na,b\na,b,c\n", "pair 2: as many fields"),
        ("truth,prediction\ncafé,b\n", "pairs.csv: no CSV file in UTF-8: .*0xe9"),
        (f"truth,prediction\na,{'b' * 200_000}\n", "pairs.csv: no CSV file.*field larger"),
    ],
)
def test_a_bad_file_says_where(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        load_pairs(file)


def test_the_report_shows_every_figure() -> None:
    text = report(compare(codes(W, S, G), codes(W, G, G), ["a", "a", "b"], RULE), "one", "two")
    assert "3 pairs judged by both" in text and "rows: one; columns: two" in text
    assert "same category 0.667" in text and "rewards change in 0 of 2 groups" in text


def test_the_shipped_pairs_can_be_compared() -> None:
    pairs = load_pairs(SHIPPED)
    labels = labels_of(pairs)
    found = compare(labels, labels, [pair.group for pair in pairs], RULE)
    assert found.same == found.kappa() == 1.0 and not found.changed_groups
