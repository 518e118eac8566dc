"""Metrics against the paper's worked examples and against plain counting."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speciarl.core.metrics import (
    Tally,
    best_of_k,
    harmonic_mean,
    mean_hm,
    report,
    tally_by,
    wilson_interval,
)
from speciarl.kernels.codes import ABSENT, FORMAT, S_MINUS, S_PLUS, A, G, S, W

ANY_CODES = st.lists(st.integers(ABSENT, FORMAT), max_size=40)
LADDER = (ABSENT, FORMAT, W, A, G, S_MINUS, S, S_PLUS)


def test_worked_correctness() -> None:
    tally = Tally.of([W] * 30 + [S] * 170)
    assert tally.n == 200
    assert tally.correctness == pytest.approx(0.85)


def test_worked_specificity() -> None:
    tally = Tally.of([A] * 10 + [G] * 15 + [S_MINUS] * 5 + [S] * 20)
    assert tally.specificity == pytest.approx(0.675)
    assert tally.correctness == 1
    assert tally.hm == pytest.approx(2 * 0.675 / 1.675)


def test_more_specific_earns_what_specific_does() -> None:
    assert Tally.of([S_PLUS, S_PLUS]).specificity == Tally.of([S, S]).specificity == 1


def test_all_wrong() -> None:
    tally = Tally.of([W, FORMAT, W])
    assert (tally.correctness, tally.specificity, tally.hm) == (0, 0, 0)


def test_format_failure_is_wrong_and_absent_is_nothing() -> None:
    tally = Tally.of([S, FORMAT, ABSENT, ABSENT])
    assert (tally.n, tally.wrong, tally.unjudged) == (2, 1, 2)
    assert tally.correctness == 0.5
    assert tally.rates()["format"] == 0.5
    assert "absent" not in tally.rates()


def test_nothing_judged_is_nan_and_null_in_json() -> None:
    for tally in (Tally(), Tally.of([ABSENT])):
        assert math.isnan(tally.correctness) and math.isnan(tally.hm)
        figures = json.loads(json.dumps(tally.as_dict(), allow_nan=False))
        assert figures["hm"] is None and figures["correctness_95"] == [0, 1]


def test_not_codes() -> None:
    for bad in ([7], [-2]):
        with pytest.raises(ValueError, match="codes run from -1 to 6"):
            Tally.of(bad)
    with pytest.raises(ValueError, match="counts must be 8 numbers"):
        Tally((1, 2))


@given(ANY_CODES, ANY_CODES)
def test_against_plain_counting(first: list[int], second: list[int]) -> None:
    codes = first + second
    tally = Tally.of(np.array(first, np.int8)) + Tally.of(np.array(second, np.int8))
    assert tally == Tally.of(codes)
    judged = [code for code in codes if code != ABSENT]
    right = [code for code in judged if code not in (W, FORMAT)]
    if not judged:
        return
    points = [min(code, S) / 4 for code in right]
    correctness = len(right) / len(judged)
    specificity = sum(points) / len(points) if points else 0.0
    hm = 2 / (1 / correctness + 1 / specificity) if right else 0.0
    assert tally.correctness == pytest.approx(correctness)
    assert tally.specificity == pytest.approx(specificity)
    assert tally.hm == pytest.approx(hm)
    assert sum(tally.rates().values()) == pytest.approx(1)
    low, high = tally.correctness_interval
    assert 0 <= low <= tally.correctness <= high <= 1


def test_codes_of_any_shape() -> None:
    assert Tally.of(np.full((3, 4), S, np.int8)).count(S) == 12


def test_wilson_known_values() -> None:
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 0) == (0, 1)
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == 1


@given(st.integers(1, 1000), st.data())
def test_wilson_bounds_are_the_shares_z_deviations_away(n: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    for bound in wilson_interval(hits, n):
        deviation = math.sqrt(bound * (1 - bound) / n)
        assert abs(hits / n - bound) == pytest.approx(1.959964 * deviation, abs=1e-6)


def test_report_per_dataset_and_domain() -> None:
    codes = np.array([S, W, G, G, ABSENT, S], np.int8)
    datasets = ["cub", "cub", "toy", "toy", "toy", "nabirds"]
    domains = ["bird", "bird", "car", "flower", "car", "bird"]
    made = report(codes, datasets, domains)
    assert list(made.datasets) == ["cub", "toy", "nabirds"]
    assert list(made.domains) == ["bird", "car", "flower"]
    assert made.datasets["toy"] == Tally.of([G, G, ABSENT])
    assert made.domains["bird"] == Tally.of([S, W, S])
    assert made.total == Tally.of(codes)
    hms = [harmonic_mean(0.5, 1), harmonic_mean(1, 0.5), 1]
    assert made.mean_hm == pytest.approx(sum(hms) / 3)
    assert made.mean_hm != pytest.approx(made.total.hm)
    as_read = json.loads(json.dumps(made.as_dict(), allow_nan=False))
    assert as_read["datasets"]["toy"]["unjudged"] == 1
    assert as_read["domains"]["bird"]["n"] == 3


def test_mean_hm_of_nothing() -> None:
    assert math.isnan(mean_hm([]))
    assert math.isnan(mean_hm([Tally.of([S]), Tally()]))
    assert report([], [], []).as_dict()["mean_hm"] is None


def test_tally_by_counts_samples_of_a_row() -> None:
    codes = np.array([[S, W], [G, G]], np.int8)
    assert tally_by(codes, ["a", "a"]) == {"a": Tally.of([S, W, G, G])}
    with pytest.raises(ValueError, match="2 codes for 1 group names"):
        tally_by(codes, ["a"])


@given(st.lists(st.lists(st.sampled_from(LADDER), min_size=3, max_size=3), max_size=10))
def test_best_of_k_against_the_ladder(rows: list[list[int]]) -> None:
    codes = np.array(rows, np.int8).reshape(-1, 3)
    best = best_of_k(codes)
    assert best.dtype == np.int8
    assert best.tolist() == [max(row, key=LADDER.index) for row in rows]


def test_best_of_k_shape() -> None:
    for shape in ((3,), (3, 0)):
        with pytest.raises(ValueError, match=r"shape \[n, k\]"):
            best_of_k(np.zeros(shape, np.int8))
