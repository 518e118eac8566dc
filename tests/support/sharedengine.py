"""Two processes that share one engine. sharedengine.py MODEL PICTURES OUT

Writes what each rank saw as OUT/<rank>.json.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from speciarl.core.policy import ModelConfig, Policy
from speciarl.core.world import free_port, init_world, leave_world
from speciarl.rollout.engine import Request, RolloutEngine, Sampling
from speciarl.rollout.native import NativeEngine
from speciarl.rollout.tensor_group import TensorGroup
from tiny import Tiny, perturb

RANKS = 2
SAMPLING = Sampling(max_new_tokens=5)


def requests(tiny: Tiny) -> list[Request]:
    return [Request(prompt, key, (0, 1)) for key, prompt in tiny.prompts.items()]


def engine_of(tiny: Tiny) -> NativeEngine:
    return NativeEngine(tiny.model(), stop_ids=[], banned_ids=tiny.banned)


def samples(engine: RolloutEngine, tiny: Tiny) -> list[list[int]]:
    groups = sorted(engine.generate(requests(tiny), SAMPLING), key=lambda g: g.group_key)
    return [rollout.ids for group in groups for rollout in group.rollouts]


def error(work: Callable[[], object]) -> str:
    """What `work` raises, in words."""
    try:
        work()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return ""


def fail() -> Any:
    raise MemoryError("no room for the engine")


def rank_of_two(rank: int, port: int, model: str, pictures: str, out: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    world = init_world(threads=1, device="cpu")
    tiny = Tiny(Path(model), Path(pictures))
    found: dict[str, Any] = {"start": error(lambda: TensorGroup(RANKS, fail))}
    found["divides"] = error(lambda: TensorGroup(3, fail))
    shared = TensorGroup(RANKS, lambda: engine_of(tiny))
    found |= {"is engine": isinstance(shared, RolloutEngine), "ranks": shared.ranks}
    found["part"] = list(world.part(range(5), shared.ranks))

    policy = Policy(ModelConfig(path=model), world, tiny.banned, reference=False)
    perturb(policy.parameters(), 0.1)
    whole = dict(policy.named_weights())  # collective
    broken = [(name, weight[:1]) for name, weight in whole.items()]
    found["refused"] = error(lambda: shared.load_weights(broken, version=1))
    shared.load_weights(policy.named_weights(), version=2)
    found["asked"] = error(lambda: list(shared.generate(requests(tiny), SAMPLING)))
    found["nothing"] = error(lambda: list(shared.generate([], SAMPLING)))
    if rank == 0:  # the other calls are the owner's alone
        found["samples"] = samples(shared, tiny)
        shared.sleep()
        shared.wake()
        found["again"] = samples(shared, tiny)
        torch.save(whole, Path(out, "weights.pt"))
    shared.check()
    shared.close()
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    leave_world()


if __name__ == "__main__":
    arguments = (free_port(), *sys.argv[1:4])
    torch.multiprocessing.start_processes(rank_of_two, arguments, RANKS, start_method="spawn")
