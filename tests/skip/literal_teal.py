"""TEAL, literally: one input at a time, and one candidate step at a time, in Python floats."""

import math


def threshold(values, share):
    """The magnitude that this share of the values does not exceed; -1 for none."""
    magnitudes = sorted(abs(x) for x in values)
    count = math.floor(len(magnitudes) * share + 1e-6)
    return magnitudes[count - 1] if count else -1.0


def linear(x, w, b, t):
    """One token x [in], w [in][out], b [out]: only inputs above t in magnitude."""
    y = list(b)
    for i in range(len(x)):
        if abs(x[i]) > t:
            for o in range(len(y)):
                y[o] += x[i] * w[i][o]
    return y


def allocate(sizes, target, step, most, error):
    """The share that each matrix skips, by its name. sizes: numbers in each matrix; step: how many
    of them a step skips; error(shares): of the block."""
    shares = {name: 0.0 for name in sizes}
    total = sum(sizes.values())
    while True:
        skipped = sum(shares[name] * sizes[name] for name in sizes)
        missing = target * total - skipped
        if missing <= 1e-6:
            return shares
        best, best_shares = math.inf, None
        for name in sizes:
            room = (most - shares[name]) * sizes[name]
            if room <= 0:
                continue
            raised = dict(shares)
            raised[name] += min(step, missing, room) / sizes[name]
            if error(raised) < best:
                best, best_shares = error(raised), raised
        shares = best_shares
