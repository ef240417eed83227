"""Train predictors, with the model frozen: the loss and its gradient by hand, AdamW, what is
recorded of the model, and the quick training when a model is loaded.

    y = 1 for an active unit, else 0;  z = (x A) B;  p = sigmoid(z)
    loss = - mean over tokens of the sum over units of weight (y log p + (1 - y) log(1 - p))
    weight = 1 where y = 1, else mean(y) + 0.005

Most units are inactive, so without the weights the best predictor would miss many that are active.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from minitx.calibration import calibration_ids, remembered
from minitx.errors import MinitxError
from minitx.model import FFN, QKV, Attend, Attention, Linear
from minitx.progress import bar
from minitx.shared.logistic_regression import sigmoid
from minitx.shared.relu_ffn import need_relu
from minitx.skip.contextual_sparsity.predictor import Predictor
from minitx.technique import blocks_of, need, wrap
from minitx.tree import Part, float_type, part

# One predictor -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """The hyperparameters of training."""

    epochs: int = 20  # passes over the examples
    batch: int = 64  # tokens of a step
    rate: float = 0.01  # learning rate of the first step; it falls linearly to 0
    decay: float = 0.01  # weight decay


def learn(x, y, rank: int, pace: Pace, rng) -> Predictor:
    """A predictor of y (n, units), booleans, from x (n, D)."""
    n, D = x.shape
    a = rng.standard_normal((D, rank)).astype(x.dtype) * D**-0.5
    b = rng.standard_normal((rank, y.shape[1])).astype(x.dtype) * rank**-0.5
    rare = float(y.mean()) + 0.005
    steps = pace.epochs * -(-n // pace.batch)
    optimizer = AdamW([a, b], pace, steps)
    order = np.array([], int)
    for _ in range(steps):
        if not len(order):
            order = rng.permutation(n)
        some, order = order[: pace.batch], order[pace.batch :]
        a, b = optimizer.step([a, b], gradients(a, b, x[some], y[some], rare))
    return Predictor(a, b)


def loss(a, b, x, y, rare: float) -> float:
    """The weighted binary cross entropy of the module's docstring, ``rare`` = mean(y) + 0.005."""
    z = x @ a @ b
    active, inactive = np.logaddexp(0, -z), np.logaddexp(0, z)  # -log p, -log(1 - p)
    return float(np.where(y, active, rare * inactive).sum() / len(x))


