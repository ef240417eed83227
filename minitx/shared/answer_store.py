"""A store of whole answers (lists of token ids) by key, in a SQLite file with a size limit.

    store = AnswerStore(None, 64.0)        # in the default file; "memory": in this process only
    store.put(key, ids, model="stories")
    store.find(key)                        # the ids, or None
    statistics(path), clear(path)          # what ``minitx cache`` prints and does

This file: where the file is, the part that holds the store, the database, ``minitx cache``, notes.

A damaged, locked, full or read-only file never stops generation: there is one warning, and answers
are generated as if there were no cache. What is read is checked, so no wrong answer is served.
"""

import os
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from minitx import ledger
from minitx.errors import MinitxError, MinitxWarning
from minitx.tree import Part, part

MEMORY = "memory"  # the file's name for a store in this process only
NAME = "answers.sqlite"
SQLITE, APPLICATION, SCHEMA = b"SQLite format 3\0", 0x6D747861, 1  # "mtxa"
WAIT = 1.0  # seconds that a new answer waits for another process that writes
WAIT_FOR_USE = 0.02  # seconds that a hit waits for it to mark the answer as used
ROW = 250  # bytes that an answer takes besides its ids, in the table and its indexes

TABLES = (
    "CREATE TABLE answers (key BLOB PRIMARY KEY, near BLOB, ids BLOB NOT NULL,"
    " checksum BLOB NOT NULL, model TEXT NOT NULL, bytes INTEGER NOT NULL, made INTEGER NOT NULL,"
    " used INTEGER NOT NULL, hits INTEGER NOT NULL)",
    "CREATE INDEX by_near ON answers (near) WHERE near IS NOT NULL",
    "CREATE INDEX by_use ON answers (used)",
    "CREATE TABLE totals (bytes INTEGER NOT NULL, hits INTEGER NOT NULL, most INTEGER NOT NULL)",
    "INSERT INTO totals VALUES (0, 0, 0)",
)
# sqlite3's errors, and what a flipped bit can make of a column: another type, or a huge number.
DAMAGE = (sqlite3.Error, TypeError, ValueError, OverflowError)


def default_file() -> Path:
    """``answers.sqlite`` in $MINITX_CACHE, or in the user's cache folder."""
    if folder := os.environ.get("MINITX_CACHE"):
        return Path(folder) / NAME
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(caches):  # the XDG specification says to ignore a relative path
        return Path(caches) / "minitx" / NAME
    try:
        return Path.home() / ".cache" / "minitx" / NAME
    except RuntimeError:  # a user without a home
        raise MinitxError(
            "There is no home folder to keep answers in; set MINITX_CACHE to a folder."
        ) from None


# The store ---------------------------------------------------------------------------------------


@part
class AnswerStore(Part):
    """Answers by key. The least recently used one is evicted first.

    file: None: the default file, wherever that is when it is first used. The database is opened by
    whoever uses it first, and again in a forked process; threads take turns."""

    file: str | None
    megabytes: float

    def __post_init__(self):
        object.__setattr__(self, "database", Database(self.file, self.limit))  # not a field

    @property
    def limit(self) -> int:
        return round(self.megabytes * 1e6)

    def __reduce__(self):  # a copy or a pickle opens the file itself
        return type(self), (self.file, self.megabytes)

    def forget(self) -> None:
        """Become an empty store in memory. The file is the user's, and stays as it is."""
        object.__setattr__(self, "database", Database(MEMORY, self.limit))

    def find(self, key: bytes) -> list[int] | None:
        """The answer with this key, which is now the most recently used one."""
        return self.database.find("key", key)

    def find_near(self, near: bytes) -> list[int] | None:
        """The most recently used answer that was put with this second key."""
        return self.database.find("near", near)

    def put(
        self, key: bytes, ids: Sequence[int], model: str = "", near: bytes | None = None
    ) -> None:
        """Store an answer, or replace the one with this key. It is all there or not at all, even if
        the process is killed now. model: a name for the statistics. near: a second key, which
        several answers may share."""
        self.database.put(key, ids, model, near)


def encode(ids: Sequence[int]) -> bytes:
    """4 bytes for each id."""
    return np.array([int(i) for i in ids], "<u4").tobytes()


def checksum(key: bytes, near: bytes | None, ids: bytes) -> bytes:
    """A hash of the ids and of both keys, so that no answer is served under another key."""
    pieces = (key, near or b"", ids)
    return sha256(b"".join(len(p).to_bytes(8, "little") + p for p in pieces)).digest()[:16]


