"""The evaluation, on models whose score is known beforehand, and against shallower models."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from test_compare import story_lm

from minitx.build import random_model
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.lab import evaluate as evaluation
from minitx.lab.evaluate import Profile, encode, evaluate, evaluate_model, exit_profile
from minitx.lm import LM
from minitx.model import Stack
from minitx.technique import apply
from minitx.training.data import end_id, story_tokenizer
from minitx.training.stories import HOPS, guess_baselines, stories

TOKENIZER = story_tokenizer()
V = len(TOKENIZER)
STORIES = list(islice(stories("train", "full", 11), 30))
CONFIG = Config("llama", V, 16, 3, 2, 1, 8, 24, 512, rope_width=8)


class Knowing:
    """Says what follows in the one of the stories that it reads, but errs on some values."""

    def __init__(self, read, wrong=()):
        self.known = [np.array(s.ids) for s in encode(TOKENIZER, read)]
        self.wrong = [TOKENIZER.encode(" " + word, special=False)[0] for word in wrong]

    def __call__(self, ids):
        logits = np.zeros((*ids.shape, V), np.float32)
        for row, given in zip(logits, ids):
            (story,) = (
                s
                for s in self.known
                if len(s) <= len(given) + 1 and (s[:-1] == given[: len(s) - 1]).all()
            )
            said = np.where(np.isin(story[1:], self.wrong), 0, story[1:])
            row[np.arange(len(said)), said] = 100
        return logits


def answers(word=None):
    return [a for s in STORIES for a in s.answers if word is None or a.value == word]


def test_perfect_model_has_loss_zero_and_full_accuracy():
    r = evaluate(Knowing(STORIES), TOKENIZER, STORIES)
    assert set(r.by_kind.values()) == set(r.by_hops.values()) == {1.0}
    assert sum(r.answers.values()) == len(answers())
    assert r.loss < 1e-5 and r.answer_loss < 1e-5
    count = sum(len(TOKENIZER.encode(s.text)) for s in STORIES) - len(answers())
    assert r.tokens == count
    assert r.floor == pytest.approx(sum(s.nats for s in STORIES) / count)
    assert r.gap == r.loss - r.floor < -0.5  # it knows what nobody can: the stories by heart


def test_model_wrong_on_one_word():
    word = max((a.value for a in answers()), key=lambda w: len(answers(w)))
    r = evaluate(Knowing(STORIES, [word]), TOKENIZER, STORIES)
    for kind, accuracy in r.by_kind.items():
        of_kind = [a for a in answers() if a.kind == kind]
        right = sum(a.value != word for a in of_kind)
        assert accuracy == pytest.approx(right / len(of_kind)) and r.answers[kind] == len(of_kind)
    for hops, accuracy in r.by_hops.items():
        of_hops = [a for a in answers() if HOPS[a.kind] == hops]
        assert accuracy == pytest.approx(sum(a.value != word for a in of_hops) / len(of_hops))
    assert min(r.by_kind.values()) < 1


def test_model_that_always_predicts_one_word():
    places = [a.value for a in answers() if a.kind == "where1"]
    place = max(places, key=places.count)
    said = TOKENIZER.encode(" " + place, special=False)[0]

    class Parrot:
        def __call__(self, ids):
            return np.broadcast_to(np.eye(V, dtype=np.float32)[said], (*ids.shape, V))

    r = evaluate(Parrot(), TOKENIZER, STORIES)
    for kind, accuracy in r.by_kind.items():
        of_kind = [a.value for a in answers() if a.kind == kind]
        assert accuracy == pytest.approx(of_kind.count(place) / len(of_kind))
    assert 0 < r.by_kind["where1"] < 0.5 and r.by_kind["count"] == 0


def test_uniform_model_has_loss_log_v():
    r = evaluate(lambda ids: np.zeros((*ids.shape, V), np.float32), TOKENIZER, STORIES)
    assert r.loss == pytest.approx(np.log(V), rel=1e-6)
    assert r.answer_loss == pytest.approx(np.log(V), rel=1e-6)


def test_guess_is_the_best_baseline():
    r = evaluate(Knowing(STORIES), TOKENIZER, STORIES)
    for kind, found in guess_baselines(STORIES).items():
        assert r.guess[kind] == max(found.values()) and f"{100 * r.guess[kind]:.1f} %" in str(r)


def test_evaluate_is_independent_of_batches():
    model = random_model(CONFIG, 2, np.float64)
    one, many = (evaluate(model, TOKENIZER, STORIES, n) for n in (1, 5000))
    assert one.by_kind == many.by_kind and one.answers == many.answers
    assert one.loss == pytest.approx(many.loss, rel=1e-12)
    assert one.answer_loss == pytest.approx(many.answer_loss, rel=1e-12)
    assert one.floor == pytest.approx(many.floor, rel=1e-12)


def test_exit_profile_equals_shallower_models():
    model = random_model(CONFIG, 3)
    profile = exit_profile(model, TOKENIZER, STORIES)
    assert len(profile) == 3
    for depth, r in enumerate(profile, 1):
        cut = replace(model, stack=Stack(model.stack.blocks[:depth]))
        assert r == evaluate(cut, TOKENIZER, STORIES)
    assert len({r.loss for r in profile}) == 3
    assert "3 of 3" in str(Profile(profile))


def test_evaluate_model_reads_held_out_stories():
    lm = LM(random_model(CONFIG, 3), TOKENIZER)
    r = evaluate_model(lm, 3, "one_hop_tiny")
    wanted = list(islice(stories("evaluation", "one_hop_tiny", 0), 3))
    assert r == evaluate(lm.model, TOKENIZER, wanted)
    assert evaluate_model(lm, 3, "one_hop_tiny", depths=True).depths[-1] == r
    assert r.as_dict()["gap"] == r.gap


def test_truncated_stories_count_whole_pieces():
    whole = encode(TOKENIZER, STORIES)
    cut = encode(TOKENIZER, STORIES, 20)
    for a, b, story in zip(whole, cut, STORIES):
        assert a.ids[:21] == b.ids and a.kinds[:20] == b.kinds and len(b.kinds) == 20
        assert 0 < b.nats < a.nats == pytest.approx(story.nats)
        assert a.ids[0] == a.ids[-1] == end_id(TOKENIZER)


def test_bad_input_is_refused():
    model = random_model(replace(CONFIG, context=40), 0)
    with pytest.raises(MinitxError, match="context is 40"):
        evaluate(model, TOKENIZER, STORIES)
    with pytest.raises(MinitxError, match="at least one story"):
        evaluate(model, TOKENIZER, [])
    with pytest.raises(MinitxError, match="tokenizer"):
        evaluate_model(LM(model), 3)
    with pytest.raises(MinitxError, match="stories must be an integer >= 1"):
        evaluate_model(LM(model, TOKENIZER), 0)


def test_evaluate_bar_advances_by_the_stories_of_each_batch(monkeypatch):
    steps = []

    @contextmanager
    def recorded(total, label, **options):
        steps.append(total)
        yield SimpleNamespace(update=steps.append)

    monkeypatch.setattr(evaluation, "bar", recorded)
    read = [evaluation.Encoded([1] * (n + 1), [0] * n, 0.0) for n in (3, 3, 5, 9)]
    rows = [len(batch.ids) for batch in evaluation.shown_batches(read, None, 6, shown=True)]
    assert rows == [2, 1, 1] and steps == [4, *rows], "total, then the stories of each batch"


@pytest.mark.parametrize(
    "name, options",
    [("layer_reorder", {"layers": "1,0"}), ("lazy_tokens", {"keep": 0.5}), ("early_exit", {})],
)
def test_profile_by_depth_refuses_blocks_that_do_not_run_one_after_another(name, options):
    lm = apply(story_lm(), {name: options})
    with pytest.raises(MinitxError, match=f"With {name}, blocks do not run one after another"):
        evaluate_model(lm, 1, depths=True)
