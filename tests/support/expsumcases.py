"""Random heads for the exp-sum tests, and what their log-probs and gradients are in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class HeadCase:
    """hidden [T, H] and weight [V, H] in bf16, targets [T], banned ids [K] or None."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    temperature: float = 1.0
    banned: Tensor | None = None

    def logits(self, dtype: torch.dtype = torch.float64) -> Tensor:
        z = self.hidden.to(dtype) @ self.weight.to(dtype).t() / self.temperature
        return z if self.banned is None else z.index_fill(1, self.banned, float("-inf"))

    def values(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [T] by plain log-softmax in `dtype`."""
        table = torch.log_softmax(self.logits(dtype), dim=1)
        entropy = -(table.exp() * table.masked_fill(table.isneginf(), 0.0)).sum(dim=1)
        return table.gather(1, self.targets.long()[:, None]).squeeze(1), entropy

    def logit_gradient(self, grad_logp: Tensor, grad_entropy: Tensor | None = None) -> Tensor:
        """d(sum of grads x values) / d(hidden . weight), float64 [T, V]."""
        table = torch.log_softmax(self.logits(), dim=1)
        p, table = table.exp(), table.masked_fill(table.isneginf(), 0.0)
        onehot = torch.zeros_like(p).scatter_(1, self.targets.long()[:, None], 1.0)
        gradient = grad_logp.double()[:, None] * (onehot - p)
        if grad_entropy is not None:
            entropy = -(p * table).sum(dim=1, keepdim=True)
            gradient -= grad_entropy.double()[:, None] * p * (table + entropy)
        return gradient / self.temperature

    def gradients(
        self, grad_logp: Tensor, grad_entropy: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of hidden and weight, in float64."""
        g = self.logit_gradient(grad_logp, grad_entropy)
        return g @ self.weight.double(), g.t() @ self.hidden.double()


def random_case(
    rows: int,
    width: int,
    vocab: int,
    *,
    temperature: float = 1.0,
    banned: list[int] | None = None,
    std: float = 4.0,
    seed: int = 0,
) -> HeadCase:
    """Logits of standard deviation `std` before temperature; targets sampled from them."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=draw).bfloat16()
    weight = (torch.randn(vocab, width, generator=draw) * std / width**0.5).bfloat16()
    ids = None if banned is None else torch.tensor(banned, dtype=torch.int64)
    case = HeadCase(hidden, weight, torch.zeros(rows, dtype=torch.int64), temperature, ids)
    if rows:
        case.targets = torch.multinomial(case.logits().softmax(1), 1, generator=draw).squeeze(1)
    return case
