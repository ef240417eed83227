"""Vocabulary pruning, literally: one token at a time, in plain loops, with nothing sliced."""

import math

import numpy as np

BELOW = 50.0


def kept_tokens(V: int, texts, always, keep=None) -> list[int]:
    """The tokens that stay: those of ``always``, then the most frequent, ties to the lower id."""
    count = [0] * V
    for ids in texts:
        for id in ids:
            count[id] += 1
    if keep is None:
        return [id for id in range(V) if id in always or count[id] > 0]
    kept = list(always)
    while len(kept) < min(keep, V):
        rest = [id for id in range(V) if id not in kept]
        kept.append(max(rest, key=lambda id: (count[id], -id)))
    return sorted(kept)


def split(data: bytes, kept_bytes: dict) -> list[int]:
    """The longest kept token that the bytes begin with, then the same for the rest."""
    if not data:
        return []
    for length in range(len(data), 0, -1):
        if data[:length] in kept_bytes:
            return [kept_bytes[data[:length]], *split(data[length:], kept_bytes)]
    raise ValueError(f"{data} cannot be spelled")


def most_similar(table, token: int, kept) -> int:
    """The kept token whose row of the table has the largest cosine with this token's."""

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

    return max(kept, key=lambda other: (cosine(table[token], table[other]), -other))


def run(model, table, ids, kept):
    """Logits (T, V) of the dense model, read and changed as the pruned model would have them."""
    seen = [id if id in kept else most_similar(table, id, kept) for id in ids]
    logits = model(np.array(seen))
    for row in logits:
        top = max(row[id] for id in kept)
        for id in range(len(row)):
            if id not in kept:
                row[id] = top - BELOW
    return logits
