"""The file with the answers: LRU eviction, and that nothing that happens to the file (kill -9, a
flipped bit, a second process, a full disk) gives a wrong answer or stops generation."""

import os
import random
import signal
import sqlite3
import threading
import time
import warnings
from hashlib import sha256

import pytest
from literal_answer_cache import Answers

from minitx.errors import MinitxError, MinitxWarning
from minitx.shared import answer_store
from minitx.shared.answer_store import (
    APPLICATION,
    MEMORY,
    NAME,
    ROW,
    SCHEMA,
    AnswerStore,
    check_file,
    checksum,
    clear,
    decoded,
    default_file,
    encode,
    statistics,
)

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def key(i: int) -> bytes:
    return sha256(str(i).encode()).digest()


def answer(i: int) -> list[int]:
    return [i, i + 1, 77] * (5 + i % 9)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "a.sqlite"


def store_of(file, megabytes=1.0) -> AnswerStore:
    return AnswerStore(str(file), megabytes)


def filled(file, count=12) -> bytes:
    """A file with some answers, every third with a second key; its bytes."""
    store = store_of(file)
    for i in range(count):
        store.put(key(i), answer(i), "m", None if i % 3 else key(-1 - i))
    del store  # which closes it, so that all is in the one file
    return file.read_bytes()


# What is found -----------------------------------------------------------------------------------


def test_what_was_put_is_found_again(file):
    store = store_of(file)
    assert store.find(key(1)) is None
    store.put(key(1), answer(1), "stories")
    store.put(key(2), [2**32 - 1, 0], "stories", near=key(9))
    for found in (store, store_of(file)):
        assert found.find(key(1)) == answer(1) and found.find(key(2)) == [2**32 - 1, 0]
        assert found.find_near(key(9)) == [2**32 - 1, 0] and found.find_near(key(1)) is None


def test_later_answer_replaces_an_earlier_one_of_the_same_key(file):
    store = store_of(file)
    store.put(key(1), [1, 2], near=key(9))
    store.put(key(1), [1, 2, 3])
    assert store.find(key(1)) == store.find_near(key(9)) == [1, 2, 3]
    assert statistics(file).bytes == ROW + 12


def test_of_answers_with_one_second_key_the_last_used_is_found(file):
    store = store_of(file)
    for i in range(3):
        store.put(key(i), answer(i), near=key(9))
    assert store.find_near(key(9)) == answer(2)
    store.find(key(0))
    assert store.find_near(key(9)) == answer(0)


def test_bytes_that_are_checked():
    """Ids 1 and 258: 01000000 02010000. The checksum covers both keys and the ids."""
    assert encode([1, 258]).hex() == "0100000002010000"
    whole = checksum(b"k", b"n", b"ids")
    assert whole not in (checksum(b"x", b"n", b"ids"), checksum(b"k", b"x", b"ids"))
    assert checksum(b"k", b"ni", b"ds") != whole != checksum(b"k", None, b"nids")


# The limit ---------------------------------------------------------------------------------------


def test_least_recently_used_answer_is_evicted(file):
    """Room for three answers of 10 tokens: a b c; a is used; d comes: b goes."""
    store = store_of(file, 3 * (ROW + 40) / 1e6)
    for i in range(3):
        store.put(key(i), [i] * 10)
    store.find(key(0))
    store.put(key(3), [3] * 10)
    assert [store.find(key(i)) is not None for i in range(4)] == [True, False, True, True]
    store.put(key(9), [9] * 1000)
    assert store.find(key(9)) is None and store.find(key(3)), "nothing goes for what cannot fit"


@pytest.mark.parametrize("room", [1, 3, 8])
def test_eviction_is_that_of_the_literal_version(room):
    rng = random.Random(room)
    limit = room * (ROW + 60)
    store, literal = AnswerStore(MEMORY, limit / 1e6), Answers(limit, ROW)
    hits = 0
    for _ in range(200):
        i = rng.randrange(12)
        found, known = store.find(key(i)), literal.find(i)
        assert (found is None) == (known is None)
        if found is None:
            store.put(key(i), answer(i))
            literal.put(i, answer(i) * 4)  # 4 bytes each
        else:
            assert found == answer(i)
            hits += 1
        (held,) = store.database.open.connection.execute("SELECT bytes FROM totals").fetchone()
        assert held == sum(len(kept) + ROW for _, kept in literal.kept) <= limit
    assert hits > 5