def decoded(row: tuple, wanted: bytes) -> list[int] | None:
    """The ids of a row (key, near, ids, checksum); None if the row is damaged, or is not the one
    that is wanted (a damaged index may lead to any row)."""
    key, near, ids, expected = row
    blobs = all(isinstance(blob, bytes) for blob in (key, ids, expected, near or b""))
    if not blobs or len(ids) % 4 or checksum(key, near, ids) != expected:
        return None
    if wanted not in (key, near):
        return None
    return np.frombuffer(ids, "<u4").tolist()


# The database ------------------------------------------------------------------------------------


@dataclass
class Open:
    """An open database, of one process."""

    process: int
    connection: sqlite3.Connection

    def __del__(self):
        if os is not None and self.process == os.getpid():  # None: the interpreter ends
            self.connection.close()


of_parents: list[Open] = []  # kept open: SQLite forbids a forked child to close a connection


class Database:
    """One file, or memory, with a limit in bytes. A failure is a warning, once for each kind."""

    def __init__(self, file: str | None, limit: int):
        self.file, self.limit = file, limit
        self.open: Open | None = None
        self.locks: dict[int, Any] = {}  # by process: a thread that holds it may not be forked
        self.warned: set[str] = set()

    @property
    def path(self) -> str | Path:
        return default_file() if self.file is None else self.file

    def find(self, column: str, wanted: bytes) -> list[int] | None:
        return self.attempt(lambda db: self._find(db, column, wanted))

    def _find(self, db: sqlite3.Connection, column: str, wanted: bytes) -> list[int] | None:
        order = "" if column == "key" else " ORDER BY used DESC LIMIT 1"
        row = db.execute(
            f"SELECT key, near, ids, checksum FROM answers WHERE {column} = ?{order}", (wanted,)
        ).fetchone()
        if row is None:
            return None
        ids = decoded(row, wanted)
        if ids is None:
            ledger.event("damaged answers dropped")
        with suppress(sqlite3.Error):  # the answer is right, whether its use can be noted or not
            db.execute(f"PRAGMA busy_timeout = {int(1000 * WAIT_FOR_USE)}")
            with transaction(db):
                if ids is None:
                    drop(db, row[0])
                else:
                    db.execute(
                        "UPDATE answers SET hits = hits + 1,"
                        " used = 1 + (SELECT max(used) FROM answers) WHERE key = ?",
                        (row[0],),
                    )
                    db.execute("UPDATE totals SET hits = hits + 1")
        return ids

    def put(self, key: bytes, ids: Sequence[int], model: str, near: bytes | None) -> None:
        blob = encode(ids)
        nbytes = len(blob) + len(model.encode()) + ROW
        if nbytes <= self.limit:
            self.attempt(lambda db: self._put(db, key, near, blob, model, nbytes))

    def _put(self, db: sqlite3.Connection, key, near, ids, model, nbytes) -> None:
        with transaction(db):
            old = db.execute("SELECT near FROM answers WHERE key = ?", (key,)).fetchone()
            if old is not None:
                near = old[0] if near is None else near
                drop(db, key)
            self.evict(db, nbytes)
            (used,) = db.execute("SELECT 1 + coalesce(max(used), 0) FROM answers").fetchone()
            row = (key, near, ids, checksum(key, near, ids), model, nbytes, int(time.time()), used)
            db.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0)", row)
            db.execute("UPDATE totals SET bytes = bytes + ?, most = ?", (nbytes, self.limit))

    def evict(self, db: sqlite3.Connection, nbytes: int) -> None:
        """Evict the least recently used answers until this many bytes fit."""
        while True:
            (held,) = db.execute("SELECT bytes FROM totals").fetchone()
            last = db.execute("SELECT key FROM answers ORDER BY used LIMIT 1").fetchone()
            if last is None:
                db.execute("UPDATE totals SET bytes = 0")
            if last is None or held + nbytes <= self.limit:
                return
            if not drop(db, last[0]):  # or this would go on for ever
                raise sqlite3.DatabaseError("an index does not match the table")
            ledger.event("answers evicted")

    def attempt(self, task: Callable[[sqlite3.Connection], Any]) -> Any:
        """``task(connection)``, or None and a warning if the file does not allow it."""
        try:
            with self.locks.setdefault(os.getpid(), threading.Lock()):  # one thread at a time
                if self.open is None or self.open.process != os.getpid():
                    if self.open is not None:
                        of_parents.append(self.open)
                    self.open = Open(os.getpid(), connect(self.path))
                db = self.open.connection
                db.execute(f"PRAGMA busy_timeout = {int(1000 * WAIT)}")
                return task(db)
        except MinitxError as error:
            self.warn("unfit", f"{str(error).removesuffix('.')}; until then, answers are not kept.")
        except DAMAGE as error:
            kind = kind_of(error)
            self.warn(kind, f"{self.path}: {FAILURES[kind].format(error)}")
        return None

    def warn(self, kind: str, message: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(message, MinitxWarning, stacklevel=2)


FAILURES = {  # while answers are generated
    "locked": "another process is writing to it, so an answer was not kept.",
    "unusable": "cannot be read or written ({}), so answers are not kept.",
    "damaged": "is damaged ({}), so answers are not kept; minitx cache clear makes a new one.",
}


def kind_of(error: Exception) -> str:
    """The kind of failure, from SQLite's message: before Python 3.11 there is no error code."""
    said = str(error)
    if "locked" in said or "busy" in said:
        return "locked"
    words = ("readonly", "full", "unable to open", "disk I/O", "too big")
    return "unusable" if any(word in said for word in words) else "damaged"


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Everything in the ``with`` block happens, or nothing. It takes the write lock first, so no
    other process changes what is read inside."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


def drop(db: sqlite3.Connection, key: bytes) -> bool:
    """Delete the answer with this key; was there one?"""
    row = db.execute("SELECT bytes FROM answers WHERE key = ?", (key,)).fetchone()
    if row is not None:
        db.execute("UPDATE totals SET bytes = bytes - ?", row)
        db.execute("DELETE FROM answers WHERE key = ?", (key,))
    return row is not None


# Opening -----------------------------------------------------------------------------------------


def connect(file: str | Path) -> sqlite3.Connection:
    """Open the file, which is made if there is none. MinitxError if it is something else."""
    if file == MEMORY:
        db = opened(":memory:")
        create(db)
        return db
    path = Path(file)
    check_file(path)
    try:
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):  # answers are nobody else's business
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        raise MinitxError(
            f"{path}: cannot be made ({error.strerror or error}); give another file, or set "
            "MINITX_CACHE to another folder."
        ) from None
    db = opened(path)
    try:
        check_database(path, db)
        if db.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            with suppress(sqlite3.OperationalError):  # locked: the next one will do it
                db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        db.close()
        raise
    return db


