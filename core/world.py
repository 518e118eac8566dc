"""The process group: who am I, who else is there, and how do we agree on the host."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process of the job. `device` is its own GPU, or the CPU.

    Host-side exchange (lengths, codes, lists of bad images) goes over gloo; gradients and
    parameters go over the mesh's own backend (NCCL on GPUs).
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's `value` (small host data), in rank order, on every rank."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value, group=_host_group())
        return out

    def part(self, items: Sequence[T], together: int = 1) -> Sequence[T]:
        """This rank's part of the items, every n-th: of `together` neighbouring ranks, which work
        as one, the first has theirs and the others nothing."""
        if self.rank % together:
            return items[:0]
        return items[self.rank // together :: self.size // together]

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.size > 1:
            dist.barrier(group=_host_group())

    def first(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0, then on the others, which find its result on disk.

        An exception on rank 0 is raised on every rank, so that nobody waits for ever.
        """
        problem: BaseException | None = None
        result: list[T] = []
        if self.main:
            try:
                result.append(work())
            except Exception as error:
                problem = error
        problem = next((p for p in self.gather(problem) if p is not None), None)
        if problem is not None:
            raise problem
        return result[0] if result else work()


_HOST_GROUP: list[dist.ProcessGroup] = []


def _host_group() -> dist.ProcessGroup:
    """A gloo group for host objects: NCCL would need them on the GPU."""
    if not _HOST_GROUP:
        _HOST_GROUP.append(dist.new_group(backend="gloo"))
    return _HOST_GROUP[0]


def free_port() -> int:
    """A TCP port nobody listens on at the moment of the call."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def init_world(threads: int = 0, device: str = "auto") -> World:
    """Joins the process group that torchrun describes, or makes one of a single process.

    Args:
        threads: torch threads of this process; 0 shares the cores between the local ranks
            (torchrun leaves one thread only where it starts several processes).
        device: "auto" (CUDA if there), "cpu" or "cuda".

    Raises:
        RuntimeError: CUDA asked for but absent, or more local ranks than GPUs.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())
    local_rank = int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and torch.cuda.device_count() < local_size:
        raise RuntimeError(
            f"{local_size} processes on this machine but {torch.cuda.device_count()} GPUs: "
            "start one process per GPU (torchrun --nproc-per-node gpu), or set train.device=cpu"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or max(1, (cores or 1) // local_size))
    if cuda:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    kind = "cuda" if cuda else "cpu"
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        local_rank=local_rank,
        local_size=local_size,
        device=torch.device(kind, local_rank) if cuda else torch.device("cpu"),
        mesh=init_device_mesh(kind, (dist.get_world_size(),)),
    )


def leave_world() -> None:
    """Leaves the process group, if this process is in one."""
    if dist.is_initialized():
        gc.collect()  # sharded modules that outlive the group can abort the interpreter's exit
        _HOST_GROUP.clear()
        dist.destroy_process_group()
