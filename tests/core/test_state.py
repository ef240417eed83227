"""The state of a running sequence: tokens in hand, cache rows that know their positions, masks."""

import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, tiny_lm, tiny_model

from minitx import ops
from minitx.decode import Sampler
from minitx.errors import MinitxError
from minitx.state import SPARE, Layer, State, Tokens

RNG = np.random.default_rng(0)


def kv(T, K=2, d=4, lead=()):
    return RNG.standard_normal((2, *lead, K, T, d))


def filled(T, capacity=20):
    """A layer with T tokens, whose key rows are their positions."""
    layer = Layer(capacity).take(T)
    k = np.broadcast_to(np.arange(float(T))[:, None], (2, T, 4))
    layer.store(k, -k)
    return layer


def held(layer):
    """The positions of the rows of each head, by what is really in the cache."""
    k, v = layer.rows()
    assert_same(k, -v, "keys and values are of different tokens")
    return k[..., 0].tolist()


# Tokens ------------------------------------------------------------------------------------------


def test_consecutive_tokens_are_a_slice():
    tokens = Tokens(slice(3, 6))
    assert tokens.lookup == slice(3, 6) and tokens.end == 6 and len(tokens) == 3
    assert tokens.array.tolist() == tokens.own.tolist() == [3, 4, 5]


def test_positions_in_padded_batch_start_at_each_sequence():
    tokens = Tokens(slice(1, 4), np.array([0, 2]))
    assert tokens.own.tolist() == [[1, 2, 3], [-1, 0, 1]]  # negative: padding
    assert tokens.lookup.tolist() == [[1, 2, 3], [0, 0, 1]]  # padding looks at 0


def test_subset_of_tokens_keeps_positions():
    tokens = Tokens(slice(5, 9)).only(np.array([0, 3]))
    assert tokens.array.tolist() == [5, 8] and len(tokens) == 2 and tokens.end == -1
    assert Tokens(slice(5, 9)).only(np.array([False, True, True, False])).array.tolist() == [6, 7]


def test_tokens_on_branches_do_not_see_each_other():
    """Rows 0 and 1 are the text; then a token at 2, and two guesses of the one at 3."""
    layer = filled(2)
    unseen = np.array([[0, 1, 1], [0, 0, 1], [0, 1, 0]], bool)
    layer.tokens = Tokens(np.array([2, 3, 3]), unseen=unseen)
    layer.store(*kv(3))
    hidden = np.array([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 1, 0]], bool)
    assert_same(layer.mask(), hidden)
    layer.tokens = layer.tokens.only(np.array([False, False, True]))
    assert_same(layer.mask(), hidden[2:], "one of the tokens")


# Rows --------------------------------------------------------------------------------------------


def test_cache_rows_in_order_store_no_positions():
    layer = filled(5)
    layer.take(2).store(*kv(2))
    assert layer.count == 7 and layer.row_positions is None and layer.mask() is None
    assert layer.row_tokens().positions == slice(0, 7)


def test_cache_rows_out_of_order_know_positions():
    """Tokens 0, 1, 4 first, then 2 and 3, which come late (token skipping)."""
    layer = Layer(20)
    for positions in ([0, 1], [4], [2, 3]):
        layer.tokens = Tokens(np.array(positions))
        k = np.broadcast_to(np.array(positions, float)[:, None], (2, len(positions), 4))
        layer.store(k, -k)
    assert layer.row_positions.tolist() == [0, 1, 4, 2, 3]
    assert layer.mask().tolist() == [  # of queries 2 and 3 over rows 0, 1, 4, 2, 3
        [False, False, True, False, True],
        [False, False, True, False, False],
    ]
    layer.tokens = Tokens(slice(5, 6))
    layer.store(*np.full((2, 2, 1, 4), 5.0) * [[[[1]]], [[[-1]]]])
    assert layer.mask() is None, "the newest single token sees every row"
    layer.rewind(3)
    assert held(layer) == [[0, 1, 2]] * 2 and layer.row_positions.tolist() == [0, 1, 2]


def test_attention_is_independent_of_row_order():
    """Shuffled cache rows, masked by their positions, give what ordered rows give."""
    q, (k, v) = RNG.standard_normal((4, 3, 4)), kv(8)
    ordered = Layer(8)
    ordered.tokens = Tokens(slice(0, 8))
    ordered.store(k, v)
    ordered.tokens = Tokens(slice(5, 8))
    expected = ops.attention(q, *ordered.rows(), 0.5, ordered.mask())
    shuffled, order = Layer(8), RNG.permutation(8)
    shuffled.tokens = Tokens(order)
    shuffled.store(k[:, order], v[:, order])
    shuffled.tokens = Tokens(slice(5, 8))
    found = ops.attention(q, *shuffled.rows(), 0.5, shuffled.mask())
    assert_same(found, expected, atol=1e-14)


