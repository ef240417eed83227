"""Switchable decision: an example by hand, the literal version, the gradients against exact
enumeration, the laws of a decision per sequence, counts, the file, and figures on stories."""

import shutil
from dataclasses import replace
from functools import cache

import literal_switchable as literal
import numpy as np
import pytest
from random_sets import broken_law
from same import assert_same
from tiny import FAMILIES, TOKENIZER, check_close, in_chunks, tiny_model

import minitx
from minitx.checkpoints.find import shipped
from minitx.checkpoints.safetensors import read_header, read_tensors
from minitx.checkpoints.safetensors_write import write_safetensors
from minitx.errors import MinitxError, MinitxWarning
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import Block, Stack
from minitx.skip.switchable import decision_of, switched, train, unit_costs
from minitx.skip.switchable.baselines import FixedPlan, RandomPlans, units_within
from minitx.skip.switchable.file import FILE, Policies, read_policies, write_policies
from minitx.skip.switchable.policy import HIDDEN, PolicyNetwork, TokenPolicy
from minitx.technique import apply, decides
from minitx.tree import Part, part

L = 4
U = 2 * (L - 1)
IDS = np.random.default_rng(3).integers(0, 258, 40)
OTHER = (IDS * 7 + 3) % 258
STEPS = (12, *[1] * 28)

family = pytest.mark.parametrize("family", FAMILIES)


def dense_lm(family="llama", dtype=np.float64):
    return LM(tiny_model(family, dtype=dtype, layers=L), TOKENIZER)


def random_network(seed=0, width=16, units=U, dtype=np.float64) -> PolicyNetwork:
    """A network whose decisions differ from prompt to prompt."""
    rng = np.random.default_rng(seed)
    shapes = (width, HIDDEN), (HIDDEN,), (HIDDEN, units), (units,)
    return PolicyNetwork(*(rng.standard_normal(shape).astype(dtype) for shape in shapes))


def random_tokens(seed=0, width=16) -> TokenPolicy:
    rng = np.random.default_rng(seed)
    return TokenPolicy(*(rng.standard_normal(shape) for shape in ((width, 1), (width, 1), (1,))))


def decided(lm, ids, state=None):
    """The units that run after this prompt."""
    state = lm.model.new_state() if state is None else state
    lm.model(ids, state)
    return decision_of(state.shared).keep


# Worked example ----------------------------------------------------------------------------------


@part
class Rows(Part):
    """An embedding with two tokens, (1, 0) and (0, 1)."""

    def __call__(self, ids, where):
        return np.eye(2)[ids]


@part
class Adds(Part):
    """A sub-layer that adds the same vector to every token."""

    vector: tuple

    def __call__(self, x, layer):
        return np.broadcast_to(np.array(self.vector, float), x.shape)


def test_decision_by_hand():
    """Layer 0 adds (1, 0), layer 1's attention (10, 0) and its FFN (0, 100).

    prompt 0 0: h = (2, 0) (2, 0), s = (2, 0).  prompt 0 1: h = (2, 0) (1, 1), s = (1.5, 0.5).
    One hidden neuron, w1 = (1, -1), b1 = -1.5:  tanh(2 - 1.5) = 0.46,  tanh(1 - 1.5) = -0.46
    w2 = (1, -1), b2 = 0: logits (0.46, -0.46), p = (0.61, 0.39): attention runs, the FFN does not.
    The other prompt: the reverse.
    """
    blocks = (Block(Adds((1, 0)), Adds((0, 0))), Block(Adds((10, 0)), Adds((0, 100))))
    lm = LM(replace(tiny_model(), embed=Rows(), stack=Stack(blocks)))
    network = PolicyNetwork(
        np.array([[1.0], [-1.0]]), np.array([-1.5]), np.array([[1.0, -1.0]]), np.zeros(2)
    )
    lm = switched(lm, network)
    assert_same(network.logits(np.array([[2.0, 0]])), [[0.4621, -0.4621]], atol=1e-4)
    for prompt, expected in (([0, 0], [[12, 0], [12, 0]]), ([0, 1], [[2, 100], [1, 101]])):
        state = lm.model.new_state()
        assert_same(lm.model.hidden(prompt, state), expected)
        later = lm.model.hidden([1], state)  # (1, 1) after layer 0, which would decide otherwise
        decided_now = (11, 1) if prompt == [0, 0] else (1, 101)
        assert_same(later, [decided_now], "the decision changed after the prompt")


def test_units_within_by_hand():
    """Costs 4 3 2 1, of 10 in all; the share 0.5 is 5. In the order 1, 0, 2, 3: without 1, 7 are
    left; without 0, only 3 would be; without 2, 5 are left; without 3, only 4 would be."""
    costs = np.array([4.0, 3, 2, 1])
    assert units_within([1, 0, 2, 3], costs, 0.5).tolist() == [True, False, False, True]
    assert units_within([1, 0, 2, 3], costs * [0, 1, 1, 1], 1.0).all()
    assert not units_within([1, 0, 2, 3], costs, 0.0).any()


