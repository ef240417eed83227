"""On the shipped ``stories`` and 100 held-out stories: what claims to change nothing changes no
word. (That the numbers agree too is for test_contract.py, in float64.)

Each story's beginning with what the dense model makes of it is read in one pass: every word of it
has to be the most likely for the changed model too, which is what greedy decoding would choose.
Some are generated again, token by token; all of them, if it is the decoding loop that a technique
swaps. Some are so slow in NumPy that fewer stories are read with them.
"""

from functools import cache

import numpy as np
import pytest
from same import assert_same

import minitx
from minitx.lab.evaluate import held_out
from minitx.technique import apply, techniques
from minitx.tree import walk

STORIES, PROMPT, NEW, TOLD = 100, 30, 20, 3
EXACT = {t.name: {} for t in techniques() if t.exact}
NEUTRAL = {t.name: t.neutral for t in techniques() if t.neutral is not None}
LEVELS = {t.name: t.level for t in techniques()}
SLOW = {"absorb_products": 25, "order_products": 8, "separate_magnitudes": 25, "pack_zeros": 25}


@cache
def stories():
    return minitx.load("stories")


@cache
def prompts():
    lm = stories()
    return [lm.tokenizer.encode(story.text)[:PROMPT] for story in held_out(lm, STORIES)]


@cache
def dense_texts():
    return stories().generate(prompts(), NEW)


def is_dense(lm) -> bool:
    """Is it the dense model: the same parts, with the same settings and numbers?"""
    found, dense = (numbers(lm.model) for lm in (lm, stories()))
    return repr(lm) == repr(stories()) and all(
        np.array_equal(a, b) for a, b in zip(found, dense, strict=True)
    )


def numbers(model) -> list:
    """All arrays of a model, in the order of its parts."""
    values = (value for _, node in walk(model) for value in vars(node).values())
    return [value for value in values if isinstance(value, np.ndarray)]


def fitting(wanted: dict) -> dict:
    """Of these techniques those that fit the model and each other, taken in order: of some that
    want the same part only the first fits."""
    chosen = {}
    for name, options in wanted.items():
        try:
            apply(stories(), chosen | {name: options})
        except minitx.MinitxError:
            continue
        chosen[name] = options
    return chosen


@cache
def all_exact() -> dict:
    """Without absorb_products, which hardly anything fits, and without what makes every product
    slow."""
    return fitting({n: {} for n in EXACT if n != "absorb_products" and LEVELS[n] != "matrices"})


@cache
def all_neutral() -> dict:
    return fitting(NEUTRAL)


SETS = [
    *(pytest.param({name: EXACT[name]}, id=name) for name in EXACT),
    *(pytest.param({name: NEUTRAL[name]}, id=f"neutral {name}") for name in NEUTRAL),
    pytest.param(all_exact, id="all exact ones that fit each other"),
    pytest.param(all_neutral, id="all neutral ones that fit each other"),
]


@pytest.mark.parametrize("chosen", SETS)
def test_the_greedy_text_of_100_stories_is_the_dense_one(chosen):
    chosen = chosen() if callable(chosen) else chosen
    try:
        lm = apply(stories(), chosen)
    except minitx.MinitxError as error:
        assert len(chosen) == 1 and next(iter(chosen)) in str(error)
        pytest.skip(str(error))
    if is_dense(lm):
        assert all(name in NEUTRAL for name in chosen), "an exact technique changed nothing"
        return  # what would run is what the texts were generated with
    texts = list(zip(prompts(), dense_texts()))
    for prompt, new in texts if chosen == {"speculative": {}} else texts[:TOLD]:
        assert lm.generate(prompt, NEW) == new
    if all(LEVELS[name] in ("decode", "answer") for name in chosen):
        return  # the model that reads is the dense one
    texts = texts[: min(SLOW.get(name, STORIES) for name in chosen)]
    # A story that has come to its end is shorter: those of one length are read in one batch.
    for length in {len(new) for _, new in texts}:
        some = [(prompt, new) for prompt, new in texts if len(new) == length]
        logits = lm.model(np.array([prompt + new for prompt, new in some]))
        best = logits[:, PROMPT - 1 : -1].argmax(-1)
        assert_same(best, np.array([new for _, new in some]), "another word")


def test_most_techniques_fit_together():
    assert len(all_exact()) >= 5 and len(all_neutral()) >= 4
