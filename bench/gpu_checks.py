"""What bench/gpu.py checks besides speed: errors, bit-equality, sizes beyond int32, no waiting."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from speciarl.bench.gpu_speed import heads
from speciarl.kernels import faults
from speciarl.kernels.codes import ABSENT, FORMAT
from speciarl.kernels.fused import linear_policy_loss
from speciarl.kernels.head import linear_logprob
from speciarl.kernels.loss import LossSpec, policy_loss
from speciarl.kernels.reward import RULES, RewardSpec, best_of_n

ROWS = 512
BARS = {"plain": 2e-5, "outliers": 1.2e-4, "gradients": 4e-3}
"""Largest error of log-probs and entropies (nats) where logits have a standard deviation of 4 and
where some reach 400, and of gradients (relative, in norm)."""


def routes_of(device: str) -> list[str]:
    return ["reference"] if device == "cpu" else ["reference", "rows", "expsum"]


def _draw(head: tuple[int, int], rows: int, device: str, outliers: bool) -> tuple[Tensor, ...]:
    rng = torch.Generator(device).manual_seed(1)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    hidden = torch.randn(rows, head[1], device=device, generator=rng)
    weight = torch.randn(head[0], head[1], device=device, generator=rng) * 4 * head[1] ** -0.5
    if outliers:
        hidden[::7] *= 20  # logits to about 400
    logits = hidden.to(dtype).float() @ weight.to(dtype).float().T
    noise = -torch.empty_like(logits).exponential_(generator=rng).log()
    targets = (logits + noise).argmax(1)  # a sample of the softmax, as a policy's tokens are
    upstream = torch.randn(2, rows, device=device, generator=rng)
    return hidden.to(dtype), weight.to(dtype), targets, upstream


def accuracy(device: str) -> dict[str, Any]:
    """Errors against float64 by route, head, temperature and kind of logits; `ok` by BARS.

    With outliers the reference's own error is the bar if it is larger (fp32 logits of 400 are
    known to 3e-5). Entropy's gradient is not included.
    """
    found = {}
    for name, head in heads(device).items():
        for outliers in (False, True):
            hidden, weight, targets, upstream = _draw(head, ROWS, device, outliers)
            for temperature in (1.0, 0.7):
                exact = _values(hidden.double(), weight.double(), targets, upstream, temperature,
                                "reference")  # fmt: skip
                bar = BARS["outliers" if outliers else "plain"]
                for route in routes_of(device):
                    got = _values(hidden, weight, targets, upstream, temperature, route)
                    error = _errors(got, exact)
                    if outliers and route == "reference":
                        bar = max(bar, error["logp"], error["entropy"])
                    error["ok"] = (
                        max(error["logp"], error["entropy"]) <= bar
                        and max(error["d_hidden"], error["d_weight"]) <= BARS["gradients"]
                    )
                    key = f"{name} {route} T={temperature}{' outliers' if outliers else ''}"
                    found[key] = error
    return found


def _values(
    hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, temperature: float,
    route: str,
) -> dict[str, Tensor]:  # fmt: skip
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    logp, entropy = linear_logprob(
        leaves[0], leaves[1], targets, temperature=temperature, return_entropy=True, route=route
    )
    grads = torch.autograd.grad(logp, leaves, upstream[0].to(logp.dtype))
    values = (logp.detach(), entropy.detach(), *grads)
    return dict(zip(("logp", "entropy", "d_hidden", "d_weight"), values, strict=True))


def _errors(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Any]:
    error: dict[str, Any] = {}
    for name, value in got.items():
        gap = value.double() - exact[name]
        wide = gap.norm() / exact[name].norm() if name.startswith("d_") else gap.abs().max()
        error[name] = wide.item()
    return error


def bit_equal(device: str) -> dict[str, bool]:
    """Whether two runs on the same inputs give the same bits, by function and route."""
    found = {}
    for name, head in heads(device).items():
        hidden, weight, targets, upstream = _draw(head, 4 * ROWS, device, False)
        for route in routes_of(device):
            call = partial(_values, hidden, weight, targets, upstream, 1.0, route)
            found[f"linear_logprob {name} {route}"] = _twice(call)
    columns = _columns(32768 if device != "cpu" else 512, device)
    for kind in ("grpo", "cispo", "gspo"):
        found[f"policy_loss {kind}"] = _twice(partial(_loss, columns, kind))
    rng = torch.Generator().manual_seed(2)
    codes = torch.randint(ABSENT, FORMAT + 1, (256, 16), generator=rng, dtype=torch.int8)
    for rule in (rule for rule in RULES if rule != "table"):
        found[f"best_of_n {rule}"] = _twice(partial(_rewards, codes.to(device), rule))
    return found


def _twice(call: Callable[[], dict[str, Tensor]]) -> bool:
    one, other = call(), call()
    return all(torch.equal(one[name], other[name]) for name in one)


def _columns(rows: int, device: str) -> dict[str, Any]:
    rng = torch.Generator(device).manual_seed(3)
    new = -torch.rand(rows, device=device, generator=rng) * 4
    noise = torch.randn(3, rows, device=device, generator=rng) * 0.2
    sequences = max(rows // 64, 1)
    return {
        "new": new,
        "old": new + noise[0],
        "ref": new + noise[1],
        "engine": new + noise[2],
        "advantages": torch.randn(sequences, device=device, generator=rng),
        "weights": torch.full((sequences,), 1.0 / rows, device=device),
        "sequence_ids": torch.arange(rows, device=device) // 64 % sequences,
    }


def _loss(columns: dict[str, Any], kind: str) -> dict[str, Tensor]:
    new = columns["new"].detach().requires_grad_()
    spec = LossSpec(kind=kind, importance_cap=2.0)
    loss, stats = policy_loss(new, **{k: v for k, v in columns.items() if k != "new"}, spec=spec)
    return {"loss": loss.detach(), "stats": stats, "grad": torch.autograd.grad(loss, [new])[0]}


def _rewards(codes: Tensor, rule: str) -> dict[str, Tensor]:
    return best_of_n(codes, RewardSpec(rule=rule), normalize=True)._asdict()


def beyond_int32(device: str) -> dict[str, Any]:
    """The last rows of a call with T x V above 2^31 (and 2^32), against the same rows alone."""
    if device == "cpu":
        return {}
    vocab, width = 152064, 512
    found = {}
    for rows in (16384, 32768):
        rng = torch.Generator(device).manual_seed(4)
        hidden = torch.randn(rows, width, device=device, generator=rng).bfloat16()
        weight = torch.randn(vocab, width, device=device, generator=rng).mul_(0.1).bfloat16()
        targets = torch.randint(vocab, (rows,), device=device, generator=rng)
        last = slice(rows - 300, rows)
        for route in routes_of(device)[1:]:
            leaf = hidden.clone().requires_grad_()
            logp = linear_logprob(leaf, weight, targets, route=route, mode="store")
            (grad,) = torch.autograd.grad(logp.sum(), [leaf])
            alone = hidden[last].clone().requires_grad_()
            wanted = linear_logprob(alone, weight, targets[last], route="reference")
            (wanted_grad,) = torch.autograd.grad(wanted.sum(), [alone])
            gap = (grad[last].float() - wanted_grad.float()).norm() / wanted_grad.float().norm()
            found[f"{route} {rows}x{vocab}"] = {
                "logp": (logp[last] - wanted).abs().max().item(),
                "d_hidden": gap.item(),
            }
    return found


def no_waiting(device: str) -> dict[str, str]:
    """From codes to gradients under `set_sync_debug_mode("error")`: "ok", or what waited.

    The first pass, which compiles and allocates, is outside.
    """
    found = {}
    head = next(iter(heads(device).values()))
    for route in routes_of(device):
        update = _update(head, route, device)
        update()
        if device == "cpu":
            found[route] = "run, but a CPU has nobody to wait for"
            continue
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            update()
            found[route] = "ok"
        except RuntimeError as error:
            found[route] = str(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


def _update(head: tuple[int, int], route: str, device: str) -> Callable[[], None]:
    """Codes [G, N] on the device -> advantages -> loss, both ways -> gradients of the head."""
    groups, size, length = 4, 8, 16
    hidden, weight, targets, _ = _draw(head, groups * size * length, device, False)
    codes = torch.arange(groups * size, dtype=torch.int8).reshape(groups, size) % 7
    codes = codes.to(device)
    ids = torch.arange(groups * size * length, device=device) // length
    weights = torch.full((groups * size,), 1.0 / len(ids), device=device)
    hidden.requires_grad_()
    weight.requires_grad_()

    def update() -> None:
        advantages = best_of_n(codes, RewardSpec(), normalize=True).advantages.reshape(-1)
        sequences: dict[str, Any] = {
            "advantages": advantages, "weights": weights, "sequence_ids": ids, "spec": LossSpec(),
        }  # fmt: skip
        with torch.no_grad():
            ref = linear_logprob(hidden, weight, targets, route=route)
        for mode in ("store", "recompute"):
            new = linear_logprob(hidden, weight, targets, route=route, mode=mode)
            loss, _ = policy_loss(new, new.detach(), **sequences, ref=ref)
            loss.backward()
        loss, _ = linear_policy_loss(
            hidden, weight, targets, old=None, **sequences, ref=ref, route=route, chunk=256
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_([hidden, weight], 1.0)
        faults.take(device)

    return update
