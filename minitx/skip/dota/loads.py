"""DOTA's token-parallel dataflow: how many keys its accelerator loads for several queries at once.

Only counted: no result depends on it, and NumPy loads what it likes.
"""

import numpy as np


def key_loads(kept, parallel_queries: int) -> int:
    """The number of key loads for kept (..., T, S), booleans, if ``parallel_queries`` neighbouring
    queries of a head run at once.

    In each step every query takes one of the keys that it still wants. A key that several take in
    the same step is loaded once. A query may take its keys in any order, since a sum does not
    depend on it, so the order is greedy: first the key that most of the idle queries (those that
    have not taken a key in this step) want; ties go to the lower index.
    """
    *_, T, S = kept.shape
    kept = kept.reshape(-1, T, S)
    if T == 1:
        return kept.sum()
    bit = np.uint8(1) << (np.arange(T, dtype=np.uint8) % parallel_queries)
    # One integer for each group of queries and each key: bit t is set if the group's query t wants
    # the key.
    starts = np.arange(0, T, parallel_queries)
    wanted = np.add.reduceat(kept * bit[:, None], starts, axis=1, dtype=np.uint8)
    wanted = wanted.reshape(-1, S)  # (groups, S)
    group, count = np.arange(len(wanted)), 0
    while wanted.any():  # a step of all groups at once; at most as many as a query keeps keys
        idle = np.bitwise_or.reduce(wanted, axis=1)
        while idle.any():  # a load; at most ``parallel_queries`` of them
            key = np.bitwise_count(wanted & idle[:, None]).argmax(1)
            served = wanted[group, key] & idle
            count += np.count_nonzero(served)
            wanted[group, key] ^= served
            idle ^= served
    return count