# Against the literal version ---------------------------------------------------------------------


@family
@pytest.mark.parametrize("tokens", [None, random_tokens()], ids=["units", "units and tokens"])
def test_logits_equal_the_literal_version(family, tokens):
    plans = set()
    for seed in range(3):
        dense, network = dense_lm(family), random_network(seed)
        lm, one = switched(dense, network, tokens), literal.Sequence(dense.model, network, tokens)
        expected = np.concatenate([one.step(ids) for ids in np.split(IDS, np.cumsum(STEPS)[:-1])])
        state = lm.model.new_state()
        check_close(in_chunks(lm, IDS, STEPS, state), expected, 1e-10, "logits")
        assert decision_of(state.shared).keep.tolist() == one.keep
        plans.add(tuple(one.keep))
    assert len(plans) == 3, "the example decides the same for every network"


# Dense, and all skipped --------------------------------------------------------------------------


@family
def test_all_units_kept_equals_dense_bit_for_bit(family):
    dense = dense_lm(family, np.float32)
    lm = switched(dense, FixedPlan(np.ones(U, bool)))
    for sizes in ((40,), STEPS):
        assert_same(in_chunks(lm, IDS, sizes), in_chunks(dense, IDS, sizes))
    assert repr(apply(dense, {"switchable": {"tolerance": 0}})) == repr(dense)


@family
def test_all_units_skipped_is_the_head_on_layer_0(family):
    dense = dense_lm(family)
    lm, model = switched(dense, FixedPlan(np.zeros(U, bool))), dense.model
    state = model.new_state(remember=False)
    h = model.stack.run(model.embed(IDS, state.take(40).lookup), state, 0, 1)
    assert_same(lm.logits(IDS), model.head(model.norm(h)))


def test_all_tokens_kept_equals_dense_bit_for_bit():
    dense, none = dense_lm("llama", np.float32), np.zeros((16, 1), np.float32)
    everything = TokenPolicy(none, none, np.ones(1, np.float32))
    lm = switched(dense, FixedPlan(np.ones(U, bool)), everything)
    assert_same(in_chunks(lm, IDS, STEPS), in_chunks(dense, IDS, STEPS))


# A decision per sequence -------------------------------------------------------------------------


def test_different_prompts_run_different_units():
    lm = switched(dense_lm(), random_network())
    prompts = np.random.default_rng(0).integers(0, 258, (20, 8))
    assert len({tuple(decided(lm, ids)) for ids in prompts}) > 5
    assert decides(lm.model) == "sequence"


def test_decision_is_forgotten_by_rewind_to_0_only():
    lm = switched(dense_lm(), random_network())
    once, other = decided(lm, IDS[:12]), decided(lm, OTHER[:12])
    assert (once != other).any()
    state = lm.model.new_state()
    decided(lm, IDS[:12], state)
    state.rewind(5)  # into the prompt: the rest cannot change what was decided
    assert_same(decided(lm, OTHER[:12], state), once, "decided again in the middle")
    fork = state.fork()
    state.rewind(0)
    assert_same(decided(lm, OTHER[:12], state), other, "the old decision is still there")
    assert_same(decided(lm, IDS[:3], fork), once, "a fork lost the decision")


def test_layer_without_attention_has_no_cache_rows():
    lm = switched(dense_lm(), FixedPlan(np.array([1, 1, 0, 1, 0, 0], bool)))
    state = lm.model.new_state()
    in_chunks(lm, IDS[:20], (12, *[1] * 8), state)
    assert [layer.count for layer in state.layers] == [20, 20, 0, 0]
    assert [layer.keys is None for layer in state.layers] == [False, False, True, True]


@family
@pytest.mark.parametrize("tokens", [None, random_tokens()], ids=["units", "units and tokens"])
def test_policy_that_reads_the_prompt_keeps_the_laws_of_the_contract(family, tokens):
    """Whose demo setting is the random baseline: it acts, whatever the model."""
    lm = switched(dense_lm(family), random_network(2), tokens)
    assert broken_law(lm, IDS[:30], prompt=12, new=6) == ""


def test_batch_rows_run_their_own_units():
    lm = switched(dense_lm(), random_network())
    batch = lm.logits(np.stack([IDS, OTHER]))
    for row, ids in zip(batch, (IDS, OTHER)):
        assert_same(row, lm.logits(ids))
    with pytest.raises(MinitxError, match="switchable runs other sub-layers for each sequence and"):
        lm.model(np.stack([IDS, OTHER]), lm.model.new_state())


