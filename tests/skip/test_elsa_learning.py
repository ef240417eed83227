"""How elsa learns its thresholds, what it counts, refuses and prints; that it is right otherwise:
see test_elsa.py."""

import literal_elsa as literal
import numpy as np
import pytest
from qkv import random_qkv, run
from test_elsa import IDS, attend, kept_of, twin
from tiny import END, TOKENIZER, tiny_lm, tiny_model

from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.model import Attend
from minitx.shared.sparse_attention import Visible
from minitx.skip.elsa import learn, samples
from minitx.skip.elsa.hashing import angle_bias
from minitx.state import Layer
from minitx.technique import apply, find, swap, wrap
from minitx.training.calibration import calibration_texts
from minitx.training.stories import split_of
from minitx.tree import Part, part

# Learning ----------------------------------------------------------------------------------------


@part
class Recorder(Part):
    """Dense attention that keeps a copy of its queries and keys, as lists."""

    dense: Part
    seen: list

    def __call__(self, q, k, v, layer):
        self.seen.append((q.tolist(), k.tolist()))
        return self.dense(q, k, v, layer)


def recorded(lm, texts):
    """For each layer the (queries, keys) of each text."""
    layers = [[] for _ in lm.model.stack.blocks]

    def change(attn, index):
        return swap(attn, Attend, lambda dense: Recorder(dense, layers[index]))

    model = wrap(lm.model, "attn", change)
    for ids in texts:
        model(ids)
    return layers


TEXTS = [IDS[:30].tolist(), IDS[3:39].tolist(), IDS[20:21].tolist()]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("p, min_visible", [(0.5, 1), (1.0, 1), (1.0, 8), (3.0, 2)])
def test_thresholds_are_the_twins(family, p, min_visible):
    lm = tiny_lm(family, np.float64)
    found = learn(lm, p, TEXTS, min_visible)
    assert found.shape == (2, 2)
    for t, seen in zip(found, recorded(lm, TEXTS)):
        expected = literal.thresholds(seen, p, lm.model.config.head_width**-0.5, min_visible)
        np.testing.assert_allclose(t, expected, atol=1e-12)


def test_texts_longer_than_a_block_of_rows():
    lm = tiny_lm(model=tiny_model(dtype=np.float64, context=150))
    text = np.random.default_rng(3).integers(0, 258, 139).tolist()
    found = learn(lm, 1.0, [text], 70)
    seen = recorded(lm, [text])
    np.testing.assert_allclose(found[1], literal.thresholds(seen[1], 1.0, 8**-0.5, 70), atol=1e-12)


def test_thresholds_rise_with_p_so_that_survivors_are_nested():
    lm, p = tiny_lm(), (0.1, 0.5, 1.0, 2.0, 4.0)
    t = [learn(lm, each, TEXTS) for each in p]
    assert all((a <= b).all() and (a < b).any() for a, b in zip(t, t[1:]))
    q, k, _ = random_qkv(H=2, K=1)
    kept = [kept_of(attend(each[0]), q, k) for each in t]
    assert all((fewer <= more).all() for more, fewer in zip(kept, kept[1:]))


def test_queries_or_keys_of_length_zero_say_0():
    q, k, _ = random_qkv(S=4)
    visible = Visible(4, 4)
    with np.errstate(invalid="raise", divide="raise"):
        assert not samples(0 * q, k, 1.0, 0.5, visible).any()
        assert not samples(q, 0 * k, 1.0, 0.5, visible).any()


@part
class Listening(Part):
    """A tokenizer that notes the texts that it is given."""

    heard: list

    def encode(self, text, special=True):
        self.heard.append(text)
        return TOKENIZER.encode(text)

    def decode(self, ids):
        return TOKENIZER.decode(ids)


@pytest.mark.parametrize("count", [1, 3])
def test_only_calibration_stories_are_read(count):
    listening = Listening([])
    lm = apply(tiny_lm(tokenizer=listening), {"elsa": {"stories": count}})
    assert len(set(listening.heard)) == count == len(listening.heard)
    assert {split_of(text) for text in listening.heard} == {"calibration"}
    again = apply(tiny_lm(), {"elsa": {"stories": count}})
    for one, other in zip(lm.model.stack.blocks, again.model.stack.blocks):
        np.testing.assert_array_equal(one.attn.attend.selector.t, other.attn.attend.selector.t)


def test_texts_begin_as_stories_do_and_fit_the_context():
    texts = calibration_texts(tiny_lm(), 2)
    assert [len(ids) for ids in texts] == [48, 48] and texts[0][0] == END


def test_the_thresholds_of_a_model_are_those_of_its_own_stories():
    lm = tiny_lm()
    expected = learn(lm, 1.0, calibration_texts(lm, 2), 5)
    changed = apply(lm, {"elsa": {"stories": 2, "min_visible": 5}})
    for t, block in zip(expected, changed.model.stack.blocks):
        np.testing.assert_allclose(block.attn.attend.selector.t, t, rtol=1e-6)


# Options -----------------------------------------------------------------------------------------


def test_one_threshold_for_all_needs_no_tokenizer():
    lm = apply(tiny_lm(tokenizer=None), {"elsa": {"t": 0.25}})
    for block in lm.model.stack.blocks:
        assert block.attn.attend.selector.t.tolist() == [0.25, 0.25]
    apply(tiny_lm(tokenizer=None), {"elsa": {"p": 0.0}})


