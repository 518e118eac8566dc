"""A vocabulary cut between two processes gives the log-probs and gradients of the whole one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vocabranks
from headcases import in_double, off, oracle
from vocabranks import CASES

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What every process found, by case: both are started once."""
    out = tmp_path_factory.mktemp("ranks")
    support = [str(Path(vocabranks.__file__).parent), *filter(None, [os.getenv("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, vocabranks.__file__, str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(support)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_shards_are_the_whole(name: str, found: list[dict[str, dict[str, Tensor]]]) -> None:
    case, (one, two) = CASES[name], (results[name] for results in found)
    hidden, weight, targets = case.inputs()
    twins = in_double(hidden, weight)
    wanted = oracle(*twins, targets, case.temperature, list(case.banned))
    d_hidden, d_weight = torch.autograd.grad(wanted, twins, tuple(case.upstream().double()))
    exact = case.dtype == torch.float64
    for mine in (one, two):
        for key, right in zip(("logp", "entropy"), wanted, strict=True):
            torch.testing.assert_close(
                mine[key].double(), right.detach(), rtol=0, atol=1e-11 if exact else 2e-5
            )
    assert torch.equal(one["d hidden"], two["d hidden"])
    limit = 1e-11 if exact else 5e-6 if case.dtype == torch.float32 else 6e-3
    gradients = [(one["d hidden"], d_hidden)]
    if case.frozen:
        assert "d weight" not in one
    else:
        gradients.append((torch.cat((one["d weight"], two["d weight"])), d_weight))
    for value, right in gradients:
        assert value.dtype == case.dtype and value.shape == right.shape
        assert not right.any() or off(value, right) < limit
