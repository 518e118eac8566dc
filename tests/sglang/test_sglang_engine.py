"""Engines of the real SGLang in other processes: under torchrun, in pairs, and how they end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import enginerank
from enginerank import PAIRS, PORT
from speciarl.judge.causal import TransformersJudge
from speciarl.rollout.engine import EngineDead
from speciarl.rollout.sglang_child import SHARED
from speciarl.rollout.sglang_settings import Launch

psutil = pytest.importorskip("psutil", reason="SGLang is not installed: make test-sglang")
RANK = Path(enginerank.__file__)
QUIT = signal.getsignal(signal.SIGQUIT)  # a job in the background of a shell ignores it
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(mode: str, out: Path, *models: Path, launcher: tuple[str, ...] = ()) -> Any:
    """A started `enginerank.py`."""
    out.mkdir()
    command = [sys.executable, *launcher, str(RANK), mode, str(out), *map(str, models)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: Any, code: int = 0) -> str:
    output, _ = process.communicate(timeout=280)
    assert process.returncode == code, output[-4000:]
    return str(output)


def wanted(model: Path) -> list[list[float]]:
    verdicts = TransformersJudge(model, device="cpu").grade(PAIRS)
    return [list(verdict.probabilities or ()) for verdict in verdicts]


def near(found: list[list[float]], right: list[list[float]]) -> bool:
    return all(a == pytest.approx(b, abs=1e-5) for a, b in zip(found, right, strict=True))


def gone(engine: dict[str, Any], seconds: float = 15.0) -> bool:
    """Whether an engine's processes end and its shared memory is freed within `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        alive = [pid for pid in engine["pids"] if _runs(pid)]
        if not alive and not any(map(os.path.exists, engine["shared"])):
            return True
        time.sleep(0.2)
    return False


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_two_ranks_with_an_engine_each(judge_dirs: dict[str, Path], tmp_path: Path) -> None:
    model = judge_dirs["qwen2"]
    finish(run("grade", tmp_path / "out", model, launcher=TORCHRUN))
    ranks = [json.loads((tmp_path / "out" / f"{i}.json").read_text()) for i in range(2)]
    right = wanted(model)
    for rank in ranks:
        assert near(rank["scores"], right)
        assert rank["everybody"] == [other["scores"] for other in ranks]
        assert len(rank["pids"]) == 2
        assert rank["changed during"] == ["signals"]  # SIGQUIT is heard while an engine runs
        assert rank["changed after"] == []
        assert rank["other child lives"]
        assert rank["closed"]["socket"] > 4  # so the count of what is left could fail
        assert rank["left by another"] == {}
        assert gone(rank, 1.0)
        assert not os.path.exists(rank["folder"])
    assert near(ranks[0]["again"], right)
    assert ranks[0]["port"] != ranks[1]["port"]


def test_two_engines_in_one_process(judge_dirs: dict[str, Path], tmp_path: Path) -> None:
    models = judge_dirs["qwen2"], judge_dirs["llama"]
    finish(run("two", tmp_path / "out", *models))
    found = json.loads((tmp_path / "out" / "0.json").read_text())["scores"]
    right = [wanted(model) for model in models]
    for scores, which in zip(found, (0, 1, 0, 1, 0), strict=True):
        assert near(scores, right[which])


def test_an_exception_leaves_nothing(judge_dirs: dict[str, Path], tmp_path: Path) -> None:
    output = finish(run("raise", tmp_path / "out", judge_dirs["qwen2"]), code=1)
    assert "RuntimeError: on purpose" in output
    engine = json.loads((tmp_path / "out" / "0.json").read_text())
    assert engine["shared"]
    assert engine["port"] == PORT
    assert gone(engine)
    assert not os.path.exists(engine["folder"])


def test_a_kill_leaves_nothing(judge_dirs: dict[str, Path], tmp_path: Path) -> None:
    process = run("wait", tmp_path / "out", judge_dirs["qwen2"])
    file = tmp_path / "out" / "0.json"
    while not file.exists():
        assert process.poll() is None, process.stdout.read()[-4000:]
        time.sleep(0.2)
    engine = json.loads(file.read_text())
    assert all(map(_runs, engine["pids"]))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert gone(engine)
    assert os.path.exists(engine["folder"])  # a few names of sockets, until the next start

    from speciarl.rollout.sglang_scope import PrivateFolder

    PrivateFolder().remove()
    assert not os.path.exists(engine["folder"])


def test_a_start_that_fails_says_why(judge_dirs: dict[str, Path], tmp_path: Path) -> None:
    from speciarl.rollout.sglang_launch import Host

    broken = tmp_path / "broken"
    shutil.copytree(judge_dirs["qwen2"], broken)
    with (broken / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    shared = set(SHARED.glob("sgl*"))
    with pytest.raises(EngineDead, match=r"did not start: .*(safetensors|[Hh]eader|incomplete)"):
        Host(Launch(broken, "cpu"))
    left = {child.pid: child for child in psutil.Process().children(recursive=True)}
    assert [c.cmdline() for pid, c in left.items() if pid not in before and not _tracker(c)] == []
    assert set(SHARED.glob("sgl*")) == shared
    assert signal.getsignal(signal.SIGQUIT) is QUIT


def _tracker(process: Any) -> bool:
    """multiprocessing's own helper, one for the life of the parent."""
    return "resource_tracker" in " ".join(process.cmdline())


def test_what_no_engine_can_be_started_for(judge_dirs: dict[str, Path], tmp_path: Path) -> None:
    from speciarl.rollout.sglang_launch import Host

    unknown = tmp_path / "unknown"
    shutil.copytree(judge_dirs["qwen2"], unknown)
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(
        json.dumps({**config, "architectures": ["Qwen2ForCausalLn"]})
    )
    with pytest.raises(ValueError, match="no class for model.*nearest.*Qwen2ForCausalLM"):
        Host(Launch(unknown, "cpu"))
    with pytest.raises(ValueError, match="no server argument 'tp_sise': did you mean tp_size"):
        Host(Launch(judge_dirs["qwen2"], "cpu", arguments={"tp_sise": 2}))
    assert signal.getsignal(signal.SIGQUIT) is QUIT


def test_a_script_without_a_guard_says_so(judge_dirs: dict[str, Path], tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from pathlib import Path\n"
        "from speciarl.rollout.sglang_launch import Host\n"
        "from speciarl.rollout.sglang_settings import Launch\n"
        f"Host(Launch(Path({str(judge_dirs['qwen2'])!r}), 'cpu'))\n"
    )
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200)
    assert found.returncode == 1
    assert 'put the script\'s work under if __name__ == "__main__":' in found.stderr
    assert "EngineDead" in found.stderr
