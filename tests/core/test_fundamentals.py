"""What everything else rests on, each property by hand and by itself. These tests run before all
others (conftest.py), so that ``pytest -x`` stops where the mistake is and says what it is.

They are read in the order of the forward pass, then of decoding. The calls go through their modules
(``ops.softmax``), because test_breaking_lines.py breaks one line after another there, and checks
that the test meant for it fails with a message that names the property.
"""

import math

import numpy as np
from same import assert_same
from tiny import FAMILIES, tiny_model

from minitx import decode, fast, model, ops
from minitx.model import Activated, Block, Head, Linear, ParallelBlock, Rope, SwiGLU, TiedHead
from minitx.precompute import quantize
from minitx.shared import draft_and_verify, folding
from minitx.skip import early_exit
from minitx.skip.early_exit.confidence import ThresholdSchedule
from minitx.skip.early_exit.kv_fill import CopyExitState
from minitx.state import Layer, Tokens
from minitx.tree import Part, part

RNG = np.random.default_rng(0)
EXACT = 1e-12


# Matrices -----------------------------------------------------------------------------------------


def test_linear_is_x_times_w_plus_b():
    """[1, 2] times [[1, 2], [3, 4]] is [1 + 6, 2 + 8]; the bias [10, 20] is added."""
    w, b = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([10.0, 20.0])
    x = np.array([[1.0, 2.0]])
    assert_same(Linear(w)(x), [[7, 10]], "linear layer without a bias: x @ w")
    assert_same(Linear(w, b)(x), [[17, 30]], "bias of a linear layer: x @ w + b")


def test_heads_are_slices_of_columns():
    """Two tokens, two heads of width 2: head 0 has columns 0 and 1."""
    x = np.array([[0, 1, 2, 3], [4, 5, 6, 7]])
    heads = [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]  # (head, token, column)
    axes = ("head", "token", "column")
    assert_same(model.split_heads(x, 2), heads, "split into heads", axes)
    assert_same(model.merge_heads(np.array(heads)), x, "merge heads: the inverse of the split")


# Norms --------------------------------------------------------------------------------------------


def test_rms_norm_divides_by_the_root_of_the_mean_square():
    """[3, 4]: the mean of the squares is (9 + 16) / 2 = 12.5."""
    x = np.array([3.0, 4.0])
    expected = x / math.sqrt(12.5)
    said = "RMS norm divides by the root of the mean of the squares, not of their sum"
    assert_same(ops.rms_norm(x, 1.0, 0.0), expected, said, tolerance=EXACT)
    rows = np.array([x, 10 * x])
    what = f"{said} (several rows)"
    assert_same(ops.rms_norm(rows, 1.0, 0.0), [expected] * 2, what, tolerance=EXACT)


def test_rms_norm_adds_epsilon_under_the_root():
    """[1, 1] with epsilon 3: 1 / sqrt(1 + 3) = 1/2. Outside the root: 1 / (1 + 3) = 1/4."""
    ones = np.ones(2)
    what = "epsilon of the RMS norm is added to the mean square, under the root"
    assert_same(ops.rms_norm(ones, 1.0, 3.0), ones / 2, what, tolerance=EXACT)
    assert_same(ops.rms_norm(np.ones((3, 2)), 1.0, 3.0), np.ones((3, 2)) / 2, what, tolerance=EXACT)


def test_rms_norm_multiplies_each_column_by_its_gain():
    gain, what = np.array([2.0, 5.0]), "gain of the RMS norm, one factor for each column"
    assert_same(ops.rms_norm(np.ones(2), gain, 0.0), gain, what, tolerance=EXACT)
    assert_same(ops.rms_norm(np.ones((3, 2)), gain, 0.0), [gain] * 3, what, tolerance=EXACT)


def test_layer_norm_subtracts_the_mean_and_adds_the_bias():
    """[1, 3] less its mean is [-1, 1], of variance 1. Gain [2, 3] and bias [10, 20]: [8, 23]."""
    x, one, zero = np.array([[1.0, 3.0]]), np.ones(2), np.zeros(2)
    what = "layer norm subtracts the mean of the row"
    assert_same(ops.layer_norm(x, one, zero, 0.0), [[-1, 1]], what, tolerance=EXACT)
    gain, bias = np.array([2.0, 3.0]), np.array([10.0, 20.0])
    found = ops.layer_norm(x, gain, bias, 0.0)
    assert_same(found, [[8, 23]], "layer norm: gain times the row, plus the bias", tolerance=EXACT)