def gradients(a, b, x, y, rare: float):
    """Its gradients with respect to a (D, rank) and b (rank, units)."""
    low = x @ a  # (n, rank)
    dz = (sigmoid(low @ b) - y) * np.where(y, 1, rare) / len(x)  # (n, units): weight (p - y) / n
    dz = dz.astype(x.dtype)
    return x.T @ (dz @ b.T), low.T @ dz


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), for a list of arrays."""

    def __init__(self, weights, pace: Pace, steps: int):
        self.pace, self.steps, self.t = pace, steps, 0
        self.mean = [np.zeros_like(w) for w in weights]
        self.square = [np.zeros_like(w) for w in weights]

    def step(self, weights, gradients) -> list:
        rate = self.pace.rate * (1 - self.t / self.steps)
        self.t += 1
        found = []
        for w, g, mean, square in zip(weights, gradients, self.mean, self.square, strict=True):
            mean += 0.1 * (g - mean)
            square += 0.001 * (g * g - square)
            direction = mean / (1 - 0.9**self.t)
            direction /= np.sqrt(square / (1 - 0.999**self.t)) + 1e-8
            found.append(w - rate * (direction + self.pace.decay * w))
        return found


# What is recorded of the model -------------------------------------------------------------------


@dataclass
class Examples:
    """Of one sub-layer: its normalized inputs, and which units were active, text by text."""

    inputs: list
    active: list

    def arrays(self):
        """x (tokens, D) and y (tokens, units)."""
        return np.concatenate(self.inputs), np.concatenate(self.active)


def record(lm, slot: str, texts: Sequence) -> list[Examples]:
    """Examples from every "ffn" (its neurons) or "attn" (its heads) of the model."""
    found = [Examples([], []) for _ in blocks_of(lm)]
    recorded = wrap(lm, slot, lambda node, index: RECORDED[slot](node, found[index]))
    for ids in bar(texts, "contextual sparsity: read", unit="text", delay=1.0):
        recorded.model.hidden(ids)
    return found


def recorded_ffn(ffn: Part, found: Examples) -> FFN:
    """Active is what ReLU leaves above 0."""
    need_neurons(ffn)
    norm = Recorder(ffn.norm, found.inputs, lambda x, y: y)
    return replace(ffn, norm=norm, expand=Recorder(ffn.expand, found.active, lambda x, h: h > 0))


def recorded_attention(attn: Part, found: Examples) -> Attention:
    """Active is the half of the heads that write most into the residual stream."""
    need_heads(attn)
    norm = Recorder(attn.norm, found.inputs, lambda x, y: y)
    w_o = attn.out.w.reshape(attn.heads, -1, attn.out.w.shape[1])  # (H, d, D)
    out = Recorder(attn.out, found.active, lambda ctx, y: longest_half(ctx, w_o))
    return replace(attn, norm=norm, out=out)


RECORDED = {"ffn": recorded_ffn, "attn": recorded_attention}


def longest_half(ctx, w_o):
    """Booleans (T, H): the half of the heads (rounded up) with the largest |ctx_h W_o,h|, for ctx
    (T, H*d)."""
    by_head = ctx.reshape(len(ctx), len(w_o), -1).swapaxes(0, 1)  # (H, T, d)
    norms = np.linalg.norm(by_head @ w_o, axis=-1).T  # (T, H)
    rank = np.argsort(-norms, axis=-1, kind="stable").argsort(-1)  # 0: the longest
    return rank < (len(w_o) + 1) // 2


@part
class Recorder(Part):
    """Runs a part and appends ``keep(input, output)`` to a list."""

    inner: Part
    found: list
    keep: Callable

    def __call__(self, x):
        y = self.inner(x)
        self.found.append(self.keep(x, y))
        return y


# All predictors of a model -----------------------------------------------------------------------


SHARES = {"ffn": 4, "attn": 16}  # the width divided by these is the default rank


@dataclass(frozen=True)
class Training:
    """The options of a training."""

    rank: int | None = None  # default: a share of the width, SHARES
    pace: Pace = Pace()
    seed: int = 0

    def rank_for(self, lm, slot: str) -> int:
        default = max(1, lm.model.config.width // SHARES[slot])
        return default if self.rank is None else self.rank


def train_predictors(lm, slot: str, texts: Sequence, training: Training) -> tuple[Predictor, ...]:
    """A predictor for each block, of its neurons ("ffn") or heads ("attn")."""
    rng, rank, dtype = np.random.default_rng(training.seed), training.rank_for(lm, slot), np.float32
    found = []
    examples = bar(record(lm, slot, texts), "contextual sparsity: train", unit="layer", delay=1.0)
    for one in examples:
        x, y = one.arrays()
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            learned = learn(x.astype(dtype), y, rank, training.pace, rng)
        need_trained(x, learned)
        found.append(in_dtype(learned, float_type(lm.model)))
    return tuple(found)


def need_trained(x, learned: Predictor) -> None:
    finite = [np.isfinite(array).all() for array in (x, learned.a, learned.b)]
    if not all(finite):
        what = "its predictors are" if finite[0] else "the hidden states of the model are"
        raise MinitxError(
            f"contextual_sparsity cannot be trained: {what} NaN or Inf on the calibration text; "
            "check the model's weights, or calibrate on another text."
        )


def quick(lm, slot: str, stories: int, training: Training) -> tuple[Predictor, ...]:
    """Predictors trained on a few calibration texts while a model is loaded."""
    texts = calibration_ids("contextual_sparsity", lm, stories, "use choose=random")

    def make():
        return train_predictors(lm, slot, texts, training)

    return remembered(f"contextual_sparsity {slot}", lm, texts, (stories, training), make)


def in_dtype(predictor: Predictor, dtype) -> Predictor:
    return Predictor(predictor.a.astype(dtype), predictor.b.astype(dtype))


# What can be predicted ---------------------------------------------------------------------------


def need_neurons(ffn: Part) -> None:
    need(ffn, FFN)
    need_relu("contextual_sparsity", ffn)
    need(ffn.expand.up, Linear)
    need(ffn.down, Linear)


def need_heads(attn: Part) -> None:
    need(attn, Attention)
    need(attn.qkv, QKV)
    need(attn.attend, Attend)
    for linear in (attn.qkv.q, attn.out):
        need(linear, Linear)
