"""Evaluates a policy: `torchrun core/evaluate.py [--model DIR] [--set section.key=value ...]`."""

from __future__ import annotations

from pathlib import Path

import click

from speciarl.core.command import announce, configured, run_guarded
from speciarl.core.config import Config, with_model
from speciarl.core.metrics import Report
from speciarl.core.world import World


def evaluate_model(config: Config, world: World, out: Path) -> Report:
    """Metrics of `config.model` on every [data.eval] table; predictions are kept in `out`.

    An interrupted evaluation goes on where it stopped.
    """
    from rich.progress import Progress

    from speciarl.core.collect import Collector
    from speciarl.core.evaluation import Predictions, evaluate
    from speciarl.core.inputs import default_cache, open_data, open_judge
    from speciarl.core.modelcheck import model_record
    from speciarl.core.parts import open_engine, report_of, write_metrics

    settings = config.evaluation
    if not config.data.eval:
        raise ValueError("there is no [data.eval.NAME] table: nothing to evaluate")
    data = open_data(config, world, train=False)
    truths = [example.truth for part in data.eval.values() for example in part]
    examiner = settings.judged_by(config.judge)
    judge = open_judge(examiner, config.data.eval, truths, default_cache(out, world))
    sampling = settings.sampling(config.rollout.max_new_tokens, config.rollout.stop_text)
    record = {
        **model_record(config.model),
        "data": {name: table.path for name, table in config.data.eval.items()},
        "judge": judge.identity,
        "variant": config.data.variant,
        "instruction": config.data.instruction,
        "k": settings.k,
        "sampling": repr(sampling),
    }
    predictions = Predictions(out, record, world)
    engine = open_engine(config, world, data.builder, keep_weights=True)
    collector = Collector(engine, judge, data.builder, examiner)
    total = -(-sum(len(part) for part in data.eval.values()) // world.size)
    try:
        with Progress(disable=not world.main, transient=True) as bar:
            task = bar.add_task("evaluating", total=total)
            rows, skipped = evaluate(
                collector,
                data.store,
                data.eval,
                sampling,
                settings.k,
                world,
                predictions,
                lambda count: bar.advance(task, count),
            )
    finally:
        collector.close()
        judge.close()
        engine.close()
    result = report_of(rows, skipped)
    if world.main:
        write_metrics(out, result, skipped)
        show(result, skipped, out)
    return result


def show(result: Report, skipped: dict[str, str], out: Path) -> None:
    """Prints the table of an evaluation."""
    from rich.console import Console
    from rich.table import Table

    table = Table("data set", "images", "specificity", "correctness", "95 %", "HM", title=str(out))
    for name, tally in result.datasets.items():
        low, high = tally.correctness_interval
        table.add_row(
            name,
            str(tally.n),
            f"{tally.specificity:.3f}",
            f"{tally.correctness:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{tally.hm:.3f}",
        )
    table.add_row("mean of HMs", "", "", "", "", f"{result.mean_hm:.3f}")
    console = Console()
    console.print(table)
    for key, reason in skipped.items():
        console.print(f"skipped {key}: {reason}", markup=False)


@click.command(epilog=announce("evaluate"))
@configured(default="toyworld")
@click.option("--model", default="", help="Checkpoint folder or hub name; over model.path.")
@click.option(
    "--out",
    default=Path("runs/evaluation"),
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Predictions (JSON lines) and metrics.json; an interrupted run goes on from them.",
)
def main(config: Config, model: str, out: Path) -> None:
    """Evaluate: correctness, specificity and their harmonic mean per data set."""
    chosen = with_model(config, model) if model else config
    run_guarded(chosen, lambda world: evaluate_model(chosen, world, out))


if __name__ == "__main__":
    main()