@pytest.mark.parametrize("k", [None, 5, 8, 20])
def test_bits_and_their_correction(k):
    lm = apply(tiny_lm(), {"elsa": {"k": k, "t": 0.2, "seed": 4}})
    chosen = lm.model.stack.blocks[1].attn.attend.selector
    bits = 8 if k is None else k
    assert chosen.hash.k == bits and chosen.cosines.shape == (bits + 1,)
    assert chosen.theta_bias == angle_bias(8, bits, 4)
    given = apply(tiny_lm(), {"elsa": {"k": k, "t": 0.2, "theta_bias": 0.0}})
    assert given.model.stack.blocks[0].attn.attend.selector.theta_bias == 0


@pytest.mark.parametrize(
    "options, words",
    [
        ({"p": -0.5}, "p=-0.5; a number from 0 (keep all)"),
        ({"p": np.inf}, "p=inf"),
        ({"k": 0}, "k=0; a whole number of bits from 1 to 4096"),
        ({"k": 10**9}, "k=1000000000"),
        ({"theta_bias": -0.1}, "theta_bias=-0.1; an angle from 0 to pi"),
        ({"theta_bias": 4.0}, "theta_bias=4"),
        ({"stories": 0}, "stories=0; at least 1"),
        ({"min_visible": 0}, "min_visible=0; a whole number of at least 1"),
        ({"min_visible": 49}, "min_visible=49, but no query of the calibration stories sees"),
        ({"seed": -1}, "seed=-1; a whole number from 0"),
    ],
)
def test_settings_that_are_refused(options, words):
    with pytest.raises(MinitxError) as refused:
        apply(tiny_lm(), {"elsa": options})
    text = str(refused.value)
    assert text.startswith("elsa has ") and words in text and "\n" not in text


def test_without_a_tokenizer_a_threshold_has_to_be_given():
    with pytest.raises(MinitxError, match="^elsa learns from .* no tokenizer .* such as t=0.3.$"):
        apply(tiny_lm(tokenizer=None), {"elsa": True})


def test_the_tree_shows_the_settings_and_the_card_what_was_chosen_here():
    drawn = repr(apply(tiny_lm(), {"elsa": {"t": 0.2, "theta_bias": 0.25}}).model)
    assert "choose: AlikeKeys(theta_bias=0.25, cosines 9, t 2)" in drawn
    assert "hash: SignHash(k=8)" in drawn and "factors.1: Factor(a 4x4)" in drawn
    card = find("elsa").card.sections
    assert "chosen here" in card["Paper"] and "chosen here" in card["Online"]
    assert "58.1" not in str(card) and "1%" not in str(card)


# Counts ------------------------------------------------------------------------------------------


def counted(lm, ids, state):
    """Entries of the attention of block 1 (the hash, the rest of choosing, the exact part), and
    the events of all."""
    with counting(lm) as counts:
        lm.model(ids, state)
    path = "model.stack.blocks.1.attn.attend"
    choosing = counts.entries[path + ".selector"]
    return counts.total(path + ".selector.hash"), choosing, counts.entries[path], counts.events


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("k, batches, hash_bytes", [(None, 1, 1), (12, 2, 2), (24, 3, 3)])
def test_a_decoded_token_costs_what_the_card_says(family, k, batches, hash_bytes):
    lm = apply(tiny_lm(family), {"elsa": {"k": k}})
    c, state = lm.model.config, lm.model.new_state()
    H, K, d, f, S = c.heads, c.kv_heads, c.head_width, 2 + 4, 30
    lm.model(IDS[:29], state)
    hashing, choosing, exact, events = counted(lm, IDS[29:30], state)
    assert hashing.multiply_adds == batches * d * f * (H + K)
    assert choosing.multiply_adds == H * S + K * d
    assert choosing.cache_bytes == K * S * (hash_bytes + 4)
    kept = exact.multiply_adds // (2 * d)  # over the heads
    assert H <= kept < H * S and exact.multiply_adds == 2 * d * kept
    assert exact.cache_bytes == 8 * d * kept
    assert events["keys seen"] == c.layers * H * S
    assert events["bits compared"] == c.layers * H * S * (k or d)


def test_counts_follow_the_thresholds():
    """Kept are as many as the twin keeps, head by head."""
    q, k, v = random_qkv(7, S=33)
    attention, layer = attend(), Layer(33)
    run(attention, q, k, v, (32,), layer)
    _, kept = twin(q[:, 32:], k, v, attention)
    with counting(attention) as counts:
        run(attention, q, k, v, (1,), layer)
    r = [len(which) for (which,) in kept]
    assert len(set(r)) > 1 and r[3] == 1
    assert counts.entries[""].multiply_adds == 2 * 8 * sum(r)
    assert counts.events == {
        "keys seen": 4 * 33,
        "keys kept": sum(r),
        "bits compared": 4 * 33 * 8,
        "queries without a key alike enough": 1,
    }


def test_a_prompt_saves_nothing_and_says_what_it_could():
    lm = apply(tiny_lm(), {"elsa": True})
    c = lm.model.config
    H, K, d, T = c.heads, c.kv_heads, c.head_width, 30
    hashing, choosing, exact, events = counted(lm, IDS[:T], lm.model.new_state())
    assert hashing.multiply_adds == d * 6 * (H + K) * T
    assert choosing.multiply_adds == H * T * T + K * d * T
    assert exact.multiply_adds == 2 * d * H * T * T
    assert events["keys seen"] == c.layers * H * T * (T + 1) // 2
    assert c.layers * H * T <= events["keys kept"] < events["keys seen"]
