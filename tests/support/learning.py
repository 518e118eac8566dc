"""Learning from stored completions: by `core.learner` on any number of ranks, and by hand.

As a script it runs every case on process groups of the sizes named, from one set of imports:

    learning.py MODELS PICTURES OUT SIZE...
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from safetensors.torch import save_file
from torch import Tensor

from speciarl.core.batch import Item
from speciarl.core.collect import Completion, JudgedGroup, codes_matrix
from speciarl.core.learner import Learner
from speciarl.core.objective import ObjectiveConfig
from speciarl.core.optim import OptimConfig, Optimizer
from speciarl.core.policy import ModelConfig, Policy, whole
from speciarl.core.world import World, free_port, init_world, leave_world
from speciarl.kernels.codes import ABSENT, FORMAT, S_MINUS, S_PLUS, A, G, S, W
from speciarl.kernels.launch import has_triton
from speciarl.kernels.reward import RewardSpec, best_of_n_numpy
from tiny import Tiny, perturb, plain_table

TEMPERATURE = 0.9
LIMIT = 16

MIXED = (
    (W, G, S),
    (W, W, W),  # no signal
    (S_PLUS, FORMAT, ABSENT),
    (ABSENT, ABSENT, ABSENT),
    (A, S_MINUS, W),
)
UNEVEN = ((W, S), (G, W, ABSENT, S_MINUS, S), (A,), (W, W, S))
# Two sequences to learn from: with four ranks, two of them have nothing but fillers.
SPARSE = ((W, W, W), (W, S, ABSENT), (G, G, G))


@dataclass(frozen=True)
class Case:
    """A model, an objective, judged groups, and how the work is cut."""

    objective: ObjectiveConfig
    kind: str = "toy"
    model: dict[str, Any] = field(default_factory=dict)
    codes: tuple[tuple[int, ...], ...] = MIXED
    rule: str = "speciarl-ordered"
    budget: int = 80
    mini_batch: int = len(MIXED)
    lr: float = 1e-3


KL = ObjectiveConfig(kl_coef=0.1)
CASES = {
    "one row": Case(KL, budget=100_000),
    "a row each": Case(KL, budget=1),
    "fillers": Case(
        ObjectiveConfig("dr-grpo"), codes=SPARSE, mini_batch=3, model={"freeze_vision": True}
    ),
    "tied": Case(
        ObjectiveConfig("dapo", entropy_coef=0.01, importance_cap=1.2, dynamic_sampling=False),
        kind="tied",
        rule="static-binary",
        model={"checkpoint_activations": True},
    ),
    "lora": Case(KL, model={"lora_rank": 4, "lora_alpha": 8.0}),
    "qwen3": Case(ObjectiveConfig(aggregation="sequence-mean", kl="k2"), kind="qwen3"),
    "groups of several sizes": Case(KL, codes=UNEVEN, mini_batch=4),
    "two updates": Case(KL, mini_batch=3, lr=0.03, model={"reshard_after_forward": False}),
    "tied, loss in the head": Case(
        ObjectiveConfig(kl_coef=0.1, entropy_coef=0.01),
        kind="tied",
        model={"head_mode": "chunked", "head_chunk": 7},
    ),
}
if has_triton():  # kernels inside the head's all-gather, interpreted
    CASES |= {
        "kernels": Case(KL, model={"head_route": "rows", "head_mode": "store"}),
        "tied, loss in the head, kernels": Case(
            KL,
            kind="tied",
            budget=100_000,
            model={"head_route": "rows", "head_mode": "chunked", "head_chunk": 16},
        ),
    }


def judged_groups(tiny: Tiny, codes: Sequence[Sequence[int]]) -> list[JudgedGroup]:
    """One group of random completions, 1 to 9 tokens long, for each row of codes."""
    draw = np.random.default_rng(0)
    out = []
    for at, (example, row) in enumerate(zip(tiny.examples, codes, strict=False)):
        every = tiny.completions(draw.integers(1, 10, len(row)).tolist(), seed=at)
        completions = [
            Completion(ids, draw.uniform(-7, -5, len(ids)).tolist(), "length", 0, code)
            for ids, code in zip(every, row, strict=True)
        ]
        out.append(JudgedGroup(example, len(tiny.prompt(example).input_ids), completions))
    return out


class Recording(Optimizer):
    """Keeps the whole gradient of every update."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gradients: list[dict[str, Tensor]] = []

    def step(self, lr: float) -> tuple[Tensor, Tensor]:
        found = {n: whole(p.grad).clone() for n, p in self.named.items() if p.grad is not None}
        self.gradients.append(found)
        return super().step(lr)


def learner_of(case: Case, tiny: Tiny, world: World) -> Learner:
    """A learner whose policy is a little away from its reference."""
    torch.manual_seed(0)  # of LoRA's first matrices
    config = ModelConfig(path=str(tiny.folder), **case.model)
    policy = Policy(config, world, tiny.banned, reference=bool(case.objective.kl_coef))
    perturb(policy.parameters())
    # With a large epsilon, AdamW does not blow up differences in the last bits of small gradients.
    optimizer = Recording(OptimConfig(eps=1e-3), policy.parameters())
    return Learner(
        policy,
        optimizer,
        case.objective,
        RewardSpec(rule=case.rule),
        world,
        temperature=TEMPERATURE,
        limit=LIMIT,
        token_budget=case.budget,
        mini_batch=case.mini_batch,
        prompt_of=tiny.prompt,
    )


