"""The policy loss, its gradient and its statistics: one launch, beside what others run.

\b
    python bench/policy_loss.py                                  all sizes, on CUDA if there is any
    python bench/policy_loss.py --kind gspo --json loss.json
    python bench/policy_loss.py --device cpu --sizes 1024 --providers reference,eager,trl

Every provider gets the same random per-token log-probs and returns the loss and its gradient:
clips, dual clip, k3 KL, truncated importance weight, mean over all tokens. "triton" is what the
fused head calls, "triton+backward" the same through autograd, as the learner calls it; both also
give the statistics, which the peers do not ("trl" computes the few that TRL logs). Sequences have
one length, so that padded peers do no work for nothing. Times are medians of calls made in turn, on
CUDA within replayed graphs; errors are against float64, relative to the largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from speciarl.bench.comparison import checked_device, chosen, measure, show, write
from speciarl.bench.timing import can_compile, environment
from speciarl.kernels.loss import KINDS, LossSpec, policy_gradients, policy_loss

SIZES = {"cuda": (1024, 4096, 8192, 32768), "cpu": (1024, 4096)}
LENGTH = 128
SPECS = {
    "grpo": LossSpec(clip_high=0.28, importance_cap=2.0),
    "cispo": LossSpec(kind="cispo", clip_low=1.0, clip_high=4.0, importance_cap=2.0),
    # Without the importance weight: ours multiplies each token's gradient, TRL's and liger's the
    # sequence's by the mean of its tokens'.
    "gspo": LossSpec(kind="gspo", clip_low=3e-4, clip_high=4e-4),
}

Inputs = dict[str, Any]
Formula = Callable[[Tensor, Inputs, LossSpec], Tensor]


def inputs_of(tokens: int, device: str, dtype: torch.dtype = torch.float32) -> Inputs:
    """Columns [T], the weights and advantages of T / LENGTH sequences; random, seeded."""
    rng = torch.Generator().manual_seed(0)

    def normal(size: int, scale: float) -> Tensor:
        return (torch.randn(size, generator=rng) * scale).to(dtype).to(device)

    sequences = tokens // LENGTH
    new = -normal(tokens, 1.0).abs()
    return {
        "new": new.requires_grad_(),
        "old": new.detach() + normal(tokens, 0.1),
        "ref": new.detach() + normal(tokens, 0.3),
        "engine": new.detach() + normal(tokens, 0.1),
        "advantages": normal(sequences, 1.0),
        "weights": torch.full((sequences,), 1 / tokens, dtype=dtype, device=device),
        "sequence_ids": torch.arange(sequences, device=device).repeat_interleave(LENGTH),
    }


def plain(new: Tensor, data: Inputs, spec: LossSpec) -> Tensor:
    """The formula as one writes it in torch, of packed tokens."""
    adv = data["advantages"][data["sequence_ids"]]
    log_ratio = new - data["old"]
    if spec.kind == "gspo":
        mean = log_ratio.detach().view(-1, LENGTH).mean(1)[data["sequence_ids"]]
        log_ratio = log_ratio - log_ratio.detach() + mean
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
    if spec.kind == "cispo":
        loss = -adv * clipped.detach() * new
    else:
        loss = torch.maximum(-adv * ratio, -adv * clipped)
        loss = torch.where(adv < 0, torch.minimum(loss, -adv * 3.0), loss)
    if spec.importance_cap is not None:
        loss = loss * (data["old"] - data["engine"]).exp().clamp(max=spec.importance_cap)
    gap = data["ref"] - new
    loss = loss + spec.kl_coef * (gap.exp() - gap - 1)
    return (loss * data["weights"][data["sequence_ids"]]).sum()


def trl(new: Tensor, data: Inputs, spec: LossSpec) -> Tensor:
    """TRL 1.16, GRPOTrainer._compute_loss, on [B, L], with the clip ratios that it logs."""
    logps, old, ref, engine = (
        column.view(-1, LENGTH) for column in (new, data["old"], data["ref"], data["engine"])
    )
    advantages, mask = data["advantages"].unsqueeze(1), torch.ones_like(logps)
    log_ratio = logps - old
    if spec.kind == "gspo":
        log_ratio = (log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
        log_ratio = log_ratio.unsqueeze(-1)
    coef_1 = torch.exp(log_ratio)
    if spec.kind == "cispo":
        clamped = torch.clamp(coef_1, max=1 + spec.clip_high).detach()
        loss = -clamped * advantages * logps
    else:
        coef_2 = torch.clamp(coef_1, 1 - spec.clip_low, 1 + spec.clip_high)
        loss = -torch.min(torch.clamp(coef_1, max=3.0) * advantages, coef_2 * advantages)
    if spec.importance_cap is not None:
        loss = loss * torch.clamp(torch.exp(old - engine), max=spec.importance_cap)
    kl = torch.exp(ref - logps) - (ref - logps) - 1
    loss = ((loss + spec.kl_coef * kl) * mask).sum() / mask.sum().clamp(min=1.0)
    with torch.no_grad():
        low = (coef_1 < 1 - spec.clip_low) & (advantages < 0)
        high = (coef_1 > 1 + spec.clip_high) & (advantages > 0)
        for figure in (kl, low.float(), high.float(), (low | high).float()):
            (figure.expand_as(mask) * mask).sum() / mask.sum().clamp(min=1.0)
    return loss


def liger(new: Tensor, data: Inputs, spec: LossSpec) -> Tensor:
    """liger-kernel's loss of given log-probs, the part of its fused GRPO loss behind the head."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    logps, old, ref, engine = (
        column.view(-1, LENGTH) for column in (new, data["old"], data["ref"], data["engine"])
    )
    mask = torch.ones_like(logps)
    cispo, cap = spec.kind == "cispo", spec.importance_cap
    loss, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logps,
        mask,
        data["advantages"],
        mask,
        ref_per_token_logps=ref,
        old_per_token_logps=old,
        epsilon_low=spec.clip_low,
        epsilon_high=spec.clip_high + cispo,  # there it is the bound itself
        beta=spec.kl_coef,
        loss_type="cispo" if cispo else "bnpo",
        importance_sampling_level="sequence" if spec.kind == "gspo" else "token",
        vllm_is_ratio=None if cap is None else (old - engine).exp().clamp(max=cap),
        delta=None if cispo else 3.0,
    )
    return loss


