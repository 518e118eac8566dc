"""Which parts of an engine's memory are where, against a memory saver that forgives nothing."""

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from speciarl.rollout.sglang_memory import CACHE, WEIGHTS, DeviceMemory

EVERYTHING = {*CACHE, *WEIGHTS}


class Saver:
    """Stands in for SGLang's memory saver, which needs a GPU: it fails where that does."""

    def __init__(self) -> None:
        self.there = set(EVERYTHING)

    def release_memory_occupation(self, tags: Sequence[str]) -> None:
        assert tags and self.there.issuperset(tags) and len(set(tags)) == len(tags)
        self.there.difference_update(tags)

    def resume_memory_occupation(self, tags: Sequence[str]) -> None:
        assert tags and self.there.isdisjoint(tags) and len(set(tags)) == len(tags)
        self.there.update(tags)


@given(st.lists(st.sampled_from(["sleep", "wake", "generate"]), max_size=12))
def test_every_part_leaves_and_comes_back_once(calls: list[str]) -> None:
    saver = Saver()

    def run(job: Callable[[Any], Any]) -> Any:
        return job(saver)

    memory, wanted = DeviceMemory(run), set(EVERYTHING)
    for call in calls:
        if call == "sleep":
            memory.release()
            wanted = set()
        else:
            tags = WEIGHTS if call == "wake" else CACHE
            memory.take(tags)
            wanted |= {*tags}
        assert saver.there == wanted