def test_dropped_tokens_have_rows_in_layer_0_only_and_positions_stay():
    tokens = random_tokens(1)
    lm = switched(dense_lm(), FixedPlan(np.ones(U, bool)), tokens)
    state = lm.model.new_state()
    with counting(lm) as counts:
        lm.model(IDS[:12], state)
    kept = state.layers[1].row_positions
    assert 2 < len(kept) < 12 and kept[0] == 0 and kept[-1] == 11
    assert counts.events == {"prompt tokens dropped": 12 - len(kept)}
    lm.model(IDS[12:16], state)
    assert state.layers[0].count == 16, "layer 0 runs every token"
    for layer in state.layers[1:]:
        held = [*kept, 12, 13, 14, 15]
        assert layer.row_positions.tolist() == held, "a new token was dropped, or renumbered"


@pytest.mark.parametrize("tokens", [None, random_tokens(1)], ids=["units", "units and tokens"])
@pytest.mark.parametrize("prompt", [1, 5, 12])
def test_tokens_after_the_prompt_in_the_first_step_decide_nothing(prompt, tokens):
    """speculative's first step is [prompt, drafts] where the prompt has one token."""
    for seed in range(5):
        lm = switched(dense_lm(), random_network(seed), tokens)
        alone, state = lm.model.new_state(), lm.model.new_state()
        expected = in_chunks(lm, IDS[:20], (prompt, 20 - prompt), alone)
        state.prompt = prompt
        check_close(lm.model(IDS[:20], state), expected, 1e-10, "logits")
        assert_same(decision_of(state.shared).keep, decision_of(alone.shared).keep)
        assert [x.count for x in state.layers] == [x.count for x in alone.layers], "drafts dropped"


@pytest.mark.parametrize("tokens", [None, random_tokens(1)], ids=["units", "units and tokens"])
def test_speculative_with_a_prompt_of_one_token_generates_the_same(tokens):
    found = set()
    for seed in range(3):
        lm = switched(dense_lm(), random_network(seed), tokens)
        drafting = replace(lm, decode=apply(dense_lm(), {"speculative": {"draft": "self"}}).decode)
        for first in (0, 65, 200):
            expected = lm.generate([first], 8)
            assert drafting.generate([first], 8) == expected
            found.add(tuple(expected))
    assert len(found) > 6, "the example decides the same for every prompt"


# Counts ------------------------------------------------------------------------------------------


@family
def test_counted_cost_equals_the_formula_on_the_card(family):
    dense = dense_lm(family, np.float32)
    c = dense.model.config
    width, d, H, K = c.width, c.head_width, c.heads, c.kv_heads
    per_ffn = (3 if family == "llama" else 2) * width * c.hidden
    for seed in range(3):
        lm = switched(dense, random_network(seed, dtype=np.float32))
        states = [model.new_state() for model in (dense.model, lm.model)]
        for S in range(1, 5):  # the first token is the prompt
            step = IDS[S - 1 : S]
            before, after = (counted(m, step, state) for m, state in zip((dense, lm), states))
            off = ~decision_of(states[1].shared).keep
            per_attention = 2 * width * (H + K) * d + 2 * S * H * d
            saved = off[::2].sum() * per_attention + off[1::2].sum() * per_ffn
            own = width * HIDDEN + HIDDEN * U if S == 1 else 0
            found = before.total().multiply_adds - after.total().multiply_adds
            assert found == saved - own, f"at {S} cached tokens"
            cache = before.total().cache_bytes - after.total().cache_bytes
            assert cache == off[::2].sum() * 2 * S * K * d * 4
            assert after.events["units switched off"] == off.sum()


def counted(lm, ids, state):
    with counting(lm) as counts:
        lm.model(ids, state)
    return counts


@family
def test_executed_multiply_adds_are_the_costs_of_the_units_that_run(family):
    dense, ids = dense_lm(family, np.float32), np.zeros(48, int)
    costs, rng = unit_costs(dense), np.random.default_rng(0)
    everything = counted(dense, ids, None).total().multiply_adds
    for _ in range(5):
        keep = rng.random(U) < 0.5
        found = counted(switched(dense, FixedPlan(keep)), ids, None).total().multiply_adds
        expected = everything * (1 - costs.sum() + costs @ keep)
        assert found == pytest.approx(expected, rel=1e-12), "not the sum of c_u b_u"


# Training ----------------------------------------------------------------------------------------


