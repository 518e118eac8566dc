"""What a route of the linear log-prob is given, and what it must be able to do."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from speciarl.kernels.shards import VocabShard


@dataclass(frozen=True, eq=False)
class Problem:
    """The distribution of one call.

    vocab: rows of the weight [V, H]; dtype: of log-probs, sums and the reference's logits, fp32 or
    float64; banned: ids [K] int64 or None; temperature: a positive number; with_entropy: whether
    entropies are wanted; shard: which part of the vocabulary the weight is, None for all of it.
    """

    vocab: int
    dtype: torch.dtype
    banned: Tensor | None
    temperature: float
    with_entropy: bool
    shard: VocabShard | None = None

    @property
    def first_id(self) -> int:
        """The id of the weight's first row."""
        return 0 if self.shard is None else self.shard.first_id

    @property
    def total(self) -> int:
        """Ids of the whole vocabulary."""
        return self.vocab if self.shard is None else self.shard.total

    def columns(self, targets: Tensor) -> Tensor:
        """Rows of the weight that belong to ids [C], -1 where another shard, or none, has them."""
        columns = targets - self.first_id
        return columns.masked_fill((columns < 0) | (columns >= self.vocab), -1)

    def allowed(self) -> Tensor | None:
        """bool [V]: rows of the weight that are not banned; None where nothing is."""
        if self.banned is None:
            return None
        # Ids of other shards go to a column that is cut off: no host read, no boolean index.
        mask = torch.ones(self.vocab + 1, dtype=torch.bool, device=self.banned.device)
        columns = self.columns(self.banned)
        return mask.index_fill_(0, columns.where(columns >= 0, self.vocab), False)[: self.vocab]

    def impossible(self, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """bool [T] twice: targets that are no id, and targets that are banned (None: none is)."""
        outside = (targets < 0) | (targets >= self.total)
        if self.banned is None:
            return outside, None
        return outside, (targets[:, None] == self.banned[None]).any(1)


class HeadRoute(Protocol):
    """Log-probs and gradients of row chunks; made for one `Problem` and its weight.

    hidden [C, H], targets [C] int64 ids. `sums` [k, C] are a route's own; `settle` makes them those
    of the whole vocabulary. A table [C, V] holds exponentials of a chunk until `gradient`
    overwrites it.
    """

    matrix: Tensor
    """The weight in the table's type."""
    whole: bool
    """Whether forward takes all rows at once, since it needs no workspace for them."""

    def table(self, rows: int) -> Tensor:
        """An empty table [rows, V]."""

    def sums(self, hidden: Tensor, targets: Tensor, table: Tensor | None) -> Tensor:
        """Sums over this shard, and their exponentials into `table` if given."""

    def settle(self, sums: Tensor) -> Tensor:
        """Sums over all shards; collective if there are several."""

    def finish(
        self, sums: Tensor, targets: Tensor, table: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs and entropies [C] from settled sums; a filled table is made fit for `gradient`
        (its column at the target).

        Log-probs are -inf where the target is banned or no id."""

    def fill(self, hidden: Tensor, targets: Tensor, sums: Tensor, table: Tensor) -> None:
        """Makes the table again from settled sums, as `sums` and `finish` leave it."""

    def gradient(
        self,
        table: Tensor,
        targets: Tensor,
        sums: Tensor,
        grad_logp: Tensor,
        grad_entropy: Tensor | None,
    ) -> Tensor:
        """The table becomes, times the factors [C] returned, dL/d(hidden . weight)."""
