"""What a run leaves behind to be read: metrics, samples, TensorBoard events, its own record.

    metrics.jsonl    one JSON object per `log`: step, timestamp (Unix seconds), scalars by name
    samples.jsonl    one JSON object per sample, with its step
    tensorboard/     the same scalars as events
    config.json      the resolved configuration; versions.json: what the run ran on

A float that is not finite is written as the string "nan", "inf" or "-inf", which `float()` reads
back and every JSON parser accepts.
"""

import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, TextIO

import torch

from speciarl.core.display import Display

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS, SAMPLES, EVENTS = "metrics.jsonl", "samples.jsonl", "tensorboard"
PARTS = ("time/generate", "time/judge", "time/learn", "time/push")
PACKAGES = (
    "torch transformers numpy safetensors tokenizers pillow rich tensorboard triton "
    "peft flash-attn sglang"
).split()


class Monitor:
    """Files and display of one run. Only rank 0 does anything; others may call all the same.

    On resume (`start_step` > 0) what was logged after `start_step` is cut before the first line is
    added, and what is already there for `start_step` itself is not written again, so no value of a
    step is there twice. `start_step` 0 starts the files afresh. Until the first `log` or `samples`
    the files are left as they are: a resume that fails costs nothing.
    Every method that writes raises OSError where the disk does.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        total_steps: int,
        config: Mapping[str, Any],
        quiet: bool = False,
        start_step: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        """`quiet` shows nothing, the files are written. `stream`: standard output if None."""
        self.run_dir = Path(run_dir)
        self.main = rank == 0
        self.config = config
        self.start_step = start_step
        self.display: Display | None = None
        if self.main and not quiet:
            self.display = Display(
                self.run_dir.name, total_steps=total_steps, start_step=start_step, stream=stream
            )
        self._metrics: IO[str] | None = None
        self._samples: IO[str] | None = None
        self._events: SummaryWriter | None = None
        self._known: set[str] = set()

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records and shows numbers that belong to `step`, by names such as "time/generate".

        "time/other" is added where "time/step" is known: what the step's parts do not explain.
        """
        if not self.main:
            return
        values = {name: float(value) for name, value in scalars.items()}
        if "time/step" in values and "time/other" not in values:
            parts = sum(values.get(part, 0.0) for part in PARTS)
            values["time/other"] = max(0.0, values["time/step"] - parts)
        if self._metrics is None:
            self._open_metrics()
        new = {k: v for k, v in values.items() if step != self.start_step or k not in self._known}
        if new:
            _append(self._metrics, {"step": step, "timestamp": round(time.time(), 3), **new})
            self._write_events(step, new)
        if self.display is not None:
            self.display.progress(step, values)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows (JSON values, tensors, paths) to samples.jsonl."""
        if not self.main:
            return
        if self._samples is None:
            self._samples, _ = _open_after(self.run_dir / SAMPLES, self.start_step)
        for row in rows:
            _append(self._samples, {"step": step, **row})

    def message(self, text: str) -> None:
        """Shows one line of text."""
        if self.display is not None:
            self.display.message(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Shows a table; floats with three decimals, everything else as it prints."""
        if self.display is not None:
            self.display.table(title, columns, rows)

    def write_run_record(
        self,
        config: Mapping[str, Any] | None = None,
        versions: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes config.json and versions.json; None: this monitor's, `run_versions()`.

        A record that differs from the one of an earlier start stands beside it: the earlier one
        is kept as `config.until-step-N.json`, N the step at which this start takes over.
        """
        if not self.main:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        record = {"config": config or self.config, "versions": versions or run_versions()}
        for name, value in record.items():
            path = self.run_dir / f"{name}.json"
            text = json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n"
            if path.exists() and path.read_text(encoding="utf-8") != text:
                path.replace(self.run_dir / f"{name}.until-step-{self.start_step}.json")
            _replace(path, text.encode())

    def close(self) -> None:
        """Gives the terminal back and closes the files. May be called twice."""
        if self.display is not None:
            self.display.close()
        for file in (self._metrics, self._samples, self._events):
            if file is not None:
                file.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open_metrics(self) -> None:
        self._metrics, self._known = _open_after(self.run_dir / METRICS, self.start_step)

    def _write_events(self, step: int, values: Mapping[str, float]) -> None:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter  # half a second that tests can spare

            first = self.start_step + 1 if self.start_step else 0
            self._events = SummaryWriter(str(self.run_dir / EVENTS), purge_step=first)
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()


def run_versions() -> dict[str, Any]:
    """Python, platform, packages (those installed), CUDA and the device: what a result rests on."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["devices"] = torch.cuda.device_count()
    else:
        found["device"] = platform.processor() or platform.machine()
    found["threads"] = torch.get_num_threads()
    return found


def _open_after(path: Path, step: int) -> tuple[IO[str], set[str]]:
    """Opens `path` to append, cut after `step`; also the names that `step` already has there.

    A last line that a kill cut short goes too. The cut is a rename: all of it or nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: list[bytes] = []
    names: set[str] = set()
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for line in lines:
        record = _record(line)
        if step > 0 and record is not None and record["step"] <= step:
            kept.append(line)
            names |= record.keys() if record["step"] == step else set()
    if len(kept) != len(lines):
        _replace(path, b"".join(kept))
    return path.open("a", encoding="utf-8"), names


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(record, dict) and "step" in record
    return record if whole else None


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _append(file: IO[str] | None, record: Mapping[str, Any]) -> None:
    assert file is not None
    file.write(json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n")
    file.flush()  # with the operating system, so a killed process loses nothing


def _plain(value: Any) -> Any:
    """`value` in JSON types: see the module's text for floats; what is unknown, as it prints."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # tensors, NumPy arrays and scalars
        return _plain(value.tolist())
    return str(value)
