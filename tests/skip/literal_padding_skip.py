"""Padding removal, literally: a padded batch, its mask, and one row, one key at a time.

Python lists and floats; nothing here is shared with minitx.
"""

import math


def packed_places(mask):
    """Where each packed row stands in the padded batch, mask [sequence][column] (1: a real token),
    and the offset of each sequence: the sum of the lengths before it."""
    places, offsets = [], []
    for b, row in enumerate(mask):
        offsets.append(len(places))
        places += [(b, column) for column, real in enumerate(row) if real]
    return places, [*offsets, len(places)]


def positions(offsets):
    """Of each packed row in its own sequence: they start from 0 again in each."""
    return [i - a for a, b in zip(offsets, offsets[1:]) for i in range(a, b)]


def pack(padded, places):
    return [padded[b][column] for b, column in places]


def unpack(packed, places, mask):
    """Back into the padded batch, zeros in padding."""
    out = [[[0.0] * len(packed[0]) for _ in row] for row in mask]
    for row, (b, column) in zip(packed, places):
        out[b][column] = row
    return out


def sees(i, j, offsets):
    """Does packed row i attend to packed row j? Only to its own sequence, up to itself: a causal
    mask made of blocks along the diagonal."""
    begins = max(a for a in offsets if a <= i)
    return begins <= j <= i


def attend(q, k, v, scale, offsets):
    """One head over packed rows q, k, v [row][feature]."""
    out = []
    for i, query in enumerate(q):
        seen = [j for j in range(len(k)) if sees(i, j, offsets)]
        scores = [scale * sum(a * b for a, b in zip(query, k[j])) for j in seen]
        weights = [math.exp(score - max(scores)) for score in scores]
        p = [weight / sum(weights) for weight in weights]
        out.append([sum(w * v[j][f] for w, j in zip(p, seen)) for f in range(len(v[0]))])
    return out


def rows_run(lengths, new):
    """Rows that each step of a generation runs: sequence i has a prompt of lengths[i] tokens and
    ends with its new[i]-th token."""
    steps = []
    for step in range(max(new)):
        going = [i for i, n in enumerate(new) if step < n]
        steps.append(sum(lengths[i] if step == 0 else 1 for i in going))
    return steps
