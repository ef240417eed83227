"""vocab_prune: which tokens stay, how others are spelled and read, logits, files, figures."""

import literal_vocab_prune as literal
import numpy as np
import pytest
from same import assert_same
from tiny import END, FAMILIES, in_chunks, tiny_lm, tiny_model

import minitx
from minitx.checkpoints.byte_level_bpe import ByteLevelBPE
from minitx.checkpoints.precomputed import Origin, write_precomputed
from minitx.decode import Sampler
from minitx.errors import MinitxError
from minitx.lab.compare import Workload, compare
from minitx.lab.reading import stories_to_read
from minitx.ledger import counting, group_of
from minitx.lm import LM
from minitx.precompute.vocab_prune import (
    BELOW,
    PrunedEmbedding,
    PrunedHead,
    SplittingTokenizer,
    all_pieces,
    kept_tokens,
    nearest_rows,
    needed_tokens,
)
from minitx.technique import apply
from minitx.training.loss import token_losses
from minitx.tree import nbytes, walk

IDS = np.random.default_rng(6).integers(0, 258, 20)
family = pytest.mark.parametrize("family", FAMILIES)


def without_tokenizer(family="llama", dtype=np.float64):
    """A model of which most tokens can be dropped, since no byte is known to be needed."""
    return LM(tiny_model(family, dtype=dtype))


def pruned(lm, texts, **options):
    return apply(lm, {"vocab_prune": options}, calibrate=texts)


def kept_of(lm) -> list[int]:
    return lm.model.head.ids.tolist()


def close(found, expected, what, tolerance=1e-10):
    assert_same(found, expected, what, atol=tolerance * abs(expected).max())


# Worked example ----------------------------------------------------------------------------------


def test_logits_by_hand_of_two_kept_tokens_of_four():
    # ids = (1, 3): row 0 of the pruned table is token 1, row 1 is token 3. The hidden state (1, 2)
    # and the rows (3, 0) and (1, 1) give the logits 3 and 3; the lower id wins. Others: 3 - 50.
    inner = minitx.model.TiedHead(np.array([[3.0, 0.0], [1.0, 1.0]]))
    head = PrunedHead(inner, 4, np.array([1, 3]))
    assert head(np.array([1.0, 2.0])).tolist() == [-47, 3, -47, 3]
    assert head.argmax(np.array([1.0, 2.0])) == 1 and head.argmax(np.array([0.0, 1.0])) == 3


def test_dropped_token_by_hand_reads_the_row_with_the_largest_cosine():
    # Kept: (1, 0) and (0, 5). (3, 4) has the cosines 3/5 and 4/5: row 1, though row 0 is nearer.
    table = np.array([[1.0, 0.0], [3.0, 4.0], [0.0, 5.0]])
    assert nearest_rows(table, np.array([0, 2])).tolist() == [0, 1, 1]


def test_frequent_tokens_by_hand_stay():
    # counts: 7 three times, 9 twice, 3 and 5 once; ties go to the lower id; END is always kept.
    lm, texts = without_tokenizer(), [[7, 9, 7, 5], [3, 7, 9]]
    assert needed_tokens(lm) == [END]
    for keep, expected in ((1, [END]), (3, [7, 9, END]), (4, [3, 7, 9, END])):
        assert kept_tokens(lm, keep, texts, "frequency", 0).tolist() == expected
    assert kept_tokens(lm, None, texts, "frequency", 0).tolist() == [3, 5, 7, 9, END]


ABC = ByteLevelBPE(  # bytes, then "ab", "abc", "abcd", "cd"
    [*(bytes([i]) for i in range(256)), b"ab", b"abc", b"abcd", b"cd"],
    [(97, 98), (256, 99), (257, 100), (99, 100)],
)


def test_dropped_token_by_hand_is_spelled_by_the_longest_kept_ones():
    bytes_and = list(range(256))
    # "abcd" without 258: the longest kept token that it begins with is "abc", then "d"
    assert all_pieces(ABC, [*bytes_and, 256, 257, 259])[258] == [257, 100]
    # without "abc" too: "ab", then "cd"
    assert all_pieces(ABC, [*bytes_and, 256, 259]) == {257: [256, 99], 258: [256, 259]}
    split = SplittingTokenizer(ABC, [*bytes_and, 256, 259])
    assert ABC.encode("abcd!") == [258, 33] and split.encode("abcd!") == [256, 259, 33]
    assert split.decode(split.encode("abcd!")) == "abcd!"