def test_file_with_a_smaller_limit_shrinks_to_it(file):
    filled(file, 20)
    store_of(file, 5 * (ROW + 200) / 1e6).put(key(50), answer(50))
    found = statistics(file)
    assert found.bytes <= found.most == 5 * (ROW + 200) and found.answers >= 4


# What happens to the file ------------------------------------------------------------------------


def in_child(task) -> int:
    """Run ``task()`` in a forked process, whose number is returned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of BLAS threads, of which none runs
        process = os.fork()
    if process == 0:
        try:
            task()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return process


@forks
@pytest.mark.parametrize("inherited", [False, True])
def test_killed_writer_loses_no_answer_and_leaves_no_half_one(file, inherited):
    """The writer reports each answer when it is stored. Killed at any time, all that it reported
    are there, and the next one is there as a whole or not at all. Also if it was forked from a
    process that has the file open."""
    rng, first, parent = random.Random(0), 0, store_of(file)
    if inherited:
        parent.put(key(-1), [5])
    for attempt in range(10):
        read, write = os.pipe()

        def endless(i=first, write=write):
            store = parent if inherited else store_of(file)
            while True:
                store.put(key(i), answer(i))
                os.write(write, b".")
                i += 1

        process, reported = in_child(endless), b""
        if attempt > 3:  # before that, also while the file is being made or opened
            reported = os.read(read, 1)
        time.sleep(rng.random() * 0.01)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(write)
        end = first + len(reported + os.read(read, 10**6))
        os.close(read)
        store = store_of(file)
        assert all(store.find(key(i)) == answer(i) for i in range(first, end)), "an answer is lost"
        assert store.find(key(end)) in (None, answer(end)), "half an answer"
        first = end + 1
    assert first >= 16 and (not inherited or parent.find(key(-1)) == [5])


@forks
@pytest.mark.parametrize("where", ["file", MEMORY])
def test_forked_process_opens_the_store_itself(file, where):
    """SQLite forbids to use, or close, a connection in a forked process."""
    store = AnswerStore(where if where == MEMORY else str(file), 1.0)
    store.put(key(1), answer(1))
    inherited = store.database.open

    def task():
        assert store.find(key(1)) == (None if where == MEMORY else answer(1))
        assert store.database.open.process == os.getpid()
        assert inherited in answer_store.of_parents, "it would be closed"
        store.put(key(2), answer(2))

    assert os.waitpid(in_child(task), 0)[1] == 0
    assert store.find(key(1)) == answer(1) and store.database.open is inherited
    assert store.find(key(2)) == (None if where == MEMORY else answer(2))


@forks
def test_two_processes_write_and_read_at_once(file):
    def work(start):
        store = store_of(file)
        for i in range(60):
            store.put(key(start + i), answer(start + i))
            other = key(1000 - start + i)
            assert store.find(other) in (None, answer(1000 - start + i))

    children = [in_child(lambda start=start: work(start)) for start in (0, 1000)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    store = store_of(file)
    assert all(store.find(key(s + i)) == answer(s + i) for s in (0, 1000) for i in range(60))
    assert statistics(file).answers == 120


def test_threads_take_turns(file):
    store, wrong = store_of(file), []

    def work(start):
        for i in range(start, start + 30):
            store.put(key(i), answer(i))
            if store.find(key(i)) != answer(i):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and statistics(file).answers == 120


def served(file, count=12) -> int:
    """How many answers are found in a file that was damaged: none is wrong, and there is no other
    sign of it than a warning."""
    found = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", MinitxWarning)
        store = store_of(file)
        for i in range(count):
            got = store.find(key(i))
            assert got in (None, answer(i)), "a wrong answer"
            found += got is not None
            assert i % 3 or store.find_near(key(-1 - i)) in (None, answer(i)), "a wrong answer"
        store.put(key(99), answer(99), "m")
        assert store.find(key(99)) in (None, answer(99))
        for task in (statistics, clear):
            try:
                task(file)
            except MinitxError as error:
                assert str(file) in str(error) and "\n" not in str(error)
    return found


def damaged(file, data: bytes) -> int:
    for name in os.listdir(file.parent):
        (file.parent / name).unlink()
    file.write_bytes(data)
    return served(file)


def test_flipped_bit_gives_no_wrong_answer_and_no_error(file):
    whole, rng, found = filled(file), random.Random(1), []
    assert served(file) == 12
    for _ in range(25):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        found.append(damaged(file, data))
    assert 0 < sum(found) < 12 * len(found), "some are served, and some bits are noticed"


def test_each_bit_of_an_answer_is_checked(file):
    store, ids = store_of(file), encode(answer(3))
    store.put(key(3), answer(3), near=key(9))
    db = store.database.open.connection
    for column, value in (("ids", ids), ("checksum", checksum(key(3), key(9), ids))):
        for bit in range(0, 8 * len(value), 13):
            wrong = bytearray(value)
            wrong[bit // 8] ^= 1 << bit % 8
            db.execute(f"UPDATE answers SET {column} = ?", (bytes(wrong),))
            assert store.find(key(3)) is None, f"bit {bit} of {column}"
            assert statistics(file).answers == 0, "it is dropped"
            store.put(key(3), answer(3), near=key(9))
    for wrong in (b"", ids[:-1], ids[:-4], "text", 7, 0.5):
        db.execute("UPDATE answers SET ids = ?", (wrong,))
        assert store.find(key(3)) is None
        store.put(key(3), answer(3), near=key(9))
    assert store.find(key(3)) == answer(3)


def test_answer_under_another_key_is_not_served(file):
    """As a damaged index would find it."""
    store = store_of(file)
    store.put(key(1), answer(1))
    store.database.open.connection.execute("UPDATE answers SET key = ?", (key(2),))
    assert store.find(key(2)) is None
    row = key(1), key(9), encode([5]), checksum(key(1), key(9), encode([5]))
    assert decoded(row, key(1)) == decoded(row, key(9)) == [5] and decoded(row, key(2)) is None


def test_answer_that_cannot_be_evicted_ends_in_a_warning(file, monkeypatch):
    """As with a damaged index, by which an answer is found that is not in the table."""
    store = store_of(file, (ROW + 100) / 1e6)
    store.put(key(1), [1] * 20)
    monkeypatch.setattr(answer_store, "drop", lambda db, key: False)
    with pytest.warns(MinitxWarning, match="is damaged .an index does not match"):
        store.put(key(2), [2] * 20)
    assert store.find(key(1)) == [1] * 20 and store.find(key(2)) is None


def test_truncated_file_gives_no_wrong_answer_and_no_error(file):
    whole = filled(file)
    for length in (0, 1, 99, 100, 4095, 4096, 4097, *range(5000, len(whole), 7001)):
        damaged(file, whole[:length])


def test_damaged_cache_is_made_anew_by_clear(file):
    data = bytearray(filled(file))
    data[4096:] = bytes(len(data) - 4096)
    file.write_bytes(data)
    with pytest.warns(MinitxWarning, match="a.sqlite: is damaged .*minitx cache clear") as said:
        store = store_of(file)
        assert [store.find(key(i)) for i in range(12)] == [None] * 12
        store.put(key(1), answer(1))
    assert len(said) == 1, "one warning, not one for each request"
    with pytest.raises(MinitxError, match="is damaged"):
        clear(file, "m")
    assert clear(file) == 0 and not file.exists()
    store = store_of(file)
    store.put(key(1), answer(1))
    assert store.find(key(1)) == answer(1)


@pytest.mark.parametrize("lock", ["IMMEDIATE", "EXCLUSIVE"])
def test_file_locked_by_another_process_is_not_written_but_read(file, monkeypatch, lock):
    monkeypatch.setattr(answer_store, "WAIT", 0.02)
    filled(file)
    store = store_of(file)
    other = sqlite3.connect(file, isolation_level=None)
    store.find(key(0))
    other.execute(f"BEGIN {lock}")
    with pytest.warns(MinitxWarning, match="another process is writing to it") as said:
        for i in (50, 51):
            store.put(key(i), answer(i))
    assert len(said) == 1 and store.find(key(1)) == answer(1)
    other.execute("ROLLBACK")
    other.close()
    store.put(key(50), answer(50))
    assert store.find(key(50)) == answer(50)


def test_file_that_may_not_be_written_is_still_read(file):
    filled(file)
    store = store_of(file)
    store.find(key(1))
    store.database.open.connection.execute("PRAGMA query_only = 1")
    with pytest.warns(MinitxWarning, match="readonly.*answers are not kept"):
        store.put(key(50), answer(50))
    assert store.find(key(1)) == answer(1) and store.find(key(50)) is None


def test_folder_that_cannot_be_made_costs_one_warning(tmp_path):
    (tmp_path / "x").write_text("a file")
    store = store_of(tmp_path / "x" / "a.sqlite")
    with pytest.warns(MinitxWarning, match="a.sqlite: cannot be made") as said:
        store.put(key(1), answer(1))
        assert store.find(key(1)) is None
    assert len(said) == 1
    assert str(said[0].message).endswith("another folder; until then, answers are not kept.")


# Which file --------------------------------------------------------------------------------------


def test_default_file_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    assert default_file().name == NAME and str(default_file().parent) == os.environ["MINITX_CACHE"]
    monkeypatch.delenv("MINITX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_file() == tmp_path / "minitx" / NAME
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert default_file() == tmp_path / "home" / ".cache" / "minitx" / NAME


@pytest.mark.skipif(os.name != "posix", reason="needs modes of files")
def test_file_and_its_folder_are_the_users_only(tmp_path):
    store = store_of(tmp_path / "new" / "a.sqlite")
    store.put(key(1), answer(1))
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "new").iterdir()} == {0o600}


def test_database_of_another_program_is_refused_and_left_alone(file):
    db = sqlite3.connect(file)
    db.execute("CREATE TABLE answers (mine)")
    db.commit()
    db.close()
    before = file.read_bytes()
    for task in (check_file, statistics, clear):
        with pytest.raises(MinitxError, match="a.sqlite: is not a cache of answers; give another"):
            task(file)
    with pytest.warns(MinitxWarning, match="is not a cache of answers"):
        store_of(file).put(key(1), answer(1))
    assert file.read_bytes() == before


@pytest.mark.parametrize("schema", [SCHEMA - 1, SCHEMA + 1])
def test_older_schema_is_made_anew_and_a_newer_one_refused(file, schema):
    filled(file)
    db = sqlite3.connect(file)
    db.execute(f"PRAGMA user_version = {schema}")
    db.execute('CREATE TABLE "old ""one""" (x)')
    db.commit()
    db.close()
    if schema > SCHEMA:
        with pytest.raises(MinitxError, match="was written by a newer minitx"):
            check_file(file)
        return
    check_file(file)
    store = store_of(file)
    assert store.find(key(1)) is None
    store.put(key(1), answer(1))
    assert store.find(key(1)) == answer(1) and statistics(file).answers == 1