def opened(path: str | Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, WAIT, isolation_level=None, check_same_thread=False)
    db.text_factory = lambda text: text.decode("utf-8", "replace")
    return db


def check_file(path: str | Path) -> None:
    """Refuse an existing file that is not a cache of answers. Nothing is opened for writing."""
    from minitx.checkpoints.common import open_file  # here: most of minitx does not need it

    if path == MEMORY or "\0" not in str(path) and not os.path.lexists(path):
        return
    with open_file(path) as file:  # which refuses folders, pipes and links to nothing
        head = file.read(100)
    if not head or os.path.exists(f"{path}-journal"):
        return  # new, or its writer was killed: SQLite restores it
    application, schema = (int.from_bytes(head[i : i + 4], "big") for i in (68, 60))
    if not head.startswith(SQLITE) or application != APPLICATION:
        raise foreign(path)
    check_schema(path, schema)


def check_schema(path: Path, schema: int) -> None:
    if schema > SCHEMA:
        raise MinitxError(
            f"{path}: was written by a newer minitx (schema {schema}, this one has {SCHEMA}); give "
            "another file."
        )


def foreign(path: Path) -> MinitxError:
    return MinitxError(
        f"{path}: is not a cache of answers; give another file, or delete this one if you do not "
        "need it."
    )


def check_database(path: Path, db: sqlite3.Connection) -> None:
    """See that the database is of this version; one of an older version is made anew."""
    if versions(db) == (APPLICATION, SCHEMA):
        return
    with transaction(db):  # another process may be making it
        application, schema = versions(db)
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master")]
        if application != APPLICATION and names:
            raise foreign(path)
        check_schema(path, schema if application == APPLICATION else 0)
        if (application, schema) != (APPLICATION, SCHEMA):
            create(db)


def versions(db: sqlite3.Connection) -> tuple[int, int]:
    return tuple(
        db.execute(f"PRAGMA {n}").fetchone()[0] for n in ("application_id", "user_version")
    )


