"""A vocabulary cut over processes: each holds some rows of the output matrix, all hold the tokens.

Log-probs need the whole vocabulary: the processes exchange a few numbers a token, never logits.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from speciarl.kernels import reference


@dataclass(frozen=True)
class VocabShard:
    """Which ids this process's rows of the output matrix are."""

    first_id: int
    """The id of the first row; the others follow."""
    total: int
    """Ids of the whole vocabulary."""
    group: dist.ProcessGroup | None = None
    """The processes that hold the vocabulary together; None: all."""

    def check(self, rows: int) -> None:
        """Raises ValueError if `rows` rows from `first_id` on are not within the vocabulary."""
        if not 0 <= self.first_id <= self.first_id + rows <= self.total:
            raise ValueError(
                f"shard: ids {self.first_id} to {self.first_id + rows - 1} (weight has {rows} "
                f"rows) are not within total = {self.total}"
            )
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError("shard needs torch.distributed: call init_process_group first")

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        dist.all_reduce(values, group=self.group)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """The largest over the processes, in place."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values


def settle(sums: Tensor, shard: VocabShard | None) -> Tensor:
    """`reference.settle` for sums [4, T] over one shard; the same on every process but for the
    anchor, which stays this table's, and its shift."""
    if shard is None:
        return reference.settle(sums)
    anchor, target, others, moment = sums
    highest, target = shard.largest(torch.stack((anchor, target)))
    shift = (anchor - highest).clamp(min=-reference.SHIFT_LIMIT)
    scale = shift.exp()
    # E ln E of a lower anchor: (E s) ln (E s) = s (E ln E + E ln s).
    others, moment = shard.add_up(torch.stack((others * scale, (moment + shift * others) * scale)))
    return torch.stack((anchor, target - highest, others, moment, shift))
