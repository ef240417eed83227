"""What a3 counts, refuses and prints; that it is right: see test_a3.py."""

import math

import literal_a3 as literal
import numpy as np
import pytest
from qkv import random_qkv, run
from test_a3 import part
from tiny import stored, tiny_lm

from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.state import Layer
from minitx.technique import apply, find

IDS = np.random.default_rng(5).permutation(258)[:40]  # no token twice: no products are equal


def side(n, d, M):
    """(products made, pieces looked into, numbers in each) on one side, as the card has it."""
    b = math.isqrt(n)
    heads = d * math.ceil(n / b)
    R = min(heads, d + math.ceil(M / b))
    return heads + R * b, R, b


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("M, T", [(0.5, 0.0), (0.1, 0.0), (0.5, 5.0)])
def test_a_decoded_token_costs_what_the_card_says(family, M, T):
    lm = apply(tiny_lm(family), {"a3": {"M": M, "T": T}})
    c, state = lm.model.config, lm.model.new_state()
    H, K, d, n = c.heads, c.kv_heads, c.head_width, 30
    lm.model(IDS[: n - 1], state)
    with counting(lm) as counts:
        lm.model(IDS[n - 1 : n], state)
    blocks = [f"model.stack.blocks.{i}.attn.attend" for i in range(c.layers)]
    products, R, b = side(n, d, round(M * n))
    for path in blocks:
        entry = counts.entries[path + ".selector.search"]
        assert entry.multiply_adds == 2 * H * products
        assert entry.cache_bytes == 2 * H * 4 * (products + R * b)  # numbers, and rows of pieces
    events = counts.events
    assert events["keys seen"] == c.layers * H * n
    assert events["products by the paper"] == c.layers * H * 2 * round(M * n)
    scored = events["keys scored" if T else "keys kept"]
    assert c.layers * H <= scored <= c.layers * H * max(1, round(M * n))
    assert sum(counts.entries[p].multiply_adds for p in blocks) == d * (
        scored + events["keys kept"]
    )
    moved = events["sorted numbers moved"]
    assert c.layers * K * d <= moved <= c.layers * K * d * n
    dense, state = tiny_lm(family), lm.model.new_state()
    dense.model(IDS[: n - 1], state)
    with counting(dense) as counts:
        dense.model(IDS[n - 1 : n], state)
    assert counts.entries[blocks[0]].multiply_adds == H * 2 * n * d


@pytest.mark.parametrize("n", [100, 1000])
def test_at_longer_contexts_fewer_products_are_made_than_there_are(n):
    q, k, v = random_qkv(1, S=n, d=16)
    attend, layer = part(M=0.125), Layer(n)
    stored(layer, k[:, :-1], v[:, :-1])
    with counting(attend) as counts:
        run(attend, q, k, v, (1,), layer)
    made = counts.entries["choose.search"].multiply_adds / 4
    M = round(n / 8)
    assert made == 2 * side(n, 16, M)[0] < 2 * M + 16 * (4 * math.sqrt(n) + 10)
    assert counts.events["products by the paper"] == 4 * 2 * M < 4 * made
    assert n == 100 or made < n * 16 / 4
    expected, chosen = literal.attention(
        *(x.tolist() for x in (q[:, -1:], k, v)), 0.5, M=0.125, T=5.0
    )
    assert counts.events["keys scored"] == sum(len(row[0][0]) for row in chosen)
    assert counts.events["keys kept"] == sum(len(row[0][1]) for row in chosen)


def test_where_products_are_equal_all_are_looked_at():
    """Keys of two ones: the first M of 2 n products belong to the first M / 2 keys."""
    q, k, v = np.ones((3, 1, 50, 2))
    attend = part()
    with counting(attend) as counts:
        run(attend, q, k, v, (1,) * 50)
    M = [max(1, round(n / 2)) for n in range(1, 51)]
    assert counts.events["keys scored"] == sum(math.ceil(m / 2) for m in M)
    made = counts.entries["choose.search"].multiply_adds
    assert made > sum(2 * side(n, 2, m)[0] for n, m in enumerate(M, 1))


def test_a_rebuild_sorts_when_a_block_is_full():
    q, k, v = random_qkv(2, S=20)
    attend, layer, moved = part(M=0.25, T=0.0, rebuild=8), Layer(20), []
    for _ in range(20):
        with counting(attend) as counts:
            run(attend, q, k, v, (1,), layer)
        moved.append(counts.events["sorted numbers moved"])
        unfinished = layer.tokens.end % 8
        assert counts.events["keys kept"] >= 4 * unfinished
        assert counts.events["keys kept"] <= 4 * (unfinished + max(1, round(layer.tokens.end / 4)))
    assert {n for n, found in enumerate(moved, 1) if found} == {8, 16}
    assert moved[15] == 2 * 8 * 16


@pytest.mark.parametrize("options", [{"exp": "tables"}, {"i": 4}])
def test_other_arithmetic_counts_what_it_gathers(options):
    q, k, v = random_qkv(3, S=20)
    attend, layer = part(**options), Layer(20)
    run(attend, q, k, v, (19,), layer)
    _, chosen = literal.attention(*(x.tolist() for x in (q[:, -1:], k, v)), 0.5, **options)
    most = max(len(row[0][0]) for row in chosen)
    with counting(attend) as counts:
        run(attend, q, k, v, (1,), layer)
    assert counts.entries["arithmetic"].multiply_adds == 4 * 2 * 8 * most
    assert counts.events["keys kept"] == sum(len(row[0][1]) for row in chosen)


# Refusals, and what is printed -------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"M": 0.0}, "M=0; a share above 0, or None"),
        ({"M": -0.5}, "M=-0.5"),
        ({"M": math.inf}, "M=inf"),
        ({"T": -1.0}, "T=-1; a percentage from 0 (off) to 100"),
        ({"T": 100.5}, "T=100.5"),
        ({"rebuild": -1}, "rebuild=-1; 0 (insert each key) or"),
        ({"i": 0}, "i=0; a whole number from 1 to 8, or None"),
        ({"i": 9}, "i=9"),
        ({"f": 0}, "f=0; a whole number from 1 to 8"),
        ({"f": 9, "exp": "tables"}, "f=9"),
        ({"setting": "aggressive", "M": 0.25}, "brings its own M and T; give the one or the other"),
        ({"setting": "conservative", "T": 2.5}, "setting=conservative"),
        ({"setting": "aggressive", "M": None}, "setting=aggressive"),
    ],
)
def test_settings_that_are_refused(options, words):
    with pytest.raises(MinitxError) as refused:
        apply(tiny_lm(), {"a3": options})
    text = str(refused.value)
    assert text.startswith("a3 has ") and words in text and "\n" not in text


def test_the_tree_shows_the_settings_and_the_card_what_is_open():
    lm = apply(tiny_lm(), {"a3": {"setting": "aggressive", "rebuild": 16, "i": 4, "exp": "tables"}})
    drawn = repr(lm.model)
    assert "M=0.125, rebuild=16" in drawn and "floor=0.1" in drawn
    assert "FixedPoint(tables=True, f=4)" in drawn and "Rounded(i=4, f=4)" in drawn
    plain = repr(apply(tiny_lm(), {"a3": True}).model)
    assert "M=0.5" in plain and "floor=0.05" in plain and "FixedPoint" not in plain
    sections = find("a3").card.sections
    assert "unconfirmed" in sections["Paper"] and "chosen here" in sections["Online"]