@cache
def compiled(formula: Formula) -> Formula:
    """By torch.compile, once for all lengths: they change with every step of a training."""
    return torch.compile(formula, dynamic=True)


def differentiated(formula: Formula, data: Inputs, spec: LossSpec) -> Callable[[], Any]:
    def call() -> tuple[Tensor, Tensor]:
        loss = formula(data["new"], data, spec)
        return loss.detach(), torch.autograd.grad(loss, data["new"])[0]

    return call


def providers(
    data: Inputs, spec: LossSpec, device: str, wanted: list[str] | None
) -> dict[str, Callable[[], Any]]:
    """Calls that return (loss, d loss / d new, ...); the project's own first."""

    def ours(route: str) -> Callable[[], Any]:
        def call() -> tuple[Tensor, Tensor]:
            found = policy_gradients(**data, spec=spec, route=route)
            return found.loss, found.new

        return call

    def through_autograd(new: Tensor, data: Inputs, spec: LossSpec) -> Tensor:
        return policy_loss(**(data | {"new": new}), spec=spec, route="triton")[0]

    every: dict[str, Callable[[], Any]] = {}
    if device.startswith("cuda"):
        every["triton"] = ours("triton")
        every["triton+backward"] = differentiated(through_autograd, data, spec)
    every["reference"] = ours("reference")
    every["eager"] = differentiated(plain, data, spec)
    if can_compile(device):
        every["compiled"] = differentiated(compiled(plain), data, spec)
    every["trl"] = differentiated(trl, data, spec)
    if find_spec("liger_kernel"):
        every["liger"] = differentiated(liger, data, spec)
        if can_compile(device):
            every["liger compiled"] = differentiated(compiled(liger), data, spec)
    return chosen(every, wanted)


def run_case(
    tokens: int, kind: str, device: str, wanted: list[str] | None, repeats: int
) -> dict[str, dict[str, Any]]:
    """The figures of every provider for one size."""
    spec = SPECS[kind]
    data = inputs_of(tokens, device)
    exact = {n: v.detach().double() if v.is_floating_point() else v for n, v in data.items()}
    want = policy_gradients(**exact, spec=spec, route="reference")

    def errors(found: tuple[Tensor, Tensor]) -> dict[str, float]:
        loss, grad = found
        scale = float(want.new.abs().max())
        return {
            "|d loss|": float((loss.double() - want.loss).abs() / want.loss.abs()),
            "|d grad|": float((grad.double() - want.new).abs().max()) / scale,
        }

    return measure(providers(data, spec, device, wanted), errors, device, repeats)


def run(
    device: str,
    sizes: Sequence[int] = (),
    kind: str = "grpo",
    wanted: list[str] | None = None,
    repeats: int = 30,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures by case and provider, printed as they come; no sizes: the usual ones."""
    results = {}
    for tokens in sizes or SIZES["cpu" if device == "cpu" else "cuda"]:
        title = f"{kind} T={tokens}"
        results[title] = run_case(tokens, kind, device, wanted, repeats)
        show(title, results[title])
    return results


@click.command(help=__doc__)
@click.option("--sizes", default="", help=f"Tokens, multiples of {LENGTH}: T[,T...].")
@click.option("--kind", type=click.Choice(KINDS), default="grpo", show_default=True)
@click.option(
    "--device",
    default="cuda" if torch.cuda.is_available() else "cpu",
    show_default=True,
    callback=checked_device,
)
@click.option("--providers", "names", default=None, help="Some of them: NAME[,NAME...].")
@click.option("--repeats", type=click.IntRange(1), default=30, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False))
def main(
    sizes: str, kind: str, device: str, names: str | None, repeats: int, json_path: Path | None
) -> None:
    words = sizes.split(",") if sizes else []
    if not all(word.isdigit() and int(word) and int(word) % LENGTH == 0 for word in words):
        raise click.BadParameter(f"--sizes {sizes!r}: multiples of {LENGTH}, separated by commas")
    about = environment(device)
    click.echo(", ".join(f"{key} {value}" for key, value in about.items()))
    wanted = names.split(",") if names else None
    results = run(device, [int(word) for word in words], kind, wanted, repeats)
    if json_path:
        write(json_path, about, results)


if __name__ == "__main__":
    main()
