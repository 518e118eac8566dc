"""Looking into a verdict cache and making it smaller, while runs may be using it."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from speciarl.judge.cache import WAIT, open_to_read
from speciarl.kernels.codes import S_PLUS, W

DAY = 86400.0
_CONTAINS = "instr(judge, :judge) AND instr(truth, :truth) AND instr(prediction, :prediction)"


@dataclass(frozen=True)
class JudgeStats:
    """What a cache holds of one judge.

    counts: verdicts of W, A, G, S-, S, S+. oldest, newest: Unix seconds.
    """

    identity: str
    counts: tuple[int, ...]
    oldest: float
    newest: float


@dataclass(frozen=True)
class Entry:
    """One verdict and its key; `made` in Unix seconds."""

    judge: str
    truth: str
    prediction: str
    category: int
    source: str
    margin: float | None
    made: float


def stats(path: Path) -> list[JudgeStats]:
    """One entry per judge, the latest used first. Raises ValueError for what is no cache."""
    sums = ", ".join(f"sum(category = {code})" for code in range(W, S_PLUS + 1))
    query = f"SELECT judge, min(made), max(made), {sums} FROM verdicts GROUP BY judge ORDER BY 3"
    with closing(open_to_read(path)) as connection:
        rows = connection.execute(query).fetchall()
    return [JudgeStats(row[0], tuple(row[3:]), row[1], row[2]) for row in reversed(rows)]


def entries(
    path: Path, *, judge: str = "", truth: str = "", prediction: str = "", limit: int = 20
) -> Iterator[Entry]:
    """The newest entries whose key contains these texts, case and all; `limit` 0 for all.

    Raises ValueError for what is no cache.
    """
    words = {"judge": judge, "truth": truth, "prediction": prediction, "limit": limit or -1}
    query = (
        "SELECT judge, truth, prediction, category, source, margin, made FROM verdicts "
        f"WHERE {_CONTAINS} ORDER BY made DESC LIMIT :limit"
    )
    with closing(open_to_read(path)) as connection:
        for row in connection.execute(query, words):
            yield Entry(*row)


def size(path: Path) -> int:
    """Bytes on the disk, with what is not yet merged into the file."""
    parts = (path, path.with_name(path.name + "-wal"))
    return sum(part.stat().st_size for part in parts if part.exists())


def prune(
    path: Path, *, judge: str = "", days: float | None = None, max_bytes: int | None = None
) -> int:
    """Removes verdicts and gives their space back; returns how many.

    judge: only those of judges whose identity contains this text. days: only those made longer
    ago. max_bytes: afterwards the oldest of any judge, until the file is no larger.
    With `max_bytes` alone nothing else is removed; with nothing at all, nothing is.
    Raises ValueError for what is no cache, and where the file cannot be written or is in use for
    longer than a minute.
    """
    open_to_read(path).close()
    connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None)
    try:
        with closing(connection):
            removed = 0
            if judge or days is not None:
                before = time.time() - (days or 0.0) * DAY
                query = "DELETE FROM verdicts WHERE made <= ? AND instr(judge, ?)"
                removed = connection.execute(query, (before, judge)).rowcount
            _shrink(connection)
            while max_bytes is not None and (excess := size(path) / max(1, max_bytes)) > 1:
                gone = _remove_oldest(connection, 1 - 1 / excess)
                if not gone:
                    break  # an empty file of this schema is larger
                removed += gone
                _shrink(connection)
            return removed
    except sqlite3.Error as error:
        raise ValueError(
            f"verdict cache {path} was not pruned: {error}. It and its folder must be writable, "
            "and no other process may hold it for a minute"
        ) from None


def _remove_oldest(connection: sqlite3.Connection, share: float) -> int:
    total = connection.execute("SELECT count(*) FROM verdicts").fetchone()[0]
    query = (
        "DELETE FROM verdicts WHERE (judge, truth, prediction) IN "
        "(SELECT judge, truth, prediction FROM verdicts ORDER BY made LIMIT ?)"
    )
    return connection.execute(query, (min(total, int(total * share) + 1),)).rowcount


def _shrink(connection: sqlite3.Connection) -> None:
    connection.execute("VACUUM")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
