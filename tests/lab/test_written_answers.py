"""``python -m minitx.lab.written_answers``: sentences graded by their last word."""

from dataclasses import replace

import pytest
from tiny import ScriptedLoop

import minitx
from minitx.lab.written_answers import last_word, main, right, written_questions


@pytest.fixture(scope="module")
def lm():
    return minitx.load("stories-draft")


def ids_of(lm, text):
    return lm.tokenizer.encode(text, special=False)


def test_prompt_ends_with_the_question_mark(lm):
    questions = written_questions(lm, 5)
    assert len(questions) > 5
    for q in questions:
        assert lm.tokenizer.decode(q.prompt).endswith("?"), q.kind
        assert len(q.answer) == 1 and q.kind != "mention"


def test_sentence_is_graded_by_its_last_word(lm):
    assert last_word(lm, ids_of(lm, " Leo is in the cellar. Leo ran to the barn.")) == "cellar"
    assert last_word(lm, []) == "" == last_word(lm, ids_of(lm, "."))
    (first, *_) = written_questions(lm, 2)
    word = lm.tokenizer.decode(first.answer)
    for text, ok in ((f" It is the {word.strip()}. The end.", True), (" It is the idea.", False)):
        scripted = replace(lm, decode=ScriptedLoop((ids_of(lm, text),), []))
        assert right(scripted, [first]).tolist() == [ok], text


def test_command_prints_the_model_and_the_technique(capsys):
    main("-m stories-draft --stories 2 --majority-vote votes=3 same=sentence".split())
    found = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in found[-2:]] == ["stories-draft", "majority_vote"]