def test_only_visible_rows_are_attended():
    layer = filled(6)
    layer.visible = np.array([0, 2, 5])
    assert held(layer) == [[0, 2, 5]] * 2
    assert layer.row_tokens().array.tolist() == [0, 2, 5]
    layer.tokens = Tokens(np.array([2, 5]))
    assert layer.mask().tolist() == [[False, False, True], [False, False, False]]


def test_keep_frees_other_rows_and_their_memory():
    layer = filled(200, capacity=1000)
    assert layer.keys.shape[-2] == 1000
    layer.keep(np.array([0, 1, 198, 199]))
    assert held(layer) == [[0, 1, 198, 199]] * 2
    assert layer.keys.shape[-2] == layer.values.shape[-2] == 4 + SPARE
    layer.take(40).store(*kv(40))
    assert layer.count == 44 and layer.row_positions.tolist()[:5] == [0, 1, 198, 199, 200]


def test_rows_kept_per_head_give_a_mask_per_head():
    layer = filled(5)
    layer.keep(np.array([[0, 3, 4], [1, 2, 4]]))
    assert held(layer) == [[0, 3, 4], [1, 2, 4]]
    layer.tokens = Tokens(np.array([2, 4]))
    mask = layer.mask()  # (K, 1, T, S)
    assert mask.shape == (2, 1, 2, 3)
    assert mask[:, 0, 0].tolist() == [[False, True, True], [False, False, True]]
    layer.keep(np.array([[0, 2], [1, 2]]))  # now by place among the rows that are left
    assert held(layer) == [[0, 4], [2, 4]]


def test_padding_is_masked_in_a_padded_batch():
    layer = Layer(6, start=np.array([0, 2])).take(3)
    layer.store(*kv(3, lead=(2,)))
    mask = layer.mask()  # (B, 1, 1, T, S)
    causal = np.triu(np.ones((3, 3), bool), 1)
    assert mask.shape == (2, 1, 1, 3, 3)
    assert_same(mask[0, 0, 0], causal)
    assert mask[1, 0, 0].tolist() == [[True] * 3, [True] * 3, [True, True, False]]


# Going back, and forking -------------------------------------------------------------------------


def test_rewind_past_freed_rows_is_refused_by_name():
    state = State(2, 20)
    state.take(10)
    state.position = 10
    for layer in state.layers:
        layer.tokens = state.tokens
        layer.store(*kv(10))
    state.layers[1].keep(np.arange(6, 10))
    state.layers[1].rewindable_to, state.layers[1].evicted_by = 8, "some_technique"
    with pytest.raises(MinitxError, match="position 7: some_technique has freed cache rows"):
        state.rewind(7)
    assert state.position == 10 and state.layers[0].count == 10, "a refusal changes nothing"
    state.rewind(8)
    assert [layer.count for layer in state.layers] == [8, 2]
    state.rewind(0)
    assert [layer.count for layer in state.layers] == [0, 0]
    assert state.layers[1].row_positions is None and state.layers[1].rewindable_to == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_position_beyond_context_is_refused(family):
    """By the core: learned positions would give empty logits, silently."""
    model = tiny_model(family)
    state = model.new_state()
    model([1] * 40, state)
    with pytest.raises(MinitxError, match="grow to 49 tokens but the model's context is 48"):
        model([1] * 9, state)
    assert state.position == 40
    assert model([1] * 8, state).shape == (8, 259)
    with pytest.raises(MinitxError, match="context is 48"):
        model([1] * 49)


def test_state_knows_prompt_length():
    seen = []

    class Loop(type(tiny_lm().decode)):
        def __call__(self, model, state, ids, choose, limit):
            seen.append((state.prompt, state.position))
            return super().__call__(model, state, ids, choose, limit)

    lm = tiny_lm(decode=Loop())
    lm.generate([5, 6, 7], 2)
    assert seen == [(3, 0)]


def test_fork_shares_no_mutable_data():
    lm = tiny_lm(dtype=np.float64)
    ids = RNG.integers(0, 258, 30)
    state = lm.model.new_state()
    lm.model(ids[:20], state)
    early, late = state.fork(12), state.fork()
    expected = lm.model(ids[20:], state)
    assert_same(lm.model(ids[20:], late), expected)
    whole = lm.model.new_state()
    lm.model(ids[:12], whole)
    found, expected = (lm.model(ids[5:9], after) for after in (early, whole))
    assert_same(found, expected, atol=1e-12)
    assert (early.position, state.position) == (16, 30)


