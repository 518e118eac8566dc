"""What surrounds an SGLang engine, without SGLang: checks, and a process left as it was."""

import asyncio
import logging
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import engineparts
from speciarl.rollout import sglang_checks as checks
from speciarl.rollout.sglang_child import Child, Family, last_error, shared_memory
from speciarl.rollout.sglang_scope import PrivateFolder, QuitGuard, Turns, unchanged
from speciarl.rollout.sglang_settings import Launch, parse_arguments

NOW = checks.Features("0.5.21", frozenset({"tp_size", "port", "quantization"}), True, False)


@pytest.mark.parametrize("version", ["0.5.17", "0.5.17.post1", "0.5.21", "0.5.23", "0.5.30rc1"])
def test_versions_that_are_tried(version: str) -> None:
    checks.require_supported(version)


@pytest.mark.parametrize("version", ["0.4.10", "0.5.9", "0.5.16", "0.6.0", "1.0.0", "main"])
def test_other_versions_are_refused_by_name(version: str) -> None:
    with pytest.raises(
        ImportError, match=rf"SGLang {version} is not supported.*0\.5\.17.*0\.5\.21"
    ):
        checks.require_supported(version)


@pytest.mark.skipif(find_spec("sglang") is not None, reason="SGLang is installed")
def test_missing_sglang_names_the_extra() -> None:
    with pytest.raises(ImportError, match=r"pip install 'speciarl\[sglang\]'"):
        checks.find()