# Rotary positions ---------------------------------------------------------------------------------

POSITION = ("position", "column")


def rotated(x, positions):
    """x (T, 4) rotated to these positions, with base 100."""
    cos, sin = ops.rope_tables(4, 50, 100.0, np.float64)
    return ops.rotate(np.asarray(x, float), cos[positions], sin[positions])


def test_rotary_position_0_rotates_nothing():
    x = RNG.normal(size=(1, 4))
    assert_same(rotated(x, [0]), x, "rotary position 0 leaves a vector as it is", POSITION, EXACT)


def test_rotary_frequencies_are_powers_of_the_base():
    """Width 4, base 100: frequencies 100^0 = 1 and 100^(-2/4) = 1/10 radians per position."""
    cos, sin = ops.rope_tables(4, 3, 100.0, np.float64)
    for position in (1, 2):
        angles = position * np.array([1, 0.1, 1, 0.1])
        what = f"rotary frequency base^(-2i/d), columns at position {position}"
        assert_same(cos[position], np.cos(angles), what, ("column",), EXACT)
        assert_same(abs(sin[position]), np.sin(angles), what, ("column",), EXACT)


def test_rotary_direction_and_pairs():
    """Columns i and i + d/2 are a pair (a, b). Rotated by t: (a cos t - b sin t, a sin t + b cos
    t). At position 1, column 0 turns by 1 radian towards column 2, column 3 by 0.1 away from 1."""
    x = [[1, 0, 0, 0], [0, 0, 0, 1]]
    expected = [
        [math.cos(1), 0, math.sin(1), 0],
        [0, -math.sin(0.1), 0, math.cos(0.1)],
    ]
    what = "direction of the rotary rotation, of columns i and i + d/2"
    assert_same(rotated(x, [1, 1]), expected, what, ("vector", "column"), EXACT)


def test_rotary_products_depend_on_the_distance_only():
    q, k = RNG.normal(size=(2, 1, 4))
    for distance in (0, 1, 7):
        products = [
            (rotated(q, [p]) @ rotated(k, [p - distance]).T).item() for p in (distance, 20, 40)
        ]
        what = f"q . k of rotated vectors depends on their distance only, here {distance}"
        assert_same(products, [products[0]] * 3, what, ("pair",), 1e-10)
        lengths = np.linalg.norm(rotated(q, [distance])), np.linalg.norm(q)
        assert_same(*lengths, "a rotation keeps the length of a vector", tolerance=EXACT)


def test_rotary_positions_are_those_of_the_tokens():
    cos, sin = ops.rope_tables(4, 9, 100.0, np.float64)
    x = RNG.normal(size=(1, 2, 4))
    found = Rope(cos, sin)(x, Tokens(slice(5, 7)))[0]
    what = "rotary positions of tokens 5 and 6 of a sequence"
    assert_same(found, rotated(x[0], [5, 6]), what, POSITION, EXACT)


# Attention ----------------------------------------------------------------------------------------

QUERY = ("query", "key")
SEES = [  # 1: the query sees this key
    [1, 0, 0],
    [1, 1, 0],
    [1, 1, 1],
]


def masks():
    """(name, mask of 3 tokens: True where hidden), from the three places that make one."""
    layer = Layer.once(3)
    layer.count, layer.row_positions = 3, np.arange(3)
    return {
        "causal_mask": ops.causal_mask(3, 3),
        "block_mask": fast.block_mask(3),
        "mask of a KV cache whose rows have positions": layer.mask(),
    }


def test_causal_mask_shows_a_query_its_own_key():
    for name, mask in masks().items():
        what = f"causal mask ({name}): each query sees its own key"
        assert_same(~mask.diagonal(), [True] * 3, what, ("query",))


def test_causal_mask_hides_later_keys():
    for name, mask in masks().items():
        what = f"causal mask ({name}): a query sees no later key and all earlier ones"
        assert_same(~mask, np.array(SEES, bool), what, QUERY)


def test_causal_mask_of_the_newest_tokens():
    """Two new tokens after two cached ones: they see 3 and 4 keys."""
    expected = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)
    what = "causal mask of the 2 newest of 4 tokens"
    assert_same(~ops.causal_mask(2, 4), expected, what, QUERY)


