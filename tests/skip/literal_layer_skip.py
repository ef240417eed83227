"""Layer skipping, literally: one layer, one token, one pair of numbers at a time, in plain loops.

Only the dense model's attention and feed-forward networks are taken from minitx. Units are named by
words: "attn3", "ffn5"; a layer is both of its sub-layers.
"""

import itertools
import math

import numpy as np


def run(model, ids, dropped=()):
    """The dense ``model`` without some sub-layers: logits (T, V), the hidden states before and
    after each layer (L + 1 arrays), and around each sub-layer that runs (name -> two arrays)."""
    T, state, around = len(ids), model.new_state(), {}
    x = model.embed(np.array(ids), slice(0, T))
    hidden = [x]
    for index, block in enumerate(model.stack.blocks):
        layer = state.layers[index].take(T)
        entering = x
        if f"attn{index}" not in dropped:
            x = x + block.attn(entering, layer)
            around[f"attn{index}"] = entering, x
        if f"ffn{index}" not in dropped:
            if type(block).__name__ != "ParallelBlock":
                entering = x  # in a parallel block the FFN reads what the attention read
            added = block.ffn(entering, layer)
            around[f"ffn{index}"] = entering, entering + added
            x = x + added
        hidden.append(x)
    return model.head(model.norm(x)), hidden, around


def cosine(a, b) -> float:
    dot = sum(float(p) * float(q) for p, q in zip(a, b))
    length = math.sqrt(sum(float(p) ** 2 for p in a)) * math.sqrt(sum(float(q) ** 2 for q in b))
    return dot / length


def mean_cosine(pairs) -> float:
    """Over the tokens of all texts: ``pairs`` has the arrays before and after for each text."""
    found = [cosine(a, b) for before, after in pairs for a, b in zip(before, after)]
    return sum(found) / len(found)


def influence(model, texts):
    """ShortGPT: how much each layer turns the hidden state."""
    states = [run(model, ids)[1] for ids in texts]
    layers = range(len(model.stack.blocks))
    return [1 - mean_cosine((h[index], h[index + 1]) for h in states) for index in layers]


def angular(model, texts, n):
    """Gromov et al.: how far each run of n layers turns the last token of a text."""
    states = [run(model, ids)[1] for ids in texts]
    found = []
    for first in range(len(model.stack.blocks) - n + 1):
        cosines = [cosine(h[first][-1], h[first + n][-1]) for h in states]
        found.append(sum(math.acos(min(1.0, c)) / math.pi for c in cosines) / len(cosines))
    return found


def similarity(model, texts, names):
    """LLM-Drop: how little each sub-layer turns the hidden state."""
    around = [run(model, ids)[2] for ids in texts]
    return [mean_cosine(found[name] for found in around) for name in names]


def loss(model, texts, dropped=()):
    """Mean negative log-likelihood, in nats per token."""
    total, tokens = 0.0, 0
    for ids in texts:
        logits = run(model, ids, dropped)[0]
        for row, target in zip(logits, ids[1:]):
            top = max(row)
            total += math.log(sum(math.exp(z - top) for z in row)) + top - row[target]
            tokens += 1
    return float(total / tokens)


def greedy(model, texts, units, count):
    """SLEB. units: tuples of sub-layers. Returns the indices of those dropped, in order."""
    plan = []
    for _ in range(count):
        best, best_loss = None, math.inf
        for index in range(len(units)):
            if index in plan:
                continue
            found = loss(model, texts, names_of(units, [*plan, index]))
            if found < best_loss:
                best, best_loss = index, found
        plan.append(best)
    return plan


def exhaustive(model, texts, units, count):
    """The best plan of all, which nobody can afford on a large model."""
    plans = itertools.combinations(range(len(units)), count)
    return min(plans, key=lambda plan: loss(model, texts, names_of(units, plan)))


def names_of(units, plan):
    return [name for index in plan for name in units[index]]