def test_gradients_equal_exact_enumeration():
    """REINFORCE against the derivative of E[q] over all 2^6 decisions, and the cost's."""
    rng, n = np.random.default_rng(0), 100_000
    harm, logits = rng.random(6), rng.standard_normal(6)
    pairs = rng.random((6, 6)) * 0.3

    def loss(b):
        off = 1 - np.array(b)
        return float(harm @ off + off @ pairs @ off)

    def expected(logits):
        return literal.expected_loss(train.sigmoid(logits).tolist(), loss)

    exact = derivative(expected, logits)
    p = np.tile(train.sigmoid(logits), (n, 1))
    b = rng.random(p.shape) < p
    known = np.array([loss([number >> u & 1 for u in range(6)]) for number in range(64)])
    advantage = known[b @ (1 << np.arange(6))] - loss(p[0] > 0.5)
    found = train.quality_gradient(p, b, advantage).sum(0)
    spread = (advantage[:, None] * (b - p)).std(0) / n**0.5
    assert (abs(found - exact) < 4 * spread).all(), "REINFORCE is biased"
    assert spread.max() < 0.02 and abs(exact).max() > 0.1, "the test would not notice"

    costs = rng.random(6)
    exact = derivative(lambda x: float(costs @ train.sigmoid(x)), logits)
    assert_same(train.cost_gradient(p[:1], costs)[0], exact, tolerance=1e-6)


def derivative(f, x, h=1e-5):
    """By central differences."""
    steps = h * np.eye(len(x))
    return np.array([(f(x + step) - f(x - step)) / (2 * h) for step in steps])


def test_backward_equals_finite_differences():
    rng = np.random.default_rng(1)
    weights = train.initial(5, np.array([1, 0, 1]), rng)
    s, wanted = rng.standard_normal((4, 5)), rng.standard_normal((4, 3))
    assert_same(
        train.logits_of(weights, s) > 0, [[True, False, True]] * 4, "does not start at the plan"
    )
    found = train.backward(weights, s, wanted)
    for name, w in weights.items():

        def loss(flat, name=name, w=w):
            changed = weights | {name: flat.reshape(w.shape)}
            return float((train.logits_of(changed, s) * wanted).sum())

        exact = derivative(loss, w.ravel()).reshape(w.shape)
        assert_same(found[name], exact, f"gradient of {name}", atol=1e-7)


def test_barrier_by_hand():
    """grad_e = (1, 0), grad_q = (-1, 1): the cheaper, the worse. |grad_q|^2 = 2, product -1.

    far below the tolerance, violation -1: phi = -5, lambda = max((-5 + 1) / 2, 0) = 0: only cost
    at the tolerance: phi = 0, lambda = 1/2, v = (1/2, 1/2), along which q does not change
    above it by 0.4: phi = 2, lambda = 3/2, v = (-1/2, 3/2): against v, q falls by 2 per length
    """
    e, q = np.array([1.0, 0]), np.array([-1.0, 1])
    assert_same(train.barrier(e, q, -1.0), e, tolerance=1e-7)
    assert_same(train.barrier(e, q, 0.0), [0.5, 0.5], tolerance=1e-7)
    assert_same(train.barrier(e, q, 0.4), [-0.5, 1.5], tolerance=1e-7)


