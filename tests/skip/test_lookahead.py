"""Lookahead decoding gives the plain text; what it verifies decides only how fast."""

import random

import literal_lookahead as literal
import numpy as np
import pytest
from enumeration import exact_distribution, model_distribution, total_variation
from same import assert_same
from tiny import FAMILIES, decode, tiny_lm, tiny_model

import minitx
from minitx import ledger
from minitx.decode import Sampler, new_state
from minitx.errors import MinitxError
from minitx.lm import LM
from minitx.shared.token_tree import TokenTree
from minitx.skip.lookahead import (
    Lookahead,
    Pool,
    Window,
    lookahead,
    most_rows,
    multiply_adds,
)
from minitx.technique import apply

PROMPT = [5, 1, 2, 3, 9, 8, 1, 2, 3]

# The worked example ------------------------------------------------------------------------------
#
# A "model" that counts: after x comes x + 1. N = 3, W = 3, the text ends with 4.
#
#     window          c = 0   1   2
#     level 0           (4)   8   2      guesses of the tokens +0 (known), +1, +2
#     level 1            7    9   5      guesses of the tokens +1, +2, +3
#
#     tree            4 - 8 - 2          level 0 is a chain from the last token;
#                     |   |   |          below each of its nodes the rest of its column
#                     7   9   5
#
#     argmax after      8   10   6       the n-grams  4 7 8,   8 9 10,   2 5 6
#
# 8 9 10 is right, for a text that ends with 8. No node below 4 is 5, so this pass gives one token,
# 5. Level 1 becomes level 0, and 8 10 6 level 1.


def test_window_and_pool_by_hand():
    window, tree, pool = Window([[4, 8, 2], [7, 9, 5]]), TokenTree(4), Pool(2)
    columns = window.add_to(tree, 5)
    ids = [[tree.ids[node] for node in column] for column in columns]
    assert ids == [[4, 7], [8, 9], [2, 5]]
    assert len(tree) == 6 and tree.depths[columns[2][1]] == 3
    guesses = [tree.ids[column[-1]] + 1 for column in columns]
    for (first, *rest), guess in zip(ids, guesses):
        pool.put(first, (*rest, guess))
    assert pool.find(8) == [(9, 10)] and pool.find(4) == [(7, 8)] and pool.find(5) == []
    window.move(guesses)
    assert window.levels == [[7, 9, 5], [8, 10, 6]]


def test_window_shrinks_where_the_text_ends():
    """A tree of depth 2 has no room for column 2, which ends at depth 3."""
    for depth, W in ((9, 3), (3, 3), (2, 2), (1, 1), (0, 0)):
        window, tree = Window([[4, 8, 2], [7, 9, 5]]), TokenTree(4)
        assert len(window.add_to(tree, depth)) == W and max(tree.depths) <= depth


def test_bigrams_need_one_level():
    """N = 2: level 0 is all, and each guess makes a pair with its token."""
    window, tree = Window([[4, 8, 2]]), TokenTree(4)
    assert [[tree.ids[n] for n in column] for column in window.add_to(tree, 5)] == [[4], [8], [2]]
    window.move([5, 9, 3])
    assert window.levels == [[5, 9, 3]]


def test_pool_drops_the_ngram_not_collected_for_longest():
    pool = Pool(2)
    for rest in ((1, 1), (2, 2), (1, 1), (3, 3)):
        pool.put(7, rest)
    assert pool.find(7) == [(1, 1), (3, 3)], "(1, 1) was collected again"
    pool.put(8, (5, 5))
    assert pool.find(7) == [(1, 1), (3, 3)], "each first token has its own room"


def test_candidates_that_begin_alike_share_rows():
    tree = TokenTree(4)
    for ngram in ((5, 6), (5, 7), (9, 9)):
        tree.add_path(0, ngram)
    assert len(tree) == 1 + 3 + 2
    assert len(Window([[4, 5, 2], [9, 6, 1]]).add_to(tree, 9)) == 3
    assert len(tree) == 6 + 2, "5, 5 6 and 9 are there; new are 5 2 and 5 2 1"


# Equal to the literal version --------------------------------------------------------------------


@pytest.mark.parametrize("W, N, G", [(1, 2, 1), (3, 2, 2), (2, 3, 1), (4, 3, 4), (3, 5, 2)])
def test_passes_and_pool_equal_the_literal_version(W, N, G, monkeypatch):
    """Which tokens each pass gives, and what the pool holds in the end, on a model whose greedy
    text repeats."""
    model, kept = tiny_model(dtype=np.float64, vocab_size=12, bos=None, eos=()), []
    monkeypatch.setattr(Pool, "__init__", lambda self, size: kept.append(self) or start(self, size))
    accepted = 0
    for seed in range(4):
        prompt = np.random.default_rng(seed).integers(0, 12, 6).tolist()
        levels = Window.of(prompt, W, N, random.Random(seed)).levels

        def next_token(text):
            return int(model(text)[-1].argmax())

        expected, gains, pool = literal.lookahead(next_token, prompt, levels, N, G, 16)
        loop, state = Lookahead(W, N, G, seed), new_state(model, prompt)
        found, passes = [], []
        with ledger.counting(loop) as counts:
            for token in loop(model, state, prompt, Sampler(), 16):
                found.append(token)
                passes.append(counts.events["passes"])
        assert found == expected == LM(model).generate(prompt, 16)
        assert [passes.count(i + 1) for i in range(passes[-1])] == gains
        assert {first: list(ngrams) for first, ngrams in kept[-1].kept.items()} == pool
        accepted += counts.events["guesses accepted"]
    assert accepted, "no guess was right: the test shows nothing"


