"""Kernels compiled ahead of time: every one passes the gates, and the gates can fail.

This is a part of what `python bench/compile_report.py` does in about two minutes.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

REPORT = Path(__file__).parents[2] / "bench" / "compile_report.py"
# All modes of the default tiles; every small kernel, and on 8.0 the fullest of each.
PART = "|".join(
    [
        r"^expsum 128x256( store)?( entropy)?( banned)? sm_90",
        r"^(anchor|reduce|entropy|sequence_means|finish store banned) sm",
        r"^row_(sums bf16( store entropy( banned)?)?|table bf16 banned|entropy bf16) sm_90",
        r"^row_sums fp32 store entropy banned sm",
        r"^policy_loss (grpo no KL|(cispo|gspo) k3 importance entropy) sm_90",
        r"^policy_loss gspo k3 importance entropy sm_80",
        r"^best_of_n speciarl N=\d+ sm_90",
        r"^best_of_n speciarl-ordered N=16 sm_80",
    ]
)
GATES = r"""
import json
from dataclasses import replace
from speciarl.bench import compile_report as report
from speciarl.bench.compile_cases import cases, expsum_case
from speciarl.kernels.expsum_tiles import Tiles

def gates(**changes):
    tiles = Tiles(128, 256, 64, **{"warps": 8, "stages": 3, **changes})
    case = expsum_case("changed", tiles, store=False, entropy=False, banned=False)
    return report.failures(case, report.compiled(case, 90))

wait, product = "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "HGMMA.64x256x16.F32.BF16 R24 ;"
known = cases()
print(json.dumps({
    "few warps": gates(warps=4),
    "many stages": gates(stages=5),
    "two programs": gates(per_sm=2),
    "apart": report._serialised("\n".join([product, product, wait, ".L_x_1:", product])),
    "in turn": report._serialised("\n".join([product, wait, product, wait, product])),
    "missing": report.missing(case for case in known if "finish" not in case.full_name),
    "all": report.missing(known),
}))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process where Triton compiles instead of interpreting."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-P", *arguments], env=environment, capture_output=True, text=True
    )


@pytest.mark.timeout(600)
def test_every_kernel_passes_the_gates(tmp_path: Path) -> None:
    done = run(str(REPORT), "--match", PART, "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failures"] == []
    found = {row["name"]: row for row in report["kernels"]}
    products = [row for name, row in found.items() if name.startswith("expsum")]
    assert len(products) == 8 and all(row["matrix"] >= 4 and row["loads"] for row in products)
    assert all((row["stores"] > 0) == ("store" in row["name"]) for row in products)
    kernels = {re.split(r" ", name)[0] for name in found}
    assert kernels >= {"anchor", "reduce", "finish", "entropy", "row_sums", "policy_loss"}


@pytest.mark.timeout(300)
def test_the_gates_can_fail() -> None:
    done = run("-c", GATES)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert any("local memory" in gate for gate in found["few warps"])
    assert any("shared memory, above 232448" in gate for gate in found["many stages"])
    assert any("for 2 programs" in gate for gate in found["two programs"])
    assert any("registers for 512 threads" in gate for gate in found["two programs"])
    assert (found["apart"], found["in turn"]) == (0, 2)
    assert (found["missing"], found["all"]) == (["finish_kernel"], [])


def test_the_interpreter_is_refused() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-P", str(REPORT)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "unset it" in done.stderr
