"""Memoization of a function of vectors, literally: one vector, one number at a time.

Python lists and floats; nothing here is shared with minitx.
"""

import math


def distance(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b)))


def size(a):
    return math.sqrt(sum(x * x for x in a))


def cover(keys, radius, most):
    """Indices of keys to store: each time the one that has most keys within its radius which
    no stored one has."""
    left, chosen = set(range(len(keys))), []
    while left and len(chosen) < most:
        best, covered = None, set()
        for i, key in enumerate(keys):
            near = {j for j in left if j == i or distance(keys[j], key) <= radius * size(key)}
            if len(near) > len(covered):
                best, covered = i, near
        chosen.append(best)
        left -= covered
    return chosen


def nearest(x, keys, basis):
    """The index of the key that is nearest to x after both are multiplied by the basis, and how far
    x is from it, relative to the key's length."""

    def short(row):
        return [sum(a * b for a, b in zip(row, column)) for column in zip(*basis)]

    found = [distance(short(x), short(key)) for key in keys]
    i = found.index(min(found))
    return i, distance(x, keys[i]) / size(keys[i])


def memoized(f, rows, keys, values, basis, radius):
    """f(x), or the stored value of the nearest key, for each x; and which ones were hits."""
    out, hits = [], []
    for x in rows:
        i, away = nearest(x, keys, basis)
        hits.append(away <= radius)
        out.append(values[i] if hits[-1] else f(x))
    return out, hits


def monitored(f, rows, keys, values, basis, radius, every, limit, halvings):
    """The same with a quality monitor; and the radius that was used for each x."""
    out, used, halved = [], [], 0
    for t, x in enumerate(rows):
        i, away = nearest(x, keys, basis)
        used.append(radius / 2**halved)
        hit = away <= used[-1]
        out.append(values[i] if hit else f(x))
        if hit and (t + 1) % every == 0:
            out[-1] = f(x)
            error = distance(values[i], out[-1]) / size(out[-1])
            if error > limit:
                halved = min(halved + 1, halvings)
            elif error <= limit / 2:
                halved = max(halved - 1, 0)
    return out, used
