"""The files inside one checkpoint folder: written, read back, verified.

Format: torch.distributed.checkpoint with HuggingFaceStorageWriter(save_distributed=True): each rank
writes its part of the tensors as safetensors, and no pickled `.metadata` exists to be read.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor

from speciarl.core.collective import by_rank, rank, world_size

MANIFEST, STATE = "manifest.json", "state.json"
FORMAT = 1
FILE_BYTES = 2 << 30  # the writer serialises a whole file in host memory, so files are bounded
READ_BYTES = 1 << 20
HASH_THREADS = 4


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the file and what to do."""


@dataclass(frozen=True)
class Shard:
    """One safetensors file as its writer read it back; `elements` counts them by tensor name."""

    bytes: int
    digest: str
    elements: dict[str, int]


def write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], failed: str) -> None:
    """Write and sync every rank's files. Collective. Raises CheckpointError on every rank."""
    writer = dcp.HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=_file_of_each(tensors), save_distributed=True
    )
    writer.fs = _NamingFileSystem()
    with _dcp_errors(failed):
        dcp.save(_writable(tensors), storage_writer=writer, no_dist=not dist.is_initialized())


def read_shards(folder: Path, tensors: Mapping[str, torch.Tensor], failed: str) -> None:
    """Fill `tensors` in place, resharding. Collective. Raises CheckpointError on every rank."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    # Detached views share the memory, so filling them fills leaves that require gradients too.
    views: dict[str, Any] = {name: value.detach() for name, value in tensors.items()}
    with _dcp_errors(failed):
        dcp.load(views, storage_reader=reader, no_dist=not dist.is_initialized())


def seal_own_shards(folder: Path) -> dict[str, Shard]:
    """Read back this rank's files, by name. Raises where a header does not fit its file."""
    return {path.name: _seal(path) for path in folder.glob(f"shard-{rank() + 1:05d}-*.safetensors")}


def write_manifest(
    folder: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: bytes,
    sealed: Sequence[Mapping[str, Shard]],
) -> None:
    """Write and sync state.json and manifest.json; raises OSError where elements are missing.

    `sealed`: what `seal_own_shards` returned on each rank.
    """
    shards = {name: shard for own in sealed for name, shard in own.items()}
    for name, value in tensors.items():
        stored = sum(shard.elements.get(name, 0) for shard in shards.values())
        if stored != value.numel():
            raise OSError(f"{name}: {stored} of {value.numel()} elements are in the files")
    _write_synced(folder / STATE, state)
    files = {name: {"bytes": s.bytes, "blake2b": s.digest} for name, s in shards.items()}
    files[STATE] = {"bytes": len(state), "blake2b": _digest(folder / STATE)}
    described = {name: _describe(value) for name, value in tensors.items()}
    manifest = {"format": FORMAT, "step": step, "files": files, "tensors": described}
    _write_synced(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    sync_folder(folder)


def verify(folder: Path, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check the manifest against `tensors`, and this rank's share of the files against it.

    Raises OSError or ValueError that names the file or the tensor.
    """
    manifest = read_json(folder / MANIFEST)
    if (manifest.get("format"), manifest.get("step")) != (FORMAT, step):
        raise ValueError(f"{folder / MANIFEST} is not of step {step} in format {FORMAT}")
    for name, value in tensors.items():
        stored, wanted = manifest["tensors"].get(name), _describe(value)
        if stored is None:
            raise ValueError(f"tensor {name} is not in the checkpoint")
        if stored != wanted:
            raise ValueError(f"tensor {name}: {stored} in the checkpoint, {wanted} in the model")
    share = sorted(manifest["files"])[rank() :: world_size()]
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        list(threads.map(lambda name: _verify_file(folder / name, manifest["files"][name]), share))


def read_json(path: Path) -> dict[str, Any]:
    """Raises OSError, or ValueError naming the file where it is not a JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is corrupted: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is corrupted: not a JSON object")
    return value


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (new files, renames) durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _NamingFileSystem(FileSystem):
    """DCP's file access, with the path in the error of a failing write."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[Any, None, None]:
        try:
            with super().create_stream(path, mode) as stream:
                yield stream
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def _dcp_errors(failed: str) -> Generator[None, None, None]:
    """DCP tells every rank of any rank's failure; say it in one line instead of tracebacks."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # saving without a process group is intended
            yield
    except CheckpointException as error:
        causes = {at: cause for at, (cause, _) in error.failures.items()}
        for cause in causes.values():
            if not isinstance(cause, Exception):
                raise cause from None  # an interrupt is not a failed checkpoint
        reasons = {at: str(cause) or repr(cause) for at, cause in causes.items()}
        raise CheckpointError(f"{failed}: {by_rank(reasons)}") from error


def _writable(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Detached, contiguous, and no two in the same host memory, as safetensors wants them."""
    out: dict[str, Any] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().contiguous()
        local = value.to_local() if isinstance(value, DTensor) else value
        storage = local.untyped_storage().data_ptr()
        out[name] = value.clone() if local.is_cpu and storage in seen else value
        seen.add(storage)
    return out


def _file_of_each(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """File number from 1 for every tensor, so that a rank's part of a file is about FILE_BYTES."""
    files: dict[str, int] = {}
    filled, number = 0.0, 1
    for name, value in tensors.items():
        size = value.numel() * value.element_size() / world_size()
        if filled and filled + size > FILE_BYTES:
            filled, number = 0.0, number + 1
        files[name], filled = number, filled + size
    return files


def _seal(path: Path) -> Shard:
    elements = {}
    with safe_open(str(path), framework="pt") as file:  # checks the header against the file's size
        for name in file.keys():  # noqa: SIM118  (not a dict)
            elements[name] = torch.Size(file.get_slice(name).get_shape()).numel()
    return Shard(bytes=path.stat().st_size, digest=_digest(path), elements=elements)


def _verify_file(path: Path, record: Mapping[str, Any]) -> None:
    size = path.stat().st_size
    if size != record["bytes"]:
        raise ValueError(f"{path} has {size} bytes where {record['bytes']} were written")
    if _digest(path) != record["blake2b"]:
        raise ValueError(f"{path} is corrupted: its checksum differs from when it was written")


def _describe(value: torch.Tensor) -> dict[str, Any]:
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def _digest(path: Path) -> str:
    checksum = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            checksum.update(block)
    return checksum.hexdigest()


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