def learn(case: Case, tiny: Tiny, world: World) -> dict[str, Tensor]:
    """Weights before and after, the first update's gradient, and the statistics. Collective."""
    learner = learner_of(case, tiny, world)
    parameters = learner.policy.parameters()
    out = {f"start {name}": whole(p.data).clone() for name, p in parameters.items()}
    learned = learner.learn(judged_groups(tiny, case.codes), lambda update: case.lr)
    assert learned is not None
    out |= {f"end {name}": whole(p.data).clone() for name, p in parameters.items()}
    out |= {f"grad {n}": g for n, g in learner.optimizer.gradients[0].items()}  # type: ignore[attr-defined]
    return out | {"stats": learned.stats, "norms": learned.norms, "skipped": learned.skipped}


def by_hand(
    case: Case, tiny: Tiny, start: dict[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The first update in float64, one unpacked sequence after another: the loss, the size of what
    it is summed from (its terms cancel), and the gradient.

    `start`: the trainable parameters. LoRA's are folded into plain weights, and its gradient
    follows from the plain one: W = W0 + c B A, so dB = c dW A^T and dA = c B^T dW.
    """
    model, reference = tiny.model(torch.float64), tiny.model(torch.float64)
    weights = dict(model.named_parameters())
    adapted = [n.removesuffix(".lora_A.default.weight") for n in start if ".lora_A." in n]
    scale = case.model.get("lora_alpha", 0.0) / case.model.get("lora_rank", 1)
    with torch.no_grad():
        for name, value in start.items():
            if name in weights:
                weights[name].copy_(value)
        for layer in adapted:
            a, b = (start[f"{layer}.lora_{x}.default.weight"].double() for x in "AB")
            weights[f"{layer}.weight"].add_(scale * b @ a)
    loss, size = torch.zeros(2, dtype=torch.float64)
    for item, completion, advantage, weight in _scored(case, tiny):
        term = weight * _token_losses(case, tiny, model, reference, item, completion, advantage)
        term.sum().backward()
        loss += term.sum().detach()
        size += term.abs().sum().detach()
    gradient = {n: weights[n].grad for n in start if n in weights}
    for layer in adapted:
        a, b = (start[f"{layer}.lora_{x}.default.weight"].double() for x in "AB")
        dense = weights[f"{layer}.weight"].grad
        gradient[f"{layer}.lora_A.default.weight"] = scale * b.T @ dense
        gradient[f"{layer}.lora_B.default.weight"] = scale * dense @ a.T
    return loss, size, gradient


def _scored(case: Case, tiny: Tiny) -> list[tuple[Item, Completion, float, float]]:
    """(item, completion, advantage, weight of a token) of the first update."""
    groups = judged_groups(tiny, case.codes)
    reward = RewardSpec(rule=case.rule)
    normalize = bool(case.objective.normalize)
    advantages = best_of_n_numpy(codes_matrix(groups), reward, normalize=normalize).advantages
    rows = [
        (Item(tiny.prompt(group.example), c.ids), c, float(a))
        for group, row in zip(groups[: case.mini_batch], advantages, strict=False)
        for c, a in zip(group.completions, row, strict=False)  # rows are padded
        if c.code != ABSENT
    ]
    tokens = sum(len(item.ids) for item, _, _ in rows)
    weight = {
        "token-mean": lambda length: 1 / tokens,
        "sequence-mean": lambda length: 1 / len(rows) / length,
        "constant": lambda length: 1 / len(rows) / LIMIT,
    }[str(case.objective.aggregation)]
    return [(item, c, a, weight(len(item.ids))) for item, c, a in rows]


def _token_losses(
    case: Case,
    tiny: Tiny,
    model: Any,
    reference: Any,
    item: Item,
    completion: Completion,
    advantage: float,
) -> Tensor:
    objective, ids = case.objective, torch.tensor(item.ids)[:, None]
    table = plain_table(model, item, tiny.banned, TEMPERATURE)
    new = table.gather(1, ids)[:, 0]
    old = new.detach()
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    loss = -torch.minimum(advantage * ratio, advantage * clipped)
    if objective.importance_cap is not None:
        engine = torch.tensor(completion.logprobs, dtype=torch.float64)
        loss = loss * (old - engine).exp().clamp(max=objective.importance_cap)
    if objective.kl_coef:
        with torch.no_grad():
            ref = plain_table(reference, item, tiny.banned, TEMPERATURE).gather(1, ids)[:, 0]
        k3 = (ref - new).exp() - (ref - new) - 1
        loss = loss + objective.kl_coef * (k3 if objective.kl == "k3" else (new - ref) ** 2 / 2)
    allowed = torch.ones(table.shape[1], dtype=torch.bool)
    allowed[list(tiny.banned)] = False
    possible = table[:, allowed]
    return loss + objective.entropy_coef * (possible.exp() * possible).sum(1)


def run_rank(rank: int, size: int, port: int, models: Path, pictures: Path, out: Path) -> None:
    """One process of a group: every case, its results written by rank 0."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    world = init_world(threads=1, device="cpu")
    for name, case in CASES.items():
        found = learn(case, Tiny(models / case.kind, pictures), world)
        if world.main:
            save_file(
                {key: value.contiguous() for key, value in found.items()},
                out / f"{name}.{size}.safetensors",
            )
    leave_world()


def main() -> None:
    models, pictures, out = (Path(word) for word in sys.argv[1:4])
    for size in map(int, sys.argv[4:]):
        arguments = (size, free_port(), models, pictures, out)
        torch.multiprocessing.start_processes(run_rank, arguments, nprocs=size, start_method="fork")


if __name__ == "__main__":
    main()
