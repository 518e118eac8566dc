"""What a run writes and shows: nothing twice, nothing lost, and a terminal left as it was."""

import io
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from speciarl.core import display as display_module
from speciarl.core.display import Display, facts, printable
from speciarl.core.monitor import Monitor, run_versions

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
STEP = {
    "time/step": 2.0,
    "time/generate": 0.8,
    "time/judge": 0.1,
    "time/learn": 0.9,
    "time/push": 0.05,
    "tokens_per_s/generate": 12345.0,
    "tokens_per_s/learn": 2345.6,
    "reward/mean": 0.4123,
    "rate/wrong": 0.3,
    "rate/abstain": 0.02,
    "rate/generic": 0.1,
    "rate/less_specific": 0.08,
    "rate/specific": 0.41,
    "rate/more_specific": 0.03,
    "rate/format": 0.06,
    "groups/no_signal": 0.375,
    "policy/kl": 0.00123,
    "policy/clip_fraction": 0.02,
    "mismatch/mean": 1e-5,
    "mismatch/max": 3e-4,
    "policy/grad_norm": 0.731,
    "optim/lr": 1e-5,
    "skipped/prompts": 3.0,
    "skipped/updates": 1.0,
}
SHOWN = (
    "step 2.00  generate 0.80  judge 0.10  learn 0.90  push 0.05  other 0.15",
    "generate 12,345  learn 2,346",
    "mean 0.412  no signal 38%",
    "W 30%  A 2%  G 10%  S- 8%  S 41%  S+ 3%  format 6%",
    "KL 0.0012  mismatch 1e-05  max 0.0003  clipped 2%  grad norm 0.73  lr 1e-05",
    "prompts 3  updates 1",
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "140", "LINES": "40"}.items():
        monkeypatch.setenv(name, value)


def monitor(run: Path, **options: object) -> Monitor:
    given = {"rank": 0, "total_steps": 9, "config": {"a": 1}, "quiet": True} | options
    return Monitor(run, **given)  # type: ignore[arg-type]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "timestamp"} for record in records]


def events(run: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(name)]


def test_metrics_are_on_file_line_by_line(tmp_path: Path) -> None:
    with monitor(tmp_path / "run") as run:
        run.log(1, {"loss": 0.1 + 0.2, "host": np.float32(0.5), "device": torch.tensor(2)})
        on_file = lines(tmp_path / "run/metrics.jsonl")  # before close: a kill loses nothing
        assert without_time(on_file) == [{"step": 1, "loss": 0.1 + 0.2, "host": 0.5, "device": 2.0}]
        run.log(2, {"time/step": 2.0, "time/generate": 0.5, "time/learn": 1.25})
        run.log(3, {"time/step": 1.0, "time/generate": 1.5})
    records = lines(tmp_path / "run/metrics.jsonl")
    assert [r.get("time/other") for r in records] == [None, 0.25, 0.0]
    assert abs(records[0]["timestamp"] - (tmp_path / "run/metrics.jsonl").stat().st_mtime) < 60


def test_numbers_that_are_not_finite_are_strings(tmp_path: Path) -> None:
    values = {"a": float("nan"), "b": float("inf"), "c": -float("inf")}
    with monitor(tmp_path) as run:
        run.log(1, values)
        run.samples(1, [{"logprobs": [0.5, -float("inf")]}])
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (record["a"], record["b"], record["c"]) == ("nan", "inf", "-inf")
    assert float(record["b"]) == values["b"]
    assert lines(tmp_path / "samples.jsonl")[0]["logprobs"] == [0.5, "-inf"]


def test_samples_carry_their_step(tmp_path: Path) -> None:
    with monitor(tmp_path) as run:
        run.samples(1, [{"text": "Grünspecht\n"}, {"image": Path("a.png"), "ids": np.arange(2)}])
        run.samples(2, [{"ids": torch.arange(2)}])
    first, *others = lines(tmp_path / "samples.jsonl")
    assert first == {"step": 1, "text": "Grünspecht\n"}
    assert others == [{"step": 1, "image": "a.png", "ids": [0, 1]}, {"step": 2, "ids": [0, 1]}]


