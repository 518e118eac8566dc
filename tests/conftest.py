"""Fixtures that several test modules share: tiny checkpoints, pictures, a world of one process."""

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Triton's interpreter runs the kernels on CPU tensors; it must be chosen before triton is imported.
os.environ["TRITON_INTERPRET"] = "1"
# Models are tiny here, and tests run side by side: more threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Helpers that tests import and that processes started by tests import too.
SUPPORT = Path(__file__).parent / "support"
sys.path.insert(0, str(SUPPORT))

if find_spec("triton"):
    import interpreter

    interpreter.patch()

settings.register_profile("same-every-time", derandomize=True, deadline=None)
settings.load_profile("same-every-time")


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random checkpoints: "toy" and "tied" (Qwen2.5-VL), "qwen3" (Qwen3-VL)."""
    from tiny import KINDS, save_tiny

    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def toy_model_dir(model_dirs: dict[str, Path]) -> Path:
    """A random toy checkpoint, tokenizer and image processor included."""
    return model_dirs["toy"]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with noise pictures of several sizes; `tiny.examples_in` names them."""
    from tiny import examples_in

    folder = tmp_path_factory.mktemp("pictures")
    examples_in(folder)
    return folder


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy world of two training images and one test image per species."""
    from speciarl.core.toyworld import WorldSpec, ensure_toyworld

    root = tmp_path_factory.mktemp("toyworld") / "root"
    return ensure_toyworld(root, WorldSpec(train=2, test=1, captions=1))


@pytest.fixture(scope="module")
def world() -> Iterator[object]:
    """A process group of one (`speciarl.core.world.World`), left when the module is done."""
    from speciarl.core.world import init_world, leave_world

    before = dict(os.environ)
    yield init_world(threads=1, device="cpu")
    leave_world()
    os.environ.clear()
    os.environ.update(before)
