"""StreamingLLM for one head, one token at a time, in the paper's steps and with Python loops.

The cache is a list of (position, key before rotation, value). Before a token is added to a full
cache, the entry right after the sinks is dropped. Then, with positions=cache, each key is rotated
by its index in the cache and the query by the last index; with positions=original, each is rotated
by its position in the text.
"""

import math


def rotate(x, position, base):
    """x (d,) with the pairs (i, i + d/2) rotated by position * base^(-2i/d)."""
    half, out = len(x) // 2, list(x)
    for i in range(half):
        angle = position * base ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def attend(queries, keys, values, sinks, window, base=None, positions="cache"):
    """One output for each token, and the positions that were cached when it attended."""
    cache, outputs, cached = [], [], []
    for t, (q, k, v) in enumerate(zip(queries, keys, values)):
        if len(cache) == sinks + window:
            del cache[sinks]
        cache.append((t, k, v))
        scores = []
        for index, (position, key, _) in enumerate(cache):
            key_at, query_at = (index, len(cache) - 1) if positions == "cache" else (position, t)
            if base is None:  # no RoPE
                rotated, query = key, q
            else:
                rotated, query = rotate(key, key_at, base), rotate(q, query_at, base)
            scores.append(sum(a * b for a, b in zip(query, rotated)) / math.sqrt(len(q)))
        weights = [math.exp(s - max(scores)) for s in scores]
        total = sum(weights)
        outputs.append(
            [
                sum(w * value[i] for w, (_, _, value) in zip(weights, cache)) / total
                for i in range(len(v))
            ]
        )
        cached.append([position for position, _, _ in cache])
    return outputs, cached
