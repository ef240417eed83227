"""Gradient rules of the operations in minitx/ops.py.

The forward pass calls the operation itself; the backward pass is one closed formula, which is
faster than the chain rule through every NumPy call inside. g is always the gradient with respect to
the result. Long sums are products with a vector, often of ones: BLAS sums three times as fast as
``sum``.
"""

import math

import numpy as np

from minitx import fast, ops
from minitx.training.autograd.array import Traced, rule, value_of
from minitx.training.autograd.numpy_rules import unbroadcast

# Norms ---------------------------------------------------------------------------------------


@rule(ops.rms_norm)
def rms_norm(x, gain, eps):
    """With r = 1 / sqrt(mean(x^2) + eps) and h = g * gain:  dx = r h - x r^3 mean(h x)."""
    a, w = x.value, value_of(gain)

    def backward(g):
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

    return Traced(ops.rms_norm(a, w, eps), backward)


@rule(ops.layer_norm)
def layer_norm(x, gain, bias, eps):
    """With n = (x - mean) r, r = 1 / sqrt(variance + eps), and h = g * gain:
    dx = r (h - mean(h) - n mean(h n))."""
    a, w, b = x.value, value_of(gain), value_of(bias)

    def backward(g):
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

    return Traced(ops.layer_norm(a, w, b, eps), backward)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _column_sums(x):
    return np.ones(len(x), x.dtype) @ x


# Activations ---------------------------------------------------------------------------------


def _activation(op, derivative):
    @rule(op)
    def run(x):
        def backward(g):
            d = derivative(x.value)
            d *= g
            yield x, d

        return Traced(op(x.value), backward)


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
    a, b = gate.value, value_of(up)

    def backward(g):
        s = np.exp(-a)
        s += 1
        np.reciprocal(s, out=s)
        silu = a * s
        if isinstance(up, Traced):
            yield up, unbroadcast(g * silu, b.shape)
        slope = 1 - s
        slope *= silu
        slope += s
        slope *= b
        slope *= g
        yield gate, unbroadcast(slope, a.shape)

    return Traced(ops.swiglu(a, b), backward)


# Positions and attention ---------------------------------------------------------------------


@rule(ops.rotate)
def rotate(x, cos, sin):
    """The gradient of a rotation is the inverse rotation: by the same angle, in reverse."""

    def backward(g):
        yield x, ops.rotate(g, cos, -sin)

    return Traced(ops.rotate(x.value, cos, sin), backward)


@rule(ops.attention)
def attention(q, k, v, scale, mask=None):
    """The backward pass of FlashAttention (Dao et al., 2022): no T x S array is stored. Attention
    weights are recomputed, in the same blocks of queries as in ``ops.attention``."""
    a, b, c = map(value_of, (q, k, v))
    out = ops.attention(a, b, c, scale, mask)

    def backward(g):
        T, S = a.shape[-2], b.shape[-2]
        dq, dk, dv = np.empty_like(a), np.zeros_like(b), np.zeros_like(c)
        for first, last, end in fast.query_blocks(T, S, mask):
            rows, keys = slice(first, last), slice(0, end)
            masked = fast.block_mask(last - first) if mask is None else mask[..., rows, keys]
            block = a[..., rows, :], b[..., keys, :], c[..., keys, :]
            parts = _attention_backward(
                g[..., rows, :], out[..., rows, :], *block, scale, masked, mask
            )
            dq[..., rows, :] = parts[0]
            dk[..., keys, :] += parts[1]
            dv[..., keys, :] += parts[2]
        yield from ((q, dq), (k, dk), (v, dv))

    return Traced(out, backward)


def _attention_backward(g, out, q, k, v, scale, masked, mask):
    """Gradients for one block of queries: g, out, q (..., H, T, d); k, v (..., K, S, d).

    With P the attention weights:  dv = P^T g,  dP = g v^T,  dscores = P * (dP - sum(g * out)).
    Instead of normalizing P by its row sums, g is divided by them, which is the smaller array.
    """
    *lead, H, T, d = q.shape
    K, S = k.shape[-3], k.shape[-2]
    p = fast.unnormalized_weights(q, k, scale, masked)  # (..., K, G*T, S)
    sums = p @ np.ones((p.shape[-1], 1), p.dtype)
    g = g.reshape(*lead, K, -1, d) / sums  # (..., K, G*T, d)
    inner = np.einsum("...d,...d->...", g, out.reshape(g.shape))
    dv = p.swapaxes(-1, -2) @ g  # (..., K, S, d)
    scores = g @ v.swapaxes(-1, -2)  # (..., K, G*T, S)
    scores -= inner[..., None]
    scores *= p
    if mask is not None:  # for a padding query all keys are masked and have equal weights
        by_head = scores.reshape(*lead, K, H // K, T, S)
        np.copyto(by_head, 0, where=masked)
    dq = scores @ k
    dq *= scale
    q = q.reshape(*lead, K, -1, d) * scale
    return dq.reshape(*lead, H, T, d), scores.swapaxes(-1, -2) @ q, dv
