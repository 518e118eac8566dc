"""Weights on their way into an SGLang engine: named, checked, in buckets of bounded size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from speciarl.rollout.engine import WeightsRefused
from speciarl.rollout.sglang_launch import Host
from speciarl.rollout.sglang_scope import house_sharing
from speciarl.rollout.weights import Manifest

_RENAMED = (("model.language_model.", "model."), ("model.visual.", "visual."))
Named = tuple[str, Tensor]
Span = Callable[..., AbstractContextManager[Any]]


def no_span(*given: Any, **args: Any) -> AbstractContextManager[Any]:
    """Reports to nobody."""
    return nullcontext()


def checkpoint_name(name: str) -> str:
    """The name in a released checkpoint, which SGLang loads by, of a weight of transformers."""
    for ours, theirs in _RENAMED:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def manifest_of(folder: Path) -> Manifest:
    """The weights that a push of the model in `folder` must bring; nothing of it is loaded."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    return Manifest(model)


def buckets(named_tensors: Iterable[Named], limit: int) -> Iterator[list[Named]]:
    """The tensors in order, in lists of at most `limit` bytes; a larger tensor is alone in one."""
    bucket: list[Named] = []
    size = 0
    for name, tensor in named_tensors:
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


@dataclass
class Pushed:
    """What a push took. The rest of `seconds` went into producing the tensors."""

    bytes: int = 0
    buckets: int = 0
    seconds: float = 0.0
    send_seconds: float = 0.0


class Push:
    """Sends weights to a running engine, one payload for each of its tensor-parallel ranks.

    Besides the policy and the engine's own copy, a push takes the memory of two buckets: the
    tensors as they were produced, and their flat copy, which the engine reads in place. The copy is
    never written to again, and CUDA's memory shared between processes is not reused before the
    reader has let go of it.

    Args:
        host: the engine.
        manifest: what a complete push brings.
        ranks: tensor-parallel ranks of the engine.
        bucket_bytes: most bytes in a bucket.
    """

    def __init__(self, host: Host, manifest: Manifest, ranks: int, bucket_bytes: int) -> None:
        self._host, self._manifest = host, manifest
        self._ranks, self._bucket_bytes = ranks, bucket_bytes

    def send(self, named_tensors: Iterable[Named], version: int, span: Span = no_span) -> Pushed:
        """All weights; completions that begin afterwards come stamped with `version`.

        named_tensors: names and shapes of transformers' model, of tied ones either. span: gets each
        bucket's stretch of time. Raises WeightsRefused for an incomplete or unfitting push and for
        what the engine would not take, EngineDead.
        """
        pushed, start = Pushed(), time.perf_counter()
        with self._session():
            for bucket in buckets(self._manifest.checked(named_tensors), self._bucket_bytes):
                began, size = time.perf_counter(), sum(tensor.nbytes for _, tensor in bucket)
                with span("push", "bucket", bytes=size):
                    self._send_bucket(bucket, str(version))
                pushed.bytes += size
                pushed.buckets += 1
                pushed.send_seconds += time.perf_counter() - began
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()  # the last buckets, which the engine has let go of
        pushed.seconds = time.perf_counter() - start
        return pushed

    @contextmanager
    def _session(self) -> Iterator[None]:
        """What newer versions want around updates; closed after a failed push too."""
        if not self._host.features.weight_sessions:
            yield
            return
        self._answer("begin_weight_update", lambda engine: engine.begin_weight_update())
        try:
            yield
        finally:
            self._answer("end_weight_update", lambda engine: engine.end_weight_update())

    def _send_bucket(self, bucket: list[Named], version: str) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
        from sglang.srt.utils import MultiprocessingSerializer
        from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

        if bucket[0][1].is_cuda:
            monkey_patch_torch_reductions()  # devices by identity, not by their local number
        else:
            house_sharing()
        flat = FlattenedTensorBucket(
            named_tensors=[(checkpoint_name(name), tensor) for name, tensor in bucket]
        )
        bucket.clear()
        payload = {
            "flattened_tensor": flat.get_flattened_tensor(),
            "metadata": flat.get_metadata(),
        }
        request = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=[
                MultiprocessingSerializer.serialize(payload) for _ in range(self._ranks)
            ],
            load_format="flattened_bucket",
            flush_cache=True,  # keys and values of older weights; costs nothing
            weight_version=version,
        )
        self._answer(
            "update_weights_from_tensor",
            lambda engine: engine.loop.run_until_complete(
                engine.tokenizer_manager.update_weights_from_tensor(request, None)
            ),
        )

    def _answer(self, call: str, job: Any) -> None:
        """SGLang answers (False, message) where others would raise."""
        success, message = self._host.run(job)
        if not success:
            raise WeightsRefused(f"SGLang refused {call}: {message}")
