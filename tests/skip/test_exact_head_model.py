"""The exact head in a model: the dense text, all logits where they are needed, and refusals."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import FAMILIES, tiny_lm

from minitx.build import random_model
from minitx.errors import MinitxError
from minitx.ledger import counting, group_of
from minitx.lm import LM
from minitx.model import Head, Linear, TiedHead
from minitx.skip.exact_head import share_of_dense
from minitx.technique import apply, swap
from minitx.tree import weights

IDS = np.random.default_rng(0).integers(0, 258, 40)
SETTINGS = {
    "svd": dict(method="svd"),
    "svd of width 1": dict(method="svd", k=1),
    "svd of full width": dict(method="svd", k=16),
    "norms": dict(method="norms"),
    "norms in small blocks": dict(method="norms", block=20),
}
settings = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@settings
@dtypes
@pytest.mark.parametrize("family", FAMILIES)
def test_all_families_generate_the_dense_text(family, dtype, options):
    dense = tiny_lm(family, dtype=dtype)
    lm = apply(dense, {"exact_head": options})
    with counting(lm) as counts:
        for ids in IDS.reshape(8, 5):
            assert lm.generate(ids, 20) == dense.generate(ids, 20)
    assert 0 < counts.events["head rows"] and set(counts.by_group()) >= {"head", "blocks.ffn"}
    if options.get("k") == 16:
        assert counts.events["head rows read"] < 0.1 * counts.events["head rows"]


@settings
@dtypes
def test_a_head_with_a_bias(dtype, options):
    """Which a LayerNorm's bias becomes when it is folded."""
    dense = apply(tiny_lm("gpt_neox", dtype=dtype), {"fold_norms": True})
    assert dense.model.head.b is not None
    lm = apply(dense, {"exact_head": options})
    with counting(lm) as counts:
        for ids in IDS.reshape(8, 5):
            assert lm.generate(ids, 20) == dense.generate(ids, 20)
    if options.get("k") != 1:  # which foretells too little
        assert counts.events["heads in full"] < counts.events["head rows"] / 259


@settings
def test_all_logits_are_the_dense_ones_also_in_batches_and_in_draws(options):
    dense = tiny_lm()
    lm = apply(dense, {"exact_head": options})
    np.testing.assert_array_equal(lm.logits(IDS), dense.logits(IDS))
    rows = IDS[:12].reshape(3, 4)
    np.testing.assert_array_equal(lm.model(rows), dense.model(rows))
    prompts = [[1], [2, 3, 4]]
    assert lm.generate(prompts, 10) == dense.generate(prompts, 10)
    drawn = dict(temperature=1.0, top_k=20, seed=3)
    assert lm.generate(IDS[:4], 20, **drawn) == dense.generate(IDS[:4], 20, **drawn)
    with counting(lm) as counts:
        lm.generate(IDS[:4], 5, **drawn)
    assert "head rows" not in counts.events  # these need all logits


def test_only_an_untied_head_is_kept_once_more_for_the_preview():
    for family, method, copies in (
        ("gpt2", "svd", 0), ("gpt2", "norms", 1), ("llama", "svd", 1), ("llama", "norms", 1),
    ):  # fmt: skip
        dense = tiny_lm(family)
        lm = apply(dense, {"exact_head": dict(method=method, k=3, block=100)})
        sizes = [sum(w.size for w in weights(m).values()) for m in (dense, lm)]
        V, D = 259, 16
        own = V * (3 + 1) + D * D if method == "svd" else V + 3  # norms: ids, and n of 3 blocks
        assert sizes[1] - sizes[0] == own + copies * V * D


def test_the_tree_shows_both_heads_and_the_ledger_counts_them_as_one():
    lm = apply(tiny_lm(), {"exact_head": True})
    drawn = str(lm.model)
    assert "head: ExactHead(biased=False)\n" in drawn and "search: Preview(rows 259x16," in drawn
    assert group_of("model.head.search") == group_of("model.head.head") == "head"


def test_a_head_of_another_type_is_refused():
    lm = swap(tiny_lm(), Head, lambda head: Linear(head.w))
    with pytest.raises(MinitxError, match="^exact_head needs a part of type Head or TiedHead, and"):
        apply(lm, {"exact_head": True})


def with_head(W):
    """A small model with W (V, D) as its embedding and its head."""
    config = replace(
        FAMILIES["llama"], vocab_size=len(W), width=W.shape[1], tied=True, bos=None, eos=()
    )
    model = random_model(config, 1)
    return LM(replace(model, embed=replace(model.embed, w=W), head=TiedHead(W)))


def test_it_says_where_it_pays_and_where_it_does_not():
    """Random rows as many as in a large model give nothing away: every row is read, and what looks
    for a way around comes on top. A decaying spectrum does."""
    rng = np.random.default_rng(10)
    config = replace(FAMILIES["llama"], vocab_size=8000, width=288, bos=None, eos=())
    texts = [rng.integers(0, 6000, 10), rng.integers(0, 6000, 8)]
    flat = LM(random_model(config, 1))
    assert share_of_dense(flat, texts, method="norms", block=500) >= 1
    assert share_of_dense(flat, texts, method="svd", k=72) > 1.25
    falling = rng.standard_normal((6000, 32)) * np.exp(-np.arange(32) / 4)
    falling = with_head(falling.astype(np.float32))
    assert share_of_dense(falling, texts, method="svd", k=16) < 0.75
    with pytest.raises(MinitxError, match="at least one"):
        share_of_dense(flat, [])


# Refusals ----------------------------------------------------------------------------------------


@settings
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_damaged_model_is_refused_as_by_the_dense_head(value, options):
    dense = tiny_lm()
    x = np.zeros(16, np.float32)
    x[3] = value
    head = apply(dense, {"exact_head": options}).model.head
    messages = []
    for best in (dense.model.head.argmax, head.argmax):
        with np.errstate(invalid="ignore"), pytest.raises(MinitxError, match="no next") as error:
            best(x)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@settings
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_damaged_weights_are_refused_in_one_sentence(value, options, family):
    lm = tiny_lm(family)
    w = lm.model.head.w.copy()
    w[(2, 7) if family == "llama" else (7, 2)] = value
    lm = replace(lm, model=replace(lm.model, head=type(lm.model.head)(w)))
    with pytest.raises(
        MinitxError, match="^exact_head: the head's weights for token 7 .* needed.$"
    ):
        apply(lm, {"exact_head": options})


@settings
def test_logits_too_large_for_float32_are_refused(options):
    lm = apply(tiny_lm(), {"exact_head": options})
    with (
        np.errstate(over="ignore", invalid="ignore"),
        pytest.raises(MinitxError, match="too large"),
    ):
        lm.model.head.argmax(np.full(16, 3e38, np.float32))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(k=0), "exact_head: k is 0; it must be at least 1 and at most 16"),
        (dict(k=17), "exact_head: k is 17; .* at most 16, the model's width"),
        (dict(block=0), "exact_head: block is 0; it must be at least 1"),
        (dict(method="int8"), "it must be one of svd, norms"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(MinitxError, match=message):
        apply(tiny_lm(), {"exact_head": options})
