"""The route "expsum" of the linear log-prob: `expsum`'s functions, for one problem."""

import math

import torch
from torch import Tensor

from speciarl.kernels import expsum, reference
from speciarl.kernels.problem import Problem


class ExpsumHead:
    """bf16; forward without workspace, tables in bf16. Sums are (anchor, S', U), [3, C]."""

    whole = True

    def __init__(self, problem: Problem, weight: Tensor) -> None:
        self.problem = problem
        self.matrix = weight
        self._allowed = None
        if problem.banned is not None:
            ids = problem.banned
            # What is no id is marked beyond the vocabulary, where nothing reads it.
            ids = ids.masked_fill((ids < 0) | (ids >= problem.total), problem.total)
            self._allowed = expsum.allowed_ids(problem.total, ids, weight.device)

    def table(self, rows: int) -> Tensor:
        return expsum.table_like(rows, self.problem.vocab, self.matrix.device)

    def sums(self, hidden: Tensor, targets: Tensor, table: Tensor | None) -> Tensor:
        problem = self.problem
        anchor = expsum.anchors(
            hidden, self.matrix, targets, problem.temperature, first_id=problem.first_id
        )
        if problem.shard is not None:
            problem.shard.add_up(anchor)
        return torch.cat((anchor[None], self._sums(hidden, targets, anchor, table)))

    def settle(self, sums: Tensor) -> Tensor:
        if self.problem.shard is not None:
            self.problem.shard.add_up(sums[1:])
        return sums

    def finish(
        self, sums: Tensor, targets: Tensor, table: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        problem = self.problem
        logp, entropy = expsum.finish(
            sums[1:],
            targets,
            self._allowed,
            table,
            first_id=problem.first_id,
            total=problem.total,
        )
        return logp, entropy if problem.with_entropy else None

    def fill(self, hidden: Tensor, targets: Tensor, sums: Tensor, table: Tensor) -> None:
        self._sums(hidden, targets, sums[0].contiguous(), table)
        # Not by `finish`, which would count clamped rows once more.
        reference.put(table, self.problem.columns(targets), -sums[1])

    def gradient(
        self,
        table: Tensor,
        targets: Tensor,
        sums: Tensor,
        grad_logp: Tensor,
        grad_entropy: Tensor | None,
    ) -> Tensor:
        temperature = self.problem.temperature
        if grad_entropy is None:
            return -grad_logp / (temperature * (1.0 + sums[1]))
        # Not by `finish`, see above. Impossible targets have no upstream gradient.
        _, others, moment = sums
        logp = -torch.log1p(others)
        entropy = -logp - math.log(2.0) * moment / (1.0 + others)
        expsum.entropy_table(
            table,
            logp,
            entropy,
            targets,
            grad_logp,
            grad_entropy,
            temperature,
            first_id=self.problem.first_id,
        )
        return torch.ones_like(grad_logp)

    def _sums(
        self, hidden: Tensor, targets: Tensor, anchor: Tensor, table: Tensor | None
    ) -> Tensor:
        problem = self.problem
        return expsum.sums(
            hidden,
            self.matrix,
            targets,
            anchor,
            self._allowed,
            problem.temperature,
            with_entropy=problem.with_entropy,
            table=table,
            first_id=problem.first_id,
        )