def attention_functions():
    """Both ways to compute attention of one head, called as f(q, k, v, scale)."""

    def plain(q, k, v, scale):
        return ops.plain_attention(q, k, v, scale, ops.causal_mask(q.shape[-2], k.shape[-2]))

    return {"plain_attention": plain, "attention": ops.attention}


def test_softmax_is_over_the_last_axis():
    """exp(ln 1) = 1 and exp(ln 3) = 3: 1/4 and 3/4. Each row sums to 1."""
    scores = np.log([[1.0, 3.0], [3.0, 2.0]])
    expected = [[1 / 4, 3 / 4], [3 / 5, 2 / 5]]
    what = "softmax over the keys (last axis): each row sums to 1"
    assert_same(ops.softmax(scores), expected, what, QUERY, EXACT)


def test_softmax_of_large_scores_does_not_overflow():
    what = "softmax of large scores (subtract the maximum first)"
    with np.errstate(all="ignore"):
        found = ops.softmax(np.array([[1000.0, 1000.0]]))
    assert_same(found, [[0.5, 0.5]], what, QUERY, EXACT)


def test_attention_multiplies_scores_by_the_scale():
    """Scale 1/2: q . k is 2 ln 3 and 0, the scores are ln 3 and 0, the weights 3/4 and 1/4; with
    the values 1 and 0 the result is 3/4."""
    q = np.array([[[2 * math.log(3), 0, 0, 0]]])
    k = np.array([[[1.0, 0, 0, 0], [0, 1, 0, 0]]])
    v = np.array([[[1.0], [0.0]]])
    for name, attention in attention_functions().items():
        what = f"scale of the attention scores ({name})"
        assert_same(attention(q, k, v, 0.5), [[[0.75]]], what, tolerance=EXACT)


def test_attention_scale_of_a_model_is_one_over_the_root_of_the_head_width():
    for family, config in FAMILIES.items():
        scale = tiny_model(family).stack.blocks[0].attn.attend.scale
        what = f"scale of the attention scores is 1/sqrt(d) = 1/sqrt({config.head_width})"
        assert_same(scale, config.head_width**-0.5, f"{what} ({family})", tolerance=EXACT)


def test_attention_with_equal_scores_averages_the_visible_values():
    """With q = 0 all scores are equal: token t gets the mean of the values 0 .. t. 70 tokens: more
    than one block of queries."""
    T = 70
    v = np.arange(T, dtype=float)[:, None]
    means = (np.cumsum(v) / np.arange(1, T + 1))[:, None]
    q, k = np.zeros((1, T, 2)), RNG.normal(size=(1, T, 2))
    for name, attention in attention_functions().items():
        what = f"causal mask in {name}: token t averages the values 0 to t"
        assert_same(attention(q, k, v[None], 1.0)[0], means, what, tolerance=EXACT)
        last = attention(q[:, 67:], k, v[None], 1.0)[0]
        what = f"causal mask in {name}: the newest tokens see the whole KV cache"
        assert_same(last, means[67:], what, tolerance=EXACT)