# The literal version -----------------------------------------------------------------------------


@family
@pytest.mark.parametrize("keep", [None, 5, 40])
def test_logits_equal_literal(family, keep):
    lm, texts = without_tokenizer(family), [IDS.tolist(), [7, 7, 7, 200]]
    changed = pruned(lm, texts, keep=keep)
    kept = literal.kept_tokens(259, texts, [END], keep)
    assert kept_of(changed) == kept
    table = lm.model.embed.tokens.w if family == "gpt2" else lm.model.embed.w
    ids = np.append(IDS, [1, 2, 3])
    expected = literal.run(lm.model, table, ids.tolist(), kept)
    close(changed.logits(ids), expected, "all tokens at once")
    close(in_chunks(changed, ids, (9, *[1] * 14)), expected, "a prompt, then token by token")


def test_pieces_equal_literal_on_stories():
    tokenizer, rng = minitx.load("stories").tokenizer, np.random.default_rng(3)
    kept = sorted({*range(256), *rng.choice(np.arange(256, 1022), 200, replace=False).tolist()})
    names = {tokenizer.token_bytes(i, i): i for i in kept}
    found = all_pieces(tokenizer, kept)
    dropped = [i for i in range(1022) if i not in kept and tokenizer.token_bytes(i, i)]
    assert found == {i: literal.split(tokenizer.token_bytes(i, i), names) for i in dropped}


# What is kept and what is dropped ----------------------------------------------------------------


@family
def test_kept_logits_equal_dense_on_a_text_of_kept_tokens(family):
    lm = without_tokenizer(family)
    changed = pruned(lm, [IDS.tolist()])
    kept = kept_of(changed)
    found, expected = changed.logits(IDS), lm.logits(IDS)
    close(found[:, kept], expected[:, kept], "logits of kept tokens")
    dropped = np.setdiff1d(np.arange(259), kept)
    gap = found[:, kept].max(-1, keepdims=True) - found[:, dropped]
    assert_same(gap, BELOW, "logits of dropped tokens", tolerance=1e-7)


def test_dropped_tokens_are_never_sampled():
    changed = pruned(without_tokenizer(), [IDS.tolist()])
    text = changed.generate(IDS[:4].tolist(), 30, temperature=1.0, seed=1)
    assert set(text) <= set(kept_of(changed))
    p = Sampler(temperature=1.0).probabilities(changed.logits(IDS)[-1])
    assert p[np.setdiff1d(np.arange(259), kept_of(changed))].sum() < 1e-16


def test_any_text_can_be_encoded_and_decoded():
    changed = apply(minitx.load("stories"), {"vocab_prune": {"keep": 0, "stories": 1}})
    for text in ("Mia went to the garden.", "zoë \u00e4\u20ac\U0001f600\n\t<|endoftext|> x"):
        ids = changed.tokenizer.encode(text)
        assert set(ids) <= set(kept_of(changed)) and changed.tokenizer.decode(ids) == text
    assert changed.tokenizer.encode_bytes(b"\xff the") == [255, *b" the"]


def test_token_that_others_cannot_spell_is_kept():
    # No token of one byte for "x": only "xy" and "xyz" have it, so one of them stays.
    tokens = [*(bytes([i]) for i in range(256) if i != 120), b"xy", b"xyz"]
    lm = LM(tiny_model(vocab_size=257, bos=None, eos=()), ByteLevelBPE(tokens, []))
    changed = apply(lm, {"vocab_prune": {"keep": 0}}, calibrate=[[255, 255]])
    assert type(changed.model.head) is not PrunedHead or 255 in kept_of(changed)


def test_keeping_all_returns_the_dense_model():
    lm = tiny_lm()
    assert apply(lm, {"vocab_prune": {"keep": 259}}).model.head is not None
    for options in ({"keep": 259}, {"keep": 1 << 40}):
        changed = apply(lm, {"vocab_prune": options})
        assert not any(isinstance(n, PrunedEmbedding | PrunedHead) for _, n in walk(changed.model))


def test_tied_table_stays_one_array():
    lm = LM(tiny_model("gpt2"))
    changed = pruned(lm, [IDS.tolist()])
    assert changed.model.head.inner.w is changed.model.embed.tokens.inner.w


