"""The rollouts of a step: rounds of generating and judging until its groups are what it needs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from speciarl.core.adaptive import Spent, top_up, uncertain
from speciarl.core.collect import JudgedGroup, Timing, codes_matrix
from speciarl.core.config import Config
from speciarl.core.examples import Example
from speciarl.core.parts import Parts
from speciarl.core.verdicts import all_ranks
from speciarl.core.world import World
from speciarl.rollout.engine import Sampling


class Rounds:
    """Draws a step's prompts and has them sampled and judged; every rank gets all groups.

    Whatever is decided between two rounds (which prompts get further completions, whether further
    prompts are drawn) is decided by every rank alike, from the verdicts of all.

    Args:
        config: the whole configuration.
        world: this process's place in the job.
        parts: stream, prompts, collector and learner are used.
    """

    def __init__(self, config: Config, world: World, parts: Parts) -> None:
        self.config = config
        self.world = world
        self.parts = parts

    def collect(self, step: int) -> tuple[list[JudgedGroup], Timing]:
        """Judged groups of a step, of all ranks, in prompt order.

        With dynamic sampling, groups without signal are replaced by further prompts until the
        step is full, `max_refills` rounds have gone by, or every example has had its turn.

        Raises:
            RuntimeError: the engine gave no completion of any prompt.
        """
        objective, wanted = self.config.objective, self.config.train.prompts
        total = Timing()
        kept: list[JudgedGroup] = []
        groups: list[JudgedGroup] = []
        seen: set[str] = set()
        for _ in range(1 + (objective.max_refills if objective.dynamic_sampling else 0)):
            # The same prompt again would give the same completions again.
            with self.parts.timeline.span("prompts"):
                drawn = self.parts.stream.draw(wanted)
            examples = [example for example in drawn if example.key not in seen]
            if not examples:
                break
            seen.update(example.key for example in examples)
            fresh, timing = self.sample(examples, step)
            total.add(timing)
            groups = fresh or groups
            if not objective.dynamic_sampling:
                break
            live = self.parts.learner.live(fresh)
            kept += [group for group, alive in zip(fresh, live, strict=True) if alive]
            if len(kept) >= wanted:
                break
        if not groups:
            raise RuntimeError(f"step {step}: the engine gave no completion of any prompt")
        # Whole mini-batches only: an update of a few groups would weigh as much as a full one.
        size = self.config.train.mini_batch
        full = min(wanted, len(kept) // size * size) or len(kept)
        return kept[:full] or groups, total

    def sample(self, examples: list[Example], step: int) -> tuple[list[JudgedGroup], Timing]:
        """The groups of these prompts, `n` completions each; or, where N is adaptive, `n_start`
        each and further ones where the bar is uncertain, `n` a prompt on average at most.

        A prompt of which the engine gave no completion is left out and counted.
        """
        rollout = self.config.rollout
        start, most = (rollout.n_start, rollout.n_max) if rollout.n_start else (rollout.n,) * 2
        budget, rounds = rollout.n * len(examples), 0
        groups = [JudgedGroup(example, 0, []) for example in examples]
        asked = np.zeros(len(examples), dtype=np.int64)
        total = Timing()
        while (more := top_up(codes_matrix(groups), asked, budget, size=start, most=most)).any():
            ids = [range(a, a + m) for a, m in zip(asked.tolist(), more.tolist(), strict=True)]
            groups, timing = self._round(groups, ids, step)
            total.add(timing)
            asked += more
            rounds += 1
        found = [group for group in groups if group.completions]
        total.spent = Spent(
            prompts=len(groups),
            empty=len(groups) - len(found),
            rounds=rounds,
            asked=int(asked.sum()),
            budget=budget,
            uncertain=int(uncertain(codes_matrix(groups)).sum()),
            lost=int(asked.sum()) - sum(len(group.completions) for group in groups),
        )
        return found, total

    def _round(
        self, groups: list[JudgedGroup], ids: list[range], step: int
    ) -> tuple[list[JudgedGroup], Timing]:
        """The groups with the completions of these sample ids added; every rank samples a share."""
        rollout, world, parts = self.config.rollout, self.world, self.parts
        sampling = Sampling(
            temperature=rollout.temperature,
            max_new_tokens=rollout.max_new_tokens,
            stop_text=rollout.stop_text,
            seed=self.config.train.seed,
            step=step,
        )
        asked = [(group.example, part) for group, part in zip(groups, ids, strict=True) if part]
        mine = parts.collector.share(asked, world)
        work = [(example, parts.data.store.need(example), part) for example, part in mine]
        given, timing = parts.collector.collect_samples(work, sampling)
        new = {group.example.key: group for part in world.gather(given) for group in part}
        timing.verdicts = all_ranks(world.gather(timing.verdicts))
        return [_joined(group, new.get(group.example.key)) for group in groups], timing


def _joined(group: JudgedGroup, new: JudgedGroup | None) -> JudgedGroup:
    """A group and its further completions, whose sample ids are the higher ones."""
    if new is None:
        return group
    return replace(new, completions=group.completions + new.completions)
