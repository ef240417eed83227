"""What predictive attention counts, refuses and prints; that it is right: see
test_predictive_attention.py."""

import literal_predictive_attention as literal
import numpy as np
import pytest
from qkv import IDS, random_qkv, run
from test_predictive_attention import part
from tiny import tiny_lm

from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.state import Layer
from minitx.technique import apply, find

# Counts ------------------------------------------------------------------------------------------


def counted(lm, ids, state):
    """(predictor's entry, exact entry) of the attention of block 0, and the events of all."""
    with counting(lm) as counts:
        lm.model(ids, state)
    path = "model.stack.blocks.0.attn.attend"
    return counts.entries[path + ".selector.predict"], counts.entries[path], counts.events


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("codes, code_bytes", [("integer", 1), ("leading-one", 4)])
def test_a_decoded_token_costs_what_the_card_says(family, codes, code_bytes):
    options = {"codes": codes, "rho": 0.25, "tau": 0.0}
    lm = apply(tiny_lm(family), {"predictive_attention": options})
    c, state = lm.model.config, lm.model.new_state()
    H, K, d = c.heads, c.kv_heads, c.head_width
    lm.model(IDS[:29], state)
    S, r = 30, 8  # ceil(0.25 * 30)
    predictor, exact, events = counted(lm, IDS[29:30], state)
    assert predictor.multiply_adds == H * S * d
    assert predictor.cache_bytes == K * S * (code_bytes * d + 4)
    assert exact.multiply_adds == H * 2 * r * d
    assert exact.cache_bytes == H * 8 * r * d
    assert events == {"keys seen": c.layers * H * S, "keys kept": c.layers * H * r}

    dense, state = tiny_lm(family), lm.model.new_state()
    dense.model(IDS[:29], state)
    with counting(dense) as counts:
        dense.model(IDS[29:30], state)
    before = counts.entries["model.stack.blocks.0.attn.attend"]
    assert before.multiply_adds == H * 2 * S * d and before.cache_bytes == K * 8 * S * d


def test_counts_follow_the_threshold():
    """r is as the twin finds it from the very queries and keys, head by head."""
    q, k, v = random_qkv(7, S=33)
    settings = dict(b=4, tau=0.1, rho=1.0, r_min=4)
    attend, layer = part(**settings), Layer(33)
    run(attend, q, k, v, (32,), layer)
    last = q[:, 32:], k, v
    _, kept = literal.attention(*(x.tolist() for x in last), 0.5, **settings)
    with counting(attend) as counts:
        run(attend, q, k, v, (1,), layer)
    r = np.array(kept).sum()
    assert len({tuple(row) for row in kept}) > 1  # heads differ in how many they keep
    assert counts.entries[""].multiply_adds == 2 * r * 8
    assert counts.entries["selector.predict"].multiply_adds == 4 * 33 * 8
    assert counts.events == {"keys seen": 4 * 33, "keys kept": r}


def test_a_prompt_saves_nothing_and_says_what_it_could():
    lm = apply(tiny_lm(), {"predictive_attention": True})
    c = lm.model.config
    predictor, exact, events = counted(lm, IDS[:30], lm.model.new_state())
    rectangle = c.heads * 30 * 30 * c.head_width
    assert predictor.multiply_adds == rectangle and exact.multiply_adds == 2 * rectangle
    assert events["keys seen"] == c.layers * c.heads * 30 * 31 // 2
    assert c.layers * c.heads * 30 <= events["keys kept"] < events["keys seen"]


def test_padding_counts_as_one_key():
    """A row of padding sees itself alone, whichever way it comes."""
    q, k, v = random_qkv(8, lead=(2,), S=6)
    for sizes in ((6,), (1,) * 6):
        attend = part(tau=1e-9)
        with counting(attend) as counts:
            run(attend, q, k, v, sizes, Layer(6, np.array([0, 4])))
        seen = 4 * (21 + (4 + 3))
        assert counts.events == {"keys seen": seen, "keys kept": seen}


# Refusals, and what is printed -------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"b": 1}, "b=1; a whole number from 2 to 8"),
        ({"b": 9}, "b=9"),
        ({"tau": -0.1}, "tau=-0.1; a number from 0 (keep all) to 1"),
        ({"tau": 1.5}, "tau=1.5"),
        ({"rho": 0.0}, "rho=0; a number above 0"),
        ({"rho": 1.1}, "rho=1.1"),
        ({"r_min": 0}, "r_min=0; a whole number of at least 1"),
        ({"codes": "leading-one"}, "give tau=0 and choose by rho"),
    ],
)
def test_settings_that_are_refused(options, words):
    with pytest.raises(MinitxError) as refused:
        apply(tiny_lm(), {"predictive_attention": options})
    text = str(refused.value)
    assert text.startswith("predictive_attention has ") and words in text and "\n" not in text


def test_the_tree_shows_the_settings_and_the_card_that_it_is_inferred():
    lm = apply(tiny_lm(), {"predictive_attention": {"tau": 0.1}})
    drawn = repr(lm.model)
    assert "code: IntegerCode(b=4)" in drawn and "keep: Keep(tau=0.1, rho=1, r_min=4)" in drawn
    sections = find("predictive_attention").card.sections
    assert "unconfirmed" in sections["Paper"] and "only the abstract" in sections["Paper"]
    assert "5.7" not in str(sections) and "1%" not in str(sections)