def start(pool, size):
    pool.size, pool.kept = size, {}


@pytest.mark.parametrize("options", [{}, {"window": 7, "ngram": 5}, {"ngram": 2}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_plain_decoding(family, options):
    dense = tiny_lm(family, dtype=np.float64)
    for choose in ("first", "random"):
        lm = apply(dense, {"lookahead": {**options, "choose": choose}})
        with ledger.counting(lm) as counts:
            assert lm.generate(PROMPT, 39) == dense.generate(PROMPT, 39)
        events = counts.events
        assert events["passes"] + events["guesses accepted"] == 39


# Sampling ----------------------------------------------------------------------------------------


def test_sequence_distribution_is_the_models():
    model = tiny_model("gpt2", vocab_size=3, bos=None, eos=(), dtype=np.float64)
    lm = apply(LM(model), {"lookahead": {"window": 2, "ngram": 3}})
    prompt, accepted = [1, 2, 0], 0

    def run(sampler):
        nonlocal accepted
        with ledger.counting(lm) as counts:
            new = tuple(decode(lm.decode, model, prompt, sampler, 4))
        accepted += counts.events["guesses accepted"]
        return new

    expected = model_distribution(model, prompt, 4, temperature=1.3)
    assert total_variation(exact_distribution(run, temperature=1.3), expected) < 1e-9
    assert accepted


def test_same_seed_gives_the_same_sample_as_plain_decoding():
    """Each token is one draw, in order: guesses do not use up random numbers."""
    dense = tiny_lm(dtype=np.float64)
    lm = apply(dense, {"lookahead": {}})
    for seed in range(3):
        options = dict(temperature=0.8, top_p=0.9, seed=seed)
        assert lm.generate(PROMPT, 30, **options) == dense.generate(PROMPT, 30, **options)


# Where decoding ends -----------------------------------------------------------------------------


def test_cache_between_passes_is_that_of_a_fresh_prefill():
    model = tiny_model(dtype=np.float64)
    loop, state, text = Lookahead(4, 3, 4, 0), new_state(model, PROMPT), list(PROMPT)
    compared = 0
    for token in loop(model, state, PROMPT, Sampler(), 39):
        text.append(token)
        if state.position > len(text) - 1:
            continue  # tokens of this pass that have not been yielded yet
        fresh = model.new_state()
        model.hidden(text[:-1], fresh)
        for kept, new in zip(state.layers, fresh.layers):
            n = new.count
            assert kept.count == n, "rows of other branches are left"
            assert_same(kept.keys[..., :n, :], new.keys[..., :n, :], atol=1e-9)
            assert_same(kept.values[..., :n, :], new.values[..., :n, :], atol=1e-9)
        compared += 1
    assert compared > 5


def test_branches_end_where_the_context_ends():
    dense = tiny_lm(dtype=np.float64)
    lm = apply(dense, {"lookahead": {"window": 9, "ngram": 6}})
    assert lm.generate([3], 47) == dense.generate([3], 47)
    with ledger.counting(lm) as counts:
        lm.generate([1] * 47, 1)
    assert counts.events["rows run"] == 1, "there is room for one token only"


def test_text_may_end_within_accepted_guesses():
    """A greedy text that repeats, so that a pass gives several tokens: each of them in turn ends
    the text."""
    dense = LM(tiny_model(dtype=np.float64, vocab_size=12, bos=None, eos=()))
    truth = dense.generate(PROMPT, 20)
    for end in set(truth):
        lm = LM(tiny_model(dtype=np.float64, vocab_size=12, bos=None, eos=(end,)))
        changed = apply(lm, {"lookahead": {}})
        with ledger.counting(changed):
            assert changed.generate(PROMPT, 20) == truth[: truth.index(end)]


def test_nothing_is_kept_from_one_text_to_the_next():
    lm = apply(tiny_lm(), {"lookahead": {}})
    events = []
    for _ in range(2):
        with ledger.counting(lm) as counts:
            lm.generate(PROMPT, 30)
        events.append(dict(counts.events))
    assert events[0] == events[1]


def test_float32_text_differs_only_at_near_ties():
    """Several rows at once round differently than one: only a tie may be decided otherwise."""
    dense = minitx.load("stories")
    prompt = dense.encode("One day")
    expected, found = (
        dense.generate(prompt, 60),
        apply(dense, {"lookahead": {}}).generate(prompt, 60),
    )
    if found != expected:
        at = next(i for i in range(60) if found[i] != expected[i])
        logits = np.sort(dense.logits(prompt + expected[:at])[-1])
        assert logits[-1] - logits[-2] < 1e-3, f"token {at} differs where there is no near tie"


# Settings ----------------------------------------------------------------------------------------


def test_no_window_changes_nothing():
    lm = tiny_lm()
    assert lookahead(lm, window=0) is lm


def test_random_baseline_verifies_as_many_ngrams():
    lm = LM(tiny_model(dtype=np.float64, vocab_size=12, bos=None, eos=()))
    first = apply(lm, {"lookahead": {}}).decode
    baseline = apply(lm, {"lookahead": {"choose": "random"}}).decode
    pool, rng = Pool(4), random.Random(0)
    for i in range(8):
        pool.put(i % 3, (i, i))
    assert first.to_verify(pool, 1, rng) == [(1, 1), (4, 4), (7, 7)]
    found = [baseline.to_verify(pool, 1, rng) for _ in range(30)]
    assert {len(ngrams) for ngrams in found} == {3}
    assert {ngram for ngrams in found for ngram in ngrams} == {(i, i) for i in range(8)}


@pytest.mark.parametrize("options", [{"window": -1}, {"ngram": 1}, {"candidates": 0}], ids=str)
def test_bad_options_are_refused(options):
    with pytest.raises(MinitxError, match="^lookahead: "):
        apply(tiny_lm(), {"lookahead": options})


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("elsa", {"p": 0.5}, "where elsa has put a"),
        ("early_exit", {}, "where early_exit has put a"),
        ("sink_window", {"window": 8}, "where sink_window has put a"),
    ],
)
def test_unfit_models_are_refused_by_name(name, options, words):
    with pytest.raises(MinitxError) as caught:
        apply(tiny_lm(), {name: options, "lookahead": True})
    assert words in str(caught.value) and str(caught.value).startswith("lookahead")
    assert "\n" not in str(caught.value)


