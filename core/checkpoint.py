"""Atomic checkpoints without pickle, for any number of ranks.

    checkpoints/step-40/shard-00001-model-00001-of-00001.safetensors   one or more per rank
                        state.json                                     everything but tensors
                        manifest.json                                  shapes, sizes, checksums

Invariants: a folder named `step-N` is complete and on disk; `step-N.tmp` is work in progress or on
its way out and never counts; a save that fails leaves every earlier checkpoint as it was; an error
on one rank is raised on every rank, so that none is left waiting in a collective.
"""

import json
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from speciarl.core.collective import rank, together
from speciarl.core.shards import (
    STATE,
    CheckpointError,
    read_json,
    read_shards,
    seal_own_shards,
    sync_folder,
    verify,
    write_manifest,
    write_shards,
)

__all__ = ["CheckpointError", "CheckpointStore", "check_shared"]

STEP_FOLDER = re.compile(r"step-(\d+)")

T = TypeVar("T")


class CheckpointStore:
    """The checkpoints of one run, in `run_dir/checkpoints`.

    `save`, `load`, `latest` and `previous` are collective: where torch.distributed is initialised
    every rank calls them (its group needs a CPU backend: "gloo" or "cpu:gloo,cuda:nccl").
    Without a process group they serve the one process.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        """`keep`: how many checkpoints stay, the newest ones; 0 keeps all.

        Raises ValueError for a negative `keep`. Touches nothing on disk.
        """
        if keep < 0:
            raise ValueError(f"checkpoints to keep: {keep} is negative; 0 keeps all")
        self.folder = Path(run_dir) / "checkpoints"
        self.keep = keep

    def path(self, step: int) -> Path:
        """The folder of a complete checkpoint of `step`."""
        return self.folder / f"step-{step}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending, as this process sees them."""
        if not self.folder.is_dir():
            return []
        found = (STEP_FOLDER.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match.group(1)) for match in found if match)

    def latest(self) -> int | None:
        """The newest step, as rank 0 sees it; None without a checkpoint. Collective."""
        steps = _together(self.steps, f"cannot list {self.folder}")[0]
        return steps[-1] if steps else None

    def previous(self, step: int) -> int | None:
        """The newest step before `step`, as rank 0 sees it, or None. Collective."""
        steps = _together(self.steps, f"cannot list {self.folder}")[0]
        return max((earlier for earlier in steps if earlier < step), default=None)

    def save(
        self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
    ) -> Path:
        """Write `step-N`, remove what `keep` no longer covers, return the folder. Collective.

        `tensors`: by name, DTensors of any sharding or plain tensors that are equal on every rank
        (one rank writes them); any shape (0-dim too), dtype and device; stored bit for bit.
        `state`: JSON values with string keys; rank 0's is stored.
        A checkpoint of the same step is replaced. Checkpoints of later steps come from a
        continuation that was given up (the run went back to an earlier step): they are renamed to
        `step-M.aside`, which no method reads.
        Raises CheckpointError on every rank if any rank fails, with the file and the reason.
        """
        partial = self.folder / f"step-{step}.tmp"
        failed = f"checkpoint {self.path(step)} was not saved"
        try:
            encoded = _together(lambda: self._prepare(partial, tensors, state), failed)[0]
            write_shards(partial, tensors, failed)
            sealed = _together(lambda: seal_own_shards(partial), failed)

            def commit() -> None:
                if rank() == 0:
                    write_manifest(partial, step, tensors, encoded, sealed)
                    self._publish(step, partial)

            _together(commit, failed)
        except CheckpointError:
            if rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)  # room on the disk for what comes next
            raise
        return self.path(step)

    def load(self, step: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Fill `tensors` in place from `step-N` and return its state. Collective.

        `tensors` may be sharded in any way over any number of ranks, and may be a part of what is
        stored (the model alone). Every file's checksum is verified before a tensor is touched.
        Raises CheckpointError on every rank for a missing, truncated or altered file, a missing
        tensor, another shape or dtype. Never falls back to another checkpoint.
        """
        folder = self.path(step)
        failed = (
            f"checkpoint {folder} cannot be used "
            "(delete it or pass --set train.resume=previous to go on from the one before)"
        )
        _together(lambda: verify(folder, step, tensors), failed)
        read_shards(folder, tensors, failed)
        return read_json(folder / STATE)

    def _prepare(
        self, partial: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
    ) -> bytes:
        """Check the values; on rank 0 make an empty folder and return the encoded state."""
        for name, value in tensors.items():
            # Without this the writer reports success and leaves a file that cannot be read.
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name} is {type(value).__name__}, not a tensor: put it in state")
        if rank() != 0:
            return b""
        encoded = json.dumps(state, indent=1).encode()
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob("step-*.tmp"):
            shutil.rmtree(stale)
        partial.mkdir()
        return encoded

    def _publish(self, step: int, partial: Path) -> None:
        """Rename the finished folder, then remove what it makes superfluous."""
        for later in (other for other in self.steps() if other >= step):
            aside = self.folder / f"step-{later}.aside"
            shutil.rmtree(aside, ignore_errors=True)
            self.path(later).rename(aside)
        partial.rename(self.path(step))
        sync_folder(self.folder)
        shutil.rmtree(self.folder / f"step-{step}.aside", ignore_errors=True)
        for old in self.steps()[: -self.keep] if self.keep else []:
            # Renamed first: a kill half way through the removal must not leave half a `step-N`.
            leaving = self.path(old).rename(self.folder / f"step-{old}.tmp")
            shutil.rmtree(leaving, ignore_errors=True)


def check_shared(run_dir: Path) -> None:
    """Raise CheckpointError unless `run_dir` is one folder on all nodes. Collective.

    Rank 0 makes the folder where it is missing, and leaves a random token there for all to find.
    """
    run_dir = Path(run_dir)
    failed = f"the run folder {run_dir} must be one folder that all nodes share"

    def leave_token() -> str:
        token = f".shared-{secrets.token_hex(16)}"
        if rank() == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / token).touch()
        return token

    def find_token() -> None:
        if not (run_dir / token).exists():
            raise FileNotFoundError(
                f"host {socket.gethostname()} does not see the file that rank 0 left there; "
                "set train.out to a folder on a file system that every node mounts at the same path"
            )

    token = _together(leave_token, failed)[0]
    try:
        _together(find_token, failed)
    finally:
        if rank() == 0:
            (run_dir / token).unlink(missing_ok=True)


def _together(action: Callable[[], T], failed: str) -> list[T]:
    return together(action, failed, CheckpointError)
