"""How many key rows DOTA's accelerator loads when it runs several queries in parallel.

Counted only: it changes no number, and NumPy loads what it likes.
"""

import numpy as np


def key_loads(kept, parallel: int) -> int:
    """Key loads for kept (..., T, S), booleans, if ``parallel`` neighbouring queries of a head run
    together.

    In each step every query takes one of the keys that it still wants, in any order, since a sum
    has none. A key that several queries take in the same step is loaded once. Greedy: first the key
    that most of the idle queries want; ties go to the lower index.
    """
    *_, T, S = kept.shape
    kept = kept.reshape(-1, T, S)
    if T == 1:
        return kept.sum()
    bit = np.uint8(1) << (np.arange(T, dtype=np.uint8) % parallel)
    # One number per group of queries and key: bit t is set if its query t wants the key.
    starts = np.arange(0, T, parallel)
    wanted = np.add.reduceat(kept * bit[:, None], starts, axis=1, dtype=np.uint8)
    wanted = wanted.reshape(-1, S)  # (groups, S)
    group, count = np.arange(len(wanted)), 0
    while wanted.any():  # a step of all groups at once; at most as many as a query keeps keys
        idle = np.bitwise_or.reduce(wanted, axis=1)
        while idle.any():  # a load; at most ``parallel`` of them
            key = np.bitwise_count(wanted & idle[:, None]).argmax(1)
            served = wanted[group, key] & idle
            count += np.count_nonzero(served)
            wanted[group, key] ^= served
            idle ^= served
    return count
