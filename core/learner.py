"""Learn: from judged groups to an updated policy, with no host synchronisation on the way.

The host knows the codes, so everything that needs a decision (which groups have signal, the
plan, the denominators) is decided before anything is uploaded; the device computes rewards and
advantages from the same codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from speciarl.core.batch import Item, PackedBatch, pack
from speciarl.core.collect import Completion, JudgedGroup, codes_matrix
from speciarl.core.examples import Example
from speciarl.core.objective import ObjectiveConfig, sequence_weights
from speciarl.core.optim import Optimizer
from speciarl.core.plan import MicroBatch, plan
from speciarl.core.policy import Policy
from speciarl.core.timeline import Timeline
from speciarl.core.world import World
from speciarl.kernels import faults
from speciarl.kernels.codes import ABSENT
from speciarl.kernels.loss import STATS
from speciarl.kernels.reward import RewardSpec, best_of_n, best_of_n_numpy
from speciarl.rollout.engine import Prompt


@dataclass(frozen=True)
class Sample:
    """One completion to learn from: where its advantage lies, and what its tokens weigh."""

    example: Example
    completion: Completion
    group: int
    prompt_tokens: int
    slot: int
    weight: float

    @property
    def own(self) -> int:
        """Tokens in the row after the prompt: the last is predicted, never read."""
        return len(self.completion.ids) - 1

    @property
    def tokens(self) -> int:
        """Tokens of the sequence with its prompt."""
        return self.prompt_tokens + self.own


@dataclass(frozen=True)
class MiniBatch:
    """The sequences of one update, and this rank's micro-batches of them."""

    sequences: list[Sample]
    micro: list[MicroBatch]


@dataclass(frozen=True)
class Learned:
    """What one step's learning leaves on the device, to be read later.

    stats [len(STATS)] summed over updates and ranks (the maximum last); norms and skipped [U];
    faults [len(FAULTS)] of `kernels.faults`, summed over ranks. tokens: of all sequences, a prompt
    counted for each of its samples.
    """

    stats: Tensor
    norms: Tensor
    skipped: Tensor
    faults: Tensor
    tokens: int


def found_faults(world: World) -> Tensor:
    """int32 [len(FAULTS)]: what kernels counted since the last call, on all ranks (collective)."""
    found = faults.take(world.device)
    if world.size > 1:
        dist.all_reduce(found)
    return found


