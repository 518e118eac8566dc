"""1, 2 and 4 processes on the same stored completions: one loss, one gradient, the plain model's.

Fillers, uneven micro-batches, every way of cutting the work, KL, LoRA and tied weights are among
the cases of support/learning.py. All of it is one test, because starting processes is what costs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import learning
from learning import CASES, Case, by_hand
from speciarl.kernels.loss import STATS
from tiny import Tiny, apart

SIZES = (1, 2, 4)
TOLERANCE = 1e-5


def run(models: Path, pictures: Path, out: Path) -> None:
    """Learns every case in process groups of SIZES; results are written to `out`."""
    words = [models, pictures, out, *SIZES]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    support = [str(Path(learning.__file__).parent), *filter(None, [os.getenv("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(support)
    done = subprocess.run(
        [sys.executable, learning.__file__, *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def part(found: dict[str, Tensor], front: str) -> dict[str, Tensor]:
    return {k.removeprefix(front): v for k, v in found.items() if k.startswith(front)}


def check(name: str, case: Case, tiny: Tiny, results: dict[int, dict[str, Tensor]]) -> None:
    """Compares a case's results with the hand-written ones, and with each other."""
    one = results[1]
    start = part(one, "start ")
    loss, scale, gradient = by_hand(case, tiny, start)
    for size, found in results.items():
        where = f"{name}, {size} processes"
        same = part(found, "start ")
        assert all(torch.equal(same[key], start[key]) for key in start), where
        distances = apart(part(found, "grad "), gradient)
        worst = max(distances, key=lambda key: distances[key])
        assert distances[worst] < TOLERANCE, f"{where}: {worst} is {distances[worst]:.1e} off"
        if len(found["norms"]) == 1:
            off = abs(found["stats"][STATS.index("loss")] - loss) / scale
            assert off < TOLERANCE, f"{where}: the loss is {off:.1e} off"
        assert not found["skipped"].any(), where
        torch.testing.assert_close(found["stats"], one["stats"], rtol=1e-4, atol=1e-4, msg=where)
        torch.testing.assert_close(found["norms"], one["norms"], rtol=1e-4, atol=0, msg=where)
        for key, value in part(one, "end ").items():
            torch.testing.assert_close(found[f"end {key}"], value, rtol=0, atol=1e-5, msg=where)
        assert any(not torch.equal(found[f"end {key}"], start[key]) for key in start), where


@pytest.mark.timeout(300)
def test_any_number_of_processes_learns_as_one_unsharded_model(
    model_dirs: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    run(model_dirs["toy"].parent, pictures, tmp_path)
    results = {
        name: {size: load_file(tmp_path / f"{name}.{size}.safetensors") for size in SIZES}
        for name in CASES
    }
    for name, case in CASES.items():
        check(name, case, Tiny(model_dirs[case.kind], pictures), results[name])

    rows, one_row = (part(results[name][4], "grad ") for name in ("a row each", "one row"))
    assert max(apart(rows, one_row).values()) < TOLERANCE
    clips = [STATS.index("clipped_low"), STATS.index("clipped_high")]
    for size in SIZES:
        assert results["two updates"][size]["stats"][clips].sum() > 0
