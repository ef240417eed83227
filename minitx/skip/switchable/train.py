"""Train policies of switchable by REINFORCE, with the model frozen.

    python -m minitx.skip.switchable.train stories --out weights/stories/switchable.safetensors

    minimize    E[e(b)] = sum c_u p_u       the cost: each unit's share of the multiply-adds
    subject to  E[q(b)] <= tolerance        q: KL divergence from the dense model, nats per token

where unit u runs (b_u = 1) with probability p_u = sigmoid(logit_u), and the logits are the policy
network's. Reading order: the network's gradient by hand, one step of the training, its loop, the
frozen model, what is made for a user, and the command.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from minitx.calibration import calibration_ids, remembered
from minitx.checkpoints.common import need_writable_file
from minitx.errors import MinitxError
from minitx.exit_status import run_module
from minitx.lm import load
from minitx.progress import bar, say
from minitx.shared.logistic_regression import sigmoid
from minitx.skip.switchable import decision_of, shipped_policies, switched, unit_costs
from minitx.skip.switchable.baselines import FixedPlan, RandomPlans
from minitx.skip.switchable.file import FILE, Policies, Trained, write_policies
from minitx.skip.switchable.policy import HIDDEN, PolicyNetwork, TokenPolicy
from minitx.technique import apply, blocks_of
from minitx.tree import float_type
from minitx.values import need_count, need_seed

PROMPT = 32  # tokens that the policy reads, as in minitx compare (lab/reading.py)
START = 3.0  # |b2| before training: p is 0.95 for units that are kept at first, 0.05 for others
LIMIT = 4.0  # logits are not pushed beyond +-LIMIT (p = 0.02 or 0.98), where nothing is learned
MOST = 10  # times the tolerance: a larger advantage counts as this much
ALPHA, BETA = 5.0, 10.0  # of the dynamic barrier
DECAY = 0.9  # of the running means of the gradients and of q


# The network's gradient --------------------------------------------------------------------------

Weights = dict[str, np.ndarray]  # w1, b1, w2, b2, as in PolicyNetwork


def initial(width: int, keep, rng, start: float = START) -> Weights:
    """A network that decides ``keep`` (U,), whatever it reads."""
    return {
        "w1": rng.standard_normal((width, HIDDEN)) / width**0.5,
        "b1": np.zeros(HIDDEN),
        "w2": rng.standard_normal((HIDDEN, len(keep))) * 0.1,
        "b2": np.where(keep, start, -start),
    }


def backward(weights: Weights, s, dlogits) -> Weights:
    """The gradient of a loss with respect to the weights, from that with respect to the logits
    (n, U) of the prompts s (n, D)."""
    a = np.tanh(s @ weights["w1"] + weights["b1"])  # (n, hidden)
    da = (dlogits @ weights["w2"].T) * (1 - a * a)
    return {"w1": s.T @ da, "b1": da.sum(0), "w2": a.T @ dlogits, "b2": dlogits.sum(0)}


def logits_of(weights: Weights, s):
    return np.tanh(s @ weights["w1"] + weights["b1"]) @ weights["w2"] + weights["b2"]


# A step ------------------------------------------------------------------------------------------


def quality_gradient(p, b, advantage):
    """REINFORCE: an estimate of d E[q] / d logits (n, U) from samples b ~ Bernoulli(p). advantage
    (n,): q(b), minus q of the decision that inference would take (the self-critical baseline)."""
    return advantage[:, None] * (b - p) / len(p)


def cost_gradient(p, costs):
    """d E[e] / d logits (n, U), exact: E[e] = sum c_u p_u, averaged over prompts."""
    return costs * p * (1 - p) / len(p)


def within_limit(gradient, logits):
    """Without what would push a logit further beyond +-LIMIT (a step goes against the gradient)."""
    return np.where((abs(logits) > LIMIT) & (gradient * logits < 0), 0, gradient)


def barrier(grad_e, grad_q, violation: float):
    """Dynamic barrier gradient descent (Gong, Liu and Liu, 2021): the direction nearest to grad_e
    that lowers q, by a rate phi that depends on how far q is above the tolerance."""
    square = grad_q @ grad_q + 1e-18
    phi = min(ALPHA * violation, BETA * square)
    return grad_e + max((phi - grad_e @ grad_q) / square, 0) * grad_q


def descend(weights: Weights, v, step: float) -> Weights:
    """A step of length ``step`` against v, shorter where v is shorter than 0.1."""
    length = np.sqrt(v @ v) + 1e-12
    v, found, end = v * (step * min(1, 10 * length) / length), {}, 0
    for name, w in weights.items():
        found[name] = w - v[end : end + w.size].reshape(w.shape)
        end += w.size
    return found


def flat(gradient: Weights):
    return np.concatenate([g.ravel() for g in gradient.values()])


# The loop ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """How long and how fast to train."""

    steps: int
    batch: int = 24  # prompts of a step
    step: float = 0.2  # length of the first steps; the last ones are a fifth as long
    check: int = 10  # steps between two looks at all texts


def learn_units(frozen: "Frozen", tolerance: float, weights: Weights, pace: Pace, rng):
    """The weights with which the decisions p > 0.5 cost least, of those that were seen to keep the
    tolerance on all texts; None if none of these skips anything."""
    s, costs, everyone = frozen.pooled, frozen.costs, np.arange(len(frozen.texts))
    best, best_cost, means = None, costs.sum() * (1 - 1e-9), None
    for step in bar(range(pace.steps), f"switchable: train for {tolerance:g} nats", delay=1.0):
        rows = rng.permutation(len(s))[: pace.batch]
        logits = logits_of(weights, s[rows])
        p = sigmoid(logits)
        b, greedy = rng.random(p.shape) < p, p > 0.5
        q, q_greedy = frozen.losses(rows, b), frozen.losses(rows, greedy)
        advantage = np.clip(q - q_greedy, -MOST * tolerance, MOST * tolerance)
        grad_q, grad_e = (
            flat(backward(weights, s[rows], within_limit(g, logits)))
            for g in (quality_gradient(p, b, advantage), cost_gradient(p, costs))
        )
        means = running(means, (grad_e, grad_q, q_greedy.mean()))
        slower = pace.step * (1 - 0.8 * step / pace.steps)
        weights = descend(weights, barrier(means[0], means[1], means[2] - tolerance), slower)
        if (step + 1) % pace.check == 0 or step + 1 == pace.steps:
            keep = logits_of(weights, s) > 0
            cost = float((keep @ costs).mean())
            if cost < best_cost and frozen.losses(everyone, keep).mean() <= tolerance:
                best, best_cost = weights, cost
    return best


def running(means, new):
    """Running means of several things."""
    if means is None:
        return new
    return tuple(DECAY * mean + (1 - DECAY) * x for mean, x in zip(means, new))


def learn_tokens(frozen: "Frozen", tolerance: float, keep, pace: Pace, rng) -> Weights:
    """The same for the tokens of prompts whose units are decided, keep (n, U): which tokens may be
    dropped for as much KL divergence again. Their cost is proportional to their number."""
    width, texts = frozen.pooled.shape[1], range(len(frozen.texts))
    best, best_cost, means = with_all_tokens(width), 1.0, None
    weights = best | {"w": rng.standard_normal(width) * 0.01}
    before = frozen.losses(texts, keep)
    for step in bar(range(pace.steps), "switchable: train tokens", delay=1.0):
        rows = rng.permutation(len(texts))[: pace.batch]
        found = [
            token_gradients(frozen, weights, i, keep[i], before[i], tolerance, rng) for i in rows
        ]
        means = running(means, tuple(sum(x) / len(rows) for x in zip(*found)))
        slower = pace.step * (1 - 0.8 * step / pace.steps)
        weights = descend(weights, barrier(means[0], means[1], means[2] - tolerance), slower)
        if (step + 1) % pace.check == 0 or step + 1 == pace.steps:
            kept = [with_ends(token_logits(frozen, weights, i) > 0) for i in texts]
            cost = float(np.mean([x.mean() for x in kept]))
            after = [frozen.loss(i, keep[i], x) for i, x in zip(texts, kept)]
            if cost < best_cost and np.mean(after - before) <= tolerance:
                best, best_cost = weights, cost
    return best


def token_logits(frozen: "Frozen", weights: Weights, i: int):
    """(T,): of the tokens of prompt i."""
    return frozen.prompts[i] @ weights["w"] + frozen.pooled[i] @ weights["v"] + weights["b"]


def token_gradients(frozen, weights: Weights, i: int, keep, before: float, tolerance: float, rng):
    """For prompt i: the gradients of its cost and of its KL divergence, and how much the tokens
    that inference would drop add to the latter."""
    h, s, logits = frozen.prompts[i], frozen.pooled[i], token_logits(frozen, weights, i)
    p = sigmoid(logits)[None]  # (1, T)
    m, greedy = rng.random(p.shape) < p, p > 0.5
    q, q_greedy = (frozen.loss(i, keep, with_ends(x[0])) for x in (m, greedy))
    advantage = np.clip([q - q_greedy], -MOST * tolerance, MOST * tolerance)
    each = np.full(len(h), (keep @ frozen.costs) / len(h))  # what a token costs
    gradients = []
    for g in (cost_gradient(p, each), quality_gradient(p, m, advantage)):
        g = within_limit(g[0], logits)
        gradients.append(flat({"w": g @ h, "v": g.sum() * s, "b": g.sum(keepdims=True)}))
    return *gradients, q_greedy - before


def with_all_tokens(width: int) -> Weights:
    return {"w": np.zeros(width), "v": np.zeros(width), "b": np.array([START])}


def with_ends(kept):
    """The tokens kept (T,), booleans, with the first and the last."""
    kept = kept.copy()
    kept[[0, -1]] = True
    return kept


# The frozen model --------------------------------------------------------------------------------


class Frozen:
    """A model and texts: what decisions cost it. Every decision is tried once.

    A text's first tokens (32, or half of a shorter text) are its prompt. pooled (n, D): the
    prompts' means of layer 0's output, with mean 0 and variance 1 over the texts.
    """

    def __init__(self, lm, texts):
        self.lm, self.costs = lm, unit_costs(lm)
        everything = np.ones(len(self.costs), bool)
        self.model = switched(lm, FixedPlan(everything)).model
        self.texts = [np.array(ids) for ids in texts]
        self.first = [max(1, min(PROMPT, len(ids) // 2)) for ids in texts]
        self.h = [self.layer_0(ids) for ids in self.texts]
        self.dense = [softmax_and_entropy(self.logits(i, everything)) for i in range(len(texts))]
        self.known: dict[tuple, float] = {}
        prompts = [h[:first].astype(np.float64) for h, first in zip(self.h, self.first)]
        s = np.array([h.mean(0) for h in prompts])
        self.mean, self.scale = s.mean(0), s.std(0) + 1e-6 if len(s) > 1 else np.ones(s.shape[1])
        self.pooled = (s - self.mean) / self.scale
        rows = np.concatenate(prompts)
        self.row_mean, self.row_scale = rows.mean(0), rows.std(0) + 1e-6
        self.prompts = [(h - self.row_mean) / self.row_scale for h in prompts]  # of (T, D)

    def layer_0(self, ids):
        """Its output (T, D)."""
        state = self.model.new_state(remember=False)
        x = self.model.embed(ids, state.take(len(ids)).lookup)
        with np.errstate(over="ignore"):
            return self.model.stack.inner.run(x, state, 0, 1)

    def logits(self, i: int, keep, kept=None):
        """Logits from the last token of the prompt on, with the units keep (U,) and the prompt
        tokens kept (booleans; None: all)."""
        h, first, stack = self.h[i], self.first[i], self.model.stack
        state = self.model.new_state(remember=False)
        state.take(len(h))
        decision_of(state.shared).keep = keep
        if kept is not None:
            rows = np.append(np.flatnonzero(kept), np.arange(first, len(h)))
            h, state.tokens = h[rows], state.tokens.only(rows)
        with np.errstate(over="ignore"):
            x = stack.inner.run(h, state, 1, len(stack.blocks))
        return self.model.head(self.model.norm(x[first - 1 - len(self.h[i]) :]))

    def loss(self, i: int, keep, kept=None) -> float:
        """The mean KL divergence from the dense model, over what follows the prompt."""
        key = i, keep.tobytes(), None if kept is None else kept.tobytes()
        if key not in self.known:
            (p, entropy), z = self.dense[i], self.logits(i, keep, kept)
            z = z - z.max(-1, keepdims=True)
            cross = np.log(np.exp(z).sum(-1)) - np.vecdot(p, z)  # -sum p log q
            self.known[key] = float((cross - entropy).mean(dtype=np.float64))
        return self.known[key]

    def losses(self, rows, keep) -> np.ndarray:
        """Of the texts ``rows`` (n,) with the units keep (n, U)."""
        return np.array([self.loss(i, units) for i, units in zip(rows, keep)])


def softmax_and_entropy(z):
    z = z - z.max(-1, keepdims=True)
    logs = z - np.log(np.exp(z).sum(-1, keepdims=True))
    p = np.exp(logs)
    return p, -np.vecdot(p, logs)


def greedy_order(frozen: Frozen, rows) -> np.ndarray:
    """(U,): the units in the order in which a static plan removes them: always the one that adds
    least KL divergence per multiply-add, on the texts ``rows``."""
    keep, order, last = np.ones(len(frozen.costs), bool), [], 0.0
    for _ in bar(range(len(keep)), "switchable: static plan", unit="unit", delay=1.0):
        tried = np.flatnonzero(keep)
        found = []
        for u in tried:
            without = keep & (np.arange(len(keep)) != u)
            found.append(frozen.losses(rows, [without] * len(rows)).mean())
        ratios = (np.array(found) - last) / np.maximum(frozen.costs[tried], 1e-12)
        best = int(ratios.argmin())
        order.append(int(tried[best]))
        keep[order[-1]], last = False, found[best]
    return np.array(order)


def largest_plan(frozen: Frozen, order, tolerance: float) -> np.ndarray:
    """(U,): the static plan that removes most units, in this order, within the tolerance."""
    found = keep = np.ones(len(order), bool)
    for u in order:
        keep = keep & (np.arange(len(keep)) != u)
        if frozen.losses(range(len(frozen.texts)), [keep] * len(frozen.texts)).mean() > tolerance:
            return found
        found = keep
    return found


# What is made for a user -------------------------------------------------------------------------


@dataclass(frozen=True)
class Quick:
    """The options of a training when a model without shipped policies is loaded."""

    stories: int
    steps: int
    tokens: bool
    seed: int

    def texts(self, lm):
        instead = "use choose=random with a share"
        return calibration_ids("switchable", lm, self.stories, instead)


def quick(lm, tolerance: float, training: Quick) -> Trained | None:
    """A policy trained in few, large steps on few texts; None if it found nothing to skip."""
    texts, pace = training.texts(lm), Pace(training.steps, batch=8, step=0.5)

    def make():
        frozen, rng = Frozen(lm, texts), np.random.default_rng(training.seed)
        everything = initial(frozen.pooled.shape[1], np.ones(len(frozen.costs)), rng, start=2.0)
        found = learn_units(frozen, tolerance, everything, pace, rng)
        if not training.tokens:
            return None if found is None else as_trained(frozen, tolerance, found, None)
        found = everything if found is None else found
        keep = logits_of(found, frozen.pooled) > 0
        tokens = learn_tokens(frozen, tolerance, keep, pace, rng)
        return as_trained(frozen, tolerance, found, tokens)

    return remembered("switchable", lm, texts, (tolerance, training), make)


def static_order(lm, training: Quick) -> np.ndarray:
    texts = training.texts(lm)

    def make():
        return greedy_order(Frozen(lm, texts), range(len(texts)))

    return remembered("switchable static", lm, texts, (), make)


def as_trained(frozen: Frozen, tolerance: float, weights: Weights, tokens: Weights | None):
    """The policy as it runs: the scaling of its inputs goes into its first matrices."""
    dtype = float_type(frozen.model)
    w1 = weights["w1"] / frozen.scale[:, None]
    arrays = w1, weights["b1"] - frozen.mean @ w1, weights["w2"], weights["b2"]
    keep = logits_of(weights, frozen.pooled) > 0
    share = float((keep @ frozen.costs).mean() / max(frozen.costs.sum(), 1e-12))
    network = PolicyNetwork(*(a.astype(dtype) for a in arrays))
    if tokens is None:
        return Trained(tolerance, share, network, None)
    w, v = tokens["w"] / frozen.row_scale, tokens["v"] / frozen.scale
    b = tokens["b"] - frozen.row_mean @ w - frozen.mean @ v
    token_policy = TokenPolicy(*(a.astype(dtype) for a in (w[:, None], v[:, None], b)))
    return Trained(tolerance, share, network, token_policy)


# The command -------------------------------------------------------------------------------------

TOLERANCES = (0.005, 0.01, 0.02, 0.05)
MIX = ("set_phrases", "told_twice", "one_hop", "two_hops", "three_hops", "full")  # grades
SHORTEST = PROMPT + 12  # tokens of a story


def mixed_stories(lm, count: int, split: str, seed: int) -> list[list[int]]:
    """``count`` stories of each grade, as ids."""
    from minitx.training.stories import stories

    found = []
    for grade in MIX:
        ids = (lm.tokenizer.encode(story.text) for story in stories(split, grade, seed))
        found += islice((x[: lm.model.config.context] for x in ids if len(x) >= SHORTEST), count)
    return found


def train(lm, texts, tolerances, pace: Pace, seed: int) -> Iterator[Policies]:
    """A policy for each tolerance, yielded with those before. Each starts from the static plan that
    removes most within the tolerance."""
    frozen, rng = Frozen(lm, texts), np.random.default_rng(seed)
    few = range(0, len(texts), max(1, len(texts) // 24))
    order, policies = greedy_order(frozen, few), []
    for tolerance in sorted(tolerances):
        weights = initial(frozen.pooled.shape[1], largest_plan(frozen, order, tolerance), rng)
        found = learn_units(frozen, tolerance, weights, pace, rng)
        if found is None:
            say(f"nothing can be skipped for {tolerance:g} nats")
            continue
        keep = logits_of(found, frozen.pooled) > 0
        fewer = replace(pace, steps=max(1, pace.steps // 40))
        tokens = learn_tokens(frozen, tolerance, keep, fewer, rng)
        policies.append(as_trained(frozen, tolerance, found, tokens))
        say(f"{tolerance:g} nats: {policies[-1].share:.3f} of the units' work")
        yield Policies(tuple(policies), order)


def measure(lm, policies: Policies, texts) -> str:
    """A table of what the policies and the baselines at equal cost do on these texts."""
    frozen = Frozen(lm, texts)
    costs, everyone, s = frozen.costs, range(len(texts)), frozen.pooled * frozen.scale + frozen.mean
    static, keep = [(0.0, 0.0)], np.ones(len(costs), bool)
    for u in policies.order:
        keep = keep & (np.arange(len(keep)) != u)
        static.append((costs @ ~keep, frozen.losses(everyone, [keep] * len(texts)).mean()))
    lines = ["tolerance  skipped  policy  static  random  decisions"]
    for p in policies.policies:
        keep = np.array([p.network(x) for x in s.astype(np.float32)])
        q, skipped = frozen.losses(everyone, keep).mean(), float((~keep @ costs).mean())
        draws = [RandomPlans(costs, 1 - skipped / costs.sum(), seed) for seed in range(5)]
        chance = [frozen.losses(everyone, [r(x) for x in s]).mean() for r in draws]
        between = np.interp(skipped, *zip(*static))
        different = len({x.tobytes() for x in keep})
        lines.append(
            f"{p.tolerance:9g}  {skipped:7.3f}  {q:.4f}  {between:.4f}  {np.mean(chance):.4f}  "
            f"{different:9}"
        )
    return "\n".join(lines)


def main(words=None) -> None:
    parser = argparse.ArgumentParser(description="Train policies of switchable.")
    parser.add_argument("model", help="a shipped model, or a folder")
    parser.add_argument("--out", type=Path, help=f"the file; default: {FILE} beside the weights")
    parser.add_argument("--stories", type=int, default=30, help="of each grade")
    parser.add_argument("--steps", type=int, default=1200, help="for each tolerance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", action="store_true", help="the file as it is: only measure it")
    given = parser.parse_args(words)
    run_module(parser, lambda: run(given))


def run(given: argparse.Namespace) -> None:
    stories, steps = need_count(given.stories, "--stories"), need_count(given.steps, "--steps")
    seed, lm = need_seed(given.seed, "--seed"), load(given.model)
    if lm.folder is None or lm.tokenizer is None:
        raise MinitxError(
            f"Policies are trained on stories for the weights of a folder with a tokenizer, and "
            f"{given.model} is none; use the options stories and steps of switchable."
        )
    if len(blocks_of(lm)) < 2:
        raise MinitxError(
            f"switchable decides about the layers after the first, and {given.model} has only one; "
            "give a model with more layers."
        )
    apply(lm, {"switchable": {"choose": "random", "share": 0.5}})  # refuses what it does not fit
    policies = shipped_policies(lm) if given.measure else None
    if given.measure and policies is None:
        raise MinitxError(f"{lm.folder} has no {FILE} to measure; train one, without --measure.")
    if not given.measure:
        out = lm.folder / FILE if given.out is None else given.out
        need_writable_file(out)
        texts = mixed_stories(lm, stories, "calibration", seed)
        for policies in train(lm, texts, TOLERANCES, Pace(steps), seed):
            write_policies(policies, lm.folder, out)
    if policies is not None:
        print(measure(lm, policies, mixed_stories(lm, 10, "evaluation", 1)))


if __name__ == "__main__":
    main()
