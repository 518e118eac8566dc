"""Supervised fine-tuning: packed cross-entropy on (image, answer), the paper's SFT baseline.

Same policy, batching, fused head, optimizer, checkpoints and evaluation as the trainer; only the
loss differs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from speciarl.core.batch import Item, pack
from speciarl.core.examples import Example
from speciarl.core.learner import Learned, found_faults
from speciarl.core.plan import plan
from speciarl.core.trainer import Trainer
from speciarl.kernels.loss import STATS


class Supervised(Trainer):
    """The trainer's run with a supervised step: no rollouts, no judge, no push while it learns.

    One update a step, whatever `train.mini_batch` says.
    """

    @property
    def updates_per_step(self) -> int:
        """One."""
        return 1

    def step(self) -> None:
        """One update on `train.prompts` examples."""
        self.timeline.begin(self.progress.step + 1)
        with self.timeline.span("prompts"):
            examples = self.parts.stream.draw(self.config.train.prompts)
        self.recent.append([{"step": self.progress.step, "key": e.key} for e in examples])
        with self.timeline.span("learn"):
            learned = self.learn(examples)
            self.settle()
        self.progress.step += 1
        self.progress.updates += 1
        self.progress.position = self.parts.stream.position
        self.list_skipped()
        seconds, idle = self.timeline.finish()
        scalars = {
            "time/step": seconds,
            "time/learn": seconds,
            "time/idle": idle,
            "tokens_per_s/learn": learned.tokens / seconds,
            "optim/lr": self.rate(-1),
            "skipped/prompts": float(len(self.progress.skipped_prompts)),
        }
        self.deferred.put(self.progress.step, scalars, learned)

    def evaluate(self) -> None:
        """The engine gets the weights only when it is asked something."""
        self.push()
        super().evaluate()
        self.rest()

    def learn(self, examples: Sequence[Example]) -> Learned:
        """Mean cross-entropy over all answer tokens of all ranks; one update."""
        world, parts = self.world, self.parts
        template = self.config.data.answer
        answers = [parts.builder.completion_ids(template.replace("{}", e.truth)) for e in examples]
        lengths = self.prompt_lengths(examples)
        costs = [n + len(ids) - 1 for n, ids in zip(lengths, answers, strict=True)]
        share = 1.0 / sum(len(ids) for ids in answers)
        total = torch.zeros((), device=world.device)
        for part in plan(costs, world.size, self.config.train.token_budget)[world.rank]:
            # A rank with too few micro-batches runs the cheapest sequence, times zero.
            chosen = part or (min(range(len(costs)), key=costs.__getitem__),)
            items = [Item(parts.data.store.need(examples[i]), answers[i]) for i in chosen]
            batch = pack(items, parts.policy.image_token_id, world.device)
            logprobs = parts.policy.logprobs(batch, temperature=1.0)
            loss = -logprobs.sum() * (share if part else 0.0)
            loss.backward()
            total += loss.detach()
        if world.size > 1:
            dist.all_reduce(total)
        norm, bad = parts.optimizer.step(self.rate(0))
        stats = torch.zeros(len(STATS), device=world.device)
        stats[STATS.index("loss")] = total
        return Learned(stats, norm[None], bad[None], found_faults(world), sum(costs))

    def prompt_lengths(self, examples: Sequence[Example]) -> list[int]:
        """Prompt tokens of each example; every rank builds its share."""
        mine = examples[self.world.rank :: self.world.size]
        lengths: dict[str, int] = {}
        need = self.parts.data.store.need
        for part in self.world.gather({e.key: len(need(e).input_ids) for e in mine}):
            lengths.update(part)
        return [lengths[example.key] for example in examples]
