"""What SGLang does to the process that starts it, undone: the trainer stays as it was.

SGLang writes to the environment (when imported and when started), replaces the handlers of the
root logger, the start method of multiprocessing and the policy of event loops, and would take the
ranks and ports that torchrun describes for its own.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import multiprocessing
import multiprocessing.util
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from speciarl.rollout.sglang_child import shared_memory

# Of torchrun: an engine that sees them waits for other ranks for ever. The allocator's settings:
# expandable segments go with neither the memory saver nor CUDA IPC. Triton's interpreter is ours.
_HIDDEN = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"),
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TRITON_INTERPRET"),
}
_HIDDEN_PREFIX = "TORCHELASTIC_"
_FOLDERS = "speciarl-sglang-"


@contextmanager
def unchanged(environment: Mapping[str, str], sockets: str | None = None) -> Iterator[None]:
    """Inside, SGLang may be imported and started; afterwards the process is as it was.

    environment: variables to set inside. sockets: the folder for the temporary files made inside.
    """
    before = dict(os.environ)
    method = multiprocessing.get_start_method(allow_none=True)
    policy = asyncio.get_event_loop_policy()
    root, folder = logging.getLogger(), tempfile.tempdir
    handlers, level = root.handlers[:], root.level
    draws = random.getstate()
    for name in before:
        if name in _HIDDEN or name.startswith(_HIDDEN_PREFIX):
            del os.environ[name]
    os.environ.update(environment)
    root.handlers[:] = []  # SGLang closes those that it finds
    root.setLevel(logging.ERROR)
    tempfile.tempdir = sockets or folder
    try:
        yield
    finally:
        tempfile.tempdir = folder
        root.handlers[:] = handlers
        root.setLevel(level)
        random.setstate(draws)
        asyncio.set_event_loop_policy(policy)
        multiprocessing.set_start_method(method, force=True)
        os.environ.clear()
        os.environ.update(before)


class PrivateFolder:
    """A folder for an engine's sockets and notes. Those of killed processes are removed, too.

    A lock on a file in it tells that its owner lives, in whatever container that is.
    """

    def __init__(self) -> None:
        root = tempfile.gettempdir()
        for old in Path(root).glob(f"{_FOLDERS}*/lease"):
            _remove_if_left(old)
        self.path = tempfile.mkdtemp(prefix=_FOLDERS, dir=root)
        draft = Path(self.path, "draft")
        self._lease = os.open(draft, os.O_CREAT | os.O_RDWR)
        fcntl.flock(self._lease, fcntl.LOCK_EX)
        draft.rename(draft.with_name("lease"))

    def remove(self) -> None:
        """The folder and all in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lease)


@cache
def house_sharing() -> None:
    """Gives multiprocessing's socket for shared memory a private folder, for the life of this
    process: its own would stay on the disk after a kill."""
    folder = PrivateFolder()
    # After multiprocessing's own, which remove the socket.
    multiprocessing.util.Finalize(None, folder.remove, exitpriority=-1000)
    before, tempfile.tempdir = tempfile.tempdir, folder.path
    try:
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = before


def _remove_if_left(lease: Path) -> None:
    try:
        descriptor = os.open(lease, os.O_RDWR)
    except OSError:  # gone meanwhile, or another user's
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for file in shared_memory(str(lease.parent), queues=False):
            file.unlink(missing_ok=True)
        shutil.rmtree(lease.parent, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


class QuitGuard:
    """Keeps this process alive on SIGQUIT, which an engine's process sends when it fails.

    Shared by all engines of the process. `count` tells how often it came. While an engine runs,
    Ctrl-\\ too counts as the failure of an engine.
    """

    def __init__(self) -> None:
        self.count = 0
        self._users = 0
        self._before: Any = None

    def enter(self) -> None:
        """Raises RuntimeError outside the main thread, where Python sets no handlers."""
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("an SGLang engine must be started from the main thread")
        if self._users == 0:
            self._before = signal.signal(signal.SIGQUIT, self._handle)
        self._users += 1

    def leave(self) -> None:
        """Sets the handler of before, when no engine is left."""
        self._users -= 1
        if self._users == 0 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGQUIT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


QUITS = QuitGuard()


class Turns:
    """Engines of one process work in turn: SGLang's newer versions (0.5.18 on) keep one
    configuration per process, that of the engine started last, and each engine needs its own.
    """

    def __init__(self, patience: float = 300.0) -> None:
        """patience: seconds to wait for another engine's work."""
        self._lock = threading.Lock()
        self._patience = patience

    @contextmanager
    def take(self, own: dict[str, Any]) -> Iterator[None]:
        """Inside, the process has the configuration in `own`, which is brought up to date after.

        An empty `own` stands for an engine that is being started. Raises RuntimeError when another
        engine does not finish.
        """
        if not self._lock.acquire(timeout=self._patience):
            raise RuntimeError(
                f"another SGLang engine of this process has been at work for {self._patience:g} s; "
                "engines of one process work in turn"
            )
        try:
            kept: Any = sys.modules.get("sglang.srt.runtime_context")
            if own and hasattr(kept, "restore_context"):
                kept.restore_context(own)
            yield
            kept = sys.modules.get("sglang.srt.runtime_context")
            if hasattr(kept, "snapshot_context"):
                own.update(kept.snapshot_context())
        finally:
            self._lock.release()


TURNS = Turns()
