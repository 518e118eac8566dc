"""Checkpoints across processes: full disks, kills, and any number of ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from speciarl.core.checkpoint import CheckpointError, CheckpointStore
store = CheckpointStore(Path(sys.argv[1]), keep=1)
store.save(1, {"w": torch.ones(100)}, {"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for tensors, state in (({"w": torch.ones(9000)}, {}), ({"w": torch.ones(100)}, {"s": "x" * 30000})):
    try:
        store.save(2, tensors, state)
    except CheckpointError as error:
        print(error)
print([path.name for path in store.folder.iterdir()])
print(store.load(store.latest(), {"w": torch.zeros(100)}))
"""


def run_script(script: str, folder: Path) -> str:
    path = folder / "script.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, str(path), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    """The file size limit of the process stands in for the end of the disk."""
    shard, state, left, loaded = run_script(FULL_DISK, tmp_path).splitlines()
    assert "step-2 was not saved" in shard and "File too large" in shard
    assert "shard-00001-model-00001-of-00001.safetensors" in shard
    assert "step-2 was not saved" in state and "File too large" in state
    assert left == "['step-1']" and loaded == "{'step': 1}"


KILLS = """
import itertools, os, random, signal, sys, time, torch
from pathlib import Path
from speciarl.core.checkpoint import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]), keep=2)
torch.set_num_threads(1)
store.save(0, {"w": torch.zeros(50_000)}, {"step": 0})
random.seed(0)
for _ in range(8):
    newest = store.latest()
    child = os.fork()
    if child == 0:
        for step in itertools.count(newest + 1):
            store.save(step, {"w": torch.full((50_000,), float(step))}, {"step": step})
    while store.latest() == newest:
        time.sleep(0.001)
    time.sleep(random.uniform(0.0, 0.04))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    target = {"w": torch.zeros(50_000)}
    assert store.latest() > newest
    for step in store.steps():
        assert store.load(step, target) == {"step": step} and target["w"].eq(step).all()
print(store.latest())
"""


def test_every_folder_left_by_a_kill_is_complete(tmp_path: Path) -> None:
    assert int(run_script(KILLS, tmp_path)) >= 8


# One interpreter forks the ranks, so that torch, and what fully_shard needs, is imported once.
RANKS = """
import json, os, resource, sys, torch
import torch._dynamo, torch._inductor.config
import torch.distributed as dist, torch.multiprocessing as mp
from pathlib import Path
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from speciarl.core.checkpoint import CheckpointError, CheckpointStore, check_shared

OUT = Path(sys.argv[1])

def trained(seed, shard):
    # 7x3, 3x2, 2x1: uneven on 2 ranks, and empty on some of 4
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in ((7, 3), (3, 2), (2, 1))))
    model.register_parameter("frozen", torch.nn.Parameter(torch.randn(6, 8)))
    if shard:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p) * 0.25
    optimizer.step()
    tensors = {f"model.{n}": p for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        tensors |= {f"optim.{n}.{k}": v for k, v in optimizer.state[p].items()}
    torch.manual_seed(seed + 1)
    wide = torch.randn(4, 10)
    if shard:
        mesh = next(model.parameters()).device_mesh
        wide = distribute_tensor(wide, mesh, [Shard(1)])
    return tensors | {"wide": wide, "plain": torch.randn(5) if seed else torch.arange(5.0)}

def whole(value):
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach()

def join(rank, size, tag):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{OUT}/rendezvous-{tag}", rank=rank,
                            world_size=size)

def save(rank, size):
    join(rank, size, f"save-{size}")
    CheckpointStore(OUT / str(size), keep=0).save(1, trained(0, True), {"ranks": size})
    dist.destroy_process_group()

def load(rank, size, reference):
    join(rank, size, f"load-{size}")
    results = {}
    for saved in (1, 2, 4):
        store = CheckpointStore(OUT / str(saved), keep=0)
        target = trained(1, True)
        state = store.load(store.latest(), target)
        different = [n for n, v in target.items() if not torch.equal(whole(v), reference[n])]
        results[saved] = [state, different]
    if rank == 0:
        (OUT / f"loaded-{size}.json").write_text(json.dumps(results))
    dist.destroy_process_group()

def failures(rank, size):
    join(rank, size, "failures")
    store = CheckpointStore(OUT / "failures", keep=1)
    store.save(1, trained(0, True), {"step": 1})
    messages = []
    def attempt(action):
        try:
            action()
            messages.append("no error")
        except CheckpointError as error:
            messages.append(str(error))
    check_shared(OUT / "failures")
    attempt(lambda: check_shared(OUT / f"own-{rank if rank == 1 else 0}"))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, limit[1]))
    attempt(lambda: store.save(2, trained(0, True), {"step": 2}))
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    attempt(lambda: store.save(3, {"w": torch.ones(2) if rank == 0 else 3}, {}))
    target = trained(1, True)
    messages.append(str(store.load(store.latest(), target)))
    dist.barrier()
    if rank == 0:
        next(store.path(1).glob("shard-00002-*")).unlink()
    dist.barrier()
    attempt(lambda: store.load(1, target))
    messages.append(sorted(p.name for p in store.folder.iterdir()))
    (OUT / f"failures-{rank}.json").write_text(json.dumps(messages))
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.set_num_threads(1)
    spawn = lambda work, size, *more: mp.start_processes(
        work, args=(size, *more), nprocs=size, start_method="fork")
    for size in (1, 2, 4):
        spawn(save, size)
    reference = {n: v.detach().clone() for n, v in trained(0, False).items()}
    for size in (1, 2, 4):
        spawn(load, size, reference)
    spawn(failures, 2)
    plain = {}
    for saved in (1, 2, 4):
        target = trained(1, False)
        state = CheckpointStore(OUT / str(saved), keep=0).load(1, target)
        plain[saved] = [state, [n for n in target if not torch.equal(target[n], reference[n])]]
    (OUT / "loaded-plain.json").write_text(json.dumps(plain))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_script(RANKS, folder)
    return folder


@pytest.mark.parametrize("loading", ["1", "2", "4", "plain"])
def test_any_number_of_ranks_loads_what_any_number_saved(ranks: Path, loading: str) -> None:
    """FSDP2 shards of uneven and empty size, AdamW state, Shard(1), a replicated plain tensor."""
    results = json.loads((ranks / f"loaded-{loading}.json").read_text())
    assert results == {str(n): [{"ranks": n}, []] for n in (1, 2, 4)}


def test_each_rank_writes_its_own_file(ranks: Path) -> None:
    for size in (1, 2, 4):
        assert len(list((ranks / str(size) / "checkpoints/step-1").glob("shard-*"))) == size


def test_a_failure_on_one_rank_is_raised_on_all(ranks: Path) -> None:
    first, second = (json.loads((ranks / f"failures-{r}.json").read_text()) for r in (0, 1))
    shared_0, full_0, kind_0, loaded_0, missing_0, left_0 = first
    shared_1, full_1, kind_1, loaded_1, missing_1, left_1 = second
    for shared in (shared_0, shared_1):
        assert "rank 1: host" in shared and "does not see the file" in shared
    for full in (full_0, full_1):
        assert "rank 1" in full and "File too large" in full and "shard-00002" in full
    for kind in (kind_0, kind_1):
        assert "rank 1: w is int, not a tensor" in kind
    assert loaded_0 == loaded_1 == "{'step': 1}"
    for missing in (missing_0, missing_1):
        assert "No such file" in missing and "shard-00002" in missing
    assert left_0 == left_1 == ["step-1"]
    assert [path.name for path in (ranks / "failures").iterdir()] == ["checkpoints"]
