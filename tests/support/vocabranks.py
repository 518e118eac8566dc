"""Log-probs over a vocabulary cut between processes. As a script it runs every case on two:

vocabranks.py OUT
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from headcases import draw
from speciarl.core.world import free_port
from speciarl.kernels.head import VocabShard, linear_logprob


@dataclass(frozen=True)
class Case:
    """cut: ids of the first process; far: how much lower its logits are, in nats."""

    route: str
    dtype: torch.dtype
    mode: str = "recompute"
    cut: int = 23
    vocab: int = 37
    rows: int = 11
    banned: tuple[int, ...] = ()
    far: float = 0.0
    temperature: float = 0.8
    frozen: bool = False

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """hidden, the whole weight, targets in both shards, none banned."""
        hidden, weight, targets = draw(self.rows, self.vocab, 16, 7, self.dtype, spread=3.0)
        with torch.no_grad():
            hidden[:, 0] = 1.0
            weight[: self.cut, 0] -= self.far
        allowed = [v for v in range(self.vocab) if v not in self.banned]
        return hidden, weight, torch.tensor(allowed)[targets % len(allowed)]

    def upstream(self) -> Tensor:
        """[2, rows]"""
        return torch.linspace(-1.0, 2.0, 2 * self.rows).reshape(2, -1)


FP64, BF16 = torch.float64, torch.bfloat16
CASES = {
    "float64": Case("reference", FP64),
    "float64 stored": Case("reference", FP64, "store", banned=(0, 30)),
    "a shard all banned": Case("reference", FP64, "store", cut=35, banned=(35, 36)),
    "a shard far below": Case("reference", FP64, "store", far=150.0),
    "bf16": Case("reference", BF16, banned=(3,)),
    "no rows": Case("reference", FP64, rows=0),
    "frozen": Case("reference", FP64, frozen=True),
    "rows": Case("rows", BF16, banned=(3, 24)),
    "rows stored": Case("rows", torch.float32, "store", cut=1),
    "expsum": Case("expsum", BF16, banned=(3, 24)),
    "expsum stored": Case("expsum", BF16, "store"),
    "expsum, a shard all banned": Case("expsum", BF16, cut=2, banned=(0, 1)),
}


def run(case: Case, rank: int) -> dict[str, Tensor]:
    """What this process gets."""
    hidden, weight, targets = case.inputs()
    first, last = (0, case.cut) if rank == 0 else (case.cut, case.vocab)
    part = weight.detach()[first:last].requires_grad_(not case.frozen)
    out = linear_logprob(
        hidden,
        part,
        targets,
        temperature=case.temperature,
        banned=torch.tensor(case.banned) if case.banned else None,
        return_entropy=True,
        chunk=4,
        route=case.route,
        mode=case.mode,
        shard=VocabShard(first, case.vocab),
    )
    leaves = [hidden] if case.frozen else [hidden, part]
    upstream = case.upstream().to(out[0].dtype)
    grads = torch.autograd.grad(out, leaves, tuple(upstream))
    names = ("logp", "entropy", "d hidden", "d weight")
    return dict(zip(names, [x.detach() for x in (*out, *grads)], strict=False))


def run_rank(rank: int, size: int, port: int, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save({name: run(case, rank) for name, case in CASES.items()}, out / f"{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    import interpreter

    interpreter.patch()
    arguments = (2, free_port(), Path(sys.argv[1]))
    torch.multiprocessing.start_processes(run_rank, arguments, nprocs=2, start_method="fork")


if __name__ == "__main__":
    main()