class TwoClasses:
    """Stands in for ``train.Frozen``: prompts of two classes; units 0 to 3 matter to one, 4 to 7 to
    the other, by 0.8, 0.4, 0.2 and 0.1 nats. Each unit costs 1/8."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.kind = np.repeat([0, 1], 32)
        self.pooled = rng.standard_normal((64, 3)) * 0.3
        self.pooled[:, 0] += 2 * self.kind - 1
        self.costs, self.texts = np.full(8, 1 / 8), range(64)
        self.harm = np.kron(np.eye(2), [0.8, 0.4, 0.2, 0.1])  # (2, 8)

    def losses(self, rows, keep):
        return (self.harm[self.kind[list(rows)]] * (1 - np.array(keep))).sum(1)


@pytest.mark.parametrize("tolerance, cost", [(0.12, 3 / 8), (0.35, 2 / 8)])
def test_policy_learns_which_prompt_needs_which_units(tolerance, cost):
    frozen, rng = TwoClasses(), np.random.default_rng(0)
    weights = train.initial(3, np.ones(8), rng)
    found = train.learn_units(frozen, tolerance, weights, train.Pace(400), rng)
    keep = train.logits_of(found, frozen.pooled) > 0
    assert frozen.losses(frozen.texts, keep).mean() <= tolerance
    assert (keep @ frozen.costs).mean() <= cost + 1 / 16, "far from the cheapest decisions"
    for kind, own in ((0, slice(0, 4)), (1, slice(4, 8))):
        of_kind = keep[frozen.kind == kind]
        assert of_kind[:, own].mean() > 2 * of_kind.mean() - of_kind[:, own].mean() + 0.3, (
            "the decisions do not depend on the prompt"
        )


def test_no_policy_is_found_if_nothing_can_be_skipped():
    frozen, rng = TwoClasses(), np.random.default_rng(0)
    frozen.harm = frozen.harm + 5
    weights = train.initial(3, np.zeros(8), rng)  # starts where everything is skipped
    assert train.learn_units(frozen, 0.01, weights, train.Pace(1), rng) is None


def test_static_order_removes_the_least_harm_per_cost_first():
    frozen = TwoClasses()
    frozen.harm[1] *= 1.5  # mean harm of units 0 to 7: 0.4 0.2 0.1 0.05 0.6 0.3 0.15 0.075
    frozen.costs = np.array([1, 1, 1, 1, 1, 1, 1, 0.01]) / 8  # so 7 saves nothing for its harm
    assert train.greedy_order(frozen, range(64)).tolist() == [3, 2, 6, 1, 5, 0, 4, 7]


def test_frozen_model_measures_what_the_technique_does():
    """The loss of a decision is the KL divergence of the model that runs it, prompt and all."""
    dense = dense_lm()
    frozen = train.Frozen(dense, [IDS.tolist(), OTHER[:9].tolist()])
    assert frozen.first == [20, 4]
    keep, kept = np.array([1, 0, 1, 1, 0, 1], bool), train.with_ends(np.arange(20) % 3 > 0)
    tokens = Chosen(np.flatnonzero(kept))
    for lm, found in (
        (switched(dense, FixedPlan(keep)), frozen.loss(0, keep)),
        (switched(dense, FixedPlan(keep), tokens), frozen.loss(0, keep, kept)),
    ):
        state = lm.model.new_state()
        logits = np.concatenate([lm.model(IDS[:20], state), lm.model(IDS[20:], state)])[19:]
        p, q = (
            np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (dense.logits(IDS)[19:], logits)
        )
        assert found == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-9)
    # and the policy reads the mean over the prompt of layer 0's output
    network = random_network()
    reads = frozen.pooled * frozen.scale + frozen.mean
    for i, prompt in enumerate((IDS[:20], OTHER[:4])):
        assert_same(decided(switched(dense, network), prompt), network(reads[i]))


@part
class Chosen(Part):
    """Keeps these tokens."""

    rows: np.ndarray

    def __call__(self, h):
        return self.rows


def test_trained_network_reads_the_pooled_prompt_as_it_is():
    """Training scales its inputs; the policy that runs has that in its matrices."""
    frozen, rng = train.Frozen(dense_lm(), [IDS.tolist(), OTHER.tolist()]), np.random.default_rng(0)
    weights = train.initial(16, np.ones(U), rng)
    weights["w2"] = weights["w2"] * 40
    tokens = {"w": rng.standard_normal(16), "v": rng.standard_normal(16), "b": np.ones(1)}
    found = train.as_trained(frozen, 1.0, weights, tokens)
    raw = frozen.pooled * frozen.scale + frozen.mean
    check_close(found.network.logits(raw), train.logits_of(weights, frozen.pooled), 1e-9, "logits")
    h, s = frozen.prompts[0], frozen.pooled[0]
    raw_h = h * frozen.row_scale + frozen.row_mean
    expected = h @ tokens["w"] + s @ tokens["v"] + tokens["b"]
    check_close(found.tokens.logits(raw_h, raw[0]), expected, 1e-9, "logits of tokens")


def test_model_without_a_file_is_trained_when_it_is_loaded():
    dense = dense_lm("gpt2")
    few = dict(stories=2, steps=60)
    nothing = apply(dense, {"switchable": few | {"tolerance": 1e-9}})
    assert repr(nothing) == repr(dense), "no decision keeps this tolerance, so nothing is skipped"
    lm = apply(dense, {"switchable": few | {"tolerance": 500.0}})
    assert decided(lm, IDS[:12]).sum() < U
    lm = apply(dense, {"switchable": few | {"tolerance": 500.0, "tokens": True}})
    assert "TokenPolicy" in repr(lm)


class TwoKindsOfTokens:
    """Stands in for ``train.Frozen``: half of the tokens matter, by 0.1 nats each."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.matters = rng.random((32, 8)) < 0.5
        self.prompts = rng.standard_normal((32, 8, 2)) * 0.3  # (n, T, D)
        self.prompts[..., 0] += 2 * self.matters - 1
        self.pooled, self.texts, self.costs = self.prompts.mean(1), range(32), np.array([1.0])

    def loss(self, i, keep, kept=None):
        return 0.0 if kept is None else 0.1 * (self.matters[i] & ~kept).sum()

    def losses(self, rows, keep):
        return np.zeros(len(rows))


def test_token_policy_learns_which_tokens_matter():
    frozen, rng = TwoKindsOfTokens(), np.random.default_rng(0)
    weights = train.learn_tokens(frozen, 0.05, np.ones((32, 1)), train.Pace(200), rng)
    logits = [h @ weights["w"] + s @ weights["v"] + weights["b"]
              for h, s in zip(frozen.prompts, frozen.pooled)]  # fmt: skip
    kept = np.array([train.with_ends(x > 0) for x in logits])
    inner = slice(1, -1)
    assert kept[:, inner][frozen.matters[:, inner]].mean() > 0.75, "tokens that matter are dropped"
    assert kept[:, inner][~frozen.matters[:, inner]].mean() < 0.5, "others are kept"


# Baselines ---------------------------------------------------------------------------------------


