"""Verdicts that outlive a run: one SQLite file for any number of processes.

The key is (identity of the judge, truth, prediction); the identity names the model and the wording
of the prompt, so another model or wording finds nothing. Every verdict is written at once, in a
transaction of its own: a kill loses the verdicts that were still being made, and a power failure
at most the last few. Judge faults are not written.

The file is in WAL mode: readers never wait, writers wait for each other. WAL needs memory that all
processes share, so the file must be on a disk of the machine: on NFS or Lustre, over several
hosts, it would break. Give each host its own file there (judge.cache).
"""

import errno
import json
import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import TypeVar

from speciarl.judge.base import Judge, Pair, Verdict, Wrapper, each, in_order

T = TypeVar("T")
SCHEMA_VERSION = 1
APPLICATION_ID = 0x53504A43  # "SPJC", in the header of the file
WAIT = 60.0  # seconds that one process waits for the others to finish writing
_MAGIC = b"SQLite format 3\0"
_CREATE = """
CREATE TABLE verdicts (
    judge TEXT NOT NULL,
    truth TEXT NOT NULL,
    prediction TEXT NOT NULL,
    category INTEGER NOT NULL CHECK (category BETWEEN 0 AND 5),
    source TEXT NOT NULL,
    margin REAL,
    probabilities TEXT,
    made REAL NOT NULL,
    PRIMARY KEY (judge, truth, prediction)
) WITHOUT ROWID"""
_FIND = (
    "SELECT category, source, margin, probabilities FROM verdicts "
    "WHERE judge = ? AND truth = ? AND prediction = ?"
)
_ADD = "INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_UNWRITABLE = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


class VerdictCache:
    """The verdicts of one file. Thread-safe; `close` may be called twice.

    A file that cannot be written is read, with a warning, and what would have been written is
    remembered until the end of the process; so is everything after a failure of the disk.
    Raises ValueError, before anything is changed, for a file that is damaged, no verdict cache, or
    one of another version of this package, and for a folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock = Lock()
        self._memory: dict[tuple[str, str, str], Verdict] = {}
        self._connection: sqlite3.Connection | None = None
        self.writable = True
        try:
            self._connection = _retried(lambda: _open_to_write(self.path))
        except (sqlite3.OperationalError, OSError) as error:
            if not _forbidden(error):
                raise _unusable(self.path, error) from None
            self.writable = False
            if os.access(self.path, os.R_OK):
                self._connection = open_to_read(self.path)
            self._warn(f"cannot be written ({error}): new verdicts are lost when the run ends")

    def find(self, judge: str, pairs: Sequence[Pair]) -> dict[int, Verdict]:
        """The verdicts of `judge` that are there, by position in `pairs`."""
        keys = [(judge, storable(pair.truth), storable(pair.prediction)) for pair in pairs]
        with self._lock:
            found = {i: self._memory[key] for i, key in enumerate(keys) if key in self._memory}
            if self._connection is None:
                return found
            try:
                for i, key in enumerate(keys):
                    row = self._connection.execute(_FIND, key).fetchone()
                    verdict = None if row is None else _verdict(*row)
                    if verdict is not None:
                        found[i] = verdict
            except sqlite3.Error as error:
                self._give_up(error)
            return found

    def add(self, judge: str, pair: Pair, verdict: Verdict) -> None:
        """Keeps a verdict; the first of a pair stays, a fault is not kept."""
        if verdict.category is None:
            return
        key = (judge, storable(pair.truth), storable(pair.prediction))
        with self._lock:
            if not self.writable or self._connection is None:
                self._memory.setdefault(key, verdict)
                return
            shares = verdict.probabilities
            row = (
                *key,
                verdict.category,
                storable(verdict.source),
                verdict.margin,
                None if shares is None else json.dumps(shares),
                time.time(),
            )
            connection = self._connection
            try:
                _retried(lambda: connection.execute(_ADD, row))
            except sqlite3.Error as error:
                self._memory[key] = verdict
                self._give_up(error)

    def close(self) -> None:
        """Closes the file; the cache is not used afterwards."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _give_up(self, error: sqlite3.Error) -> None:
        self._warn(f"failed ({error}): new verdicts are lost when the run ends")
        if self._connection is not None:
            self._connection.close()
        self._connection, self.writable = None, False

    def _warn(self, text: str) -> None:
        warnings.warn(f"verdict cache {self.path} {text}", RuntimeWarning, stacklevel=3)


