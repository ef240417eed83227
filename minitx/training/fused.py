"""Gradient rules of the operations of ops.py: each calls the operation itself for its value, and
has its own formula for the way back, where the chain of small steps would be slow.

g is always the gradient with respect to the result. Long sums are written as a product with a
vector, often of ones: BLAS is three times as fast at them as ``sum``.
"""

import math

import numpy as np

from minitx import fast, ops
from minitx.training.rules import fit
from minitx.training.traced import Traced, plain, rule

# Norms ---------------------------------------------------------------------------------------


@rule(ops.rms_norm)
def rms_norm(x, gain, eps):
    """With r = 1 / sqrt(mean(x^2) + eps) and h = g * gain: dx = r h - x r^3 mean(h x)."""
    a, w = x.value, plain(gain)

    def pull(g):
        rows, g = _rows(a), _rows(g)
        D = a.shape[-1]
        r = 1 / np.sqrt(np.einsum("nd,nd->n", rows, rows) / D + eps)
        gx = g * rows
        if isinstance(gain, Traced):
            yield gain, r @ gx
        dx = g * w
        dx *= r[:, None]
        np.multiply(rows, (r * r * r * (gx @ w) / D)[:, None], out=gx)
        dx -= gx
        yield x, dx.reshape(a.shape)

    return Traced(ops.rms_norm(a, w, eps), pull)


@rule(ops.layer_norm)
def layer_norm(x, gain, bias, eps):
    """With n = (x - mean) r, r = 1 / sqrt(variance + eps), and h = g * gain:
    dx = r (h - mean(h) - n mean(h n))."""
    a, w, b = x.value, plain(gain), plain(bias)

    def pull(g):
        rows, g = _rows(a), _rows(g)
        D = a.shape[-1]
        n = rows - rows.mean(-1, keepdims=True)
        r = 1 / np.sqrt(np.einsum("nd,nd->n", n, n) / D + eps)
        n *= r[:, None]
        gn = g * n
        if isinstance(gain, Traced):
            yield gain, _column_sums(gn)
        if isinstance(bias, Traced):
            yield bias, _column_sums(g)
        dx = g * w
        dx -= ((g @ w) / D)[:, None]
        n *= ((gn @ w) / D)[:, None]
        dx -= n
        dx *= r[:, None]
        yield x, dx.reshape(a.shape)

    return Traced(ops.layer_norm(a, w, b, eps), pull)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _column_sums(x):
    return np.ones(len(x), x.dtype) @ x


# Activations ---------------------------------------------------------------------------------


def _activation(op, derivative):
    @rule(op)
    def run(x):
        def pull(g):
            d = derivative(x.value)
            d *= g
            yield x, d

        return Traced(op(x.value), pull)


def _silu_derivative(x):
    s = 1 / (1 + np.exp(-x))
    return s * (1 + x * (1 - s))


def _gelu_derivative(x):
    density = np.exp(-0.5 * (x * x)) * (1 / math.sqrt(2 * math.pi))
    return 0.5 + 0.5 * ops.erf(x * math.sqrt(0.5)) + x * density


def _gelu_tanh_derivative(x):
    c = math.sqrt(2 / math.pi)
    xx = x * x
    t = np.tanh(x * (c + c * 0.044715 * xx))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (c + 3 * c * 0.044715 * xx)


_activation(ops.silu, _silu_derivative)
_activation(ops.relu, lambda x: (x > 0).astype(x.dtype))
_activation(ops.gelu, _gelu_derivative)
_activation(ops.gelu_tanh, _gelu_tanh_derivative)


@rule(ops.swiglu)
def swiglu(gate, up):
    """With s = sigmoid(gate): d silu / d gate = s + gate s (1 - s)."""
    a, b = gate.value, plain(up)

    def pull(g):
        s = np.exp(-a)
        s += 1
        np.reciprocal(s, out=s)
        silu = a * s
        if isinstance(up, Traced):
            yield up, fit(g * silu, b.shape)
        slope = 1 - s
        slope *= silu
        slope += s
        slope *= b
        slope *= g
        yield gate, fit(slope, a.shape)

    return Traced(ops.swiglu(a, b), pull)


# Positions and attention ---------------------------------------------------------------------


@rule(ops.rotate)
def rotate(x, cos, sin):
    """The way back from a rotation is to turn back by the same angle."""

    def pull(g):
        yield x, ops.rotate(g, cos, -sin)

    return Traced(ops.rotate(x.value, cos, sin), pull)


@rule(ops.attention)
def attention(q, k, v, scale, mask=None):
    """FlashAttention's way back (Dao et al., 2022): nothing of size T x S is kept; the weights are
    computed again, in the row blocks of ``ops.attention``."""
    a, b, c = map(plain, (q, k, v))
    out = ops.attention(a, b, c, scale, mask)

    def pull(g):
        T, S = a.shape[-2], b.shape[-2]
        dq, dk, dv = np.empty_like(a), np.zeros_like(b), np.zeros_like(c)
        for first, last, end in fast.query_blocks(T, S, mask):
            rows, keys = slice(first, last), slice(0, end)
            near = fast.block_mask(last - first) if mask is None else mask[..., rows, keys]
            block = a[..., rows, :], b[..., keys, :], c[..., keys, :]
            parts = _attend_back(g[..., rows, :], out[..., rows, :], *block, scale, near, mask)
            dq[..., rows, :] = parts[0]
            dk[..., keys, :] += parts[1]
            dv[..., keys, :] += parts[2]
        yield from ((q, dq), (k, dk), (v, dv))

    return Traced(out, pull)


def _attend_back(g, out, q, k, v, scale, near, mask):
    """Gradients for one block of rows: g, out, q (..., H, T, d); k, v (..., K, S, d).

    With P the softmax: dv = P^T g, dP = g v^T, and through the softmax
    dscores = P * (dP - sum(g * out)). P is never divided by its row sums: g is, which is smaller.
    """
    *lead, H, T, d = q.shape
    K, S = k.shape[-3], k.shape[-2]
    p = fast.attention_weights(q, k, scale, near)  # (..., K, G*T, S)
    sums = p @ np.ones((p.shape[-1], 1), p.dtype)
    g = g.reshape(*lead, K, -1, d) / sums  # (..., K, G*T, d)
    inner = np.einsum("...d,...d->...", g, out.reshape(g.shape))
    dv = p.swapaxes(-1, -2) @ g  # (..., K, S, d)
    scores = g @ v.swapaxes(-1, -2)  # (..., K, G*T, S)
    scores -= inner[..., None]
    scores *= p
    if mask is not None:  # a row of padding sees nothing and weighs all keys alike
        by_head = scores.reshape(*lead, K, H // K, T, S)
        np.copyto(by_head, 0, where=near)
    dq = scores @ k
    dq *= scale
    q = q.reshape(*lead, K, -1, d) * scale
    return dq.reshape(*lead, H, T, d), scores.swapaxes(-1, -2) @ q, dv
