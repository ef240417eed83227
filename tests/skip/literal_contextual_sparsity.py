"""Contextual sparsity, literally: one token, one neuron, one head, one number at a time.

Only the dense model's norms, projections and rotation are taken from minitx; the weights of a
predictor come as lists.
"""

import math

import numpy as np


def scores(n, A, B):
    """z = (n A) B for one token: n [D], A [D][rank], B [rank][units]."""
    low = [sum(n[i] * A[i][r] for i in range(len(n))) for r in range(len(B))]
    return [sum(low[r] * B[r][j] for r in range(len(B))) for j in range(len(B[0]))]


def above(z, threshold):
    return [j for j in range(len(z)) if z[j] > threshold]


def top(z, count):
    return sorted(sorted(range(len(z)), key=lambda j: (-z[j], j))[:count])


def ffn(n, W_up, b_up, W_down, b_down, neurons):
    """relu(n W_up + b_up) W_down + b_down for one token, over these neurons only: W_up [D][F],
    W_down [F][D]."""
    y = list(b_down)
    for j in neurons:
        h = b_up[j] + sum(n[i] * W_up[i][j] for i in range(len(n)))
        if h > 0:
            for o in range(len(y)):
                y[o] += h * W_down[j][o]
    return y


def loss(A, B, X, Y, rare):
    """The weighted binary cross entropy, summed over units and averaged over tokens."""
    total = 0.0
    for x, y in zip(X, Y):
        for z, active in zip(scores(x, A, B), y):
            p = 1 / (1 + math.exp(-z))
            total -= math.log(p) if active else rare * math.log(1 - p)
    return total / len(X)


def longest_half(ctx, W_o):
    """The half of the heads (rounded up) with the longest ctx_h W_o,h, for ctx [H][d] and W_o
    [H][d][D]."""
    lengths = []
    for c, w in zip(ctx, W_o):
        written = [sum(c[i] * w[i][o] for i in range(len(c))) for o in range(len(w[0]))]
        lengths.append(math.sqrt(sum(x * x for x in written)))
    return top(lengths, math.ceil(len(ctx) / 2))


def attention(attn, n, ran, positions):
    """y (T, D) for the normalized inputs n (T, D), where token t runs the heads ran[t]."""
    T, H, K = len(n), attn.heads, attn.kv_heads
    q, k, v = (a.reshape(T, heads, -1) for a, heads in zip(attn.qkv(n), (H, K, K)))
    d = q.shape[-1]
    q, k = (attn.rope(a.swapaxes(0, 1), positions).swapaxes(0, 1) for a in (q, k))
    y = np.zeros((T, attn.out.w.shape[1]))
    for t in range(T):
        if attn.out.b is not None:
            y[t] += attn.out.b
        for h in ran[t]:
            of_head = h * K // H
            dots = [float(q[t, h] @ k[s, of_head]) / math.sqrt(d) for s in range(t + 1)]
            e = [math.exp(s - max(dots)) for s in dots]
            ctx = sum((w / sum(e)) * v[s, of_head] for s, w in enumerate(e))
            for i in range(d):
                y[t] += ctx[i] * attn.out.w[h * d + i]
    return y


def run(model, ids, neurons, heads):
    """Logits (T, V) of the dense ``model``, where ``neurons(layer, n)`` and ``heads(layer, n)``
    return the list of what one token runs."""
    T, state = len(ids), model.new_state()
    x = model.embed(np.array(ids), slice(0, T))
    for index, block in enumerate(model.stack.blocks):
        layer = state.layers[index].take(T)
        n = block.attn.norm(x)
        y = attention(block.attn, n, [heads(index, row.tolist()) for row in n], layer.tokens)
        parallel = type(block).__name__ == "ParallelBlock"
        n = block.ffn.norm(x if parallel else x + y)
        up, down = block.ffn.expand.up, block.ffn.down
        maps = [a.tolist() for a in (up.w, up.b, down.w, down.b)]
        rows = [ffn(row, *maps, neurons(index, row)) for row in n.tolist()]
        x = x + y + np.array(rows)
    return model.head(model.norm(x))