class CachedJudge(Wrapper):
    """Asks `inner` for what `cache` does not hold, and writes each verdict as it arrives."""

    def __init__(self, inner: Judge, cache: VerdictCache) -> None:
        super().__init__(inner)
        self.cache = cache

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict per pair, in order."""
        return in_order(len(pairs), self.grade_each(pairs))

    def grade_each(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Verdict]]:
        """(index, verdict): first those of the cache, then each as it is made."""
        found = self.cache.find(self.identity, pairs)
        self.counts.add("pairs", len(pairs))
        self.counts.add("by_cache", len(found))
        yield from found.items()
        missing = [i for i in range(len(pairs)) if i not in found]
        if not missing:
            return
        for place, verdict in each(self.inner, [pairs[i] for i in missing]):
            index = missing[place]
            self.cache.add(self.identity, pairs[index], verdict)
            yield index, verdict

    def close(self) -> None:
        """Closes the inner judge, then the file."""
        self.inner.close()
        self.cache.close()


def storable(text: str) -> str:
    """`text` as UTF-8 can hold it: half a surrogate pair becomes its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def open_to_read(path: Path) -> sqlite3.Connection:
    """A connection that cannot write, checked. Raises ValueError as `VerdictCache` does."""
    _require_database(path)
    # A WAL file in a folder that cannot be written opens only as one that nobody writes to.
    for mode in ("mode=ro", "immutable=1"):
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?{mode}",
            uri=True,
            timeout=WAIT,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            _require_schema(connection, path)
            return connection
        except sqlite3.OperationalError as error:
            connection.close()
            problem = error
    raise _unusable(path, problem)


def _open_to_write(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and (path.is_dir() or path.stat().st_size):
        _require_database(path)
    connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
    try:
        # Only after the file is known to be ours, or empty: nothing else is touched.
        empty = not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not empty:
            _require_schema(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")  # WAL: safe from a kill without a flush
        connection.execute("BEGIN IMMEDIATE")  # also finds out whether the file can be written
        if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            connection.execute(_CREATE)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except sqlite3.DatabaseError as error:
        connection.close()
        if isinstance(error, sqlite3.OperationalError):
            raise
        raise _unusable(path, error) from None
    except ValueError:
        connection.close()
        raise
    return connection


def _require_database(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"judge.cache = {str(path)!r} is a folder: name a file in it")
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise _unusable(path, "not a database")


def _require_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Raises ValueError unless the file is a sound cache of this version."""
    try:
        ours = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if ours != APPLICATION_ID:
            raise _unusable(path, "a database, but not one of verdicts")
        if version != SCHEMA_VERSION:
            raise _unusable(path, f"made with schema {version}, this package has {SCHEMA_VERSION}")
        state = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        raise _unusable(path, error) from None
    if state != "ok":
        raise _unusable(path, state)


def _unusable(path: Path, problem: object) -> ValueError:
    if isinstance(problem, sqlite3.OperationalError):  # a full disk, a lock: no fault of the file
        return ValueError(
            f"verdict cache {path} cannot be opened: {problem}. Make room on its disk, end what "
            'locks it, or set judge.cache to another file ("" for none)'
        )
    return ValueError(
        f"verdict cache {path} cannot be used: {problem}. Nothing was changed; move the file away, "
        'or set judge.cache to another file ("" for none)'
    )


def _retried(action: Callable[[], T]) -> T:
    """`action` again while another process holds the lock.

    SQLite waits by itself, except where waiting might be in vain: a switch to WAL, a recovery.
    """
    until = time.monotonic() + WAIT
    while True:
        try:
            return action()
        except sqlite3.OperationalError as error:
            if _code(error) not in _BUSY or time.monotonic() > until:
                raise
        time.sleep(0.01)


def _code(error: sqlite3.Error) -> int:
    """The primary result code; the upper bits say more than is asked here."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _forbidden(error: sqlite3.OperationalError | OSError) -> bool:
    """Whether the file is what it should be, and only must not be written."""
    if isinstance(error, sqlite3.Error):
        return _code(error) in _UNWRITABLE
    return isinstance(error, PermissionError) or error.errno == errno.EROFS


def _verdict(
    category: int, source: str, margin: float | None, shares: str | None
) -> Verdict | None:
    """None for a row that somebody's hand or a bad disk made unreadable: it is asked again."""
    try:
        found = None if shares is None else tuple(json.loads(shares))
        return Verdict(category, source, margin, found)
    except ValueError:
        return None
