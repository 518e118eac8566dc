"""The stream of training prompts: endless, shuffled by counter, the same for any rank count."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from speciarl.core.examples import BadImage, DataTable, Example
from speciarl.core.prompts import INSTRUCTION, PromptBuilder, PromptTooLong
from speciarl.core.world import World
from speciarl.rollout.engine import Prompt


@dataclass(frozen=True)
class DataConfig:
    """Images, labels and the question."""

    train: dict[str, DataTable] = field(default_factory=dict)
    """[data.train.NAME] tables; training takes their union."""
    eval: dict[str, DataTable] = field(default_factory=dict)
    """[data.eval.NAME] tables; evaluation reports each."""
    toyworld: str = ""
    """Folder in which the toy world is generated if it is not there; "" generates nothing."""
    variant: str = "general"
    """"general" or "be-specific": the first sentence of the prompt."""
    instruction: str = INSTRUCTION
    """How to answer; follows the first sentence."""
    answer: str = "<answer>{}</answer>"
    """The completion that supervised training teaches; {} is the label."""
    max_prompt_tokens: int = 2048
    """Longer prompts are dropped and counted, never cut."""
    drop_last: bool = True
    """An epoch is whole batches only; what is left over waits for the next shuffle."""
    cached_prompts: int = 512
    """Processed prompts kept in memory by each rank (a photograph takes about 5 MB)."""

    def __post_init__(self) -> None:
        if self.variant not in ("general", "be-specific"):
            raise ValueError(f"variant={self.variant!r}: one of general, be-specific")
        if self.answer.count("{}") != 1:
            raise ValueError(f"answer={self.answer!r} must hold {{}} exactly once")
        if self.max_prompt_tokens < 1 or self.cached_prompts < 1:
            raise ValueError("max_prompt_tokens and cached_prompts must be at least 1")


class PromptStore:
    """Builds each prompt once and keeps the last ones used.

    A prompt that cannot be built (bad image, too long) is None, and stays so.
    """

    def __init__(self, builder: PromptBuilder, capacity: int) -> None:
        self.builder = builder
        self.capacity = capacity
        self.problems: dict[str, str] = {}
        self._kept: OrderedDict[str, Prompt] = OrderedDict()

    def get(self, example: Example) -> Prompt | None:
        """The prompt of an example, or None with the reason in `problems`."""
        if example.key in self.problems:
            return None
        if example.key in self._kept:
            self._kept.move_to_end(example.key)
            return self._kept[example.key]
        try:
            prompt = self.builder.build(example)
        except (BadImage, PromptTooLong) as error:
            self.problems[example.key] = str(error)
            return None
        self._kept[example.key] = prompt
        if len(self._kept) > self.capacity:
            self._kept.popitem(last=False)
        return prompt

    def need(self, example: Example) -> Prompt:
        """The prompt of an example that could be built before.

        Raises:
            RuntimeError: its image cannot be read any more.
        """
        prompt = self.get(example)
        if prompt is None:
            raise RuntimeError(f"could be read before, not now: {self.problems[example.key]}")
        return prompt


class PromptStream:
    """Draws prompts in an order fixed by the seed: position p of epoch e is a permutation's
    entry, so that a run resumes from one number, whatever the number of ranks.

    Args:
        examples: the training set.
        store: where prompts are built.
        world: ranks share the work of building, and agree on which examples are bad.
        seed: of the shuffles.
        batch: an epoch's length is a multiple of this.
        position: examples already drawn.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        store: PromptStore,
        world: World,
        seed: int,
        batch: int = 1,
        position: int = 0,
    ) -> None:
        if not examples:
            raise ValueError("the training set is empty: check the [data.train] tables")
        self.examples = examples
        self.store = store
        self.world = world
        self.seed = seed
        self.epoch = max(len(examples) // batch * batch, min(batch, len(examples)))
        self.position = position
        self.skipped: dict[str, str] = {}
        self._shuffled = -1
        self._order = np.zeros(0, dtype=np.int64)

    def _at(self, position: int) -> Example:
        epoch, offset = divmod(position, self.epoch)
        if self._shuffled != epoch:
            self._shuffled = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self.examples))
        return self.examples[int(self._order[offset])]

    def require(self, count: int) -> None:
        """Raises ValueError: fewer than `count` examples are left that may be usable."""
        usable = len(self.examples) - len(self.skipped)
        if usable < count:
            reason = next(iter(self.skipped.values()), "")
            raise ValueError(
                f"{count} prompts wanted at once (train.prompts), but only {usable} of "
                f"{len(self.examples)} training examples can be used"
                f"{'; one skipped: ' + reason if reason else ''}"
            )

    def draw(self, count: int) -> list[Example]:
        """The next `count` usable examples, the same list on every rank.

        Each rank builds its share; what turns out to be bad is skipped, noted in `skipped`,
        and replaced by the examples that follow.

        No example comes twice, even where an epoch ends in the middle.

        Raises:
            ValueError: the training set has fewer than `count` usable examples.
        """
        good: dict[str, Example] = {}
        while len(good) < count:
            self.require(count)
            batch = [self._at(self.position + i) for i in range(count - len(good))]
            self.position += len(batch)
            mine = batch[self.world.rank :: self.world.size]
            bad = {e.key: self.store.problems[e.key] for e in mine if self.store.get(e) is None}
            for part in self.world.gather(bad):
                self.skipped.update(part)
            good.update((e.key, e) for e in batch if e.key not in self.skipped)
        return list(good.values())
