"""The cascade of two models in plain loops, straight from the paper. Models are functions from a
list of tokens to the logits of the next one."""

import math


def softmax(logits):
    largest = max(logits)
    e = [math.exp(z - largest) for z in logits]
    return [x / sum(e) for x in e]


def greedy(model, prompt, limit, eos=()):
    """(tokens, their probabilities, entropies relative to ln V): up to an end of text."""
    tokens, probabilities, entropies = [], [], []
    while len(tokens) < limit:
        p = softmax(model(prompt + tokens))
        token = max(range(len(p)), key=lambda v: p[v])
        tokens.append(token)
        probabilities.append(p[token])
        entropies.append(-sum(x * math.log(x) for x in p if x) / math.log(len(p)))
        if token in eos:
            break
    return tokens, probabilities, entropies


def score(name, probabilities, entropies):
    n = len(probabilities)
    if name == "logprob":
        return sum(math.log(p) for p in probabilities) / n
    if name == "lowest":
        return min(probabilities)
    return 1 - sum(entropies) / n


def cascade(small, big, prompt, limit, name, cut, eos=()):
    """(who answered, tokens)."""
    tokens, probabilities, entropies = greedy(small, prompt, limit, eos)
    if score(name, probabilities, entropies) >= cut:
        return "small", tokens
    return "big", greedy(big, prompt, limit, eos)[0]


def isotonic(right):
    """The least-squares fit that never falls, to ``right`` in the order of rising scores: at i, the
    largest over a <= i of the smallest over b >= i of the mean of right[a..b]."""
    n = len(right)

    def mean(a, b):
        return sum(right[a : b + 1]) / (b + 1 - a)

    return [max(min(mean(a, b) for b in range(i, n)) for a in range(i + 1)) for i in range(n)]