def test_what_an_engine_cannot_be_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no server argument 'tp_sise': did you mean tp_size"):
        checks.require_arguments(["port", "tp_sise"], NOW)
    checks.require_arguments(["port"], NOW)
    with pytest.raises(ImportError, match="torch_memory_saver"):
        checks.require_memory_saver(NOW)
    checks.require_shareable_memory({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"})
    with pytest.raises(ValueError, match="PYTORCH_ALLOC_CONF=.*: unset it"):
        checks.require_shareable_memory({"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 20))
    with pytest.raises(MemoryError, match=r"take 0\.0 GiB.*memory = 0\.5.*raise memory"):
        checks.require_room(tmp_path, 1, 2 << 20, 0.5)
    checks.require_room(tmp_path, 2, 2 << 20, 0.5)
    assert "memory saver" in NOW.describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device = 'tpu'"),
        ({"memory": 1.0}, "memory = 1.0"),
        ({"arguments": {"tp_size": 0}}, "tp_size = 0"),
        ({"arguments": {"tp_size": "two"}}, "tp_size = 'two'"),
        ({"arguments": {"port": -5}}, "port = -5"),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Launch(**{"model": Path("x"), "device": "cpu", **options})


def test_ports_and_seeds_are_each_ranks_own() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launch = Launch(Path("x"), "cpu", seed=7, arguments={"port": port})
        with pytest.raises(ValueError, match=rf"port = {port} cannot be used"):
            launch.server_arguments(rank=4, local=0)
        given = launch.server_arguments(rank=5, local=1)
        assert given["port"] == given["nccl_port"] == port + 1
        assert given["random_seed"] == 12
    with pytest.raises(ValueError, match="port = 70000 cannot be used"):
        Launch(Path("x"), "cpu", arguments={"port": 70_000}).server_arguments(0, 0)
    free = {Launch(Path("x"), "cpu").server_arguments(0, 0)["port"] for _ in range(3)}
    assert len(free) > 1


def test_sleeping_is_for_gpus() -> None:
    kept = Launch(Path("x"), "cpu", sleeps=True, keep_weights=True).server_arguments(0, 0)
    assert not kept["enable_memory_saver"]
    assert kept["attention_backend"] == "torch_native"
    own = Launch(Path("x"), "cpu", arguments={"attention_backend": "other"}, memory=0.3)
    given = own.server_arguments(0, 0)
    assert (given["attention_backend"], given["mem_fraction_static"]) == ("other", 0.3)


def test_server_arguments_as_text() -> None:
    words = 'tp_size=2 quantization=fp8  enable_x=true chunked=0.5 override={"a":1} none=null'
    assert parse_arguments(words) == {
        "tp_size": 2, "quantization": "fp8", "enable_x": True, "chunked": 0.5,
        "override": {"a": 1}, "none": None,
    }  # fmt: skip
    assert parse_arguments("") == {}
    with pytest.raises(ValueError, match="'tp_size' is not of the form key=value"):
        parse_arguments("tp_size 2")


def test_a_process_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")

    def state() -> list[Any]:
        root = logging.getLogger()
        return [
            dict(os.environ), multiprocessing.get_start_method(allow_none=True),
            asyncio.get_event_loop_policy(), root.handlers[:], root.level, tempfile.tempdir,
            random.getstate(),
        ]  # fmt: skip

    before = state()
    with pytest.raises(KeyError), unchanged({"SGLANG_X": "1"}, "/nowhere"):
        assert "RANK" not in os.environ
        assert "TORCHELASTIC_RUN_ID" not in os.environ
        assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
        assert (os.environ["SGLANG_X"], os.environ["NCCL_DEBUG"]) == ("1", "WARN")
        assert tempfile.gettempdir() == "/nowhere"
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"
        multiprocessing.set_start_method("spawn", force=True)
        asyncio.set_event_loop_policy(asyncio.DefaultEventLoopPolicy())
        logging.basicConfig(level=logging.DEBUG, force=True)
        random.random()
        raise KeyError
    assert state() == before


def test_a_failing_process_does_not_quit_this_one() -> None:
    guard = QuitGuard()
    before = signal.getsignal(signal.SIGQUIT)
    guard.enter()
    guard.enter()
    os.kill(os.getpid(), signal.SIGQUIT)
    guard.leave()
    os.kill(os.getpid(), signal.SIGQUIT)
    assert guard.count == 2
    guard.leave()
    assert signal.getsignal(signal.SIGQUIT) is before
    errors: list[str] = []

    def elsewhere() -> None:
        try:
            guard.enter()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert errors == ["an SGLang engine must be started from the main thread"]


def test_an_engine_that_never_finishes_does_not_block_another() -> None:
    turns = Turns(patience=0.1)
    with turns.take({}):
        with pytest.raises(RuntimeError, match="another SGLang engine .* at work for 0.1 s"):
            with turns.take({}):
                pass
    with turns.take({}):
        pass


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path


def test_folders_of_killed_processes_are_removed(temporary: Path) -> None:
    own = PrivateFolder()
    code = (
        "import os, tempfile; tempfile.tempdir = os.environ['WHERE']\n"
        "from speciarl.rollout.sglang_scope import PrivateFolder\n"
        "folder = PrivateFolder(); print(folder.path, flush=True); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "WHERE": str(temporary)},
        capture_output=True,
        text=True,
    )
    left = Path(killed.stdout.strip())
    assert killed.returncode == -9
    assert left.is_dir()
    other = PrivateFolder()
    assert not left.exists()
    assert Path(own.path).is_dir()
    own.remove()
    other.remove()
    assert list(temporary.iterdir()) == []


def test_an_engines_processes_are_known_and_ended_alone(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    family = Family()
    other = spawn.Process(target=time.sleep, args=(60,))
    child = Child(engineparts.fail, str(tmp_path), family)
    other.start()
    assert family.alive() == []
    ports = engineparts.Ports()
    quick = spawn.Process(target=child, args=(ports, 0.0))
    slow = spawn.Process(target=child, args=(ports, 60.0))
    quick.start()
    slow.start()
    assert sorted(family.alive()) == sorted([quick.pid, slow.pid])
    assert family.ended(timeout=60) == (quick.pid, 0)
    assert last_error(str(tmp_path)) == "ValueError: the reason"
    family.kill()
    assert family.alive() == []
    assert slow.exitcode == -9
    assert other.is_alive()
    other.kill()
    other.join()
    assert list(tmp_path.glob(f"{quick.pid}.abcdef.shared"))
    assert shared_memory(str(tmp_path), queues=True) == []


def test_processes_die_with_their_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, os, time\n"
        "from speciarl.rollout.sglang_child import Child, Family\n"
        "if __name__ == '__main__':\n"
        "    family = Family()\n"
        f"    child = Child(time.sleep, {str(tmp_path)!r}, family)\n"
        "    multiprocessing.get_context('spawn').Process(target=child, args=(60,)).start()\n"
        "    print(*family.alive(), flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    parent = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert parent.returncode == -9
    pid = int(parent.stdout)
    end = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