class Learner:
    """One policy update after another from judged groups.

    Args:
        policy: the model.
        optimizer: over the policy's trainable parameters.
        objective: the loss.
        reward: codes to rewards.
        temperature: the sampling temperature of the completions.
        limit: the completion length limit ("constant" aggregation divides by it).
        token_budget: tokens of a micro-batch.
        mini_batch: groups of an update.
        prompt_of: the prompt of an example, on any rank.
        timeline: gets the parts of learning.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: Optimizer,
        objective: ObjectiveConfig,
        reward: RewardSpec,
        world: World,
        *,
        temperature: float,
        limit: int,
        token_budget: int,
        mini_batch: int,
        prompt_of: Callable[[Example], Prompt],
        timeline: Timeline | None = None,
    ) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.objective = objective
        self.spec = objective.loss
        self.reward = reward
        self.world = world
        self.temperature = temperature
        self.limit = limit
        self.token_budget = token_budget
        self.mini_batch = mini_batch
        self.prompt_of = prompt_of
        self.timeline = timeline or Timeline(keep=False)
        self.normalize = bool(objective.normalize)

    def live(self, groups: Sequence[JudgedGroup]) -> np.ndarray:
        """bool [G]: groups with a non-zero advantage, from the host's copy of the rule."""
        codes = codes_matrix(groups)
        return best_of_n_numpy(codes, self.reward, normalize=self.normalize).live

    def plan(self, groups: Sequence[JudgedGroup]) -> list[MiniBatch]:
        """Cuts the step into updates and each update into micro-batches, alike on every rank.

        Groups without signal are left out (unless a KL term still moves them), unscored
        completions always; the denominators count every scored completion.
        """
        live = self.live(groups)
        width = max(len(group.completions) for group in groups)
        out = []
        for start in range(0, len(groups), self.mini_batch):
            part = range(start, min(start + self.mini_batch, len(groups)))
            scored = [
                (g, i)
                for g in part
                for i, c in enumerate(groups[g].completions)
                if c.code != ABSENT
            ]
            if not scored:
                continue
            lengths = [len(groups[g].completions[i].ids) for g, i in scored]
            weights = sequence_weights(lengths, str(self.objective.aggregation), self.limit)
            sequences = [
                Sample(
                    groups[g].example,
                    groups[g].completions[i],
                    g,
                    groups[g].prompt_tokens,
                    g * width + i,
                    weight,
                )
                for (g, i), weight in zip(scored, weights, strict=True)
                if live[g] or self.spec.kl_coef or self.spec.entropy_coef
            ]
            if sequences:
                micro = plan(
                    [s.own for s in sequences],
                    self.world.size,
                    self.token_budget,
                    [(s.group, s.prompt_tokens) for s in sequences],
                )
                out.append(MiniBatch(sequences, micro[self.world.rank]))
        return out

    def learn(self, groups: Sequence[JudgedGroup], lr_of: Callable[[int], float]) -> Learned | None:
        """All updates of a step; None when no group has signal.

        Args:
            groups: every rank's groups in prompt order, the same on every rank.
            lr_of: the learning rate of the step's u-th update.
        """
        minis = self.plan(groups)
        if not minis:
            return None
        codes = torch.from_numpy(codes_matrix(groups))
        result = best_of_n(
            codes.to(self.world.device, non_blocking=True), self.reward, normalize=self.normalize
        )
        advantages = result.advantages.reshape(-1)
        # With a single update the policy that samples is the policy that learns.
        with self.timeline.span("learn", "before the updates"):
            old = self._before(minis, self._old) if len(minis) > 1 else None
            reference = self._before(minis, self._reference) if self.spec.kl_coef else None
        stats, norms, skipped = [], [], []
        for index, mini in enumerate(minis):
            with self.timeline.span("learn", "forward and backward", update=index):
                stats.append(
                    self._accumulate(
                        mini,
                        advantages,
                        old[index] if old else None,
                        reference[index] if reference else None,
                    )
                )
            with self.timeline.span("learn", "optimizer", update=index):
                norm, bad = self.optimizer.step(lr_of(index))
            norms.append(norm)
            skipped.append(bad)
        tokens = sum(s.tokens for mini in minis for s in mini.sequences)
        return Learned(
            self._reduced(stats),
            torch.stack(norms),
            torch.stack(skipped),
            found_faults(self.world),
            tokens,
        )

    def _reduced(self, stats: list[Tensor]) -> Tensor:
        """Sums over updates and ranks; the last entry is a maximum."""
        stacked = torch.stack(stats)
        sums, most = stacked[:, :-1].sum(0), stacked[:, -1:].amax(0)
        if self.world.size > 1:
            dist.all_reduce(sums)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return torch.cat([sums, most])

    def _chosen(self, mini: MiniBatch, micro: MicroBatch) -> tuple[list[Sample], float]:
        """A micro-batch's sequences and their scale: an empty one runs the cheapest, times 0."""
        if micro:
            return [mini.sequences[i] for i in micro], 1.0
        return [min(mini.sequences, key=lambda s: s.tokens)], 0.0

    def _pack(self, chosen: Sequence[Sample]) -> PackedBatch:
        items = [Item(self.prompt_of(s.example), s.completion.ids) for s in chosen]
        return pack(items, self.policy.image_token_id, self.world.device)

    def _old(self, batch: PackedBatch) -> Tensor:
        return self.policy.logprobs(batch, temperature=self.temperature)

    def _reference(self, batch: PackedBatch) -> Tensor:
        return self.policy.reference_logprobs(batch, temperature=self.temperature)

    @torch.no_grad()
    def _before(
        self, minis: Sequence[MiniBatch], score: Callable[[PackedBatch], Tensor]
    ) -> list[list[Tensor]]:
        """Log-probs of every micro-batch of every update, before the first update."""
        return [
            [score(self._pack(self._chosen(mini, micro)[0])) for micro in mini.micro]
            for mini in minis
        ]

    def _accumulate(
        self,
        mini: MiniBatch,
        advantages: Tensor,
        old: list[Tensor] | None,
        reference: list[Tensor] | None,
    ) -> Tensor:
        """Gradients of one update; returns its statistics [len(STATS)]."""
        device = self.world.device
        total = torch.zeros(len(STATS), device=device)
        for index, micro in enumerate(mini.micro):
            chosen, scale = self._chosen(mini, micro)
            batch = self._pack(chosen)
            logprobs = [x for s in chosen for x in s.completion.logprobs]
            slots = torch.tensor([s.slot for s in chosen]).to(device, non_blocking=True)
            weights = torch.tensor([s.weight * scale for s in chosen])
            loss, stats = self.policy.loss(
                batch,
                temperature=self.temperature,
                spec=self.spec,
                old=old[index] if old else None,
                advantages=advantages.index_select(0, slots),
                weights=weights.to(device, non_blocking=True),
                ref=reference[index] if reference else None,
                engine=torch.tensor(logprobs).to(device, non_blocking=True),
            )
            loss.backward()
            total = torch.cat([(total + stats)[:-1], torch.maximum(total, stats)[-1:]])
        return total
