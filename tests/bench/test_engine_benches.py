"""Benches of engines, on what a machine without a GPU can do of them."""

import pytest
from click.testing import CliRunner

from speciarl.bench.memory_budget import GIB, main, model_of, row
from speciarl.bench.push import measure
from speciarl.bench.rollout_work import TOYBASE
from speciarl.core.config import Config
from speciarl.core.settings import load
from speciarl.core.world import World


def test_a_push_is_taken_apart(world: World) -> None:
    words = (f"model.path={TOYBASE}", "rollout.max_new_tokens=4", "rollout.sleep=true")
    result = measure(load(Config, [], words), world, repeats=2, prompts=2, samples=3)
    stored = TOYBASE.joinpath("model.safetensors").stat().st_size
    assert result["bytes"] == pytest.approx(stored, rel=0.02)
    for one in result["rounds"]:
        assert 0 < one["gather_s"] and 0 < one["push_s"] and 0 < one["generate_s"]
        assert 0 < one["mismatch_max"] < 1e-4
    assert len(result["rounds"]) == 2


def test_what_a_gpu_holds() -> None:
    """Against the released model's own figures."""
    model = model_of("qwen2.5-vl-7b", 0)
    assert model.parameters == pytest.approx(8.29e9, rel=1e-3)
    assert model.kv_bytes == 28 * 4 * 128 * 2 * 2
    lora = model_of("qwen2.5-vl-7b", 64)
    assert lora.trained < 0.03 * lora.parameters
    cells = row("qwen2.5-vl-7b", 4, "4 GPUs", 64, 0.7, 78.0, 7.5).split(" | ")
    rest = lora.parameters * 2 / 4 / GIB  # the shards of the frozen weights alone
    assert rest < float(cells[3]) < rest + 1
    assert float(cells[4]) == pytest.approx(8.29e9 * 2 / GIB, abs=0.1)
    shown = CliRunner().invoke(main, ["--gpu-gib", "139"])
    assert shown.exit_code == 0 and shown.output.count("| 8 GPUs |") == 3
