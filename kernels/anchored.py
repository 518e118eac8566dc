"""Routes of the linear log-prob that measure a row from its largest logit; the reference is one."""

from torch import Tensor

from speciarl.kernels import reference, shards
from speciarl.kernels.problem import Problem


class AnchoredHead:
    """What such routes share; `reference` has the maths, `problem.HeadRoute` says what is what."""

    whole = False

    def __init__(self, problem: Problem, weight: Tensor) -> None:
        self.problem = problem
        self.matrix = weight
        self.allowed = problem.allowed()

    def settle(self, sums: Tensor) -> Tensor:
        return shards.settle(sums, self.problem.shard)

    def finish(
        self, sums: Tensor, targets: Tensor, table: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if table is not None:
            self._fix(table, targets, sums)
        logp, entropy = reference.finish(sums)
        return logp, entropy if self.problem.with_entropy else None

    def gradient(
        self,
        table: Tensor,
        targets: Tensor,
        sums: Tensor,
        grad_logp: Tensor,
        grad_entropy: Tensor | None,
    ) -> Tensor:
        columns, temperature = self.problem.columns(targets), self.problem.temperature
        return reference.gradient(table, columns, sums, temperature, grad_logp, grad_entropy)

    def _fix(self, table: Tensor, targets: Tensor, sums: Tensor) -> None:
        reference.put(table, self.problem.columns(targets), reference.at_target(sums))


class ReferenceHead(AnchoredHead):
    """Any device and dtype, fp32 (or float64) logits, one copy of the matrix in that dtype."""

    def __init__(self, problem: Problem, weight: Tensor) -> None:
        super().__init__(problem, weight)
        self.matrix = weight.to(problem.dtype)
        self._scratch: Tensor | None = None

    def table(self, rows: int) -> Tensor:
        return self.matrix.new_empty(rows, self.problem.vocab)

    def sums(self, hidden: Tensor, targets: Tensor, table: Tensor | None) -> Tensor:
        if table is None:
            if self._scratch is None:
                self._scratch = self.table(len(hidden))
            table = self._scratch[: len(hidden)]
        self._logits(hidden, table)
        columns = self.problem.columns(targets)
        return reference.row_sums(table, columns, self.problem.with_entropy)

    def fill(self, hidden: Tensor, targets: Tensor, sums: Tensor, table: Tensor) -> None:
        self._logits(hidden, table)
        table.sub_(sums[0, :, None]).exp_()
        self._fix(table, targets, sums)

    def _logits(self, hidden: Tensor, table: Tensor) -> None:
        reference.fill_logits(table, hidden, self.matrix, self.allowed, self.problem.temperature)