def test_random_plans_follow_prompt_and_seed_and_cost_their_share():
    rng, costs = np.random.default_rng(0), np.array([1, 2, 1, 2, 1, 2, 1, 2]) / 20
    prompts = rng.standard_normal((200, 16))
    plans = np.array([RandomPlans(costs, 0.5, 0)(s) for s in prompts])
    again = np.array([RandomPlans(costs, 0.5, 0)(s) for s in prompts])
    assert_same(plans, again)
    assert (plans != np.array([RandomPlans(costs, 0.5, 1)(s) for s in prompts])).any()
    assert len({x.tobytes() for x in plans}) > 20
    share = plans @ costs / costs.sum()
    assert 0.5 <= share.min() and share.max() < 0.5 + 2 / 12, "not the wanted cost"
    assert 0.3 < plans.mean(0).min() and plans.mean(0).max() < 0.7, "some units are preferred"


# The file ----------------------------------------------------------------------------------------


def folder_with_policies(tmp_path):
    """A copy of stories' weights, with policies of untrained networks beside them."""
    folder = tmp_path / "stories"
    folder.mkdir()
    for f in shipped()["stories"].iterdir():
        if f.name not in ("training_log.json", FILE):
            shutil.copy(f, folder)
    rng = np.random.default_rng(0)
    made = [
        train.Trained(tolerance, 0.5, random_network(0, 128, 14, np.float32), random_tokens(0, 128))
        for tolerance in (0.2, 0.1)
    ]
    write_policies(Policies(tuple(made), rng.permutation(14)), folder)
    return folder


def test_written_policies_are_read_again(tmp_path):
    folder = folder_with_policies(tmp_path)
    found = read_policies(folder, 128, 14)
    assert [p.tolerance for p in found.policies] == pytest.approx([0.1, 0.2]), "not ascending"
    for name, w in vars(random_network(0, 128, 14, np.float32)).items():
        assert_same(getattr(found.policies[0].network, name), w)
    assert sorted(found.order) == list(range(14))
    assert found.within(0.0999) is None
    assert found.within(0.1) is found.within(0.19) is found.policies[0]
    assert found.within(9.0) is found.policies[1]
    lm = minitx.load(folder, switchable={"tolerance": 0.1, "tokens": True})
    assert "PolicyNetwork" in repr(lm) and "TokenPolicy" in repr(lm)
    below = minitx.load(folder, switchable={"tolerance": 0.05})
    assert repr(below) == repr(minitx.load(folder)), "a smaller tolerance must keep all units"


def without_policies(tensors):
    for name in list(tensors):
        if name != "order":
            del tensors[name]
    tensors |= {"tolerances": np.zeros(0), "shares": np.zeros(0)}


def flip_a_bit(tensors):
    tensors["policies.0.w1"].view(np.uint32)[3, 2] ^= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("policies.1.w2"), "policies.1.w2 has no such tensor; switchable expected"),
        (lambda t: t.update({"order": np.zeros(14)}), "order does not name each of the 14 units"),
        (lambda t: t.update({"policies.0.w1": np.zeros((64, 16))}), "w1 has the shape .64, 16.; "),
        (lambda t: t.update({"more": np.zeros(1)}), "unexpected tensor 'more'; is it another"),
        (lambda t: t["tokens.0.w"].fill(np.nan), "tokens.0.w"),
        (
            lambda t: t["tolerances"].fill(-0.01),
            "numbers above 0 and at most 1000 in tol.*got -0.0",
        ),
        (lambda t: t["tolerances"].fill(0), "in tolerances, got 0; train policies with"),
        (
            lambda t: t["shares"].fill(-0.5),
            "expected numbers 0 to 1 in shares, got -0.5; train pol",
        ),
        (lambda t: t["shares"].fill(1e30), "expected numbers 0 to 1 in shares, got 1e.30; train p"),
        (lambda t: t["policies.1.w2"].fill(-3e38), "in policies.1.w2, got -3e.38; train policies"),
        (without_policies, "expected 1 to 100 policies, got 0; train policies with python -m"),
        (flip_a_bit, "do not match their fingerprint, .* bring the original back, or train"),
    ],
)
def test_file_that_does_not_fit_is_refused(tmp_path, change, words):
    folder = folder_with_policies(tmp_path)
    metadata = read_header(folder / FILE).metadata
    tensors = {name: w.copy() for name, w in read_tensors(folder / FILE).items()}
    change(tensors)
    write_safetensors(folder / FILE, tensors, "F32", metadata)
    with pytest.raises(MinitxError, match=words) as caught:
        minitx.load(folder, switchable=True)
    assert FILE in str(caught.value) and "\n" not in str(caught.value)