def test_a_resume_cuts_what_comes_after_its_checkpoint(tmp_path: Path) -> None:
    with monitor(tmp_path) as run:
        run.log(0, {"eval/hm": 0.1})
        for step in range(1, 7):
            run.log(step, {"loss": float(step)})
            run.samples(step, [{"text": str(step)}])
            if step == 4:
                run.log(step, {"eval/hm": 0.4})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1')  # cut short by a kill
    time.sleep(1.1)  # event files are read in the order of their second
    with monitor(tmp_path, start_step=4) as run:
        run.log(4, {"eval/hm": 0.4, "eval/new": 1.0})
        for step in (5, 6):
            run.log(step, {"loss": step * 10.0})
            run.samples(step, [{"text": "again"}])
    steps = [
        (r["step"], r.get("loss"), r.get("eval/hm")) for r in lines(tmp_path / "metrics.jsonl")
    ]
    assert steps == [
        *[(0, None, 0.1), (1, 1.0, None), (2, 2.0, None), (3, 3.0, None), (4, 4.0, None)],
        *[(4, None, 0.4), (4, None, None), (5, 50.0, None), (6, 60.0, None)],
    ]
    texts = [(r["step"], r["text"]) for r in lines(tmp_path / "samples.jsonl")]
    assert texts == [*[(s, str(s)) for s in range(1, 5)], (5, "again"), (6, "again")]
    assert events(tmp_path, "loss") == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50), (6, 60)]
    assert events(tmp_path, "eval/hm") == [(0, pytest.approx(0.1)), (4, pytest.approx(0.4))]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_fresh_start_leaves_no_old_step(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with monitor(tmp_path) as run:
            run.log(0, {"eval/hm": value})
            run.log(1, {"loss": value})
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [0, 1]
    assert events(tmp_path, "loss") == [(1, 2.0)]


def test_a_resume_that_fails_before_its_first_step_costs_nothing(tmp_path: Path) -> None:
    with monitor(tmp_path) as run:
        run.log(1, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(RuntimeError), monitor(tmp_path, start_step=0):
        raise RuntimeError("checkpoint is damaged")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_other_ranks_do_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with monitor(tmp_path, rank=1, quiet=False) as run:
        run.log(1, {"loss": 1.0})
        run.samples(1, [{"a": 1}])
        run.message("x")
        run.table("t", ["a"], [[1]])
        run.write_run_record()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_quiet_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with monitor(tmp_path) as run:
        run.log(1, STEP)
        run.message("x")
        run.table("t", ["a"], [[1]])
    assert capsys.readouterr().out == ""
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_run_record(tmp_path: Path) -> None:
    with monitor(tmp_path, config={"train": {"out": Path("runs/x"), "lr": 1e-5}}) as run:
        run.write_run_record()
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "train": {"out": "runs/x", "lr": 1e-5}
    }
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert versions == run_versions()
    assert versions["torch"] == torch.__version__ and versions["python"].startswith("3.")
    assert {"transformers", "numpy", "cuda", "device", "threads"} <= versions.keys()
    with monitor(tmp_path, start_step=7) as run:
        run.write_run_record({"train": {"lr": 1}}, versions)
    assert json.loads((tmp_path / "config.json").read_text()) == {"train": {"lr": 1}}
    assert "runs/x" in (tmp_path / "config.until-step-7.json").read_text()
    assert not (tmp_path / "versions.until-step-7.json").exists()


def test_facts_show_what_is_known() -> None:
    rows = facts(STEP | {"time/other": 0.15, "eval/birds/hm": 0.5, "policy/unknown": 1.0})
    assert [text for _, text in rows] == [*SHOWN, "birds/hm 0.500"]
    assert facts({"rate/wrong": float("nan")}) == [("answers", "W nan%")]
    assert facts({}) == []


def test_a_log_file_gets_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with monitor(tmp_path, quiet=False, stream=stream) as run:
        run.message("2 images skipped: \x1b[31mred\x07 [bold]a.png[/bold]")
        for step in range(1, 9):
            run.log(step, STEP)
        run.log(8, {"eval/birds/hm": 0.25})
        run.log(9, STEP)
        run.table("base / trained", ["domain", "base", "trained"], [["birds", 0.12345, 0.5]])
    text = stream.getvalue()
    assert printable(text) == text
    progress = [line for line in text.splitlines() if line.startswith("step ")]
    assert [line.split(" | ")[0] for line in progress] == ["step 1/9", "step 8/9", "step 9/9"]
    assert all(part in progress[0] for part in SHOWN)
    assert "birds/hm 0.250" in progress[1] and "reward" not in progress[1]
    assert "left 0:00:0" in progress[0]
    assert "[bold]a.png[/bold]" in text
    assert "0.123" in text and "base / trained" in text


def test_lines_come_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(display_module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    show = Display("run", total_steps=100, start_step=10, stream=stream)
    for step in range(11, 31):
        now[0] += 60.5 if step == 30 else 0.5
        show.progress(step, {"reward/mean": 0.5})
    steps = [line.split("|")[0].strip() for line in stream.getvalue().splitlines()]
    assert steps == [f"step {s}/100" for s in (11, 15, 19, 23, 27, 30)]
    assert "left 0:04:05" in stream.getvalue().splitlines()[-1]  # 70 s for 20 steps, 70 to go


def test_a_terminal_gets_a_panel_and_its_cursor_back() -> None:
    stream = Terminal()
    with pytest.raises(RuntimeError), Display("toy", total_steps=9, stream=stream) as show:
        show.progress(3, STEP | {"time/other": 0.15})
        show.message("hello \x1b[2J")
        show.table("result", ["domain", "hm"], [["birds", 0.5]])
        raise RuntimeError
    text = stream.getvalue()
    assert text.count(HIDE) == text.count(SHOW) == 1 and text.index(HIDE) < text.rindex(SHOW)
    assert all(part in text for part in SHOWN)
    assert "3/9" in text and "toy" in text and "birds" in text
    assert "\x1b[2J" not in text
    show.close()
    show.message("after the end")
    assert stream.getvalue().endswith("after the end\n")


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("TERM", "dumb")])
def test_no_panel_where_it_cannot_be_drawn(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    stream = Terminal()
    with Display("toy", total_steps=9, stream=stream) as show:
        show.progress(1, STEP)
    assert stream.getvalue().startswith("step 1/9") and "\x1b" not in stream.getvalue()


def test_an_uncaught_error_leaves_the_terminal_usable() -> None:
    """A process that never closes its display, on a real pseudo-terminal."""
    script = (
        "from speciarl.core.display import Display\n"
        "show = Display('toy', total_steps=9)\n"
        "show.progress(1, {'reward/mean': 0.5})\n"
        "raise RuntimeError('broke in the middle')\n"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", script], stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        chunks = []
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # Linux ends a pseudo-terminal with an error
                break
            chunks.append(chunk)
    os.close(ours)
    text = b"".join(chunks).decode()
    assert process.returncode == 1
    assert "broke in the middle" in text
    assert text.rindex(SHOW) > text.rindex(HIDE)