def test_new_file_is_marked_as_ours(file):
    head = filled(file)[:100]
    assert int.from_bytes(head[68:72], "big") == APPLICATION == int.from_bytes(b"mtxa", "big")


# minitx cache ------------------------------------------------------------------------------------


def test_statistics_count_answers_bytes_and_hits_by_model(file):
    assert statistics(file).answers == 0 and not file.exists(), "asking makes no file"
    store = store_of(file, 2.0)
    for i, model in enumerate(("a", "b", "a")):
        store.put(key(i), [i] * 10, model)
    for i in (0, 0, 1):
        store.find(key(i))
    found = statistics(file)
    assert (found.answers, found.bytes, found.most) == (3, 3 * (ROW + 41), 2_000_000)
    assert found.hits == 3 and time.time() - 60 < found.oldest <= found.newest <= time.time()
    assert [(m.model, m.answers, m.hits) for m in found.models] == [("a", 2, 2), ("b", 1, 1)]


def test_clear_removes_all_or_one_models_answers(file):
    assert clear(file) == 0 and not file.exists()
    store = store_of(file)
    for i, model in enumerate(("a", "b", "a")):
        store.put(key(i), [i] * 10, model)
    assert clear(file, "a") == 2 and clear(file, "a") == 0
    assert store.find(key(0)) is None and store.find(key(1)) == [1] * 10, "others are still there"
    assert statistics(file).bytes == ROW + 41
    assert clear(file) == 1 and statistics(file).bytes == 0
    store.put(key(5), [5])
    assert store.find(key(5)) == [5], "a process that has the file open goes on"
