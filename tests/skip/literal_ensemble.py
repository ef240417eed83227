"""Averages of two predictions, on lists, and a greedy loop without a KV cache.

Independent of minitx's code. Probabilities are lists; a model is a function from a text (a list of
tokens) to the probabilities of its next token.
"""

import math


def probability_average(p, q, weight):
    return [(1 - weight) * a + weight * b for a, b in zip(p, q)]


def logit_average(p, q, weight):
    """The weighted geometric mean, normalized."""
    products = [math.pow(a, 1 - weight) * math.pow(b, weight) for a, b in zip(p, q)]
    total = sum(products)
    return [x / total for x in products]


def greedy(one, other, average, weight, prompt, limit):
    """Both models read every token."""
    text = list(prompt)
    for _ in range(limit):
        p = average(one(text), other(text), weight)
        text.append(max(range(len(p)), key=lambda token: (p[token], -token)))
    return text[len(prompt) :]