def test_policies_of_other_weights_are_refused(tmp_path):
    folder = folder_with_policies(tmp_path)
    header = read_header(folder / FILE).metadata | {"weights": "of another training"}
    write_safetensors(folder / FILE, read_tensors(folder / FILE), "F32", header)
    with pytest.raises(
        MinitxError, match="was not trained for the weights beside it; delete it, or"
    ):
        minitx.load(folder, switchable=True)


def test_link_to_a_file_that_is_gone_is_refused(tmp_path):
    folder = folder_with_policies(tmp_path)
    (folder / FILE).unlink()
    (folder / FILE).symlink_to("elsewhere.safetensors")
    with pytest.raises(MinitxError, match=f"{FILE}: is a link to a file that does not exist; "):
        minitx.load(folder, switchable=True)


@pytest.mark.parametrize("options", [{}, {"choose": "static", "share": 0.5}, {"choose": "random"}])
def test_policies_of_layers_that_are_gone_are_refused(options):
    """And random units with a share, which the message suggests, need none."""
    merge = {"layer_merge": {"size": 2, "first": 3}}
    words = (
        r"decides about 14 units, .* \(it has 12\), since a technique has removed layers; use cho"
    )
    with pytest.raises(MinitxError, match=words) as caught:
        apply(stories()[0], merge | {"switchable": options})
    assert "another model's file" not in str(caught.value)
    lm = apply(stories()[0], merge | {"switchable": {"choose": "random", "share": 0.5}})
    assert len(decided(lm, IDS)) == 12


def test_command_trains_writes_and_measures(tmp_path, capsys, monkeypatch):
    folder, out = folder_with_policies(tmp_path), tmp_path / "trained.safetensors"
    monkeypatch.setattr(train, "TOLERANCES", (0.02,))
    monkeypatch.setattr(train, "MIX", ("full",))
    monkeypatch.setattr(train, "mixed_stories", lambda lm, *_: [[5 * i for i in range(60)]])
    train.main([str(folder), "--out", str(out), "--steps", "2"])
    assert capsys.readouterr().out.startswith("tolerance  skipped  policy  static  random")
    out.replace(folder / FILE)
    (trained,) = read_policies(folder, 128, 14).policies
    assert trained.tolerance == pytest.approx(0.02) and 0 < trained.share < 1
    (folder / FILE).unlink()
    with pytest.raises(SystemExit):
        train.main([str(folder), "--measure"])
    assert f"has no {FILE} to measure" in capsys.readouterr().err


def never(*_):
    raise AssertionError("training has begun")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("stories --stories 0", "--stories must be an integer, at least 1; got 0."),
        ("stories --stories -1", "--stories must be an integer, at least 1; got -1."),
        ("stories --steps 0", "--steps must be an integer, at least 1; got 0."),
        ("stories --steps -3", "--steps must be an integer, at least 1; got -3."),
        ("stories --seed -1", "--seed must be an integer, at least 0; got -1."),
        ("stories --out nowhere/x", "there is no folder nowhere; create it first."),
        ("stories --out .", "is a folder; give the name of a file."),
        ("stories-skipless --out x", "switchable needs residual connections and this model is"),
        ("kv_share", "switchable changes which layers run, or their order, but with kv_share"),
        ("layer_reorder", "switchable needs a part of type Stack where layer_reorder has put"),
        ("one_layer", "about the layers after the first, and one_layer has only one; give a"),
    ],
)
def test_command_refuses_before_it_trains(tmp_path, capsys, monkeypatch, words, message):
    changes = {"kv_share": {"kv_share": {"first": 0}}, "layer_reorder": {"layer_reorder": True}}
    changes["one_layer"] = {"layer_merge": {"size": 8}}
    if words in changes:
        lm = replace(apply(stories()[0], changes[words]), folder=tmp_path)
        monkeypatch.setattr(train, "load", lambda _: lm)
    monkeypatch.setattr(train, "mixed_stories", never)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        train.main(words.split())
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list(tmp_path.iterdir()), "left a file"


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(share=0.5), "share is of the baselines, and choose is policy; use choose=random or"),
        (dict(choose="random", tokens=True), "tokens are dropped by the policy, and choose is ran"),
        (dict(tolerance=-1.0), "tolerance must be a number, at least 0; got -1"),
        (dict(choose="best"), "choose must be one of policy, random, static; got 'best'"),
        (dict(choose="random", share=1.5), "share must be a number, .* or None; got 1.5"),
    ],
)
def test_refusals_are_one_clear_sentence(options, message):
    with pytest.raises(MinitxError, match=message) as caught:
        apply(dense_lm(), {"switchable": options})
    assert "\n" not in str(caught.value) and "switchable" in str(caught.value)


