"""Is the toy base policy fit for the experiment? Three conditions on the base alone.

    python bench/base.py --json bench/results/toybase.json

For a policy to learn to be specific it must already know more than it says. On held-out images of
every domain, before any reward rule is run:
- the species is sampled in at least 10 % of the completions of images that carry its cue;
- the best of 10 has an HM at least .15 above the greedy answer's;
- the greedy answer's HM is at most .80.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from speciarl.core.collect import Collector, JudgedGroup
from speciarl.core.config import Config, load_config, with_model
from speciarl.core.inputs import Data, open_data, open_judge
from speciarl.core.metrics import Tally, best_of_k
from speciarl.core.parts import open_engine
from speciarl.core.toyworld import cue_images
from speciarl.core.world import World, init_world, leave_world
from speciarl.kernels.codes import S
from speciarl.rollout.engine import Sampling

LEAST_SPECIES, LEAST_GAIN, MOST_HM = 0.10, 0.15, 0.80


def measure(groups: list[JudgedGroup], greedy: list[JudgedGroup], cues: dict[Path, bool]) -> Any:
    """The figures of one data set from sampled groups and greedy answers."""
    codes = np.array([[c.code for c in group.completions] for group in groups], dtype=np.int8)
    cued = np.array([cues[group.example.image] for group in groups])
    first = Tally.of(np.array([group.completions[0].code for group in greedy], dtype=np.int8))
    best = Tally.of(best_of_k(codes))
    return {
        "images": len(groups),
        "greedy": first.as_dict(),
        "sampled": Tally.of(codes).as_dict(),
        "best_of_n": best.as_dict(),
        "species_where_cued": float((codes[cued] == S).mean()),
        "species_where_not_cued": float((codes[~cued] == S).mean()),
        "conditions": {
            "species": bool((codes[cued] == S).mean() >= LEAST_SPECIES),
            "best_of_n_gain": bool(best.hm - first.hm >= LEAST_GAIN),
            "base_hm": bool(first.hm <= MOST_HM),
        },
    }


def measure_all(config: Config, world: World, data: Data) -> dict[str, Any]:
    """Figures by data set."""
    truths = [example.truth for part in data.eval.values() for example in part]
    judge = open_judge(config.judge, config.data.eval, truths)
    engine = open_engine(config, world, data.builder, keep_weights=True)
    collector = Collector(engine, judge, data.builder, config.judge)
    cues = cue_images(Path(config.data.toyworld))
    limit, out = config.rollout.max_new_tokens, {}
    for name, examples in data.eval.items():
        work = [(e, p) for e in examples if (p := data.store.get(e)) is not None]
        sampled, _ = collector.collect(work, config.rollout.n, Sampling(max_new_tokens=limit))
        greedy, _ = collector.collect(work, 1, Sampling(temperature=0.0, max_new_tokens=limit))
        out[name] = measure(sampled, greedy, cues)
    collector.close()
    return out


@click.command()
@click.option("--model", default="", help="A checkpoint folder; the packaged base if not given.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="Write figures here.")
def main(model: str, report: Path | None) -> None:
    """Check the base policy of the toy world."""
    config = load_config("toyworld", None, ())
    config = replace(config, rollout=replace(config.rollout, n=10))
    config = with_model(config, model) if model else config
    world = init_world()
    figures = measure_all(config, world, open_data(config, world))
    leave_world()
    for name, one in figures.items():
        click.echo(
            f"{name:8s} greedy HM {one['greedy']['hm']:.3f} "
            f"(correct {one['greedy']['correctness']:.3f}), "
            f"best of 10 {one['best_of_n']['hm']:.3f}, species said where the cue is there "
            f"{one['species_where_cued']:.1%} | {one['conditions']}"
        )
    if report:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(figures, indent=1) + "\n")
    if not all(all(one["conditions"].values()) for one in figures.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