def create(db: sqlite3.Connection) -> None:
    """Drop all tables, and create those of this version."""
    old = db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    for (name,) in old:
        if not name.startswith("sqlite_"):
            quoted = name.replace('"', '""')
            db.execute(f'DROP TABLE "{quoted}"')
    for statement in TABLES:
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION}")
    db.execute(f"PRAGMA user_version = {SCHEMA}")


# What minitx cache prints and does ---------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """What a cache, or one model in it, holds."""

    model: str
    answers: int
    bytes: int
    hits: int  # of the answers that are still there


@dataclass(frozen=True)
class Statistics:
    """What a file holds. Times are seconds since 1970; None without answers. most: the limit of
    whoever wrote last."""

    file: str
    answers: int = 0
    bytes: int = 0
    most: int = 0
    hits: int = 0  # also of answers that have been evicted since
    oldest: int | None = None
    newest: int | None = None
    models: tuple[Share, ...] = ()


def statistics(path: Path) -> Statistics:
    """What the file holds; nothing if there is none. MinitxError if it is no cache of answers, or
    damaged."""
    if not os.path.lexists(path):
        return Statistics(str(path))
    with inspected(path) as db:
        nbytes, hits, most = map(int, db.execute("SELECT * FROM totals").fetchone())
        count, *times = db.execute("SELECT count(*), min(made), max(made) FROM answers").fetchone()
        models = db.execute(
            "SELECT model, count(*), sum(bytes), sum(hits) FROM answers GROUP BY model"
            " ORDER BY model"
        )
        shares = tuple(Share(str(name), *map(int, numbers)) for name, *numbers in models)
        first, last = (None if t is None else int(t) for t in times)
        return Statistics(str(path), count, nbytes, most, hits, first, last, shares)


def clear(path: Path, model: str | None = None) -> int:
    """Remove all answers, or those of one model; returns how many. A damaged cache is deleted if
    all are to go. MinitxError if the file is something else, or if another process uses it."""
    if not os.path.lexists(path):
        return 0
    try:
        with inspected(path) as db:
            with transaction(db):
                which = "" if model is None else " WHERE model = ?"
                values = () if model is None else (model,)
                count = db.execute(f"DELETE FROM answers{which}", values).rowcount
                db.execute(
                    "UPDATE totals SET bytes = (SELECT coalesce(sum(bytes), 0) FROM answers),"
                    " hits = (SELECT coalesce(sum(hits), 0) FROM answers)"
                )
            db.execute("VACUUM")
            return count
    except Damaged:
        if model is not None:
            raise
        for name in (f"{path}-wal", f"{path}-shm", f"{path}-journal", path):  # the file last
            with suppress(FileNotFoundError):
                os.unlink(name)
        return 0


class Damaged(MinitxError):
    """A cache of answers that cannot be read."""


@contextmanager
def inspected(path: Path) -> Iterator[sqlite3.Connection]:
    """The database of an existing file, closed after the ``with`` block."""
    try:
        db = connect(path)
        try:
            yield db
        finally:
            db.close()
    except MinitxError:
        raise
    except DAMAGE as error:
        kind = kind_of(error)
        if kind == "locked":
            raise MinitxError(f"{path}: another process is writing to it; try again.") from None
        if kind == "unusable":
            raise MinitxError(f"{path}: cannot be read or written ({error}).") from None
        raise Damaged(
            f"{path}: is damaged ({error}); minitx cache clear makes a new one."
        ) from None


# Notes:
#
# - Write-ahead log (WAL): readers and one writer do not wait for each other, and a commit is one
#   write to the log, without waiting for the disk (synchronous=NORMAL). After kill -9 everything
#   that was committed is there; after a power failure the last answers may be missing, but the file
#   is intact.
#   The log is at most about 4 MB, and gone when the last process closes the file. WAL needs memory
#   shared between processes: two machines must not use one file over a network.
# - One answer of 200 tokens: 0.08 ms to store, 0.05 ms to find, 0.01 ms if there is none (one
#   thread, medians).
# - The limit counts 250 bytes per answer for its row, keys and indexes. Files with 20 to 1,000
#   tokens per answer took 0.78 to 1.11 of what was counted. Pages of evicted rows are reused.
# - Of prompts only hashes are stored, but of answers the tokens; so only its owner can read the
#   file (mode 600).
# - LRU order is a counter, not the clock, which may be set back. An answer that is found is marked
#   as used, unless another process is writing for longer than 20 ms.
# - ``minitx cache clear`` deletes a file only if its header says that it is a cache of answers.
