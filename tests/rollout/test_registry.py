"""Engines by name, and settings that no engine can have."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from speciarl.rollout.native import NativeEngine
from speciarl.rollout.registry import RolloutConfig, Source, make_engine
from tiny import Tiny


def source(tiny: Tiny, **other: Any) -> Source:
    given: dict[str, Any] = dict(
        folder=str(tiny.folder), dtype=torch.float32, device=torch.device("cpu"),
        stop_ids=tiny.builder.stop_ids, banned_ids=tiny.banned, decode=tiny.builder.decode,
        longest_prompt=64, keep_weights=False,
    )  # fmt: skip
    return Source(**given | other)


@pytest.fixture(scope="module")
def tiny(toy_model_dir: Path, pictures: Path) -> Tiny:
    return Tiny(toy_model_dir, pictures)


@pytest.mark.parametrize(
    ("sleep", "keep", "dropped"),
    [(None, False, False), (False, True, False), (True, False, True), (True, True, False)],
)
def test_the_native_engine(tiny: Tiny, sleep: bool | None, keep: bool, dropped: bool) -> None:
    engine = make_engine(RolloutConfig(sleep=sleep, max_rows=3), source(tiny, keep_weights=keep))
    assert isinstance(engine, NativeEngine)
    assert engine.max_rows == 3
    engine.sleep()
    assert all((p.numel() == 0) == dropped for p in engine.model.parameters())


def test_who_sleeps_while_the_policy_learns() -> None:
    assert not RolloutConfig().sleeps and RolloutConfig(sleep=True).sleeps
    assert RolloutConfig(engine="sglang").sleeps
    assert not RolloutConfig(engine="sglang", sleep=False).sleeps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(engine="sglan"), "engine='sglan': one of native, sglang; did you mean sglang"),
        (dict(tp=2), "engine='native' knows no tp and no server_args"),
        (dict(server_args="a=1"), "engine='native' knows no tp and no server_args"),
        (dict(engine="sglang", tp=0), "tp=0: must be at least 1"),
        (dict(engine="sglang", bucket_mb=0), "bucket_mb=0: must be at least 1"),
        (dict(engine="sglang", memory=1.0), r"memory=1.0: must be from 0 to below 1"),
        (dict(engine="sglang", server_args="x"), "server_args: 'x' is not of the form key=value"),
        (dict(engine="sglang", server_args="tp_size=2"), "tp_size is set by rollout.tp"),
        (dict(engine="sglang", server_args="mem_fraction_static=.5"), "set by rollout.memory"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**settings)


@pytest.mark.skipif(find_spec("sglang") is not None, reason="SGLang is installed")
def test_without_sglang(tiny: Tiny) -> None:
    with pytest.raises(ImportError, match="rollout.engine='sglang': SGLang is not installed"):
        make_engine(RolloutConfig(engine="sglang"), source(tiny))


def test_prompts_and_completions_longer_than_the_model(tiny: Tiny) -> None:
    long = RolloutConfig(engine="sglang", max_new_tokens=4000)
    with pytest.raises(ValueError, match=r"4100 tokens .* context of 4096: lower .*max_new_tokens"):
        make_engine(long, source(tiny, longest_prompt=100))
