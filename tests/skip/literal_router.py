"""Routing in plain loops. Models are functions from a list of tokens to the logits of the next."""

import math


def features(prompt, buckets=256, last=16):
    """ln length; the last token; how often each of the last tokens occurs. Tokens are hashed: the
    leading 8 bits of the token times 2654435769, modulo 2^32."""

    def bucket(token):
        return int(bin((token * 2654435769) % 2**32 + 2**32)[3:11], 2)

    one, bag = [0] * buckets, [0] * buckets
    one[bucket(prompt[-1])] = 1
    for token in prompt[-last:]:
        bag[bucket(token)] += 1
    return [math.log(len(prompt)), *one, *bag]


def losses(model, prompt, last=16):
    """ln length; the mean of -ln p(token) over the prompt, and over its last tokens."""
    found = []
    for t in range(1, len(prompt)):
        logits = model(prompt[:t])
        largest = max(logits)
        total = sum(math.exp(z - largest) for z in logits)
        found.append(largest + math.log(total) - logits[prompt[t]])
    if not found:
        return [0, 0, 0]
    tail = found[-last:]
    return [math.log(len(prompt)), sum(found) / len(found), sum(tail) / len(tail)]


def route(x, w, b, threshold):
    z = b + sum(a * c for a, c in zip(x, w))
    return "small" if 1 / (1 + math.exp(-z)) >= threshold else "big"