def test_cache_bytes_count_rows_in_use():
    lm = tiny_lm()
    state = lm.model.new_state()
    assert state.cache_bytes == state.bytes_per_token == 0
    lm.model([1, 2, 3, 4], state)
    c = lm.model.config
    assert state.bytes_per_token == c.layers * 2 * c.kv_heads * c.head_width * 4
    state.layers[0].keep(np.array([0, 3]))
    assert state.cache_bytes == 6 * c.kv_heads * c.head_width * 2 * 4


# Decoding ----------------------------------------------------------------------------------------


def test_decoding_continues_from_a_warm_state():
    """The state holds the first tokens of the prompt: they are not run again."""
    lm = tiny_lm(dtype=np.float64)
    prompt = RNG.integers(0, 258, 9).tolist()
    for held in (0, 1, 8):
        state = lm.model.new_state()
        if held:
            lm.model(prompt[:held], state)
        found = list(lm.decode(lm.model, state, prompt, Sampler(), 7))
        assert found == lm.generate(prompt, 7), f"{held} tokens were there"
        assert state.position == 9 + 6


def test_sampler_stores_its_seed():
    assert Sampler(seed=7).seed == 7 and Sampler().seed is None


@pytest.mark.parametrize("T, S", [(130, 130), (70, 200), (3, 3)])
def test_explicit_causal_mask_equals_built_in_mask(T, S):
    """Also in blocks of queries, of which the first do not see the last keys."""
    q, (k, v) = RNG.standard_normal((4, T, 4)), kv(S)
    mask = np.arange(S) > np.arange(S - T, S)[:, None]
    found, expected = ops.attention(q, k, v, 0.5, mask), ops.attention(q, k, v, 0.5)
    assert_same(found, expected, atol=1e-14)


# The end of the context ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lead", [(), (2,)], ids=["one", "batch"])
def test_context_end_is_refused_and_leaves_the_state_usable(family, lead):
    model = tiny_model(family, dtype=np.float64)
    ids = np.broadcast_to(np.arange(60) * 7 % 258, (*lead, 60))
    whole, state = model(ids[..., :48]), model.new_state()
    for a, b in ((0, 20), (20, 47)):
        model(ids[..., a:b], state)
    for use in (model, model.next_logits, model.hidden):
        for T in (2, 13):  # one token would fit
            with pytest.raises(MinitxError, match=f"would grow to {47 + T} tokens .* 48"):
                use(ids[..., 47 : 47 + T], state)
    for other in (state, state.fork(), state.fork(30)):
        found = model(ids[..., other.position : 48], other)
        assert_same(found[..., -1, :], whole[..., -1, :], atol=1e-12)
        with pytest.raises(MinitxError, match="would grow to 49 tokens"):
            model(ids[..., 48:49], other)
        other.rewind(0)
        with pytest.raises(MinitxError, match="would grow to 49 tokens"):
            model(ids[..., :49], other)
    with pytest.raises(MinitxError, match="would grow to 60 tokens"):
        model(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_state_of_another_model_is_refused(family):
    """A longer context would look up positions beyond the end of the tables: with learned positions
    one token's logits would be silently empty."""
    model, longer = tiny_model(family), tiny_model(family, context=96)
    state = longer.new_state()
    longer(np.arange(48), state)
    with pytest.raises(MinitxError, match="context of 96, .* 48; make one with model.new_state"):
        model([1], state)
    with pytest.raises(MinitxError, match="for 3 blocks"):
        model([1], tiny_model(family, layers=3).new_state())


def test_ids_of_another_batch_shape_are_refused():
    model, state = tiny_model(), tiny_model().new_state()
    model([1, 2, 3], state)
    for ids in ([[1], [2]], [[1]]):
        with pytest.raises(MinitxError, match=r"batch of shape \(\) .* use a new state"):
            model(ids, state)
    with pytest.raises(MinitxError, match="batch of shape"):
        model([1], model.new_state(np.array([0, 1])))


@pytest.mark.parametrize("ids", [5, [], [1.0], ["a"], None], ids=str)
def test_ids_that_are_no_list_of_integers_are_refused(ids):
    for state in (None, tiny_model().new_state()):
        with pytest.raises(MinitxError, match="Expected token ids as a list or an array of int"):
            tiny_model()(ids, state)
