"""The benches of the small kernels run anywhere, and what they share times calls in turn."""

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from rewardcases import SPECS, by_hand, groups_of
from speciarl.bench import best_of_n, comparison, gpu, gpu_speed, policy_loss, timing
from speciarl.bench.head_measure import Case
from speciarl.kernels.loss import KINDS
from speciarl.kernels.reward import RewardSpec
from speciarl.kernels.routes import rows_within


def run(command: click.Command, tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / "figures" / "out.json"
    result = CliRunner().invoke(command, [*words, "--device", "cpu", "--json", str(out)])
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    assert record["environment"]["device"] == "cpu" and "torch" in record["environment"]
    for title, providers in record["results"].items():
        assert title in result.output
        assert all(name in result.output for name in providers)
    return record["results"]


@pytest.mark.parametrize("kind", KINDS)
def test_policy_loss(kind: str, tmp_path: Path) -> None:
    words = ("--kind", kind, "--sizes", "256,128", "--providers", "trl,reference,eager")
    results = run(policy_loss.main, tmp_path, *words, "--repeats", "1")
    assert list(results) == [f"{kind} T=256", f"{kind} T=128"]
    for providers in results.values():
        assert list(providers) == ["trl", "reference", "eager"]
        for figures in providers.values():
            assert figures["call_us"]["low"] <= figures["call_us"]["median"]
            assert max(figures["error"].values()) < 1e-5  # all of them compute the same


def test_best_of_n(tmp_path: Path) -> None:
    words = ("--sizes", "5x3", "--rule", "speciarl", "--providers", "reference,host")
    (providers,) = run(best_of_n.main, tmp_path, *words).values()
    assert list(providers) == ["reference", "host"]
    assert all(figures["error"]["|d adv|"] < 1e-6 for figures in providers.values())


@pytest.mark.parametrize("spec", SPECS[:4])
def test_the_exact_advantages(spec: RewardSpec) -> None:
    codes = groups_of(4)
    wanted = np.array([by_hand(row, spec, True)[1] for row in codes.tolist()])
    np.testing.assert_allclose(
        best_of_n.exact_advantages(codes, spec), wanted, rtol=1e-7, atol=1e-12
    )


@pytest.mark.parametrize(
    ("command", "words", "named"),
    [
        (policy_loss.main, ("--sizes", "100"), "multiples of 128"),
        (policy_loss.main, ("--providers", "vllm"), "reference"),
        (policy_loss.main, ("--device", "tpu"), "tpu"),
        (best_of_n.main, ("--sizes", "256"), "GxN"),
        (best_of_n.main, ("--sizes", "0x4"), "at least one group"),
    ],
)
def test_bad_options_are_named(command: click.Command, words: tuple[str, ...], named: str) -> None:
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 2 and named in result.output


def test_a_peer_that_fails_costs_only_its_own_figures() -> None:
    def broken() -> None:
        raise RuntimeError("no kernel image")

    calls = {"good": lambda: 1.0, "bad": broken}
    results = comparison.measure(calls, lambda value: {"error": value}, "cpu", 2)
    assert results["bad"] == {"failed": "RuntimeError: no kernel image"}
    assert results["good"]["error"] == {"error": 1.0} and "call_us" in results["good"]


def test_calls_take_turns_and_keep_to_the_budget() -> None:
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    taken = timing.interleaved(calls, "cpu", repeats=3, at_least=0.0)
    assert seen == list("abababab") and [len(v) for v in taken.values()] == [3, 3]
    slow = {"slow": lambda: time.sleep(0.02)}
    assert len(timing.interleaved(slow, "cpu", repeats=50, budget=0.05)["slow"]) <= 3
    assert timing.interleaved({}, "cpu") == {}
    assert timing.spread([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}


def test_a_swept_chunk_is_the_one_that_runs() -> None:
    for vocab, _ in gpu_speed.HEADS.values():
        for rows in gpu_speed.CHUNKS:
            assert rows_within(gpu_speed.asked_for(rows, "expsum", vocab), vocab) == rows
            assert gpu_speed.asked_for(rows, "rows", vocab) == rows


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_a_forward_pass_asks_for_no_gradient(backward: bool, frozen: bool) -> None:
    inputs = Case(3, 5, 4, frozen, backward, "cpu", "float32").inputs()
    assert inputs.hidden.requires_grad == backward
    assert inputs.matrix.requires_grad == (backward and not frozen)


def test_the_gpu_command_runs_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: str) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(gpu.gpu_checks, "bit_equal", broken)
    words = ["--device", "cpu", "--out", str(tmp_path), "--minutes", "1"]
    found = CliRunner().invoke(
        gpu.main, [*words, "--sections", "bit_equal,accuracy,no_waiting,chunks"]
    )
    assert found.exit_code == 1 and "failed: bit_equal" in found.output
    (file,) = tmp_path.glob("cpu-*.json")
    sections = json.loads(file.read_text())["sections"]
    assert sections["bit_equal"]["failed"] == "RuntimeError: on purpose"
    assert sections["accuracy"] and all(one["ok"] for one in sections["accuracy"].values())
    assert "## chunks" in file.with_suffix(".md").read_text()
    unknown = CliRunner().invoke(gpu.main, [*words, "--sections", "heads"])
    assert unknown.exit_code == 2 and "'heads' is no section" in unknown.output
