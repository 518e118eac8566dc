"""Fault counters: per device, read once, explained; CPU values are checked at once."""

import threading

import pytest
import torch

from speciarl.kernels import faults

CPU = torch.device("cpu")


def test_counts_add_up_until_they_are_taken() -> None:
    assert faults.counters(CPU) is faults.counters("cpu")
    faults.count(faults.TARGET_BANNED, torch.tensor([True, False, True]))
    faults.count(faults.TARGET_BANNED, torch.tensor([[True]]))
    faults.count(faults.UNKNOWN_CODE, torch.zeros(0, dtype=torch.bool))
    taken = faults.take("cpu")
    assert taken.dtype == torch.int32 and taken.tolist() == [0, 3, 0, 0, 0]
    faults.count(faults.TARGET_RANGE, torch.tensor(True))
    assert taken.tolist() == [0, 3, 0, 0, 0]  # a copy
    assert faults.take(CPU).tolist() == [1, 0, 0, 0, 0]
    assert not faults.take(CPU).any()


def test_the_counters_outlive_inference_mode() -> None:
    with torch.inference_mode():
        faults.count(faults.SEQUENCE_RANGE, torch.tensor([True]))
    faults.count(faults.SEQUENCE_RANGE, torch.tensor([True]))
    assert faults.take(CPU)[faults.SEQUENCE_RANGE] == 2


def test_a_device_counts_without_being_read() -> None:
    # A meta tensor has no values: reading one raises.
    faults.count(faults.SEQUENCE_RANGE, torch.zeros(4, dtype=torch.bool, device="meta"))
    assert faults.take("meta").shape == (len(faults.FAULTS),)
    faults.check_range("targets", torch.zeros(3, dtype=torch.int64, device="meta"), 0, 1)
    assert not faults.immediate(torch.zeros(1, device="meta"))


@pytest.mark.parametrize(("values", "bad"), [([0, 5, 9], 9), ([-3, 2], -3), ([-1, 9], -1)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_values_on_the_host_are_refused_at_once(
    values: list[int], bad: int, dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match=rf"targets holds {bad}; it must be in \[0, 9\)"):
        faults.check_range("targets", torch.tensor(values, dtype=dtype), 0, 9)
    with faults.deferred():
        faults.check_range("targets", torch.tensor(values, dtype=dtype), 0, 9)
    faults.check_range("targets", torch.tensor([0, 8], dtype=dtype), 0, 9)
    faults.check_range("targets", torch.zeros(0, dtype=dtype), 0, 9)


def test_deferring_ends_with_its_block_and_stays_in_its_thread() -> None:
    values = torch.zeros(1)
    seen = []
    with pytest.raises(KeyError), faults.deferred():
        with faults.deferred():
            pass
        assert not faults.immediate(values)
        other = threading.Thread(target=lambda: seen.append(faults.immediate(values)))
        other.start()
        other.join()
        raise KeyError
    assert seen == [True] and faults.immediate(values)


def test_the_message_names_what_was_wrong() -> None:
    assert faults.explain([0] * len(faults.FAULTS)) is None
    message = faults.explain([0, 0, 0, 2, 1])
    assert message is not None
    assert "2 sequence_ids outside" in message and "1 category codes outside" in message
    assert "target" not in message
    words = {0: "vocabulary", 1: "banned", 3: "sequence_ids", 4: "codes"}
    for place in range(len(faults.FAULTS)):
        counts = [int(index == place) for index in range(len(faults.FAULTS))]
        # A clamped log-prob is a figure to look at, nothing to stop for.
        assert words.get(place, "None") in str(faults.explain(counts))
    with pytest.raises(ValueError):
        faults.explain([1])
