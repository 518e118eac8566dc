"""What runs in an engine's processes before SGLang does: they never outlive the trainer."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

from tqdm import tqdm

_PR_SET_PDEATHSIG = 1
_SHARED_NOTE = ".shared"
SHARED = Path("/dev/shm")
QUEUE = "sgl_shm_"  # segments that multiprocessing made, and its tracker knows
_PATIENCE = 30.0  # seconds for the end of a killed process that holds a GPU


class Family:
    """The processes that one engine started, and no others."""

    def __init__(self) -> None:
        self._started: list[Any] = []

    def add(self, popen: Any) -> None:
        """A process that is about to start, by multiprocessing's handle of it."""
        self._started.append(popen)

    def alive(self) -> list[int]:
        """Process ids of those that run."""
        return [popen.pid for popen in self._running() if popen.poll() is None]

    def ended(self, timeout: float = 0.0) -> tuple[int, int] | None:
        """Process id and exit code of one that ended, waiting `timeout` s for it; None if none."""
        running = self._running()
        if timeout:
            closed = wait([popen.sentinel for popen in running], timeout)
            for popen in running:
                if popen.sentinel in closed:
                    popen.wait(_PATIENCE)  # its pipes close shortly before it ends
        codes = ((popen.pid, popen.poll()) for popen in running)
        return next(((pid, code) for pid, code in codes if code is not None), None)

    def kill(self) -> None:
        """Ends them and all that they started; returns when they are gone."""
        import psutil

        doomed = []
        for pid in self.alive():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                doomed += [process, *process.children(recursive=True)]
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        running = self._running()
        for popen in running:
            popen.wait()
        self._started = [popen for popen in self._started if popen not in running]
        del running[:]
        psutil.wait_procs(doomed, timeout=_PATIENCE)
        multiprocessing.active_children()  # forgets those that ended, and closes their pipes

    def _running(self) -> list[Any]:
        """Those whose start is complete."""
        return [popen for popen in self._started if hasattr(popen, "sentinel")]


class Child:
    """Runs `function` of SGLang in a process tied to the one that started it.

    notes: a folder; what SGLang logs as an error is written there too, so that the trainer can say
    why an engine died, and what shared memory it has. family: learns of the process.
    """

    def __init__(self, function: Callable[..., None], notes: str, family: Family) -> None:
        self._function, self._notes, self._family = function, notes, family

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled on the way into a new process, and only then."""
        self._family.add(get_spawning_popen())
        return Child, (self._function, self._notes, Family())

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        tie_to_parent()
        tqdm.set_lock(threading.RLock())  # its own is a semaphore that a kill leaves behind
        for argument in (*args, *kwargs.values()):
            if instance := getattr(argument, "instance_id", ""):
                Path(self._notes, f"{os.getpid()}.{instance}{_SHARED_NOTE}").touch()
        note = logging.FileHandler(Path(self._notes, f"{os.getpid()}.log"), delay=True)
        note.setLevel(logging.ERROR)
        logging.getLogger("sglang").addHandler(note)
        self._function(*args, **kwargs)


def tie_to_parent() -> None:
    """From now on this process dies with its parent, however that ends; at once if it has ended.

    SGLang asks for the same, but only after some seconds of imports.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():
        os._exit(1)


def shared_memory(notes: str, *, queues: bool) -> list[Path]:
    """Segments of shared memory that the engine of `notes` uses, or left when it was killed.

    queues: also those that it finds by process ids, which are its own only until others get them.
    """
    found: list[Path] = []
    for note in Path(notes).glob(f"*{_SHARED_NOTE}"):
        pid, instance, _ = note.name.split(".")
        found += SHARED.glob(f"sglang_loads_*{instance}*")
        found += SHARED.glob(f"{QUEUE}*_{pid}_*") if queues else ()
    return sorted(set(found))


def last_error(notes: str) -> str:
    """The last line that an engine's process logged as an error; "" if none did."""
    files = sorted(Path(notes).glob("*.log"), key=lambda file: file.stat().st_mtime)
    lines = [line for file in files for line in file.read_text(errors="replace").splitlines()]
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