def test_other_loops_are_refused_by_name():
    lm = apply(tiny_lm(), {"prompt_lookup": True})
    with pytest.raises(MinitxError, match="lookahead replaces the decoding loop.*prompt_lookup"):
        apply(lm, {"lookahead": True})


def test_techniques_applied_afterwards_are_refused_when_it_runs():
    lm = apply(tiny_lm(), {"lookahead": True})
    for name, options in (("elsa", {"p": 0.5}), ("early_exit", {}), ("sink_window", {"window": 8})):
        with pytest.raises(MinitxError, match="^lookahead") as caught:
            apply(lm, {name: options}).generate(PROMPT, 5)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["quantize_cache", "quantize", "fold_norms", "ffn_skip"])
def test_techniques_that_compute_token_by_token_stay(name):
    lm = apply(tiny_lm(dtype=np.float64), {name: True})
    changed = apply(lm, {"lookahead": True})
    assert changed.generate(PROMPT, 30) == lm.generate(PROMPT, 30)


# What it costs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("W, N, G", [(4, 3, 4), (2, 5, 3)])
def test_counted_multiply_adds_are_those_of_the_rows(W, N, G):
    dense = LM(tiny_model(vocab_size=12, bos=None, eos=()))
    lm = apply(dense, {"lookahead": {"window": W, "ngram": N, "candidates": G}})

    def ffn(lm):
        with ledger.counting(lm) as counts:
            lm.generate([7], 40)
        return counts.total("model.stack.blocks.0.ffn").multiply_adds, counts.events

    (plain, _), (work, events) = ffn(dense), ffn(lm)
    passes, rows = events["passes"], events["rows run"]
    assert work / plain == pytest.approx(rows / 40)
    assert work / plain == pytest.approx(multiply_adds(rows / passes, 40 / passes))
    assert passes < 40 and W * (N - 1) * 0.7 < rows / passes <= most_rows(W, N, G)


def test_passes_with_nothing_in_common_run_the_rows_of_the_formula():
    tree = TokenTree(0)
    for i in range(4):
        tree.add_path(0, (100 + i, 200 + i))
    Window([[0, 1, 2], [10, 11, 12]]).add_to(tree, 9)
    assert len(tree) == most_rows(3, 3, 4) == 14


def test_stories_takes_fewer_passes_than_with_random_ngrams():
    dense = minitx.load("stories", dtype=np.float64)
    expected = dense.generate("One day", 80)

    def tokens_per_pass(**options):
        lm = apply(dense, {"lookahead": options})
        with ledger.counting(lm) as counts:
            assert lm.generate("One day", 80) == expected
        return 80 / counts.events["passes"], counts.events["rows run"] / counts.events["passes"]

    (tokens, rows), (baseline, its_rows) = tokens_per_pass(), tokens_per_pass(choose="random")
    assert 1.3 < tokens < 2.2 and tokens > baseline + 0.2, f"{tokens:.2f}, {baseline:.2f}"
    assert 8 < rows < 14 and its_rows > 0.9 * rows, f"{rows:.1f}, {its_rows:.1f} rows"
