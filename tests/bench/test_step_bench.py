import json
from pathlib import Path

import pytest
import torch
from torch import nn

from speciarl.bench.flop_count import ModelSize, learn_flops, peak_of
from speciarl.bench.random_vlm import SIZES, random_config, save_random
from speciarl.bench.step_meter import Meter, StepRecord
from speciarl.bench.step_report import print_report, ratios, samples_per_second, spread
from speciarl.core.prompts import PromptBuilder


def record(step: float, learn: float = 0.2) -> StepRecord:
    parts = {"step": step, "generate": 0.1, "judge": 0.0, "learn": learn, "push": 0.01}
    return StepRecord.of(parts, Meter(), samples=160, completion_tokens=640, learn_tokens=4800)


def result(records: dict[str, list[StepRecord]]) -> dict[str, object]:
    return {
        "model": "toy",
        "trained": "full",
        "machine": {"device": "cpu"},
        "memory_bytes": dict.fromkeys(records, 2**30),
        "mfu": None,
        "packing": {"packed - alone": 1e-6},
        "ratio": ratios(records) if "TRL" in records else None,
    }


def test_the_parts_of_a_step_add_up() -> None:
    parts = record(1.0).parts
    assert parts["step"] == pytest.approx(sum(v for k, v in parts.items() if k != "step"))


def test_speed_ratios_are_taken_pair_by_pair() -> None:
    records = {"ours": [record(1.0), record(2.0)], "TRL": [record(4.0, 0.4), record(6.0, 1.0)]}
    found = ratios(records)
    assert found["samples/s"] == pytest.approx({"median": 3.5, "min": 3.0, "max": 4.0})
    assert found["step seconds"] == pytest.approx(found["samples/s"])
    assert found["learn seconds"] == pytest.approx({"median": 3.5, "min": 2.0, "max": 5.0})
    assert samples_per_second(records["TRL"][0]) == 40


@pytest.mark.parametrize("names", [("ours",), ("ours", "TRL")])
def test_the_report_shows_every_part(
    names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    records = {name: [record(1.0), record(1.5)] for name in names}
    print_report(result(records), records)
    shown = capsys.readouterr().out
    for word in ("generate", "judge", "learn", "push", "other", "samples/s", "MiB", "nats"):
        assert word in shown
    assert ("TRL's seconds / ours" in shown) == ("TRL" in names)


def test_spread_is_median_and_range() -> None:
    assert spread([3.0, 1.0, 2.0], 1) == "2.0 [1.0, 3.0]"


def test_known_devices_have_a_peak() -> None:
    assert peak_of("NVIDIA H200") == peak_of("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_of("NVIDIA L4") is None


SIZE = ModelSize(language=1000, head=100, vision=50, merger=8, merged=4)
WORK = {"language, learn": 10, "vision, learn": 16, "predicted": 3}


def test_learning_everything_costs_six_flops_a_weight_and_token() -> None:
    text, vision = 1000 * 10 + 100 * 3, 50 * 16 + 8 * 4
    assert learn_flops(SIZE, WORK, lora=False, freeze_vision=False) == 6 * (text + vision)
    assert learn_flops(SIZE, WORK, lora=False, freeze_vision=True) == 6 * text + 2 * vision
    assert learn_flops(SIZE, WORK, lora=True, freeze_vision=True) == 4 * text + 2 * vision


def test_a_reference_costs_two_more() -> None:
    scored = {**WORK, "language, reference": 10, "vision, reference": 16}
    how = {"lora": False, "freeze_vision": False}
    assert learn_flops(SIZE, scored, **how) == pytest.approx(learn_flops(SIZE, WORK, **how) * 4 / 3)


def test_the_meter_counts_by_phase_and_forgets_what_is_taken() -> None:
    meter, layer = Meter(), nn.Linear(3, 2)
    meter.watch(layer, lambda kwargs: "rows", lambda args, kwargs: len(args[0]))
    layer(torch.zeros(5, 3))
    meter.timed("outer", lambda: layer(torch.zeros(2, 3)))()
    seconds, work = meter.take()
    assert work == {"rows": 7} and set(seconds) == {"rows", "outer"}
    assert meter.take() == ({}, {})


# Parameters of the released checkpoints, from their safetensors indices.
@pytest.mark.parametrize(
    ("size", "count"), [("qwen2.5-vl-3b", 3_754_622_976), ("qwen2.5-vl-7b", 8_292_166_656)]
)
def test_released_sizes_have_the_released_number_of_weights(size: str, count: int) -> None:
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(random_config(size))
    assert sum(p.numel() for p in model.parameters()) == count


def test_a_random_checkpoint_loads_and_enlarges_images(tmp_path: Path) -> None:
    save_random(tmp_path, "tiny", 16, torch.device("cpu"))
    builder = PromptBuilder(tmp_path)
    assert builder.config.text_config.vocab_size == SIZES["tiny"]["text"]["vocab_size"]
    assert max(builder.stop_ids + builder.banned_ids) < len(builder.tokenizer)
    size = json.loads((tmp_path / "preprocessor_config.json").read_text())["size"]
    assert size["shortest_edge"] == 16 * 28 * 28


def test_an_unknown_size_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"qwen2\.5-vl-7b"):
        random_config("70b")
