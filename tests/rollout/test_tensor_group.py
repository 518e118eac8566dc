"""Two ranks that share one engine: what the owner does, and what the other one sees of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sharedengine
from speciarl.core.world import World
from tiny import Tiny


@pytest.fixture(scope="module")
def out(toy_model_dir: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shared")
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    support = [str(Path(sharedengine.__file__).parent), *filter(None, [os.getenv("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, sharedengine.__file__, str(toy_model_dir), str(pictures), str(out)],
        env=environment | {"PYTHONPATH": os.pathsep.join(support)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def ranks(out: Path) -> list[dict[str, Any]]:
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def test_the_owner_samples_what_the_sharded_policy_sent(
    out: Path, ranks: list[dict[str, Any]], toy_model_dir: Path, pictures: Path
) -> None:
    tiny = Tiny(toy_model_dir, pictures)
    engine = sharedengine.engine_of(tiny)
    before = sharedengine.samples(engine, tiny)
    engine.load_weights(torch.load(out / "weights.pt").items(), version=1)
    wanted = sharedengine.samples(engine, tiny)
    assert ranks[0]["samples"] == ranks[0]["again"] == wanted != before
    assert ranks[0]["asked"] == ""


def test_the_other_rank_has_no_prompts_and_may_ask_nothing(ranks: list[dict[str, Any]]) -> None:
    assert [rank["part"] for rank in ranks] == [[0, 1, 2, 3, 4], []]
    assert [rank["nothing"] for rank in ranks] == ["", ""]
    assert "in rank 0: ask there" in ranks[1]["asked"]
    assert all(rank["is engine"] and rank["ranks"] == 2 for rank in ranks)


def test_what_fails_on_the_owner_fails_on_both(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["start"] == "MemoryError: no room for the engine"
        assert rank["refused"].startswith("WeightsRefused: weight ")
        assert rank["divides"].startswith("ValueError: rollout.tp = 3 does not divide the 2")


def test_parts_of_ranks_that_share_engines(world: World) -> None:
    from dataclasses import replace

    for size, together in ((1, 1), (4, 1), (4, 2), (6, 3), (4, 4)):
        parts = [replace(world, rank=r, size=size).part(range(11), together) for r in range(size)]
        assert sorted(item for part in parts for item in part) == list(range(11))
        assert all(bool(part) == (rank % together == 0) for rank, part in enumerate(parts))
        lengths = [len(part) for part in parts if part]
        assert max(lengths) - min(lengths) <= 1
