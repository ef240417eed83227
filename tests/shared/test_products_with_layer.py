"""shared.products_with_layer: the same products, called with the layer."""

import numpy as np
import pytest
from tiny import FAMILIES, check_close, in_chunks, tiny_lm

from minitx.errors import MinitxError
from minitx.model import Attention, Linear
from minitx.shared.products_with_layer import (
    WHERE,
    StatefulProduct,
    StatelessProduct,
    replace_products,
)
from minitx.state import Layer
from minitx.technique import apply, blocks_of
from minitx.tree import part, walk

IDS = np.random.default_rng(2).integers(0, 258, 24)


@part
class Recording(StatefulProduct):
    linear: Linear
    seen: list

    def one(self, x, layer: Layer):
        assert x.ndim == 2 and len(layer.tokens) == len(x)
        self.seen.append(layer.tokens.array)
        return self.linear(x)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("family", FAMILIES)
def test_model_computes_what_it_did_and_the_named_products_get_the_layer(family, where):
    dense, seen = tiny_lm(family, dtype=np.float64), []
    names = []

    def make(linear, name, index):
        names.append((index, name))
        return Recording(linear, seen)

    lm = replace_products(dense, where, make)
    assert sorted(names) == sorted((i, name) for i in (0, 1) for name in WHERE[where])
    found = in_chunks(lm, IDS, (10, 1, 13))
    check_close(found, dense.logits(IDS), 1e-13, f"where={where}")
    assert len(seen) == 3 * len(names) and seen[-1].tolist() == list(range(11, 24))
    rows = np.stack([IDS, IDS[::-1]])  # a batch without a cache: one sequence after another
    check_close(lm.logits(rows), dense.logits(rows), 1e-13, "a batch")


def test_only_the_given_layers_are_changed():
    lm = replace_products(
        tiny_lm(), "all", lambda linear, *_: StatelessProduct(linear), range(1, 2)
    )
    first, second = (repr(block) for block in blocks_of(lm))
    assert "StatelessProduct" not in first and second.count("StatelessProduct") == 5


def test_keys_can_be_stored_and_queries_asked_apart():
    dense = tiny_lm(dtype=np.float64)
    lm = replace_products(dense, "attention", lambda linear, *_: Recording(linear, []))
    x, found = np.random.default_rng(0).standard_normal((5, 16)), []
    for model in (dense.model, lm.model):
        attn, layer = blocks_of(model)[0].attn, Layer(5).take(5)
        attn.backfill(x, layer)
        found.append(attn.attend_from(x, layer))
    assert type(attn) is not Attention
    check_close(found[1], found[0], 1e-13, "attend_from")


def test_batch_with_a_cache_is_refused():
    lm = replace_products(tiny_lm(), "ffn", lambda linear, *_: Recording(linear, []))
    assert lm.model.stack.blocks[0].ffn.down.one_sequence
    with pytest.raises(MinitxError, match="remembers earlier tokens"):
        lm.model(np.stack([IDS, IDS]), lm.model.new_state())


def test_attention_of_another_technique_and_other_matrices_are_refused():
    for other in ({"head_router": {"first": 0}}, {"quantize": {}}):
        lm = apply(tiny_lm(), other)
        with pytest.raises(MinitxError):
            replace_products(lm, "attention", lambda linear, *_: StatelessProduct(linear))
    assert not any(type(node) is StatelessProduct for _, node in walk(tiny_lm()))
