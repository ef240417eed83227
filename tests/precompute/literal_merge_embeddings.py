"""Merged embeddings by loops: merged[t][p] = tokens[t] + positions[p]. Tables are lists of rows."""


def add(a, b):
    return [x + y for x, y in zip(a, b)]


def merge(tokens, positions):
    return [[add(token, position) for position in positions] for token in tokens]


def embed(table, ids, first=0):
    """The rows of tokens at positions first, first + 1, ..."""
    return [table[token][first + i] for i, token in enumerate(ids)]
