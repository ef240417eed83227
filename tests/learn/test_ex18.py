"""Exercise 18: what is no recipe is refused in a sentence, the constraints are those of the text,
and a technique of one's own must keep its promises."""

from types import SimpleNamespace

import numpy as np
import pytest
from tiny import tiny_lm

import minitx
from minitx import ledger
from minitx.learn import ex18_budget
from minitx.learn.check import judge
from minitx.learn.ex18_budget import Score, apply_recipe, broken_promise
from minitx.learn.exercise import find_exercise
from minitx.technique import wrap
from minitx.tree import Part, part

SPEC = dict(work=900.0, share=0.9, loss=0.01, two_hop=92.0, points=1.0)


def verdict_on(made):
    return judge(find_exercise(18), SimpleNamespace(recipe=lambda: made))


@pytest.mark.parametrize(
    "made, words",
    [
        (3, "must return a dict of flags"),
        (None, "must return a dict of flags"),
        (({}, 3), "must return a dict of flags"),
        ({3: {}}, "Expected names of techniques"),
        ({"ffnskip": {}}, "did you mean 'ffn_skip'"),
        ({"ffn_skip": {"treshold": 0.9}}, "Did you mean 'threshold'"),
        ({"ffn_skip": 0.9}, "True, False or a dict"),
        ({"dtype": {}}, "There is no technique 'dtype'"),
        ({"speculative": {}}, "how often the model runs"),
        ({"answer_cache": {}}, "how often the model runs"),
        (({}, lambda lm: None), "must return a language model"),
        (({}, lambda lm: minitx.load("stories", speculative=True)), "not how it is decoded"),
    ],
)
def test_what_is_no_recipe_is_refused_in_a_sentence(made, words):
    verdict = verdict_on(made)
    assert verdict.kind == "error" and words in verdict.message
    assert "Traceback" not in verdict.message


def test_limits_are_those_of_the_text():
    assert not Score(**SPEC).misses(), "each limit itself is allowed"
    for change, word in (
        (dict(share=0.91), "saving"),
        (dict(loss=0.011), "loss by 0.0010 nats"),
        (dict(points=1.2), "two-hop answers by 0.2 points"),
        (dict(loss=float("nan")), "loss"),
    ):
        (missed,) = Score(**SPEC | change).misses()
        assert word in missed
        assert missed in str(Score(**SPEC | change))


def test_dense_model_saves_nothing():
    verdict = verdict_on({})
    assert verdict.kind == "wrong" and "misses the least saving" in verdict.message
    assert verdict.figures["multiply_adds"] == 1 and verdict.figures["loss"] == 0


def test_recipe_is_judged_on_other_stories_for_another_seed():
    texts = [ex18_budget.encoded(seed) for seed in (0, 7)]
    assert texts[0][0].ids != texts[1][0].ids


def test_reference_recipes_hold_the_constraints_and_are_valid():
    lm = tiny_lm()
    for flags, share, loss, points in ex18_budget.REFERENCES:
        assert not Score(0.0, share, loss, 93.0, points).misses()
        assert all(minitx.technique.find(name).checked(options) is not None
                   for name, options in flags.items())  # fmt: skip
    assert apply_recipe(lm, {})[1] is None


# A technique of one's own ------------------------------------------------------------------------


@part
class Changed(Part):
    """An FFN whose output is changed by a function of (x, y, layer)."""

    inner: Part
    change: object

    def __call__(self, x, layer):
        return self.change(x, self.inner(x, layer), layer)


def with_change(change):
    return wrap(tiny_lm(dtype=np.float64), "ffn", lambda ffn, index: Changed(ffn, change))


def test_technique_of_ones_own_that_decides_for_each_token_is_fine():
    def large_only(x, y, layer):
        return np.where((x**2).mean(-1, keepdims=True) > 0.1, y, 0)

    assert broken_promise(with_change(large_only)) is None


def test_technique_that_remembers_other_texts_is_noticed():
    calls = []

    def grows(x, y, layer):
        calls.append(1)
        return y * len(calls)

    assert "the second time" in broken_promise(with_change(grows))


def test_technique_that_looks_at_the_whole_chunk_is_noticed():
    assert "in chunks" in broken_promise(
        with_change(lambda x, y, layer: y - y.mean(-2, keepdims=True))
    )


def test_technique_that_says_that_it_decides_by_step_may_depend_on_the_chunk():
    @part
    class Centered(Changed):
        decides = "step"

    def centered(x, y, layer):
        return y - y.mean(-2, keepdims=True)

    lm = wrap(tiny_lm(dtype=np.float64), "ffn", lambda ffn, index: Centered(ffn, centered))
    assert broken_promise(lm) is None


def test_technique_that_does_not_rewind_is_noticed():
    @part
    class Decays(Part):
        inner: Part
        decides = "step"

        def __call__(self, x, layer):
            seen = layer.memory.recall(self, Count)
            seen.steps += 1
            return self.inner(x, layer) / seen.steps

    class Count:
        steps = 0

        def rewind(self, position):
            pass

    lm = wrap(tiny_lm(dtype=np.float64), "ffn", lambda ffn, index: Decays(ffn))
    assert "After state.rewind" in broken_promise(lm)


def test_work_of_a_technique_of_ones_own_counts():
    """It costs more than it saves, since it counts a product of its own for each token."""

    def costly(x, y, layer):
        ledger.count(10**6 * x.shape[-2])
        return y

    def own(lm):
        return wrap(lm, "ffn", lambda ffn, index: Changed(ffn, costly) if index == 0 else ffn)

    found = verdict_on(({}, own)).figures
    assert found["multiply_adds"] > 1.3 and abs(found["loss"]) < 1e-6