def test_grouped_heads_repeat_key_heads():
    """4 query heads, 2 key heads: query heads 0 and 1 share key head 0, and 2 and 3 share 1."""
    q, k, v = (RNG.normal(size=(heads, 3, 4)) for heads in (4, 2, 2))
    mask = ops.causal_mask(3, 3)
    heads = [ops.plain_attention(q[h], k[h // 2], v[h // 2], 0.5, mask) for h in range(4)]
    what = "grouped heads: query head h reads key head h // 2 (repeat, not tile)"
    axes = ("query head", "token", "column")
    assert_same(ops.attention(q, k, v, 0.5), heads, what, axes, EXACT)


# Blocks -------------------------------------------------------------------------------------------


@part
class Times(Part):
    """Stands for attention or an FFN: multiplies its input."""

    factor: float

    def __call__(self, x, layer=None):
        return self.factor * x


def test_block_adds_to_the_residual_stream():
    """Attention times 10, FFN times 100, input 1: 1 + 10 = 11, then 11 + 1100."""
    found = Block(Times(10.0), Times(100.0))(np.ones((1, 2)), None)
    what = "residual stream: x + attention(x), and to that its FFN is added"
    assert_same(found, [[1111, 1111]], what)


def test_parallel_block_reads_the_input_twice():
    """1 + 10 + 100: the FFN does not see the attention's output."""
    found = ParallelBlock(Times(10.0), Times(100.0))(np.ones((1, 2)), None)
    what = "residual stream of a parallel block: x + attention(x) + FFN(x)"
    assert_same(found, [[111, 111]], what)


def test_swiglu_is_silu_of_the_gate_times_up():
    """silu(g) = g / (1 + exp(-g)): silu(ln 3) = 3/4 ln 3. Times 2: 3/2 ln 3."""
    gate, up = np.array([[math.log(3)]]), np.array([[2.0]])
    what = "SwiGLU: silu(gate) * up, not gate * silu(up)"
    assert_same(ops.swiglu(gate, up), [[1.5 * math.log(3)]], what, tolerance=EXACT)
    assert_same(ops.silu(gate), [[0.75 * math.log(3)]], "silu: x * sigmoid(x)", tolerance=EXACT)
    ffn = SwiGLU(Times(math.log(3)), Times(2.0))
    what = "SwiGLU of a model: the gate's matrix goes through silu"
    assert_same(ffn(np.ones((1, 1))), [[1.5 * math.log(3)]], what, tolerance=EXACT)


def test_activations_by_hand():
    """The normal distribution has Phi(1) = 0.841345 and Phi(-1) = 0.158655."""
    x = np.array([[1.0, -1.0]])
    found = Activated(Times(1.0), ops.gelu)(x)
    assert_same(found, [[0.841345, -0.158655]], "GELU: x * Phi(x)", tolerance=1e-6)
    assert_same(ops.gelu_tanh(x), [[0.841192, -0.158808]], "GELU by tanh", tolerance=1e-6)
    assert_same(ops.relu(x), [[1, 0]], "ReLU: max(x, 0)")


# Embedding and head -------------------------------------------------------------------------------


def test_embedding_adds_the_position_of_each_token():
    tokens, positions = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[10.0], [20.0], [30.0]])
    embed = model.PositionEmbedding(model.TokenEmbedding(tokens), positions)
    found = embed(np.array([1, 0]), slice(1, 3))
    what = "embedding: row of the token plus row of its position"
    assert_same(found, [[23, 24], [31, 32]], what)


def test_head_scores_each_vocabulary_entry():
    """Logits are x times a column per entry; a tied head takes the rows of the embedding."""
    x, table = np.array([[1.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    axes = ("token", "vocabulary entry")
    assert_same(Head(table.T)(x), [[1, 2, 3]], "output head: one logit per column", axes)
    what = "tied head: logits are dot products with the rows of the embedding"
    assert_same(TiedHead(table)(x), [[1, 2, 3]], what, axes)


# The KV cache -------------------------------------------------------------------------------------

IDS = [5, 1, 9, 200, 7, 31]


def test_kv_cache_token_by_token_equals_one_pass():
    for family in FAMILIES:
        m = tiny_model(family, dtype=np.float64)
        whole, state = m(IDS), m.new_state()
        steps = np.concatenate([m([token], state) for token in IDS])
        what = f"KV cache: logits of {family} token by token, against one pass"
        assert_same(steps, whole, what, ("token", "logit"), 1e-10)


def test_kv_cache_forgets_what_is_rewound():
    m = tiny_model("llama", dtype=np.float64)
    state = m.new_state()
    m([*IDS[:3], 99, 98], state)
    state.rewind(3)
    what = "rewind of the KV cache: logits after two tokens were taken back"
    assert_same(m(IDS[3:], state), m(IDS)[3:], what, ("token", "logit"), 1e-10)


# Sampling -----------------------------------------------------------------------------------------

# Probabilities 8/15, 4/15, 2/15 and 1/15. At temperature 1/2 they are squared: 64, 16, 4 and 1, of
# 85.
LOGITS = np.log([8.0, 4.0, 2.0, 1.0])


def test_sampling_divides_logits_by_the_temperature():
    found = decode.Sampler(temperature=0.5).probabilities(LOGITS)
    what = "temperature: probabilities are softmax(logits / temperature)"
    assert_same(found, np.array([64, 16, 4, 1]) / 85, what, ("token",), EXACT)


def test_sampling_keeps_the_top_k():
    found = decode.Sampler(temperature=1, top_k=2).probabilities(LOGITS)
    assert_same(found, [2 / 3, 1 / 3, 0, 0], "top-k keeps the k largest", ("token",), EXACT)


def test_sampling_top_p_keeps_the_token_that_crosses_p():
    """8/15 is less than 0.6; with the next token it is 12/15: two tokens are kept."""
    found = decode.Sampler(temperature=1, top_p=0.6).probabilities(LOGITS)
    what = "top-p keeps the smallest set that reaches p, and divides by its sum"
    assert_same(found, [2 / 3, 1 / 3, 0, 0], what, ("token",), EXACT)


def test_sampling_applies_the_temperature_before_top_p():
    """At temperature 1/2, 64 + 16 of 85 are 0.94 and reach 0.9: two tokens are kept. At
    temperature 1, 8 + 4 of 15 are only 0.8, and three would be."""
    found = decode.Sampler(temperature=0.5, top_p=0.9).probabilities(LOGITS)
    what = "temperature before top-p"
    assert_same(found, [0.8, 0.2, 0, 0], what, ("token",), EXACT)


def test_greedy_decoding_takes_the_largest_logit():
    what = "greedy decoding: the largest logit, ties to the lower id"
    assert_same(decode.Sampler()(np.array([1.0, 3.0, 3.0, -5.0])), 1, what)


# Speculative decoding -----------------------------------------------------------------------------

TARGET, DRAFT = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])


class Draws:
    """A sampler that notes the distributions it draws from, and returns given outcomes, then
    0."""

    temperature = 1

    def __init__(self, *outcomes):
        self.outcomes, self.drawn = list(outcomes), []

    def draw(self, p):
        self.drawn.append(np.asarray(p))
        return self.outcomes.pop(0) if self.outcomes else 0

    def probabilities(self, logits):
        return logits

    def __call__(self, logits):
        return self.draw(logits)


def test_acceptance_rule_is_p_over_q():
    """Token 0: 0.5 / 0.2 is above 1, so it is always accepted. Token 1: with 0.3 / 0.5."""
    for x, accept in enumerate([1, 0.6, 2 / 3]):
        sampler = Draws(1)
        token = draft_and_verify.accept_or_resample(TARGET, DRAFT, x, sampler)
        what = f"acceptance rule min(1, p/q) for draft token {x}"
        assert_same(sampler.drawn[0][1], accept, what, tolerance=EXACT)
        assert token == x, "acceptance rule: an accepted draft token is returned"


def test_residual_distribution_is_what_the_draft_lacks():
    """p - q = [0.3, -0.2, -0.1]: only token 0 is proposed too rarely."""
    found = draft_and_verify.residual_distribution(TARGET, DRAFT)
    what = "residual distribution max(0, p - q), normalized"
    assert_same(found, [1, 0, 0], what, ("token",), EXACT)
    found = draft_and_verify.residual_distribution(
        np.array([0.6, 0.4, 0]), np.array([0.2, 0.2, 0.6])
    )
    assert_same(found, [2 / 3, 1 / 3, 0], what, ("token",), EXACT)


def test_rejection_draws_from_the_residual_distribution():
    sampler = Draws(0, 0)
    draft_and_verify.accept_or_resample(TARGET, DRAFT, 1, sampler)
    what = "residual distribution, from which a rejected token is drawn again"
    assert_same(sampler.drawn[1], [1, 0, 0], what, ("token",), EXACT)


def test_verification_stops_at_the_first_rejection():
    """Two proposals: accepted and rejected gives the accepted one and a new token; both accepted
    gives one more token from the target."""
    proposals = [draft_and_verify.Proposal(x, DRAFT) for x in (1, 2)]
    rows = np.array([TARGET] * 3)
    found = draft_and_verify.verify(rows, proposals, Draws(0, 0, 0))
    assert_same(found, [0], "verification ends at the first rejection", ("token",))
    found = draft_and_verify.verify(rows, proposals, Draws(1, 1, 0))
    what = "verification adds a token of the target after accepted proposals"
    assert_same(found, [1, 2, 0], what, ("token",))


# Early exit ---------------------------------------------------------------------------------------


@part
class Confident(Part):
    """A measure: confidence 0.1 after one layer, 0.9 from two layers on."""

    def __call__(self, h, previous, depth, t):
        return np.full(len(h), 0.9 if depth >= 2 else 0.1)


def exiting(threshold, warm_up=0):
    """A tiny model of 4 layers and the same model with exits from layer 1 on."""
    dense = tiny_model("llama", dtype=np.float64, layers=4)
    schedule = ThresholdSchedule(threshold, None, 1, warm_up)
    stack = early_exit.ExitingStack(dense.stack, Confident(), schedule, CopyExitState(), 1, 1)
    return dense, stack


def run_stack(m, stack, ids, state):
    x = m.embed(np.array(ids), state.take(len(ids)).lookup)
    y = stack(x, state)
    state.position += len(ids)
    return y


def test_exit_condition_is_confidence_of_at_least_the_threshold():
    """Confidence 0.9 reaches the thresholds 0.8 and 0.9 after 2 layers, 0.95 never; one token takes
    another path through the code than several."""
    for threshold, depth in ((0.8, 2), (0.9, 2), (0.95, 4)):
        for ids in (IDS, IDS[:1]):
            dense, stack = exiting(threshold)
            found = run_stack(dense, stack, ids, dense.new_state())
            state = dense.new_state()
            x = dense.embed(np.array(ids), state.take(len(ids)).lookup)
            expected = dense.stack.run(x, state, 0, depth)
            what = (
                f"exit condition: with confidence 0.9 and threshold {threshold}, {len(ids)} tokens "
                f"exit after {depth} layers"
            )
            assert_same(found, expected, what, tolerance=1e-10)


def test_kv_backfill_fills_skipped_layers_from_the_exit_state():
    for ids in (IDS, IDS[:1]):
        dense, stack = exiting(0.8)
        state = dense.new_state()
        exit_state = run_stack(dense, stack, ids, state)
        rows = [layer.count for layer in state.layers]
        what = "KV backfill: cache rows in each layer, also in those that were skipped"
        assert_same(rows, [len(ids)] * 4, what, ("layer",))
        for i in (2, 3):
            attn = dense.stack.blocks[i].attn
            keys = attn.qkv.k(attn.norm(exit_state))[None]  # one key head
            expected = attn.rope(keys, Tokens(slice(0, len(ids))))
            what = f"KV backfill: keys of skipped layer {i}, from the hidden state at the exit"
            assert_same(state.layers[i].rows()[0], expected, what, ("head", *POSITION), 1e-10)


# Precomputed weights ------------------------------------------------------------------------------


def test_quantization_rounds_to_the_scale_of_the_group():
    """Largest magnitude 1.27: scale 1.27 / 127 = 0.01, and 0.5 becomes the code 50."""
    w = np.array([-1.27, 0.5, 0.004]).reshape(1, 3, 1)
    codes, scales, _ = quantize.quantize_groups_symmetric(w, 8)
    assert_same(scales, [[0.01]], "scale: largest magnitude of a group / 127", None, EXACT)
    assert_same(codes[0, :, 0], [-127, 50, 0], "codes: weight / scale, rounded", ("input",))


def test_dequantization_subtracts_the_zero_point_before_scaling():
    """Codes 3 and 5, zero point 1, scale 1/2: (3 - 1) / 2 and (5 - 1) / 2."""
    codes = np.array([[[3.0], [5.0]]])
    found = quantize.dequantize(codes, np.array([[0.5]]), np.array([[1.0]]))
    what = "dequantization: scale * (code - zero point)"
    assert_same(found[0, :, 0], [1, 2], what, ("input",), EXACT)


def test_quantized_weights_are_off_by_a_scale_at_most():
    w = RNG.normal(1, 1, size=(2, 8, 3))  # not centered: zero points matter
    for method in (quantize.quantize_groups_symmetric, quantize.quantize_groups_asymmetric):
        codes, scales, zero_points = method(w, 8)
        off = abs(quantize.dequantize(codes, scales, zero_points) - w) / scales[:, None]
        assert off.max() <= 1, f"{method.__name__}: a weight is off by {off.max():.2f} scales"


def test_folding_a_norm_scales_the_rows_of_the_next_matrix():
    """(x * gain + bias) W = x (diag(gain) W) + bias W."""
    w, gain, bias = RNG.normal(size=(3, 3)), np.array([2.0, 3.0, 5.0]), np.array([1.0, -1.0, 2.0])
    folded = folding.fold_into(Linear(w), gain, bias)
    what = "folding: the gain multiplies the rows (inputs) of the matrix"
    assert_same(folded.w, [2 * w[0], 3 * w[1], 5 * w[2]], what, ("input", "output"), EXACT)
    what = "folding: the norm's bias times the original matrix becomes a bias"
    assert_same(folded.b, w[0] - w[1] + 2 * w[2], what, ("output",), EXACT)
