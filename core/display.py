"""What a run shows while it runs: a live panel in a terminal, plain lines anywhere else."""

import atexit
import os
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 2.0  # at most one line of progress in this time
PLAIN_WIDTH = 200
SPEED_WINDOW = 3600.0  # seconds of past steps that the time left is estimated from

SECONDS, COUNT, SHARE, NUMBER, SMALL = "{:.2f}", "{:,.0f}", "{:.0%}", "{:.3f}", "{:.2g}"
# row label, then (scalar, shown name, format); a row without any of its scalars is left out
LAYOUT: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "seconds",
        (
            ("time/step", "step", SECONDS),
            ("time/generate", "generate", SECONDS),
            ("time/judge", "judge", SECONDS),
            ("time/learn", "learn", SECONDS),
            ("time/push", "push", SECONDS),
            ("time/other", "other", SECONDS),
            ("time/idle", "idle", SECONDS),
        ),
    ),
    (
        "tokens/s",
        (("tokens_per_s/generate", "generate", COUNT), ("tokens_per_s/learn", "learn", COUNT)),
    ),
    (
        "judge",
        (
            ("judge/verdicts_per_s", "verdicts/s", COUNT),
            ("judge/by_rule", "rule", SHARE),
            ("judge/by_batch", "batch", SHARE),
            ("judge/by_cache", "cache", SHARE),
            ("judge/model_calls", "asked", COUNT),
            ("judge/faults", "faults", COUNT),
            ("judge/agreement", "agree", SHARE),
        ),
    ),
    (
        "samples",
        (
            ("completions/count", "completions", COUNT),
            ("groups/empty", "empty groups", COUNT),
            ("completions/lost", "lost", COUNT),
            ("adaptive/rounds", "rounds", COUNT),
            ("adaptive/uncertain", "uncertain", SHARE),
            ("adaptive/budget_used", "budget", SHARE),
        ),
    ),
    ("reward", (("reward/mean", "mean", NUMBER), ("groups/no_signal", "no signal", SHARE))),
    (
        "answers",
        (
            ("rate/wrong", "W", SHARE),
            ("rate/abstain", "A", SHARE),
            ("rate/generic", "G", SHARE),
            ("rate/less_specific", "S-", SHARE),
            ("rate/specific", "S", SHARE),
            ("rate/more_specific", "S+", SHARE),
            ("rate/format", "format", SHARE),
        ),
    ),
    (
        "policy",
        (
            ("policy/loss", "loss", SMALL),
            ("policy/kl", "KL", SMALL),
            ("mismatch/mean", "mismatch", SMALL),
            ("mismatch/max", "max", SMALL),
            ("policy/clip_fraction", "clipped", SHARE),
            ("policy/grad_norm", "grad norm", SMALL),
            ("optim/lr", "lr", SMALL),
        ),
    ),
    ("skipped", (("skipped/prompts", "prompts", COUNT), ("skipped/updates", "updates", COUNT))),
)


def facts(scalars: Mapping[str, float]) -> list[tuple[str, str]]:
    """(label, text) rows for those of `scalars` that are shown; `eval/...` in a row of its own."""
    rows = [
        (label, [f"{n} {f.format(scalars[key])}" for key, n, f in cells if key in scalars])
        for label, cells in LAYOUT
    ]
    evaluated = [key for key in scalars if key.startswith("eval/")]
    rows.append(("eval", [f"{k.removeprefix('eval/')} {scalars[k]:.3f}" for k in evaluated]))
    return [(label, "  ".join(cells)) for label, cells in rows if cells]


def printable(text: str) -> str:
    """`text` without control characters, which could drive the terminal it is shown on."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


class Display:
    """Shows a run's progress, messages and tables on `stream`; `live` chooses panel or lines.

    `live=None` takes the panel where the stream is a terminal that can move its cursor and the
    environment is not CI. Lines carry no control characters.
    """

    def __init__(
        self,
        title: str,
        *,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        live: bool | None = None,
    ) -> None:
        stream = stream or sys.stdout
        if live is None:
            dumb = os.environ.get("TERM", "") in ("dumb", "unknown")
            live = stream.isatty() and not dumb and "CI" not in os.environ
        self.total, self.start = total_steps, start_step
        if live:
            self.console = Console(file=stream, force_terminal=True)
            self.panel: _Panel | None = _Panel(self.console, title, total_steps, start_step)
        else:
            self.console = Console(
                file=stream, force_terminal=False, color_system=None, width=PLAIN_WIDTH
            )
            self.panel = None
        self.began = time.monotonic()
        self.printed = float("-inf")

    def progress(self, step: int, scalars: Mapping[str, float]) -> None:
        """The state after `step`, of which these numbers are new."""
        if self.panel is not None:
            self.panel.update(step, scalars)
            return
        now = time.monotonic()
        evaluation = any(key.startswith("eval/") for key in scalars)
        if now - self.printed < PLAIN_SECONDS and step != self.total and not evaluation:
            return
        self.printed = now
        parts = [f"step {step}/{self.total}", f"left {self._left(step, now)}"]
        parts += [f"{label}: {text}" for label, text in facts(scalars)]
        self.message(" | ".join(parts))

    def message(self, text: str) -> None:
        """Prints `text`, above the panel if there is one."""
        self.console.print(Text(printable(text)), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Prints a table; the first column is text, the others are numbers to the right."""
        table = Table(title=Text(printable(title)), box=box.SIMPLE_HEAD, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(Text(column), justify="right" if index else "left")
        for row in rows:
            cells = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row]
            table.add_row(*(Text(printable(cell)) for cell in cells))
        self.console.print(table)

    def close(self) -> None:
        """Leaves the last panel on the screen and gives the terminal back. May be called twice."""
        if self.panel is not None:
            self.panel.close()

    def __enter__(self) -> "Display":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _left(self, step: int, now: float) -> str:
        done = step - self.start
        if done <= 0:
            return "unknown"
        seconds = round((now - self.began) / done * (self.total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class _Panel:
    """The live panel: a progress bar and the newest value of everything shown."""

    def __init__(self, console: Console, title: str, total: int, start: int) -> None:
        self.title = printable(title)
        self.scalars: dict[str, float] = {}
        self.rows: list[tuple[str, str]] = []
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            speed_estimate_period=SPEED_WINDOW,
        )
        self.task = self.bar.add_task("", total=total, completed=start)
        self.live = Live(console=console, get_renderable=self.render, refresh_per_second=4)
        self.live.start()
        atexit.register(self.close)  # an exit that nobody caught must not keep the cursor hidden

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        self.scalars.update(scalars)
        self.rows = facts(self.scalars)
        self.bar.update(self.task, completed=step)

    def render(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold")
        grid.add_column()
        for label, text in self.rows:
            grid.add_row(label, Text(text))
        return Panel(Group(self.bar, grid), title=Text(self.title), title_align="left")

    def close(self) -> None:
        atexit.unregister(self.close)
        self.live.stop()
