"""The whole configuration of a run: one section per thing configured, each beside its class."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from speciarl.core.evaluation import EvaluationConfig
from speciarl.core.mismatch import MismatchConfig
from speciarl.core.objective import ObjectiveConfig
from speciarl.core.optim import OptimConfig
from speciarl.core.policy import ModelConfig
from speciarl.core.settings import load, preset_path
from speciarl.core.stream import DataConfig
from speciarl.judge.settings import JudgeConfig
from speciarl.kernels.reward import RewardSpec
from speciarl.rollout.registry import RolloutConfig


@dataclass(frozen=True)
class TrainConfig:
    """The run itself: how long, how much at once, where to."""

    out: str = "runs/toyworld"
    """Run folder: configuration, metrics, samples, checkpoints, final model."""
    steps: int = 160
    """Training steps; each draws `prompts` prompts."""
    prompts: int = 16
    """Prompts of a step, over all ranks."""
    mini_batch: int = 16
    """Prompts of an update; prompts / mini_batch updates a step."""
    token_budget: int = 8192
    """Tokens of a micro-batch on one rank (prompt and completion)."""
    seed: int = 0
    """Of data order, sampling and adapters."""
    save_every: int = 20
    """Steps between checkpoints; 0 saves only the last."""
    keep: int = 2
    """Checkpoints kept; 0 keeps all."""
    resume: str = "auto"
    """"auto" goes on from the newest checkpoint in `out`; "previous" from the one before it;
    "never" refuses a folder that has any."""
    threads: int = 0
    """Torch threads of a process; 0 shares the machine's cores between its processes."""
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""
    samples_every: int = 10
    """Steps between samples written to samples.jsonl; 0 writes none."""
    trace_steps: int = 0
    """Steps from the start (or from where a run is resumed) whose timeline is written to
    trace.json, for ui.perfetto.dev; -1 writes all."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.prompts < 1 or self.mini_batch < 1 or self.token_budget < 1:
            raise ValueError("steps, prompts, mini_batch and token_budget must be at least 1")
        if self.prompts % self.mini_batch:
            raise ValueError(
                f"prompts={self.prompts} is not divisible by mini_batch={self.mini_batch}"
            )
        if self.resume not in ("auto", "previous", "never"):
            raise ValueError(f"resume={self.resume!r}: one of auto, previous, never")
        if min(self.save_every, self.keep, self.threads, self.samples_every) < 0:
            raise ValueError("save_every, keep, threads and samples_every must not be negative")
        if self.trace_steps < -1:
            raise ValueError(f"trace_steps={self.trace_steps}: at least 0, or -1 for all steps")
        if not self.out:
            raise ValueError("out='': name the run folder")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device={self.device!r}: one of auto, cpu, cuda")


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    train: TrainConfig = field(default_factory=TrainConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    reward: RewardSpec = field(default_factory=RewardSpec)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.objective.normalize and self.rollout.n < 2:
            raise ValueError(
                f"rollout.n={self.rollout.n} with objective.normalize: a group's standard "
                "deviation needs at least 2 completions; raise rollout.n or set "
                "objective.normalize=false"
            )
        if self.objective.normalize and self.rollout.n_start == 1:
            raise ValueError(
                "rollout.n_start=1 with objective.normalize: a group's standard deviation needs at "
                "least 2 completions; raise rollout.n_start"
            )
        if self.model.head_mode == "chunked" and self.objective.loss.kind == "gspo":
            raise ValueError(
                "model.head_mode=chunked with objective.algorithm=gspo: its ratios need all tokens "
                "of a sequence at once; set model.head_mode=auto"
            )


def load_config(preset: str, file: Path | None, sets: tuple[str, ...]) -> Config:
    """Preset, then file, then --set, each overriding the one before.

    Raises:
        SettingsError: naming every unknown key and impossible value at once.
    """
    sources = [preset_path(preset)] if preset else []
    return load(Config, [*sources, *([file] if file else [])], list(sets))


def with_model(config: Config, path: str) -> Config:
    """The same configuration with another model."""
    return replace(config, model=replace(config.model, path=path))
