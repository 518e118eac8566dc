"""A strict reader of the Trace Event Format, as far as this project writes it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

Events = list[dict[str, Any]]
METADATA = {"process_name", "process_sort_index", "thread_name", "thread_sort_index"}


def read_trace(path: Path) -> Events:
    """The complete events ("X") of a trace, its every event checked; each has its rank's and
    track's names added, as "process" and "thread"."""
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record.keys() == {"displayTimeUnit", "otherData", "traceEvents"}
    assert record["displayTimeUnit"] in ("ms", "ns")
    names: dict[tuple[int, int, str], Any] = {}
    spans: Events = []
    for event in record["traceEvents"]:
        check_common(event)
        if event["ph"] == "M":
            assert event.keys() == {"name", "ph", "ts", "pid", "tid", "args"}
            assert event["name"] in METADATA
            key = "name" if event["name"].endswith("_name") else "sort_index"
            assert event["args"].keys() == {key}
            assert type(event["args"][key]) is (str if key == "name" else int)
            where = (event["pid"], event["tid"], event["name"])
            assert where not in names, f"{where} is named twice"
            names[where] = event["args"][key]
        else:
            assert event["ph"] == "X"
            assert event.keys() == {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"}
            assert type(event["cat"]) is str and type(event["args"]["step"]) is int
            assert type(event["dur"]) is int and event["dur"] >= 0
            spans.append(event)
    for span in spans:
        span["process"] = names[span["pid"], 0, "process_name"]
        span["thread"] = names[span["pid"], span["tid"], "thread_name"]
        assert (span["pid"], span["tid"], "thread_sort_index") in names
        assert re.fullmatch(re.escape(span["cat"]) + r"( [2-9]\d*)?", span["thread"])
    check_nesting(spans)
    return spans


def check_common(event: dict[str, Any]) -> None:
    """What every event must have."""
    assert type(event["name"]) is str and event["name"]
    for name in ("ts", "pid", "tid"):
        assert type(event[name]) is int, event
    assert type(event["args"]) is dict


def check_nesting(spans: Events) -> None:
    """On one thread, two spans lie apart or one inside the other: else viewers drop one."""
    threads: dict[tuple[int, int], Events] = defaultdict(list)
    for span in spans:
        threads[span["pid"], span["tid"]].append(span)
    for part in threads.values():
        ends: list[int] = []
        for span in sorted(part, key=lambda s: (s["ts"], -s["dur"])):
            while ends and ends[-1] <= span["ts"]:
                ends.pop()
            end = span["ts"] + span["dur"]
            assert not ends or end <= ends[-1], f"{span} crosses another"
            ends.append(end)
