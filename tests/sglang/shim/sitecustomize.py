"""Lets torchvision's CUDA wheel be imported beside a CPU build of torch, which lacks its ops."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType


class _DeclareOps(importlib.abc.MetaPathFinder):
    """Declares, when torchvision is first imported, the two ops that it registers shapes for."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                for op in ("nms", "qnms"):
                    torch.library.define(
                        f"torchvision::{op}",
                        "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                    )
        return None


sys.meta_path.insert(0, _DeclareOps())
