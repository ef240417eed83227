"""CATS, literally: one token and one neuron at a time, in Python floats."""

import math


def silu(z):
    return z / (1 + math.exp(-z))


def threshold(gates, sparsity):
    """The magnitude that a share ``sparsity`` of all gates does not exceed; -1 for none."""
    magnitudes = sorted(abs(g) for g in gates)
    count = math.floor(len(magnitudes) * sparsity + 1e-6)
    return magnitudes[count - 1] if count else -1.0


def ffn(x, w_gate, w_up, w_down, t):
    """One token x [D]; w_gate and w_up [D][F], w_down [F][D]. Returns the output [D] and the active
    neurons."""
    y, active = [0.0] * len(x), []
    for j in range(len(w_down)):
        g = silu(sum(x[i] * w_gate[i][j] for i in range(len(x))))
        if abs(g) <= t:
            continue  # neither up nor down is computed
        active.append(j)
        up = sum(x[i] * w_up[i][j] for i in range(len(x)))
        for i in range(len(x)):
            y[i] += g * up * w_down[j][i]
    return y, active
