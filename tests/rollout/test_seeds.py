import numpy as np
import pytest

from speciarl.rollout.seeds import uniform_rows, uniforms


def test_values_never_change() -> None:
    # Stored completions and resumed runs rely on them.
    found = uniforms(7, 3, "birds/001.jpg", 4, 5)
    golden = [
        *(0.7171600224182523, 0.5714658805462252, 0.9905070758771174),
        *(0.7726820839116497, 0.6245739095358793),
    ]
    np.testing.assert_array_equal(found, golden)


def test_rows_do_not_depend_on_their_neighbours_or_length() -> None:
    names = [("a", 0), ("b", 1), ("a", 1), ("é", 12345)]
    rows = uniform_rows(1, 2, names, 9)
    for row, (key, sample) in zip(rows, names, strict=True):
        np.testing.assert_array_equal(row, uniforms(1, 2, key, sample, 9))
        np.testing.assert_array_equal(row[:5], uniforms(1, 2, key, sample, 5))
    np.testing.assert_array_equal(rows[::-1], uniform_rows(1, 2, names[::-1], 9))


@pytest.mark.parametrize(
    "other", [(2, 1, "k", 1), (1, 2, "k", 1), (1, 1, "l", 1), (1, 1, "k", 2), (1, 1, "", 1)]
)
def test_every_part_of_the_name_matters(other: tuple[int, int, str, int]) -> None:
    assert not np.intersect1d(uniforms(1, 1, "k", 1, 50), uniforms(*other, 50)).size


def test_no_two_names_share_a_stream() -> None:
    # The same digits and separators, cut elsewhere.
    names = [(1, 23, "x", 4), (12, 3, "x", 4), (1, 2, "x", 34), (1, 2, "4\x1fx", 3), (1, 2, "x", 3)]
    first = {float(uniforms(*name, 1)[0]) for name in names}
    assert len(first) == len(names)


def test_numbers_are_uniform_in_the_half_open_interval() -> None:
    draws = uniform_rows(0, 0, [("key", i) for i in range(200)], 500).ravel()
    assert draws.dtype == np.float64 and 0 <= draws.min() and draws.max() < 1
    counts = np.histogram(draws, bins=100, range=(0, 1))[0]
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert 60 < chi_square < 148  # 99 degrees of freedom, 0.1 % on either side
