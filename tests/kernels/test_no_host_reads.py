"""From category codes to gradients the host reads nothing that the device computes.

A read would make the host wait for the device, and the device then for the host. Values that the
host knows itself (lengths, rows, prompts) are uploaded before.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hostreads import METHODS, HostRead, no_host_reads, on_the_host
from learning import CASES, Case, judged_groups, learner_of
from losscases import cast, draw
from speciarl.core.world import World
from speciarl.kernels import faults
from speciarl.kernels.head import linear_logprob
from speciarl.kernels.loss import KINDS, KL_KINDS, LossSpec, policy_loss
from speciarl.kernels.reward import RULES, RewardSpec, best_of_n
from tiny import Tiny

ROUTES = ["reference", *(["triton"] if find_spec("triton") else [])]
SUPPORT = Path(__file__).parents[1] / "support"
NUMBERS = torch.arange(6.0)

READS: dict[str, Callable[[], Any]] = {
    "tolist": lambda: NUMBERS.tolist(),
    "numpy": lambda: NUMBERS.numpy(),
    "item": lambda: NUMBERS.sum().item(),
    "bool": lambda: "yes" if NUMBERS.sum() > 3 else "no",
    "int": lambda: int(NUMBERS[1]),
    "float": lambda: float(NUMBERS[1]),
    "nonzero": lambda: NUMBERS.nonzero(),
    "where": lambda: torch.where(NUMBERS > 3),
    "masked_select": lambda: torch.masked_select(NUMBERS, NUMBERS > 3),
    "mask": lambda: NUMBERS[NUMBERS > 3],
    "mask put": lambda: NUMBERS.clone().index_put_((NUMBERS > 3,), torch.tensor(0.0)),
    "mask set": lambda: NUMBERS.clone().__setitem__(NUMBERS > 3, torch.zeros(2)),
    "unique": lambda: NUMBERS.unique(),
    "consecutive": lambda: NUMBERS.unique_consecutive(),
    "repeats": lambda: NUMBERS.repeat_interleave(torch.full((6,), 2)),
    "equal": lambda: torch.equal(NUMBERS, NUMBERS),
    "range check": lambda: (
        faults.check_range("x", torch.tensor([1]), 0, 1) or torch.tensor([3]).item()
    ),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_the_guard_refuses(read: Callable[[], Any]) -> None:
    with no_host_reads(), pytest.raises(HostRead):
        read()
    on_the_host(lambda: NUMBERS.tolist())()  # and all is as before
    assert NUMBERS.tolist() == [0, 1, 2, 3, 4, 5]


def test_the_guard_lets_a_device_work() -> None:
    with no_host_reads():
        index = (NUMBERS * 2).long() // 2
        assert NUMBERS[index].shape == NUMBERS.index_select(0, index).shape
        NUMBERS.where(NUMBERS > 3, 0.0).masked_fill(NUMBERS > 4, 1.0).index_fill(0, index, 2.0)
        NUMBERS.repeat_interleave(2)
        assert on_the_host(lambda: NUMBERS.tolist())() == [0, 1, 2, 3, 4, 5]
        with pytest.raises(HostRead):
            NUMBERS.tolist()
    assert {"tolist", "numpy", "item", "__bool__"} <= set(METHODS)


def test_the_guard_sees_backward_passes() -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * grad.sum().item()

    x = torch.ones(2, requires_grad=True)
    with no_host_reads(), pytest.raises(HostRead):
        Reads.apply(x).sum().backward()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("rule", RULES)
def test_rewards(rule: str, route: str) -> None:
    spec = RewardSpec(rule=rule, table=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5) if rule == "table" else None)
    codes = torch.randint(-1, 9, (5, 6), dtype=torch.int8)  # 7 and 8 are unknown
    with no_host_reads():
        for normalize in (True, False):
            best_of_n(codes, spec, normalize=normalize, route=route)
        faults.take("cpu")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kl", KL_KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_from_codes_to_the_gradients_of_hidden_states(kind: str, kl: str, route: str) -> None:
    data = cast(draw(tokens=40, sequences=6), torch.float32)
    data["sequence_ids"][3] = 99
    hidden, weight = torch.randn(40, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    spec = LossSpec(kind=kind, kl=kl, importance_cap=1.5, entropy_coef=0.1)
    codes, targets = torch.randint(-1, 7, (2, 3), dtype=torch.int8), torch.randint(20, (40,))
    with no_host_reads():
        result = best_of_n(codes, RewardSpec(), normalize=True, route=route)
        new, entropy = linear_logprob(hidden, weight, targets, return_entropy=True)
        columns = data | {"new": new, "entropy": entropy, "old": new.detach()}
        columns["advantages"] = result.advantages.reshape(-1)
        loss, _ = policy_loss(**columns, spec=spec, route=route)
        loss.backward()
        faults.take("cpu")
    assert hidden.grad is not None and weight.grad is not None and data["ref"].grad is not None


@pytest.fixture(scope="module")
def tiny(model_dirs: dict[str, Path], pictures: Path) -> Tiny:
    return Tiny(model_dirs["toy"], pictures)


@pytest.fixture
def host_part(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Lets a learner do what the host does: pack the prompts, which it holds, and look at the sizes
    of their images, which transformers' vision tower reads."""

    def allow(learner: Any) -> None:
        monkeypatch.setattr(learner, "_pack", on_the_host(learner._pack))
        nets = [net for net in (learner.policy.net, learner.policy.frozen) if net is not None]
        for net in nets:
            inner = net.model.model
            monkeypatch.setattr(inner, "get_image_features", on_the_host(inner.get_image_features))

    return allow


@pytest.mark.parametrize("name", ["two updates", "lora", "fillers"])
def test_a_step_of_the_learner(
    name: str, tiny: Tiny, world: World, host_part: Callable[[Any], None]
) -> None:
    case: Case = CASES[name]
    learner = learner_of(case, tiny, world)
    host_part(learner)
    groups = judged_groups(tiny, case.codes)
    with no_host_reads():
        learned = learner.learn(groups, lambda _: case.lr)
    assert learned is not None and not learned.skipped.any() and not learned.faults.any()


def test_a_read_planted_in_the_learner_is_found(
    tiny: Tiny, world: World, host_part: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["two updates"]
    learner = learner_of(case, tiny, world)
    host_part(learner)
    step = learner.optimizer.step

    def reading(lr: float) -> tuple[Tensor, Tensor]:
        norm, bad = step(lr)
        return (norm, bad) if norm > 0 else (bad, norm)

    monkeypatch.setattr(learner.optimizer, "step", reading)
    with no_host_reads(), pytest.raises(HostRead, match="__bool__"):
        learner.learn(judged_groups(tiny, case.codes), lambda _: case.lr)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device() -> None:
    """The compiled kernels, in a process of their own: here Triton interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SUPPORT)
    subprocess.run([sys.executable, str(SUPPORT / "ondevice.py")], env=environment, check=True)
