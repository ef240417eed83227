"""The semantic cache: when it hits, whose answers it gives, and that false hits are counted."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from literal_semantic_cache import Cache
from same import assert_same
from tiny import END, tiny_lm, tiny_model

import minitx
from minitx import ledger
from minitx.checkpoints.precomputed import Origin, write_precomputed
from minitx.decode import Sampler, new_state
from minitx.lab.semantic_hits import EMBEDDINGS, measure
from minitx.skip.semantic_cache import SemanticStore, embedding, unit_mean
from minitx.technique import apply
from minitx.tree import walk

IDS = np.random.default_rng(0).integers(0, 258, 40).tolist()
EVENTS = ("semantic hits", "semantic misses", "audited hits", "audited hits that were wrong")


def cached(lm, threshold=0.8, entries=100, audit=1000, **others):
    options = {"threshold": threshold, "entries": entries, "audit": audit}
    return apply(lm, others | {"semantic_cache": options})


def generate(lm, prompt, n=6, **options):
    """New tokens; semantic hits, misses, audited hits and wrong ones; did the model run?"""
    with ledger.counting(lm) as counts:
        text = lm.generate(prompt, n, **options)
    ran = counts.total("model.stack").multiply_adds > 0
    return text, tuple(counts.events[name] for name in EVENTS), ran


def changed(prompt, *places):
    """The prompt with other tokens in these places."""
    return [(token + 1) % 258 if i in places else token for i, token in enumerate(prompt)]


# The similarity ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "a, b, cosine",
    [
        ("add 2 and 3", "add 2 and 8", 3 / 4),
        ("how do I cancel my order", "how do I cancel my subscription", 5 / 6),
        ("is 7 prime", "is 7 not prime", 3 / 12**0.5),
        ("how do I cancel my order", "what is the way to stop an order", 1 / 48**0.5),
    ],
)
def test_cosine_of_word_counts_by_hand(a, b, cosine):
    """With one dimension for each word, the mean of the embeddings counts words. Two prompts of 4
    words with 3 in common: 3 / (sqrt(4) sqrt(4)) = 0.75. The last two mean the same and have one
    word of 6 and 8 in common: 1 / sqrt(48) = 0.144, less than those that mean something else."""
    known = sorted({*a.split(), *b.split()})
    one_hot = np.eye(len(known))
    e, f = (unit_mean(one_hot[[known.index(word) for word in text.split()]]) for text in (a, b))
    assert e @ f == pytest.approx(cosine)


def test_prompt_in_another_order_has_similarity_one():
    """So no threshold up to 1 tells them apart: the mean does not know the order."""
    dense, other = tiny_lm(dtype=np.float64), IDS[6:12] + IDS[:6]
    assert dense.generate(other, 6) != dense.generate(IDS[:12], 6)
    lm = cached(dense, threshold=1.0)
    text = lm.generate(IDS[:12], 6)
    assert generate(lm, other) == (text, (1, 0, 0, 0), False), "a false hit at a similarity of 1"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_embedding_is_the_mean_of_the_tokens_at_length_one(family):
    """Of GPT-2 with the embedding of the positions."""
    model = tiny_model(family, dtype=np.float64)
    rows = model.embed(np.array(IDS[:9]), slice(0, 9))
    expected = rows.mean(0) / np.linalg.norm(rows.mean(0))
    assert_same(embedding(model, IDS[:9]), expected, atol=1e-14)
    assert np.isfinite(unit_mean(np.zeros((3, 4)))).all()


# Hits and misses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("audit", [1, 3, 1000])
def test_requests_are_those_of_the_literal_version(seed, audit):
    """Prompts of 8 tokens that differ in up to 3, with two limits: the same answers, hits, audits
    and evictions."""
    rng = np.random.default_rng(seed)
    dense = tiny_lm(dtype=np.float64)
    lm = cached(dense, threshold=0.8, entries=4, audit=audit)
    literal = Cache(dense.model.embed.w, dense.generate, 0.8, 4, audit)
    total = np.zeros(4, int)
    for _ in range(30):
        prompt = IDS[:8] if rng.random() < 0.6 else IDS[8:16]
        prompt = changed(prompt, *rng.integers(0, 8, rng.integers(0, 4)).tolist())
        limit = int(rng.integers(2, 4))
        text, events, _ = generate(lm, prompt, limit)
        answer, hit = literal.request(prompt, limit)
        assert (text, bool(events[0])) == (answer, hit)
        total += events
    assert [literal.hits, 30 - literal.hits, literal.audited, literal.wrong] == total.tolist()
    assert [e[3] for e in literal.entries] == [a.ids for a in lm.decode.store.answers.values()]
    assert 0 < literal.hits < 30


@pytest.mark.parametrize("threshold", [1.01, 2.0])
def test_threshold_above_one_never_hits(threshold):
    lm = cached(tiny_lm(), threshold)
    for _ in range(3):
        assert generate(lm, IDS[:9])[1:] == ((0, 1, 0, 0), True)
    assert len(lm.decode.store.answers) == 1, "the same prompt is stored once"


def test_threshold_of_minus_one_always_hits():
    lm = cached(tiny_lm(), -1.0)
    text = lm.generate(IDS[:9], 6)
    for prompt in (IDS[9:12], [5], IDS):
        assert generate(lm, prompt) == (text, (1, 0, 0, 0), False)


def test_of_two_similar_prompts_the_nearer_one_answers():
    dense = tiny_lm(dtype=np.float64)
    lm = cached(dense, 0.2)
    near, far, asked = changed(IDS[:12], 3), changed(IDS[:12], *range(6)), IDS[:12]
    texts = []
    for prompt in (far, near):
        lm.decode.store.forget()
        texts.append(lm.generate(prompt, 6))
    assert texts[0] != texts[1]
    full = replace(lm, decode=replace(lm.decode, threshold=2.0))  # the same store, which never hits
    for prompt in (far, near):
        full.generate(prompt, 6)
    assert lm.decode.store is full.decode.store and len(lm.decode.store.answers) == 2
    assert generate(lm, asked)[0] == texts[1]


def test_neutral_is_the_model_itself():
    dense = tiny_lm()
    assert repr(apply(dense, {"semantic_cache": {"entries": 0}})) == repr(dense)


# Whose answers -----------------------------------------------------------------------------------


def test_only_the_same_settings_and_the_same_model_hit():
    lm, sampled = cached(tiny_lm(), -1.0), {"temperature": 0.7, "seed": 3}
    lm.generate(IDS[:9], 6)
    assert generate(lm, IDS[:9], 5)[1] == (0, 1, 0, 0), "another limit"
    assert generate(lm, IDS[:9], 6, **sampled)[1] == (0, 1, 0, 0), "a temperature"
    for change in ({"temperature": 0.8}, {"seed": 4}, {"top_k": 9}, {"top_p": 0.5}):
        assert generate(lm, IDS[:9], 6, **sampled | change)[1] == (0, 1, 0, 0), change
    other = replace(lm, model=tiny_model(seed=2))
    assert generate(other, IDS[:9], 6)[1] == (0, 1, 0, 0), "other weights"
    wider = replace(lm, model=tiny_model(width=24, heads=3, kv_heads=1))
    assert generate(wider, IDS[:9], 6)[1] == (0, 1, 0, 0), "another width"
    inner = apply(tiny_lm(), {"prefix_cache": {"block": 2}}).decode
    loop = replace(lm, decode=replace(lm.decode, inner=inner))
    assert generate(loop, IDS[:9], 6)[1] == (0, 1, 0, 0), "another loop"
    assert generate(lm, IDS[:9], 6)[1] == generate(lm, IDS[:9], 5)[1] == (1, 0, 0, 0)
    same = replace(lm, model=tiny_model(seed=1, dtype=np.float32))
    assert generate(same, IDS[:9], 6)[1] == (1, 0, 0, 0), "equal weights are the same model"


def test_without_a_seed_nothing_is_stored_and_with_one_the_sample_comes_again():
    dense, options = tiny_lm(dtype=np.float64), {"temperature": 1.0, "top_p": 0.9}
    lm = cached(dense, -1.0)
    with ledger.counting(lm) as counts:
        lm.generate(IDS[:9], 6, **options)
    assert counts.events["bypassed"] == 1 and not lm.decode.store.answers
    expected = dense.generate(IDS[:9], 6, seed=5, **options)
    assert generate(lm, IDS[:9], seed=5, **options) == (expected, (0, 1, 0, 0), True)
    assert generate(lm, IDS[:9], seed=5, **options) == (expected, (1, 0, 0, 0), False)


def test_only_complete_answers_are_stored():
    lm = cached(tiny_lm(), -1.0)
    tokens = lm.tokens(IDS[:9], 6)
    for _ in range(5):
        next(tokens)
    assert not lm.decode.store.answers, "the caller may stop before the last token"
    next(tokens)
    assert len(lm.decode.store.answers) == 1


def ending():
    """A tiny model whose third greedy token after IDS[:9] ends the text, and its tokens."""
    tokens = tiny_lm().generate(IDS[:9], 8)
    assert tokens.index(tokens[2]) == 2
    return tiny_lm(model=tiny_model(eos=(END, tokens[2]))), tokens


def loop_tokens(lm, prompt, limit):
    """What the loop yields, past the end of the text too."""
    return list(lm.decode(lm.model, new_state(lm.model, prompt), prompt, Sampler(), limit))


def test_an_answer_that_ends_early_is_complete():
    dense, tokens = ending()
    lm = cached(dense, -1.0)
    assert generate(lm, IDS[:9], 8) == (tokens[:2], (0, 1, 0, 0), True)
    assert [answer.ids for answer in lm.decode.store.answers.values()] == [tokens[:3]]
    assert generate(lm, changed(IDS[:9], 2), 8) == (tokens[:2], (1, 0, 0, 0), False)


def test_a_caller_may_go_on_after_the_end_of_the_text():
    dense, tokens = ending()
    lm, other = cached(dense, -1.0), changed(IDS[:9], 2)
    assert loop_tokens(lm, IDS[:9], 8) == tokens == loop_tokens(lm, IDS[:9], 8)
    rest = loop_tokens(dense, other + tokens[:3], 5)
    assert loop_tokens(lm, other, 8) == tokens[:3] + rest, "then the model goes on from there"


def test_rows_of_a_batch_hit_what_was_answered_before():
    """Those that miss run in one batch. A row that has ended repeats its last token."""
    dense, tokens = ending()
    lm, prompts = cached(dense, 0.999), [IDS[:9], IDS[9:14], IDS[:30]]
    expected = [dense.generate(prompt, 6) for prompt in prompts]
    assert expected[0] == tokens[:2] and len(expected[1]) == 6
    lm.generate(prompts[0], 6)
    assert generate(lm, prompts)[:2] == (expected, (1, 2, 0, 0))
    assert generate(lm, prompts) == (expected, (3, 0, 0, 0), False)
    audited = replace(lm, decode=replace(lm.decode, audit=1))
    assert generate(audited, prompts) == (expected, (3, 0, 3, 0), True)
    assert lm.generate(prompts, 0) == [[], [], []]
    seeded = dict(top_k=5, seed=3)  # row i is sampled with seed 3 + i
    lm.generate(prompts[0], 6, **seeded)
    expected = dense.generate(prompts, 6, **seeded)
    assert generate(lm, prompts, **seeded)[:2] == (expected, (1, 2, 0, 0))


def test_what_misses_goes_to_the_answer_cache_and_the_packed_batch_inside():
    dense, prompts = tiny_lm(dtype=np.float64), [IDS[:9], IDS[9:14], IDS[:30]]
    lm = cached(dense, 0.999, answer_cache={"file": "memory"}, padding_skip={})
    kinds = [type(part).__name__ for _, part in walk(lm.decode)]
    assert kinds[:2] == ["SemanticCache", "AnswerCache"] and "PackedBatch" in kinds
    expected = [dense.generate(prompt, 6) for prompt in prompts]
    for forget, events in ((True, (3, 0, 0)), (False, (0, 3, 0)), (True, (3, 0, 3))):
        if forget:
            lm.decode.store.forget()
        with ledger.counting(lm) as counts:
            assert lm.generate(prompts, 6) == expected
        names = ("semantic misses", "semantic hits", "exact hits")
        assert tuple(counts.events[name] for name in names) == events
        assert (counts.events["tokens run"] > 0) == (events == (3, 0, 0))


# Audits ------------------------------------------------------------------------------------------


def test_every_nth_hit_is_audited_and_a_wrong_answer_joined_by_the_right_one():
    """audit=2: of 4 hits the second and the fourth are generated. The second is of a prompt with
    another answer: the generated one is returned, and stored beside the first."""
    dense = tiny_lm(dtype=np.float64)
    lm, other = cached(dense, 0.5, audit=2), changed(IDS[:12], 11)
    text, right = dense.generate(IDS[:12], 6), dense.generate(other, 6)
    assert text != right
    assert generate(lm, IDS[:12]) == (text, (0, 1, 0, 0), True)
    assert generate(lm, other) == (text, (1, 0, 0, 0), False), "a false hit that nobody sees"
    assert generate(lm, other) == (right, (1, 0, 1, 1), True), "audited, and wrong"
    assert generate(lm, other) == (right, (1, 0, 0, 0), False), "now the nearest is its own"
    assert generate(lm, IDS[:12]) == (text, (1, 0, 1, 0), True), "audited, and right"


def test_an_audit_that_is_not_generated_to_its_end_says_nothing():
    lm = cached(tiny_lm(), -1.0, audit=1)
    lm.generate(IDS[:9], 6)
    with ledger.counting(lm) as counts:
        next(lm.tokens(IDS[9:20], 6))
    assert counts.events["semantic hits"] == 1 and counts.events["audited hits"] == 0
    assert len(lm.decode.store.answers) == 1


# The store ---------------------------------------------------------------------------------------


def unit(*x):
    return np.array(x) / np.linalg.norm(x)


def test_the_least_recently_used_answer_is_evicted():
    """Room for two. a, b; a is used; c takes the place of b. The embedding of a again: replaced."""
    store = SemanticStore(2)
    a, b, c = unit(1, 0.0), unit(0, 1.0), unit(-1, 0.0)
    for e, ids in ((a, [1]), (b, [2])):
        store.put(e, b"k", ids)
    assert store.use(store.nearest(a, b"k")[0]).ids == [1]
    store.put(c, b"k", [3])
    assert [answer.ids for answer in store.answers.values()] == [[1], [3]]
    store.put(a, b"k", [4])
    assert [answer.ids for answer in store.answers.values()] == [[3], [4]]
    assert store.nearest(a, b"other") == (-1, -np.inf), "of another key there is none"
    number, similarity = store.nearest(unit(1, 1.0), b"k")
    assert store.answers[number].ids == [4] and similarity == pytest.approx(0.5**0.5, abs=1e-6)
    store.forget()
    assert not store.answers and store.nearest(a, b"k") == (-1, -np.inf)


def test_ties_go_to_the_older_answer_also_if_that_was_used_last():
    store = SemanticStore(5)
    store.put(unit(1, 1.0), b"k", [1])
    store.put(unit(1, -1.0), b"k", [2])
    store.use(1)
    assert store.answers[store.nearest(unit(1, 0.0), b"k")[0]].ids == [1]


def test_a_precomputed_folder_begins_with_an_empty_store(tmp_path):
    lm = cached(tiny_lm(), entries=7, audit=3)
    text = lm.generate(IDS[:13], 5)
    write_precomputed(lm, tmp_path / "out", Origin("toy", "--semantic-cache"), None)
    again = minitx.load(tmp_path / "out")
    assert repr(again.decode) == repr(lm.decode) and not again.decode.store.answers
    assert generate(again, IDS[:13], 5) == (text, (0, 1, 0, 0), True)


# What it costs and saves -------------------------------------------------------------------------


def test_counted_work_of_a_hit_is_that_of_the_embedding_and_the_search():
    """T = 20 tokens of D = 16 numbers: T D additions for the mean, 2 D multiplications for its
    length, N D for the similarities to N = 3 answers; and no work of the model's blocks."""
    lm, T, D, N = cached(tiny_lm(), 0.999), 20, 16, 3
    for prompt in (IDS[:T], IDS[20:30], IDS[30:40]):
        lm.generate(prompt, 6)
    with ledger.counting(lm) as counts:
        lm.generate(IDS[:T], 6)
    assert counts.total().additions == T * D
    assert counts.total().multiply_adds == 2 * D + N * D
    assert counts.total("model.stack").multiply_adds == 0


@cache
def stories_report():
    return measure(minitx.load("stories"), stories=8, changes=2, thresholds=(0.999,), bar=False)


def test_on_stories_no_threshold_separates_the_same_answer_from_another():
    """Of prompts that differ in a word, those with another answer reach into those with the same
    one. The last state tells them apart, but takes the whole pass over the prompt."""
    pairs = stories_report().pairs
    for name in EMBEDDINGS[:2]:
        same, other = pairs[name]
        assert len(same) >= 30 and len(other) >= 8
        assert other.max() > np.median(same), f"{name}: a threshold that keeps half is wrong"
    same, other = pairs[EMBEDDINGS[2]]
    assert other.max() < np.quantile(same, 0.2), "the last state"


def test_on_stories_false_hits_are_far_fewer_than_those_of_random_entries():
    row = stories_report().rows[0]
    assert 0.4 < row.hit_rate < 0.7 and row.by_chance > 0.8 * row.hits
    assert 0.01 < row.false_hits < 0.2, f"{row.wrong} of {row.hits} hits are wrong"
