"""The merge loop of byte-pair encoding: merge the best adjacent pair until none can be merged.

Both tokenizers use it: byte-level BPE merges the pair with the lowest rank, llama2.c the pair whose
merged token has the highest score. Scanning all pairs after every merge is O(n^2), too slow for a
word of 100,000 characters. A heap of candidate pairs and a linked list of symbols make it
O(n log n).
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush

_REMOVED = -1  # marks a symbol that was merged into its left neighbor; no token has this id


def merge_best_first(
    ids: list[int], lookup: Callable[[int, int], tuple[float, int] | None]
) -> list[int]:
    """Merges adjacent `ids`; ties go to the leftmost pair.

    `lookup(left, right)` returns (priority, merged id), lowest priority first, or None for a pair
    that cannot be merged. `ids` itself is not changed.
    """
    ids = list(ids)
    end = len(ids)
    next_index = list(range(1, end + 1))  # index of the right neighbor; `end` if there is none
    prev_index = list(range(-1, end - 1))  # index of the left neighbor; -1 if there is none

    def candidate(index: int) -> tuple[float, int, int, int, int] | None:
        found = lookup(ids[index], ids[next_index[index]])
        return found and (found[0], index, found[1], ids[index], ids[next_index[index]])

    heap = [entry for index in range(end - 1) if (entry := candidate(index))]
    heapify(heap)
    while heap:
        _, index, merged, left, right = heappop(heap)
        # A heap entry is stale if one of its two symbols has been merged since.
        if ids[index] != left or next_index[index] == end or ids[next_index[index]] != right:
            continue
        removed = next_index[index]
        ids[index], ids[removed] = merged, _REMOVED
        next_index[index] = next_index[removed]
        if next_index[index] < end:
            prev_index[next_index[index]] = index
            if entry := candidate(index):
                heappush(heap, entry)
        if prev_index[index] >= 0 and (entry := candidate(prev_index[index])):
            heappush(heap, entry)
    return [i for i in ids if i != _REMOVED]
