"""Stands in for SGLang's kernel package, which needs CUDA or AMX.

Without either, SGLang computes the models of the tests with torch alone; it only imports names
from here, and none is called.
"""

from collections.abc import Callable
from typing import NoReturn

import torch


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(f"sgl_kernel.{name} is not there on a CPU")

    return missing


# Looked up as torch.ops.sgl_kernel.* when SGLang imports its Qwen models.
for _op in (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
):
    torch.library.define(f"sgl_kernel::{_op}", "(Tensor a, Tensor b) -> Tensor")
