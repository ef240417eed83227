"""On the shipped ``stories`` and 100 held-out stories: what claims to change nothing changes no
word. (That the numbers agree too is for test_contract.py, in float64.)"""

from functools import cache

import pytest

import minitx
from minitx.lab.evaluate import held_out
from minitx.technique import apply, techniques

STORIES, PROMPT, NEW = 100, 30, 20
EXACT = {t.name: {} for t in techniques() if t.exact}
NEUTRAL = {t.name: t.neutral for t in techniques() if t.neutral is not None}
# Of those that choose keys only one at a time fits: they want the same part.
SCORES = {t.name for t in techniques() if t.level == "scores"}
TOGETHER = {name: options for name, options in NEUTRAL.items() if name not in SCORES - {"elsa"}}
NEUTRALS = [TOGETHER, *({name: options} for name, options in NEUTRAL.items())]
SETS = [
    *(pytest.param({name: options}, id=name) for name, options in EXACT.items()),
    *(pytest.param({name: options}, id=f"neutral {name}") for name, options in NEUTRAL.items()),
    pytest.param(EXACT, id="all exact ones"),
    pytest.param(TOGETHER, id="all neutral ones that fit each other"),
]


@cache
def stories():
    return minitx.load("stories")


@cache
def prompts():
    lm = stories()
    return [lm.tokenizer.encode(story.text)[:PROMPT] for story in held_out(lm, STORIES)]


@cache
def dense_texts():
    return [stories().generate(prompt, NEW) for prompt in prompts()]


@pytest.mark.parametrize("chosen", SETS)
def test_the_greedy_text_of_100_stories_is_the_dense_one(chosen):
    lm = apply(stories(), chosen)
    assert chosen in NEUTRALS or repr(lm) != repr(stories())
    assert [lm.generate(prompt, NEW) for prompt in prompts()] == dense_texts()
