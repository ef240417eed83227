"""``minitx cache stats`` and ``minitx cache clear``, and generate with --answer-cache."""

import json
import re

import pytest

WORDS = ("generate", "Once", "-m", "toy", "-n", 9, "-t", 0)


@pytest.fixture
def cache(workdir, monkeypatch):
    """An empty cache folder; its file."""
    monkeypatch.setenv("MINITX_CACHE", str(workdir / "cache"))
    return workdir / "cache" / "answers.sqlite"


def test_second_run_prints_the_stored_answer(run, cache):
    status, text, _ = run(*WORDS)
    assert status == 0 and not cache.exists(), "nothing is kept unless it is asked for"
    for hits in (0, 1, 2):
        assert run(*WORDS, "--answer-cache")[:2] == (0, text)
        assert json.loads(run("cache", "stats", "--json")[1])["hits"] == hits


def test_stats_prints_answers_bytes_and_hits_by_model(run, cache):
    status, out, err = run("cache", "stats")
    assert (status, out, err) == (0, f"{cache}: 0 answers, 0 bytes\n", "") and not cache.exists()
    for number in (9, 9, 10):
        run(*WORDS[:-3], number, *WORDS[-2:], "--answer-cache")
    run("generate", "Once", "-m", "bare", "--answer-cache")  # refused: it has no tokenizer
    status, out, err = run("cache", "stats")
    first, second, blank, heading, row = out.splitlines()
    assert re.fullmatch(r".*answers.sqlite: 2 answers, [56]\d\d of at most 64,000,000 bytes", first)
    assert re.fullmatch(r"1 hits so far; stored \d{4}-.* to \d{4}-.*", second)
    assert heading.split() == ["model", "answers", "bytes", "hits"]
    assert row.split()[:2] == ["toy", "2"] and row.split()[3] == "1" and (status, err) == (0, "")


def test_stats_as_json(run, cache):
    run(*WORDS, "--answer-cache")
    found = json.loads(run("cache", "stats", "--json")[1])
    assert (found["answers"], found["most"], found["hits"]) == (1, 64_000_000, 0)
    assert [m["model"] for m in found["models"]] == ["toy"]


def test_clear_removes_all_or_one_models_answers(run, cache):
    assert run("cache", "clear")[:2] == (0, f"{cache}: 0 answers removed\n") and not cache.exists()
    run(*WORDS, "--answer-cache")
    assert run("cache", "clear", "--model", "other")[1] == f"{cache}: 0 answers removed\n"
    assert run("cache", "clear", "--model", "toy")[1] == f"{cache}: 1 answer removed\n"
    run(*WORDS, "--answer-cache")
    assert run("cache", "clear")[1] == f"{cache}: 1 answer removed\n"
    assert run(*WORDS, "--answer-cache")[1] == run(*WORDS)[1]


def test_another_file(run, cache, workdir):
    file = workdir / "mine.sqlite"
    run(*WORDS, "--answer-cache", f"file={file}")
    assert f"{file}: 1 answer, " in run("cache", "stats", "--file", file)[1] and not cache.exists()
    assert run("cache", "clear", "--file", file)[1] == f"{file}: 1 answer removed\n"


@pytest.mark.parametrize("words", [("stats",), ("clear",), ("clear", "--model", "toy")])
@pytest.mark.parametrize("what", ["folder", "text", "link"])
def test_other_files_are_refused_in_one_sentence(run, workdir, words, what):
    path = workdir / "x"
    if what == "folder":
        path.mkdir()
    elif what == "text":
        path.write_text("no database " * 20)
    else:
        path.symlink_to("nothing")
    status, out, err = run("cache", *words, "--file", path)
    assert (status, out) == (2, "") and re.fullmatch(r"minitx: \S*x: is .*\.\n", err)
    assert what != "text" or path.read_text() == "no database " * 20


def test_damaged_file_is_named_by_stats_and_made_anew_by_clear(run, cache):
    run(*WORDS, "--answer-cache")
    whole = cache.read_bytes()
    cache.write_bytes(whole[:4096] + bytes(len(whole) - 4096))
    status, _, err = run("cache", "stats")
    assert status == 2 and re.fullmatch(r"minitx: .* is damaged .*minitx cache clear .*\n", err)
    expected = run(*WORDS)[1]
    status, out, err = run(*WORDS, "--answer-cache")
    assert (status, out) == (0, expected), "a damaged cache stops nothing"
    assert err.count("minitx: note: ") == 1 and "is damaged" in err
    assert run("cache", "clear")[:2] == (0, f"{cache}: 0 answers removed\n")
    run(*WORDS, "--answer-cache")
    assert "1 answer, " in run("cache", "stats")[1]


@pytest.mark.parametrize(
    "words, why",
    [
        ((), "expected stats or clear"),
        (("stat",), "There is no minitx cache command 'stat'; did you mean 'stats'"),
        (("stats", "--model", "x"), "There is no option --model"),
        (("stats", "--fold-norms"), "minitx cache stats takes no techniques"),
        (("clear", "--json"), "There is no option --json"),
    ],
)
def test_wrong_words_are_explained(run, words, why):
    status, out, err = run("cache", *words)
    assert (status, out) == (2, "") and err.startswith(f"minitx: {why}") and err.count("\n") == 1


def test_generate_streams_although_the_cache_cannot_be_written(run, workdir, monkeypatch):
    (workdir / "file").write_text("no folder")
    monkeypatch.setenv("MINITX_CACHE", str(workdir / "file"))
    expected = run(*WORDS)[1]
    status, out, err = run(*WORDS, "--answer-cache")
    assert (status, out) == (0, expected) and err.count("minitx: note: ") == 1
    assert "cannot be made" in err


def test_show_draws_the_store(run, cache):
    out = run("show", "-m", "toy", "--answer-cache", "megabytes=3")[1]
    assert "AnswerCache(name=toy)" in out and "store: AnswerStore(megabytes=3)" in out
