"""An SGLang engine in this process: started under torchrun, watched while it works, ended clean.

`Host` gives the engine a thread with an event loop of its own, so that SGLang installs no signal
handlers, calls can be given up when the engine dies, and any thread may call. The engine's own
processes, and no others, end with it; they end with this process too, however that ends.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import logging
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

import torch

from speciarl.rollout import sglang_checks as checks
from speciarl.rollout.engine import EngineDead
from speciarl.rollout.sglang_child import QUEUE, Child, Family, last_error, shared_memory
from speciarl.rollout.sglang_scope import QUITS, TURNS, PrivateFolder, unchanged
from speciarl.rollout.sglang_settings import Launch

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_POLL = 0.2  # seconds between looks at the engine's processes
_GRACE = 5.0  # seconds for the end of a process that reported its failure
_END = object()
_KINDS: set[str] = set()  # of devices that this process's engines run on


class Host:
    """A running engine.

    Engines of one process share SGLang's global state, so calls of different engines wait for each
    other (`sglang_scope.Turns`), and all sit on one kind of device.
    """

    def __init__(self, launch: Launch) -> None:
        """Starts the engine: 15-45 s, and more for large weights.

        To be called in the main thread of a script whose entry is under `if __name__ ==
        "__main__"`, before the trainer takes memory on the device: the engine takes a share of
        what is free.
        Raises ImportError (SGLang or its memory saver is missing or unsupported), ValueError (model
        class, port, argument, kind of device), MemoryError (weights larger than their share),
        RuntimeError (not the main thread, or an unguarded script), EngineDead (it could not start,
        with the reason).
        """
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise RuntimeError(
                "an SGLang engine is being started while a process that it spawned imports the "
                'main script: put the script\'s work under if __name__ == "__main__":'
            )
        if _KINDS - {launch.device}:
            raise ValueError(
                f"device {launch.device!r}: another SGLang engine of this process is on "
                f"{', '.join(_KINDS)}, and SGLang serves one kind of device per process"
            )
        QUITS.enter()
        self._launch = launch
        self._dead = ""
        self._closed = False
        self._owner = os.getpid()
        self._engine: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="sglang", daemon=True)
        self._jobs: queue.SimpleQueue[tuple[Callable[[Any], Any], Future[Any]] | None]
        self._jobs = queue.SimpleQueue()
        self._context: dict[str, Any] = {}
        self._tracked: list[Path] = []
        self._folder = PrivateFolder()
        self._family = Family()
        atexit.register(self.close)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def run(self, job: Callable[[Any], T], timeout: float | None = None) -> T:
        """What `job(engine)` returns; `engine` is the sglang.Engine, `job` runs in its thread.

        Jobs of several threads wait for each other. Raises what the job raises, and EngineDead
        when the engine dies, or when `timeout` seconds pass: a late engine is ended.
        """
        return self._await(self._submit(job), timeout)

    def stream(self, produce: Callable[[Any], AsyncIterator[T]]) -> Iterator[T]:
        """What `produce(engine)` yields, as it comes. Raises as `run` does.

        An abandoned iterator (closed, or collected) aborts the requests under way.
        """
        items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        task: list[asyncio.Task[Any]] = []

        async def pump(engine: Any) -> None:
            if (current := asyncio.current_task()) is not None:
                task.append(current)
            try:
                async for item in produce(engine):
                    items.put(item)
            except asyncio.CancelledError:
                engine.tokenizer_manager.abort_request(abort_all=True)
            finally:
                items.put(_END)

        quits = QUITS.count
        future = self._submit(lambda engine: engine.loop.run_until_complete(pump(engine)))
        try:
            while (item := self._next(items, future, quits)) is not _END:
                yield item
            self._await(future, None)
        finally:
            if task and not future.done() and not self._dead:
                self._loop.call_soon_threadsafe(task[0].cancel)
                with suppress(EngineDead):
                    self._await(future, _GRACE)

    def check(self) -> None:
        """Raises EngineDead, with the reason, when the engine cannot go on."""
        self._require_alive(QUITS.count)

    @property
    def pids(self) -> list[int]:
        """The engine's processes that are alive."""
        return self._family.alive()

    def close(self) -> None:
        """Ends the engine's processes and removes what it left. Safe to call twice."""
        if self._closed or os.getpid() != self._owner:  # a forked process has a copy
            return
        self._closed = True
        atexit.unregister(self.close)
        self._end("it was closed")
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
        else:
            self._loop.close()
        self._family.kill()  # what a start that was given up may have started since
        for file in shared_memory(self._folder.path, queues=True):
            file.unlink(missing_ok=True)
            if file in self._tracked or file.name.startswith(QUEUE):
                resource_tracker.unregister(f"/{file.name}", "shared_memory")
        self._folder.remove()
        gc.collect()  # the engine is full of cycles that hold pipes
        QUITS.leave()

    def _start(self) -> None:
        launch = self._launch
        rank, local = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
        with unchanged(launch.variables, self._folder.path):
            self.features = checks.find()
            _KINDS.add(launch.device)
            launch.check(self.features)
            arguments = launch.server_arguments(rank, local)
            self._thread.start()
            try:
                self.run(lambda _: self._build(arguments), launch.start_timeout)
            except (EngineDead, RuntimeError) as error:
                reason = last_error(self._folder.path) or self._dead or str(error)
                raise EngineDead(
                    f"the SGLang engine for {str(launch.model)!r} did not start: {reason}"
                ) from error

    def _build(self, arguments: dict[str, object]) -> None:
        """In the engine's thread."""
        from sglang.srt.entrypoints.engine import Engine

        host, folder, family = self, self._folder.path, self._family

        class RankEngine(Engine):
            run_scheduler_process_func = Child(Engine.run_scheduler_process_func, folder, family)
            run_detokenizer_process_func = Child(
                Engine.run_detokenizer_process_func, folder, family
            )

            def shutdown(self) -> None:  # SGLang's own ends all children of this process
                host.close()

        if self._launch.device == "cuda":
            torch.cuda.set_device(int(str(arguments["base_gpu_id"])))
        self._engine = RankEngine.__new__(RankEngine)
        self._engine.__init__(**arguments)
        if self._engine.loop is not self._loop:  # 0.5.17 makes one of its own
            self._loop.close()
            self._loop = self._engine.loop
        self._engine.tokenizer_manager._subprocess_watchdog.stop()  # `_require_alive` does it
        for file in shared_memory(folder, queues=False):
            # The tracker of multiprocessing removes it even after a kill of this process.
            resource_tracker.register(f"/{file.name}", "shared_memory")
            self._tracked.append(file)

    def _serve(self) -> None:
        """The engine's thread: one job after another. Its end would end the engine's processes."""
        asyncio.set_event_loop(self._loop)
        while (item := self._jobs.get()) is not None:
            job, future = item
            try:
                with TURNS.take(self._context):
                    result = job(self._engine)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del item, job, future
        if self._engine is not None:
            atexit.unregister(self._engine.shutdown)
        _release(self._engine, self._loop)
        self._engine = None

    def _submit(self, job: Callable[[Any], T]) -> Future[T]:
        self._require_alive(QUITS.count)
        future: Future[T] = Future()
        self._jobs.put((job, future))
        return future

    def _await(self, future: Future[T], timeout: float | None) -> T:
        quits, start = QUITS.count, time.monotonic()
        while not wait([future], _POLL).done:
            self._require_alive(quits)
            if timeout is not None and time.monotonic() > start + timeout:
                self._end(f"it did not answer within {timeout:g} s")
                self._require_alive(quits)
        if future.exception() is not None:
            self._require_alive(quits)
        return future.result()

    def _next(self, items: queue.SimpleQueue[Any], future: Future[Any], quits: int) -> Any:
        """The next item, or _END when there will be none."""
        while True:
            try:
                return items.get(timeout=_POLL)
            except queue.Empty:
                if future.done() and items.empty():
                    return _END
                self._require_alive(quits)

    def _require_alive(self, quits: int) -> None:
        """quits: `QUITS.count` when the work began."""
        ended = self._family.ended()
        if not ended and QUITS.count > quits:
            ended = self._family.ended(_GRACE)
            self._end("one of its processes reported a failure")
        if ended:
            self._end(f"its process {ended[0]} ended with code {ended[1]}")
        if self._dead:
            raise EngineDead(f"the SGLang engine for {str(self._launch.model)!r}: {self._dead}")

    def _end(self, reason: str) -> None:
        """No job from now on: the processes are killed, and a job under way is given up."""
        if self._dead:
            return
        error = last_error(self._folder.path)
        self._dead = f"{reason}: {error}" if error else reason
        if not self._closed:
            _LOG.error("SGLang engine for %s: %s", self._launch.model, self._dead)
        self._family.kill()
        if self._loop.is_running():
            self._loop.call_soon_threadsafe(self._loop.stop)


def _release(engine: Any, loop: asyncio.AbstractEventLoop) -> None:
    """Closes what an engine holds in this process: tasks, sockets, threads, workers."""
    import zmq

    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    manager = getattr(engine, "tokenizer_manager", None)
    held = [value for owner in (engine, manager) if owner for value in vars(owner).values()]
    for context in {socket.context for socket in held if isinstance(socket, zmq.Socket)}:
        context.destroy(linger=0)
    processor = getattr(manager, "mm_processor", None)
    if processor is not None and hasattr(processor, "shutdown"):  # newer versions
        processor.shutdown()
    for executor in [] if processor is None else vars(processor).values():
        if isinstance(executor, Executor):
            executor.shutdown(cancel_futures=True)
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    asyncio.set_event_loop(None)
