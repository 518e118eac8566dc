"""Rewards and group advantages from category codes: one launch, beside torch and the host.

\b
    python bench/best_of_n.py                                    all sizes, on CUDA if there is any
    python bench/best_of_n.py --rule speciarl --json best.json
    python bench/best_of_n.py --device cpu --sizes 256x16 --providers reference,host

Every provider gets the same random codes [G, N] and makes rewards, advantages, live groups and
counts. "host" is NumPy's twin, which the trainer also asks; on CUDA its time has no device part. No
peer has this operation: "torch mean/std" is the group normalisation alone, of ready rewards, as
TRL and verl compute it. Times are medians of calls made in turn, on CUDA within replayed graphs;
errors are the largest differences of the advantages from the same formula in exact fractions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from speciarl.bench.comparison import checked_device, chosen, measure, show, write
from speciarl.bench.timing import can_compile, environment
from speciarl.kernels import reference
from speciarl.kernels.codes import CODES, FORMAT, W
from speciarl.kernels.reward import RULES, RewardSpec, best_of_n, best_of_n_numpy

SIZES = [(32, 8), (256, 10), (256, 16), (2048, 64)]
EXACT_GROUPS = 64


def exact_advantages(codes: np.ndarray, spec: RewardSpec) -> np.ndarray:
    """[G, N] from sums in exact fractions of the rewards; the square root alone is rounded."""
    rewards = best_of_n_numpy(codes, spec, normalize=False).rewards
    out = np.zeros(codes.shape)
    for group, row in enumerate(codes.tolist()):
        own = [
            i for i, c in enumerate(row) if W <= c < FORMAT or (c == FORMAT and spec.keeps_format)
        ]
        values = {i: Fraction(float(rewards[group, i])) for i in own}
        mean = sum(values.values(), Fraction()) / max(len(own), 1)
        spread = sum(((v - mean) ** 2 for v in values.values()), Fraction())
        std = float(spread / max(len(own) - 1, 1)) ** 0.5
        for i, value in values.items():
            out[group, i] = float(value - mean) / (std + reference.STD_EPSILON)
        if not spec.keeps_format:
            out[group, codes[group] == FORMAT] = spec.format_penalty
    return out


def group_normalised(rewards: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-6) by group."""
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    return (rewards - mean) / (std + 1e-6)


def providers(
    codes: np.ndarray, spec: RewardSpec, device: str, wanted: list[str] | None
) -> dict[str, Callable[[], Any]]:
    """Calls that return advantages, or None where they do less; the project's own first."""
    on_device = torch.from_numpy(codes).to(device)
    settings = {k: getattr(spec, k) for k in ("values", "has_bar", "format_penalty")}
    settings |= {"keeps_format": spec.keeps_format, "normalize": True}
    rewards = torch.from_numpy(best_of_n_numpy(codes, spec, normalize=True).rewards).to(device)

    def ours(route: str) -> Callable[[], Any]:
        return lambda: best_of_n(on_device, spec, normalize=True, route=route).advantages

    def normalisation_alone() -> None:
        group_normalised(rewards)

    every: dict[str, Callable[[], Any]] = {}
    if device.startswith("cuda"):
        every["triton"] = ours("triton")
    every["reference"] = ours("reference")
    if can_compile(device):
        compiled = torch.compile(reference.best_of_n)
        every["compiled"] = lambda: compiled(on_device, **settings)[1]
    every["torch mean/std"] = normalisation_alone
    if not device.startswith("cuda"):
        every["host"] = lambda: torch.from_numpy(
            best_of_n_numpy(codes, spec, normalize=True).advantages
        )
    return chosen(every, wanted)


def run_case(
    groups: int, size: int, rule: str, device: str, wanted: list[str] | None, repeats: int
) -> dict[str, dict[str, Any]]:
    """The figures of every provider for one shape."""
    spec = RewardSpec(rule=rule)
    codes = np.random.default_rng(0).choice(CODES, (groups, size)).astype(np.int8)
    exact = torch.from_numpy(exact_advantages(codes[:EXACT_GROUPS], spec))

    def errors(advantages: Tensor | None) -> dict[str, float]:
        if advantages is None:
            return {}
        return {"|d adv|": float((advantages[:EXACT_GROUPS].cpu().double() - exact).abs().max())}

    return measure(providers(codes, spec, device, wanted), errors, device, repeats)


def run(
    device: str,
    sizes: Sequence[tuple[int, int]] = SIZES,
    rule: str = "speciarl-ordered",
    wanted: list[str] | None = None,
    repeats: int = 30,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures by case and provider, printed as they come."""
    results = {}
    for groups, size in sizes:
        title = f"{rule} [{groups}, {size}]"
        results[title] = run_case(groups, size, rule, device, wanted, repeats)
        show(title, results[title])
    return results


def parse_sizes(text: str) -> list[tuple[int, int]]:
    try:
        sizes = [tuple(int(number) for number in part.split("x")) for part in text.split(",")]
        shapes = [(groups, size) for groups, size in sizes]
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not GxN[,GxN...]") from error
    if min(min(shape) for shape in shapes) < 1:
        raise click.BadParameter(f"{text!r}: at least one group of one")
    return shapes


@click.command(help=__doc__)
@click.option("--sizes", default="", help="Groups x rollouts: GxN[,GxN...].")
@click.option(
    "--rule",
    type=click.Choice([rule for rule in RULES if rule != "table"]),
    default="speciarl-ordered",
    show_default=True,
)
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
    sizes: str, rule: str, device: str, names: str | None, repeats: int, json_path: Path | None
) -> None:
    shapes = parse_sizes(sizes) if sizes else SIZES
    about = environment(device)
    click.echo(", ".join(f"{key} {value}" for key, value in about.items()))
    results = run(device, shapes, rule, names.split(",") if names else None, repeats)
    if json_path:
        write(json_path, about, results)


if __name__ == "__main__":
    main()
