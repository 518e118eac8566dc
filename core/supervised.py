"""Supervised fine-tuning: packed cross-entropy on (image, answer), the paper's SFT baseline.

Same policy, batching, fused head, optimizer, checkpoints and evaluation as the trainer; only the
loss differs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from speciarl.core.batch import Item, pack
from speciarl.core.labels import label_of
from speciarl.core.learner import Learned
from speciarl.core.plan import MicroBatch, plan
from speciarl.core.trainer import Trainer
from speciarl.judge.taxonomy import Taxonomy
from speciarl.kernels.loss import STATS


class Supervised(Trainer):
    """The trainer's run with a supervised step: no rollouts, no judge, no push while it learns."""

    def step(self) -> None:
        """One update on `train.prompts` examples."""
        start = time.perf_counter()
        items = self.items()
        learned = self.learn(items)
        self.settle()
        self.progress.step += 1
        self.progress.updates += 1
        self.progress.position = self.parts.stream.position
        self.progress.skipped_prompts = dict(self.parts.stream.skipped)
        seconds = time.perf_counter() - start
        scalars = {
            "time/step": seconds,
            "time/learn": seconds,
            "tokens_per_s/learn": learned.tokens / seconds,
            "optim/lr": self.rate(-1),
            "skipped/prompts": float(len(self.progress.skipped_prompts)),
        }
        self.deferred.put(self.progress.step, scalars, learned)

    def evaluate(self) -> None:
        """The engine gets the weights only when it is asked something."""
        self.push()
        super().evaluate()

    def items(self) -> list[Item]:
        """The step's (prompt, answer) pairs, the same on every rank."""
        config, parts = self.config, self.parts
        out = []
        for example in parts.stream.draw(config.train.prompts):
            label = label_of(
                example, config.sft.levels, self.taxonomy, config.train.seed, self.progress.step
            )
            ids = parts.builder.completion_ids(config.sft.template.format(label))
            out.append(Item(parts.prompt(example), ids))
        return out

    def learn(self, items: Sequence[Item]) -> Learned:
        """Mean cross-entropy over all answer tokens of all ranks; one update."""
        world = self.world
        micro = plan([item.cost for item in items], world.size, self.config.train.token_budget)
        share = 1.0 / sum(len(item.ids) for item in items)
        total = torch.zeros((), device=world.device)
        for part in micro[world.rank]:
            total += self.accumulate(items, part, share)
        if world.size > 1:
            dist.all_reduce(total)
        norm, bad = self.parts.optimizer.step(self.rate(0))
        stats = torch.zeros(len(STATS), device=world.device)
        stats[STATS.index("loss")] = total
        tokens = sum(item.cost for item in items)
        return Learned(stats, norm[None], bad[None], tokens)

    def accumulate(self, items: Sequence[Item], part: MicroBatch, share: float) -> Tensor:
        """Gradient of one micro-batch; returns its part of the loss. An empty one adds zero."""
        chosen = [items[i] for i in part] or [min(items, key=lambda item: item.cost)]
        policy = self.parts.policy
        batch = pack(chosen, policy.image_token_id, self.world.device)
        loss = -policy.logprobs(batch, temperature=1.0).sum() * (share if part else 0.0)
        loss.backward()
        return loss.detach()

    @property
    def taxonomy(self) -> Taxonomy | None:
        """Of the judge, where it has one."""
        return getattr(self.parts.collector.judge, "taxonomy", None)