def test_models_it_does_not_fit_are_refused():
    for lm, words in (
        (LM(tiny_model("skipless"), TOKENIZER), "switchable needs residual connections and this"),
        (replace(dense_lm(), tokenizer=None), "switchable learns .* choose=random with a share"),
    ):
        with pytest.raises(MinitxError, match=words):
            apply(lm, {"switchable": {"stories": 1}})
    bare = replace(dense_lm(), tokenizer=None)
    apply(bare, {"switchable": {"choose": "random", "share": 0.5}})
    with pytest.raises(MinitxError, match="switchable .*lazy_tokens|lazy_tokens .*switchable"):
        apply(dense_lm(), {"switchable": {"choose": "random", "share": 0.5}, "lazy_tokens": True})


def test_model_of_one_layer_has_nothing_to_decide():
    lm = LM(tiny_model(layers=1), TOKENIZER)
    with pytest.warns(MinitxWarning, match="this model has only one"):
        assert apply(lm, {"switchable": True}).model.stack is lm.model.stack


# Figures -----------------------------------------------------------------------------------------


@cache
def stories():
    """The model, its policies, and three held-out stories of each grade of the training."""
    lm = minitx.load("stories")
    texts = train.mixed_stories(lm, 3, "evaluation", 1)
    return lm, read_policies(lm.folder, 128, 14), train.Frozen(lm, texts)


def decisions(frozen, network) -> np.ndarray:
    """(n, U)"""
    reads = (frozen.pooled * frozen.scale + frozen.mean).astype(np.float32)
    return np.array([network(s) for s in reads])


def test_baselines_run_the_policys_share_of_the_work_by_default():
    lm, policies, _ = stories()
    share, costs = policies.within(0.01).share, unit_costs(lm)
    for choose in ("random", "static"):
        changed = apply(lm, {"switchable": {"choose": choose}})
        assert share <= decided(changed, IDS) @ costs / costs.sum() < share + 0.1


def test_policies_keep_their_tolerance_on_held_out_stories():
    """Measured on 60 other stories: 0.0045, 0.0106, 0.0207, 0.0469."""
    _, policies, frozen = stories()
    skipped = []
    for p in policies.policies:
        keep = decisions(frozen, p.network)
        loss = frozen.losses(range(len(frozen.texts)), keep).mean()
        assert 0.5 * p.tolerance < loss < 1.25 * p.tolerance, f"{loss:.4f} at {p.tolerance:g} nats"
        skipped.append((~keep @ frozen.costs).mean())
    assert [p.tolerance for p in policies.policies] == pytest.approx([0.005, 0.01, 0.02, 0.05])
    assert_same(skipped, [0.232, 0.41, 0.467, 0.55], atol=0.03)


def test_policy_is_far_better_than_random_units_and_better_than_a_static_plan():
    """At 0.01 nats, at equal cost: 0.011 for the policy, 0.014 static, 0.78 random units."""
    _, policies, frozen = stories()
    p, costs, rows = policies.within(0.01), frozen.costs, range(len(frozen.texts))
    keep = decisions(frozen, p.network)
    loss, cost = frozen.losses(rows, keep).mean(), (keep @ costs).mean()
    drawn = decisions(frozen, RandomPlans(costs, float(cost / costs.sum()), 0))
    assert (drawn @ costs).mean() >= cost
    assert frozen.losses(rows, drawn).mean() > 10 * loss
    static, plan = [(0.0, 0.0)], np.ones(14, bool)  # each plan's skipped work, and its loss
    for u in policies.order[:9]:
        plan = plan & (np.arange(14) != u)
        static.append((costs @ ~plan, frozen.losses(rows, [plan] * len(rows)).mean()))
    of_equal_cost = np.interp(costs.sum() - cost, *zip(*static))
    assert loss < 0.9 * of_equal_cost


def test_decisions_on_stories_depend_on_the_kind_of_story():
    """At 0.01 nats, stories whose second half repeats the first keep more units than others."""
    _, policies, frozen = stories()
    keep = decisions(frozen, policies.within(0.01).network)
    work = (keep @ frozen.costs / frozen.costs.sum()).reshape(len(train.MIX), -1).mean(1)
    by_grade = dict(zip(train.MIX, work))
    assert by_grade["told_twice"] > 0.6
    assert max(by_grade[grade] for grade in train.MIX if grade != "told_twice") < 0.55
    assert len({units.tobytes() for units in keep}) >= 3


def test_more_tolerance_skips_more_of_the_generated_text():
    lm, _, _ = stories()
    prompt, counts = "Anna was in the garden. Tom had a red ball.", []
    for tolerance in (0, 0.005, 0.01, 0.05):
        changed = apply(lm, {"switchable": {"tolerance": tolerance}})
        with counting(changed) as found:
            changed.generate(prompt, 8)
        counts.append(found.total().multiply_adds)
    assert counts == sorted(counts, reverse=True) and counts[-1] < 0.55 * counts[0]


def test_interrupted_training_command_says_so(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupted)
    with pytest.raises(SystemExit) as caught:
        train.main(["stories"])
    assert caught.value.code == 130 and capsys.readouterr().err == "stopped.\n"
