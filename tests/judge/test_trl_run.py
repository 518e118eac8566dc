"""A real GRPOTrainer with our reward, on the packaged base policy of the toy world."""

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

PROMPTS, N = 4, 4


@pytest.fixture
def job(toy_root: Path) -> dict[str, Any]:
    from speciarl.core.examples import DataTable, load_examples
    from speciarl.core.policy import ModelConfig
    from speciarl.core.prompts import QUESTIONS

    examples = load_examples(
        "birds", DataTable("cub", str(toy_root / "birds"), "train", k=2 * PROMPTS)
    )
    return {
        "model": ModelConfig(path="toy").folder,
        "text": f"{QUESTIONS['general']} Answer inside <answer> </answer>.",
        "prompts": [{"image": str(one.image), "truth": one.truth} for one in examples],
        "taxonomy": str(toy_root / "taxonomy.json"),
    }


def test_trl_learns_from_the_reward(job: dict[str, Any], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText
    from trl import GRPOConfig, GRPOTrainer

    from speciarl.bench.peer_trl import image_only_processor, make_dataset
    from speciarl.bench.step_meter import Meter
    from speciarl.judge.registry import make_judge
    from speciarl.judge.trl_reward import TRLReward
    from speciarl.kernels.reward import RewardSpec

    seen: list[list[float | None]] = []

    class Watched(TRLReward):
        def __call__(self, **columns: Any) -> list[float | None]:
            seen.append(super().__call__(**columns))
            return seen[-1]

    judge = make_judge("taxonomy", taxonomy=job["taxonomy"])
    model = AutoModelForImageTextToText.from_pretrained(job["model"], dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=Watched(judge, RewardSpec("speciarl-guarded"), num_generations=N),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=PROMPTS * N,
            num_generations=N,
            max_completion_length=16,
            max_steps=2,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            use_cpu=True,
            seed=0,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=make_dataset(job),
        processing_class=image_only_processor(job["model"], Meter()),
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "rewards/speciarl/mean" in row]
    assert len(logged) == len(seen) == 2
    for row, rewards in zip(logged, seen, strict=True):
        assert len(rewards) == PROMPTS * N and set(rewards) <= {-1.0, 0.0, 1.0}
        assert row["rewards/speciarl/mean"] == pytest.approx(sum(r or 0 for r in rewards) / 16)
        assert math.isfinite(row["loss"]) and row["judge/unscored"] == 0
        # The best of a group earns 1, unless nothing in it could be parsed.
        groups = [rewards[i : i + N] for i in range(0, len(rewards), N)]
        assert all(max(map(float, group)) == 1.0 or -1.0 in group for group in groups)  # type: ignore[arg-type]
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())
