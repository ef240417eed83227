"""``minitx keys``: the recorded weights, and the keys that techniques keep."""

import json
from xml.dom import minidom

import numpy as np
import pytest
from tiny import error, tiny_lm

from minitx import ops
from minitx.errors import MinitxError
from minitx.model import Attend
from minitx.pictures.keys_kept import RecordedAttend, keys_kept, with_recorder
from minitx.pictures.keys_kept_svg import as_svg
from minitx.state import Layer
from minitx.technique import apply


def kept_by(flags, new=10, family="llama", **more):
    dense = tiny_lm(family)
    changed = apply(dense, flags)
    return keys_kept(dense, changed, "a title", "once upon", new, temperature=0, **more)


def test_recorded_weights_are_the_softmax_and_the_result_stays():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, 5, 4)) for n in (2, 1, 1))  # 2 query heads, 1 key head
    calls, layer = [], Layer.once(5)
    layer.store(k, v)
    out = RecordedAttend(Attend(0.5), calls)(q, k, v, layer)
    assert np.allclose(out, ops.attention(q, k, v, 0.5)), "the result of attention"
    expected = 0.5 * q @ k.swapaxes(-1, -2)
    expected = ops.softmax(np.where(ops.causal_mask(5, 5), -np.inf, expected))
    assert np.allclose(calls[0].weights, expected), "the attention weights"


def test_recorder_leaves_the_logits_as_they_are():
    for flags in ({}, {"elsa": {"threshold": 0.1}}, {"value_prune": {"keep": 0.5}}):
        lm = apply(tiny_lm(), flags)
        recorded, calls = with_recorder(lm, 1)
        ids = np.arange(12)
        assert error(recorded.logits(ids), lm.logits(ids)) < 1e-6, f"{flags}: other logits"
        assert len(calls) == 1


def test_dense_model_keeps_all_keys_and_misses_nothing():
    found = kept_by({}, head=1)
    T = len(found.columns)
    assert (found.kept == np.tri(T, dtype=bool)).all() and found.ran.all()
    assert not found.missed.any()
    assert np.allclose(found.dense.sum(-1), 1), "the weights of each query sum to 1"


def test_window_keeps_the_sinks_and_the_newest_keys():
    """Both while the prompt runs in one step and afterwards, when rows have been evicted."""
    found = kept_by({"sink_window": {"sinks": 2, "window": 4}})
    i, j = np.indices(found.kept.shape)
    assert (found.kept == ((j < 2) | (j > i - 4)) & (j <= i)).all()
    last = found.dense[-1]
    assert found.missed[-1] == pytest.approx(last[2:-4].sum()), "the mass between sinks and window"


def test_evicted_keys_are_missed_by_their_own_head():
    found = [kept_by({"heavy_hitters": {"heavy": 2, "recent": 3}}, family="gpt2", head=h)
             for h in (0, 1)]  # fmt: skip
    prompt = len(tiny_lm().encode("once upon"))
    for one in found:
        assert (one.counts[prompt + 1 :] == 2 + 3 + 1).all(), "the budget, and the query's own key"
    assert (found[0].kept != found[1].kept).any(), "each key head evicts its own rows"


def test_query_that_the_layer_does_not_run_is_no_miss():
    found = kept_by({"mixture_of_depths": {"router": "random", "capacity": 0.5, "first": 1}})
    assert found.ran.any() and not found.ran.all()
    assert "No attention weights were computed for" in found.sentence
    assert "not run" in found.text()
    assert not found.kept[:, ~found.ran].any(), "a token that did not enter has no key there"
    assert found.as_dict()["mean_missed"] == pytest.approx(found.missed[found.ran].mean())


def test_text_marks_kept_and_missed_keys():
    found = kept_by({"sink_window": {"sinks": 1, "window": 2}})
    kept, dense = np.tri(4, dtype=bool), np.zeros((4, 4))
    kept[3, 1:3] = False
    dense[:, 0], dense[3] = 1, (0.5, 0.2, 0.02, 0.28)
    by_hand = type(found)("t", found.columns[:4], 0, 0, dense, kept, np.ones(4, bool))
    line = by_hand.text().splitlines()[6]
    assert line.endswith("█Xx▓      2/4   22.0%"), line
    narrow = by_hand.text(33).splitlines()[6]
    assert " █▓ " in narrow, "with two keys a character, the one that matters most shows"
    assert "keys kept. They miss 5.5% of the attention on average, 22.0% at most (token 3)" in (
        by_hand.sentence
    )


def test_svg_and_json_are_complete():
    found = kept_by({"elsa": {"threshold": 0.2}})
    root = minidom.parseString(str(as_svg(found))).documentElement
    notes = [t.firstChild.data for t in root.getElementsByTagName("title")][1:]
    assert len(notes) == len(found.columns)
    assert notes[-1].split(", misses")[0].endswith(f"keeps {found.counts[-1]} of {len(notes)} keys")
    again = json.loads(json.dumps(found.as_dict()))
    assert [len(kept) for kept in again["kept"]] == found.counts.tolist()


@pytest.mark.parametrize(
    "flags, more, message",
    [
        ({}, {"layer": 2}, "There is no layer 2; the model has 2: give 0 to 1."),
        ({}, {"head": -1}, "There is no head -1"),
        ({"layer_skip": {"drop": "1"}}, {"layer": 1}, "Layer 1 has no attention weights to show"),
        ({"layer_merge": {"size": 2, "first": 0}}, {}, "leave 1 of 2 layers"),
        ({"head_cascade": {}}, {}, "cannot see which keys AttendHeads uses"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_sentence(flags, more, message):
    with pytest.raises(MinitxError, match=message):
        kept_by(flags, **more)
