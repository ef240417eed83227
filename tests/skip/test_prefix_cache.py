"""The prefix cache: which blocks are found, that their rows are right, and what is evicted."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from literal_prefix_cache import LeastRecentlyUsed, Prefixes
from same import assert_same
from tiny import FAMILIES, decode, tiny_lm, tiny_model

import minitx
from minitx import ledger
from minitx.checkpoints.precomputed import Origin, write_precomputed
from minitx.decode import Sampler
from minitx.errors import MinitxError, MinitxWarning
from minitx.lm import LM
from minitx.shared.draft_and_verify import Speculative
from minitx.shared.draft_length import FixedLength
from minitx.skip.prefix_cache import Block, PrefixStore, extend
from minitx.skip.speculative import DraftModel
from minitx.technique import apply, wrap
from minitx.tree import Part, part

IDS = np.random.default_rng(0).integers(0, 258, 40).tolist()


def cached(lm, block=4, megabytes=1.0, **techniques) -> LM:
    return apply(lm, techniques | {"prefix_cache": {"block": block, "megabytes": megabytes}})


def generate(lm, prompt, n=6, **options) -> tuple[list[int], int, int]:
    """New tokens, and how many tokens of the prompt were reused and run."""
    with ledger.counting(lm) as counts:
        text = lm.generate(prompt, n, **options)
    return text, counts.events["prompt tokens reused"], counts.events["prompt tokens run"]


# Which blocks are found --------------------------------------------------------------------------


def test_a_prompt_of_ten_common_tokens_reuses_two_blocks_of_four():
    """Blocks of 4:  10 11 12 13 | 14 15 16 17 | 18 19 20 21 | 22 23
                     10 11 12 13 | 14 15 16 17 | 18 19 99 98 | 97 96
    10 tokens are common, which are 2 full blocks: 8 tokens are reused and 14 - 8 = 6 are run."""
    a, b = [*range(10, 24)], [*range(10, 20), 99, 98, 97, 96]
    hashes = {}
    for name, text in (("a", a), ("b", b)):
        hashes[name] = [b"seed"]
        extend(hashes[name], text, 4, 3)
    assert hashes["a"][:3] == hashes["b"][:3], "the first two blocks are the same"
    assert hashes["a"][3] != hashes["b"][3], "the third block differs"
    lm = cached(tiny_lm(), block=4)
    assert generate(lm, a)[1:] == (0, 14)
    assert generate(lm, b)[1:] == (8, 6)


def test_a_block_hash_stands_for_all_tokens_before_it():
    def last(seed, text):
        hashes = [seed]
        extend(hashes, text, 2, len(text) // 2)
        return hashes[-1]

    assert last(b"s", [1, 2, 5, 6]) != last(b"s", [3, 4, 5, 6]), "block 5 6 after other tokens"
    assert last(b"s", [5, 6]) != last(b"t", [5, 6]), "block 5 6 of another model"
    assert last(b"s", [1, 23]) != last(b"s", [12, 3]), "ids of fixed width"
    assert last(b"s", [1, 2]) != last(b"s", [2, 1]) and last(b"s", [1, 2]) == last(b"s", [1, 2])


def test_a_prompt_found_as_a_whole_runs_its_last_token():
    lm = cached(tiny_lm(dtype=np.float64), block=4)
    prompt = IDS[:12]
    first, *counts = generate(lm, prompt)
    assert counts == [0, 12]
    again, *counts = generate(lm, prompt)
    assert counts == [11, 1] and again == first == tiny_lm(dtype=np.float64).generate(prompt, 6)


def test_a_completion_is_the_beginning_of_the_next_prompt():
    """A conversation: prompt, answer and the next question are one prompt. Of 12 + 9 tokens the
    last was not run, which leaves 20: 5 blocks of 4."""
    lm, dense = cached(tiny_lm(dtype=np.float64), block=4), tiny_lm(dtype=np.float64)
    answer = lm.generate(IDS[:12], 9)
    prompt = IDS[:12] + answer + [7, 8, 9]
    text, *counts = generate(lm, prompt)
    assert counts == [20, 4] and text == dense.generate(prompt, 6)


def prompts_that_begin_alike(seed):
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 258, 24).tolist()]
    for _ in range(7):
        old = texts[rng.integers(len(texts))]
        n = int(rng.integers(0, len(old) + 1))
        texts.append((old[:n] + rng.integers(0, 258, 24).tolist())[: rng.integers(1, 25)])
    return texts


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_one_token_are_the_literal_version(family):
    dense = tiny_lm(family, dtype=np.float64)
    lm, literal = cached(dense, block=1, megabytes=50.0), Prefixes(dense.model)
    found = []
    for prompt in prompts_that_begin_alike(1):
        text, reused, run = generate(lm, prompt, 5)
        found.append(reused)
        assert text == literal.generate(prompt, 5) and reused + run == len(prompt)
    assert found == literal.reused and sum(found) > 20


@pytest.mark.parametrize("block", [2, 3, 5, 8])
def test_blocks_reuse_what_the_literal_version_knows_in_whole_blocks(block):
    dense = tiny_lm(dtype=np.float64)
    lm, literal = cached(dense, block=block, megabytes=50.0), Prefixes(dense.model)
    for prompt in prompts_that_begin_alike(2):
        expected = min(literal.known(prompt) // block * block, len(prompt) - 1)
        text, reused, _ = generate(lm, prompt, 5)
        assert reused == expected, f"{literal.known(prompt)} tokens of {len(prompt)} were known"
        assert text == literal.generate(prompt, 5)


# That their rows are right -----------------------------------------------------------------------


class Watching(Sampler):
    """Greedy, but asks for the logits, and keeps them."""

    def __init__(self):
        super().__init__(temperature=1.0)
        self.seen = []

    def __call__(self, logits):
        self.seen.append(logits)
        return int(logits.argmax())


def logits(lm, prompt, n, state=None):
    choose = Watching()
    state = lm.model.new_state() if state is None else state
    tokens = list(lm.decode(lm.model, state, prompt, choose, n))
    return tokens, np.array(choose.seen), state


COMPANIONS = {
    "none": {},
    "early_exit": {"early_exit": {"threshold": 0.2, "kv_fill": "copy"}},
    "first_layer": {"first_layer": True},
    "quantize_cache": {"quantize_cache": {"bits": 8}},
    "quantize_cache-4": {"quantize_cache": {"bits": 4}},
    "slim_attention": {"slim_attention": True},
    "ffn_skip": {"ffn_skip": {"threshold": 0.5, "warm_up": 3, "cold_start": 0, "cold_end": 2}},
    "elsa": {"elsa": {"threshold": 0.3}},
    "predictive_attention": {"predictive_attention": True},
    "a3": {"a3": True},
    "sparse_memory": {"sparse_memory": {"keep": 3}},
    "lut_product": {"lut_product": True},
}


def with_companion(family, name, dtype=np.float64):
    """The model with the technique alone, and with the prefix cache too; skips what is refused."""
    try:
        alone = apply(tiny_lm(family, dtype=dtype), COMPANIONS[name])
    except MinitxError as error:
        pytest.skip(str(error))
    return alone, cached(tiny_lm(family, dtype=dtype), **COMPANIONS[name])


@pytest.mark.parametrize("name", COMPANIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_reused_rows_give_the_logits_of_a_whole_prefill(family, name):
    """Also where a technique knows something of each key (hashes, sorted columns): it is made anew
    from the keys. Only rounding differs, since other rows are multiplied together."""
    alone, both = with_companion(family, name)
    prompt, other = IDS[:21], IDS[:14] + IDS[30:37]
    text, expected, whole = logits(alone, prompt, 9)
    logits(both, other, 3)
    again, found, state = logits(both, prompt, 9)
    assert generate(both, prompt)[1] > 0
    assert again == text, f"{name}: another text"
    assert_same(found, expected, atol=1e-9 * abs(expected).max())
    for layer, its in zip(state.layers, whole.layers):
        assert layer.count == its.count and layer.keys.dtype == its.keys.dtype
        assert layer.row_positions is None
        for a, b in zip(layer.rows(), its.rows()):
            if a.dtype.kind == "f":
                assert_same(a, b, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", [1, 4, 5])
@pytest.mark.parametrize("held", [0, 1, 4, 6, 14, 20])
def test_a_warm_state_is_filled_up(family, block, held):
    """The state may hold some tokens of the prompt, to the middle of a block."""
    dense = tiny_lm(family, dtype=np.float64)
    lm, prompt = cached(dense, block=block), IDS[:21]
    text, expected, _ = logits(dense, prompt, 5)
    logits(lm, IDS[:17], 1)
    state = dense.model.new_state()
    if held:
        dense.model(prompt[:held], state)
    with ledger.counting(lm) as counts:
        again, found, state = logits(lm, prompt, 5, state)
    known = 17 // block * block
    assert counts.events["prompt tokens reused"] == max(known - held, 0)
    assert counts.events["prompt tokens run"] == 21 - max(known, held)
    assert again == text and [layer.count for layer in state.layers] == [25, 25]
    assert_same(found, expected, atol=1e-10 * abs(expected).max())


def test_two_sequences_may_run_at_the_same_time():
    dense = tiny_lm(dtype=np.float64)
    lm, prompts = cached(dense, block=2), (IDS[:9], IDS[:8] + [3])
    rows = [decode(lm.decode, lm.model, prompt, Sampler(), 12) for prompt in prompts]
    found = [list(tokens) for tokens in zip(*zip(*rows))]
    assert found == [dense.generate(prompt, 12) for prompt in prompts]


def test_the_rows_of_a_batch_reuse_the_beginning_of_those_before():
    dense = tiny_lm(dtype=np.float64)
    lm, prompts = cached(dense, block=4), [IDS[:13], IDS[:9] + [1], IDS[20:25], IDS[:30]]
    text, reused, run = generate(lm, prompts, 5)
    assert text == [dense.generate(prompt, 5) for prompt in prompts]
    assert (reused, run) == (0 + 8 + 0 + 12, 13 + 2 + 5 + 18)


@pytest.mark.parametrize("options", [{"top_k": 20}, {"top_p": 0.9}], ids=str)
def test_a_seed_draws_the_same_tokens_as_without_the_cache(options):
    dense = tiny_lm(dtype=np.float64)
    lm = cached(dense)
    for seed in range(5):
        for prompt in (IDS[:13], IDS[:10] + [2, 3]):
            expected = dense.generate(prompt, 12, temperature=0.9, seed=seed, **options)
            assert lm.generate(prompt, 12, temperature=0.9, seed=seed, **options) == expected


DRAFTING = {"prompt_lookup": {}, "self_speculative": {}, "speculative": {"draft": "self"}}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loop", DRAFTING)
@pytest.mark.parametrize("inner", ["none", "early_exit", "elsa", "quantize_cache"])
def test_speculation_goes_on_from_reused_rows(family, loop, inner):
    speculative, dense = {loop: DRAFTING[loop] | {"gamma": 3}}, tiny_lm(family, dtype=np.float64)
    try:
        alone = apply(dense, COMPANIONS[inner])
        both = cached(dense, **COMPANIONS[inner], **speculative)
    except MinitxError as error:
        pytest.skip(str(error))  # an exiting stack cannot be cut in half
    assert repr(both.decode).startswith("PrefixCache(block=4)\n  inner: Speculative")
    for prompt in (IDS[:13], IDS[:11] + [1, 2, 3], IDS[:13]):
        assert both.generate(prompt, 12) == alone.generate(prompt, 12)
    assert generate(both, IDS[:13])[1] == 12
    seeded = dict(temperature=1.0, top_k=9, seed=3)
    without = apply(dense, COMPANIONS[inner] | speculative)
    assert both.generate(IDS[:13], 12, **seeded) == without.generate(IDS[:13], 12, **seeded)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_model_reuses_prefixes_too(family):
    """The first 12 of 16 prompt tokens are three blocks of 4 that both models have stored. Of a
    prompt found as a whole, each model runs the last token."""
    dense, new = tiny_lm(family, dtype=np.float64), IDS[:13] + [1, 2, 3]
    lm = cached(dense, block=4, speculative={"draft": "self", "gamma": 3})
    assert type(lm.decode.inner.draft.model).__name__ == "PrefixModel"
    found = []
    for prompt in (IDS[:15], new, new):
        with ledger.counting(lm) as counts:
            assert lm.generate(prompt, 9) == dense.generate(prompt, 9)
        names = ("prompt tokens reused", "prompt tokens reused by the second model")
        found.append(tuple(counts.events[name] for name in names))
    assert found == [(0, 0), (12, 12), (15, 15)]
    held = {len(block.layers) for block in lm.decode.store.blocks.values()}
    assert held == {1, 2}, "blocks of the draft, one layer, and of the target, two"


def test_a_draft_proposes_the_same_from_reused_rows():
    """The same proposals, so the same number is accepted, with a seed too."""
    dense = tiny_lm(dtype=np.float64)
    speculative = {"speculative": {"draft": "self", "gamma": 3}}
    alone, lm = apply(dense, speculative), cached(dense, block=2, **speculative)
    for options in ({}, {"temperature": 1.0, "seed": 4}):
        for prompt in (IDS[:13], IDS[:11] + [1, 2]):
            found = []
            for one in (alone, lm, lm):
                with ledger.counting(one) as counts:
                    text = one.generate(prompt, 20, **options)
                found.append((text, counts.events["draft tokens accepted"]))
            assert found[0] == found[1] == found[2]


def test_of_a_draft_only_the_prompt_is_stored_and_under_its_own_weights():
    """Blocks of one token: what the draft writes, one or two tokens at a time, is no beginning."""
    dense, other = tiny_lm(dtype=np.float64), tiny_model(seed=3, dtype=np.float64)
    lm = cached(replace(dense, decode=Speculative(DraftModel(other), FixedLength(3))), block=1)
    lm.generate(IDS[:13], 9)
    seed = lm.decode.store.seed(lm.decode.inner.draft.model)
    hashes = [seed]
    extend(hashes, IDS, 1, 13)
    target = [lm.decode.store.seed(lm.model)]
    extend(target, IDS[:13] + dense.generate(IDS[:13], 9), 1, 22)
    assert {*lm.decode.store.blocks} <= {*hashes[1:], *target[1:]}
    assert {*hashes[1:]} <= {*lm.decode.store.blocks}, "the prompt of the draft"


def test_a_draft_that_remembers_more_than_keys_and_values_runs_the_whole_prompt():
    dense = tiny_lm(dtype=np.float64)
    odd = wrap(dense, "attn", lambda attn, index: Unfit(attn, has_history=True)).model
    for draft, kind in ((odd, "Transformer"), (dense.model, "PrefixModel")):
        loop = Speculative(DraftModel(draft), FixedLength(3))
        lm = cached(replace(dense, decode=loop), block=4)
        assert type(lm.decode.inner.draft.model).__name__ == kind
        for _ in range(2):
            assert lm.generate(IDS[:13], 9) == dense.generate(IDS[:13], 9)


@part
class LeftOut(Part):
    """Stands in for attention: adds nothing, stores no rows."""

    def __call__(self, x, layer):
        return np.zeros_like(x)


def test_a_layer_without_rows_has_none_in_a_block():
    dense = tiny_lm(dtype=np.float64)
    dense = wrap(dense, "attn", lambda attn, index: attn if index else LeftOut())
    lm = cached(dense)
    for prompt in (IDS[:13], IDS[:10] + [1, 2]):
        assert lm.generate(prompt, 9) == dense.generate(prompt, 9)
    assert generate(lm, IDS[:13])[1] == 12
    assert all(block.layers[0] is None for block in lm.decode.store.blocks.values())


# The store ---------------------------------------------------------------------------------------


def test_neutral_and_a_block_longer_than_the_context_keep_nothing():
    dense = tiny_lm()
    assert apply(dense, {"prefix_cache": {"megabytes": 0.0}}) is dense or (
        repr(apply(dense, {"prefix_cache": {"megabytes": 0.0}})) == repr(dense)
    )
    with pytest.warns(MinitxWarning, match="a block of 49 tokens .* no block is ever reused"):
        lm = cached(dense, block=49)
    for _ in range(2):
        assert generate(lm, IDS)[:2] == (dense.generate(IDS, 6), 0)
    assert not lm.decode.store.blocks


def test_bytes_held_are_the_cache_bytes_of_the_tokens_stored():
    """llama, 2 layers, one key/value head of width 8, float32: 2 * 2 * 1 * 8 * 4 = 128 a token."""
    lm = cached(tiny_lm(), block=4)
    lm.generate(IDS[:14], 4)  # 14 and the 3 new ones that were run: 17 tokens, 4 blocks
    assert len(lm.decode.store.blocks) == 4 and lm.decode.store.held == 16 * 128
    lm.generate(IDS[:10] + [1, 2], 1)  # 2 of the 3 blocks are there
    assert len(lm.decode.store.blocks) == 5 and lm.decode.store.held == 20 * 128
    state = lm.model.new_state()
    lm.model(IDS, state)
    assert state.bytes_per_token == 128


def test_what_is_stored_cannot_be_changed_by_a_sequence():
    lm = cached(tiny_lm(dtype=np.float64), block=2)
    expected = lm.generate(IDS[:13], 9)

    def contents():
        blocks = lm.decode.store.blocks.values()
        arrays = [a for block in blocks for pair in block.layers for a in pair]
        assert not any(array.flags.writeable for array in arrays)
        assert all(array.base is None for array in arrays), "a copy keeps nothing else in memory"
        return [array.copy() for array in arrays]

    before, (_, _, state) = contents(), logits(lm, IDS[:13], 1)
    for layer in state.layers:
        layer.keys[:] = layer.values[:] = 9.0  # what a sequence does with its own rows
    for a, b in zip(contents(), before):
        assert_same(a, b)
    assert lm.generate(IDS[:13], 9) == expected


def texts(chain):
    return [bytes(chain[: i + 1]) for i in range(len(chain))]


def test_the_tail_of_a_prefix_is_evicted_before_its_head():
    """Room for 4 blocks. a b c, then a d: c was used longest ago, then b. e needs room: c goes.
    f: b goes. Then a d e f are left; of a d, used together, d would go before a."""
    store, block = PrefixStore(4e-6), Block((), 1)
    for chain in ("abc", "ad", "e", "f"):
        store.put(texts(chain.encode()), lambda i: block)
    assert list(store.blocks) == [b"ad", b"a", b"e", b"f"]
    store.put(texts(b"g"), lambda i: block)
    assert b"a" in store.blocks and b"ad" not in store.blocks
    assert len(store.find(texts(b"abc"))) == 1


def test_what_is_looked_up_counts_as_used():
    store, block = PrefixStore(3e-6), Block((), 1)
    for chain in (b"ab", b"x"):
        store.put(texts(chain), lambda i: block)
    assert len(store.find(texts(b"abz"))) == 2
    store.put(texts(b"y"), lambda i: block)
    assert {*store.blocks} == {b"ab", b"a", b"y"}, "x was used longest ago"


def test_a_prefix_that_grows_does_not_evict_its_own_beginning():
    store, block = PrefixStore(3e-6), Block((), 1)
    for chain in (b"ab", b"x", b"abc"):  # abc finds ab, which is older than x
        store.put(texts(chain), lambda i: block)
    assert list(store.blocks) == [b"abc", b"ab", b"a"]


def test_the_first_unknown_block_ends_the_search():
    store = PrefixStore(3e-6)
    store.put(texts(b"ab"), lambda i: Block((), i + 1))
    assert store.find([b"a", b"z", b"ab"]) == [Block((), 1)] and store.find([b"z", b"a"]) == []


def test_a_prefix_longer_than_the_limit_keeps_its_head():
    store, made = PrefixStore(3e-6), []
    store.put(texts(b"x"), lambda i: Block((), 1))
    store.put(texts(b"abcdef"), lambda i: made.append(i) or Block((), 1))
    assert list(store.blocks) == [b"abc", b"ab", b"a"] and store.held == 3
    assert made == [0, 1, 2, 3], "it stops copying at the first that finds no room"
    store.put([b"large"], lambda i: Block((), 4))
    assert len(store.blocks) == 3, "nothing is evicted for what can never fit"


@pytest.mark.parametrize("room", [1, 2, 5, 9])
def test_eviction_is_that_of_the_literal_version(room):
    rng = np.random.default_rng(room)
    store, literal = PrefixStore(room * 1e-6), LeastRecentlyUsed(room)
    found = 0
    for _ in range(300):
        names = texts(bytes(rng.integers(97, 100, rng.integers(1, 6)).tolist()))
        hits = len(store.find(names))
        store.put(names, lambda i: Block((), 1))
        assert hits == literal.prompt(names)
        assert {*store.blocks} == {*literal.table} and store.held == len(store.blocks) <= room
        assert all(key[:-1] in store.blocks for key in store.blocks if len(key) > 1), "unreachable"
        found += hits
    assert found > 50


def test_the_limit_holds_while_prompts_come_and_go():
    dense = tiny_lm(dtype=np.float64)
    lm = cached(dense, block=2, megabytes=0.004)  # 256 bytes a token in float64: 7 blocks
    with ledger.counting(lm) as counts:
        for prompt in prompts_that_begin_alike(3):
            assert lm.generate(prompt, 4) == dense.generate(prompt, 4)
            assert lm.decode.store.held <= 4000
    assert len(lm.decode.store.blocks) == 7
    assert counts.events["prefix blocks evicted"] > 0 < counts.events["prompt tokens reused"]


def test_forget_empties_the_store():
    lm = cached(tiny_lm())
    lm.generate(IDS[:13], 2)
    lm.decode.store.forget()
    assert lm.decode.store.held == 0 and generate(lm, IDS[:13])[1] == 0


def test_a_precomputed_folder_begins_with_an_empty_store(tmp_path):
    lm = cached(tiny_lm(), block=4, megabytes=2.0, speculative={"draft": "self"})
    text = lm.generate(IDS[:13], 5)
    write_precomputed(lm, tmp_path / "out", Origin("toy", "--speculative --prefix-cache"), None)
    again = minitx.load(tmp_path / "out")
    assert repr(again.decode) == repr(lm.decode) and not again.decode.store.blocks
    assert generate(again, IDS[:13], 5)[:2] == (text, 0)
    assert generate(again, IDS[:13], 5)[:2] == (text, 12)


# Whose rows they are -----------------------------------------------------------------------------


def test_another_model_with_the_same_store_finds_nothing_of_this_one():
    """Also one that differs in a setting alone, which the printed tree may not show."""
    lm = cached(tiny_lm(dtype=np.float64))
    lm.generate(IDS[:13], 5)
    others = {
        "weights": replace(lm, model=tiny_model(seed=2, dtype=np.float64)),
        "early_exit": apply(lm, {"early_exit": {"threshold": 0.5}}),
        "threshold": apply(lm, {"early_exit": {"threshold": 0.5000001}}),
    }
    for what, other in others.items():
        assert other.decode.store is lm.decode.store
        dense = replace(other, decode=tiny_lm().decode)
        text, reused, _ = generate(other, IDS[:13])
        assert reused == 0, f"rows of a model with other {what}"
        assert text == dense.generate(IDS[:13], 6)
    assert generate(lm, IDS[:13])[1] == 12, "this one still finds its own"
    same = replace(lm, model=tiny_model(dtype=np.float64, seed=1))
    assert generate(same, IDS[:13])[1] == 12, "equal weights are the same model"


@part
class Unfit(Part):
    inner: Part
    has_history: bool = False
    frees_rows: bool = False
    decides: str = "token"

    def __call__(self, x, layer):
        return self.inner(x, layer)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"has_history": True}, "remembers more of a prompt"),
        ({"frees_rows": True}, "keeps fewer cache rows"),
        ({"decides": "step"}, "depend on later tokens"),
        ({"decides": "sequence"}, "depend on later tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_cut_into_blocks_is_refused(options, why):
    lm = wrap(tiny_lm(), "attn", lambda attn, index: Unfit(attn, **options))
    with pytest.raises(MinitxError, match=f"^prefix_cache .* test_prefix_cache .*{why}"):
        cached(lm)
    by_hand = replace(cached(tiny_lm()), model=lm.model)
    with pytest.raises(MinitxError, match=why):
        by_hand.generate(IDS[:5], 3)


@pytest.mark.parametrize(
    "name, options",
    [
        ("dota", {"keep": 4}),
        ("sparse_memory", {"keep": 3, "slots": 8}),
        ("early_exit", {"kv_fill": "deferred"}),
    ],
)
def test_techniques_with_a_history_are_refused_by_name(name, options):
    with pytest.raises(MinitxError) as caught:
        cached(tiny_lm(), **{name: options})
    assert name in str(caught.value) and "prefix_cache" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"block": 0}, {"megabytes": -1.0}, {"block": 2.5}], ids=str)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(MinitxError, match="prefix_cache"):
        apply(tiny_lm(), {"prefix_cache": options})


# What it saves -----------------------------------------------------------------------------------


def test_counted_work_is_that_of_the_tokens_left_to_run():
    """One new token: T = 21 prompt tokens, m = 20 of them reused. Of a linear layer D x F are left
    (T - m) D F multiply-adds; attention of the last token still goes over all 21 keys. m tokens of
    2 L K d numbers are read from the store."""
    lm = cached(tiny_lm(), block=4)
    D, F, L, H, K, d, T, m = 16, 24, 2, 2, 1, 8, 21, 20

    def work():
        with ledger.counting(lm) as counts:
            lm.generate(IDS[:T], 1)
        ffn = counts.total("model.stack.blocks.0.ffn").multiply_adds
        attend = counts.total("model.stack.blocks.1.attn.attend").multiply_adds
        return ffn, attend, counts.total("decode").cache_bytes

    row = 2 * L * K * d * 4
    seen = T * T  # a prompt's scores are all computed, the later ones masked
    cold, warm = work(), work()
    assert cold == (T * 3 * D * F, 2 * seen * H * d, m * row)
    assert warm == ((T - m) * 3 * D * F, 2 * (T - m) * T * H * d, m * row)


@cache
def stories_prompts():
    """A beginning of 400 tokens and eight stories' beginnings of 20, on the shipped model."""
    from minitx.lab.first_token import prompts

    lm = minitx.load("stories", prefix_cache={})
    return lm, prompts(lm, shared=400, own=20, count=8)


def test_stories_with_400_tokens_in_common_run_5_percent_of_the_prompt():
    lm, texts = stories_prompts()
    dense = minitx.load("stories")
    work = []
    for prompt in texts:
        with ledger.counting(lm) as counts:
            assert lm.generate(prompt, 4) == dense.generate(prompt, 4)
        work.append((counts.events["prompt tokens run"], counts.total("model").multiply_adds))
    assert [run for run, _ in work] == [420] + [20] * 7
    ratio = np.mean([done for _, done in work[1:]]) / work[0][1]
    assert 0.05 < ratio < 0.07, f"{ratio:.3f} of the multiply-adds of a prompt that is not known"