def test_random_baseline_keeps_as_many():
    lm = without_tokenizer()
    found = [kept_of(pruned(lm, [IDS.tolist()], choose="random", seed=s)) for s in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert len(found[0]) == len(kept_of(pruned(lm, [IDS.tolist()]))) and END in found[2]


def test_refusals_name_the_technique_and_the_remedy():
    with pytest.raises(MinitxError, match="vocab_prune learns from calibration text.*tokenizer"):
        apply(without_tokenizer(), {"vocab_prune": True})
    with pytest.raises(MinitxError, match="first_layer needs.*where vocab_prune has put a Pruned"):
        apply(tiny_lm("gpt_neox"), {"vocab_prune": {"keep": 0, "stories": 1}, "first_layer": True})


def test_saved_model_has_its_tokenizer_back(tmp_path):
    lm = apply(minitx.load("stories-draft"), {"vocab_prune": {"keep": 300, "stories": 1}})
    file = minitx.load("stories-draft").folder / "tokenizer.json"
    write_precomputed(lm, tmp_path / "out", Origin("stories-draft", "--vocab-prune"), file)
    again = minitx.load(tmp_path / "out")
    text = "Mia went to the garden."
    assert again.tokenizer.encode(text) == lm.tokenizer.encode(text)
    assert again.tokenizer.encode(text) != lm.tokenizer.original.encode(text)
    assert_same(again.logits([1, 2, 3]), lm.logits([1, 2, 3]))


# Work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, tables", [("llama", 2), ("gpt2", 1)])
def test_work_and_weights_saved_are_those_of_the_card(family, tables):
    """D (V - n) multiply-adds for each row of logits, and as many weights of each table; V + n
    integers more."""
    lm = LM(tiny_model(family))
    changed = pruned(lm, [IDS.tolist()])
    V, D, n = 259, 16, len(kept_of(changed))
    work = []
    for one in (lm, changed):
        with counting(one) as counts:
            one.logits(IDS)
        work.append(counts.total().multiply_adds)
    assert work[0] - work[1] == len(IDS) * D * (V - n)
    saved = nbytes(lm.model) - nbytes(changed.model)
    assert saved == tables * 4 * D * (V - n) - 8 * (V + n)


def test_tree_shows_the_sizes_and_the_ledger_counts_one_embedding():
    changed = pruned(LM(tiny_model("gpt2")), [IDS.tolist()])
    n, drawn = len(kept_of(changed)), str(changed.model)
    assert f"PrunedEmbedding(row 259)\n      inner: TokenEmbedding(w {n}x16)" in drawn
    assert f"head: PrunedHead(vocab_size=259, ids {n})\n    inner: TiedHead(w {n}x16)" in drawn
    assert group_of("model.embed.inner") == group_of("model.embed.tokens.inner") == "embed"


# Figures -----------------------------------------------------------------------------------------


def test_price_on_stories_draft_is_none_if_all_tokens_of_a_text_stay_and_high_if_random_ones_do():
    """Without its rival tokens the text is even a little more likely. Spelling a word in pieces
    that the model has hardly ever read costs it dearly."""
    dense, loss = minitx.load("stories-draft"), {}
    texts = [dense.tokenizer.decode(one.ids)[:500] for one in stories_to_read(dense, 3).texts]
    words = [dense.encode(text) for text in texts]
    for name, options in dict(dense=None, frequency={}, random={"choose": "random"}).items():
        lm = apply(dense, {"vocab_prune": options}, calibrate=words) if name != "dense" else dense
        own = [lm.encode(text) for text in texts]  # each model in its own tokens
        nats = [token_losses(lm.logits(ids[:-1]), np.array(ids[1:])).sum() for ids in own]
        loss[name] = sum(nats) / sum(map(len, words))
    assert -0.5 < loss["frequency"] - loss["dense"] <= 1e-6, loss
    assert loss["random"] - loss["dense"] > 1, loss


@pytest.mark.filterwarnings("ignore:vocab_prune calibrated on the given ids")
def test_compare_has_finite_figures_where_the_text_has_dropped_tokens():
    dense = minitx.load("stories-draft")
    changed = apply(dense, {"vocab_prune": {"keep": 300}}, calibrate=[[5, 6]])
    found = compare(dense, changed, "", Workload(stories=1, prompts=1, rounds=1), bar=False)
    assert 1 < found.reading.divergence < BELOW + 10 and "nan" not in str(found).lower()


def test_pruned_head_is_stored_row_major():
    """Offline work is done on row-major matrices; another layout would round otherwise once it is
    saved and loaded."""
    lm = apply(tiny_lm("gpt_neox"), {"vocab_prune": {"keep": 257}})
    assert lm.model.head.inner.w.flags.c_contiguous
