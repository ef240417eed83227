"""The merge loop of byte-pair encoding: join the best adjacent pair until no pair can be joined.

Both tokenizers run it: byte-level BPE takes the pair of the lowest rank, llama2.c's the pair whose
joined token scores highest. Looking through all pairs after every merge takes time in the square of
the length, hopeless for a word of 100,000 characters. Here every pair waits in a heap, and a linked
list finds the neighbours of a merged pair: n log n.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush

_GONE = -1  # stands where a symbol was swallowed by its left neighbour; no token has this id


def merge_best_first(
    ids: list[int], find: Callable[[int, int], tuple[float, int] | None]
) -> list[int]:
    """Merge the symbols `ids`; of equal pairs the leftmost goes first.

    `find(left, right)` answers (priority, merged id), the lowest priority being merged first, or
    None for a pair that cannot be merged. `ids` is left as it was.
    """
    ids = list(ids)
    end = len(ids)
    after = list(range(1, end + 1))  # position of the right neighbour; `end` if there is none
    before = list(range(-1, end - 1))  # position of the left neighbour; -1 if there is none

    def candidate(at: int) -> tuple[float, int, int, int, int] | None:
        found = find(ids[at], ids[after[at]])
        return found and (found[0], at, found[1], ids[at], ids[after[at]])

    heap = [entry for at in range(end - 1) if (entry := candidate(at))]
    heapify(heap)
    while heap:
        _, at, merged, left, right = heappop(heap)
        # An entry may be older than the last change at its place: it counts only if the same two
        # symbols still stand there.
        if ids[at] != left or after[at] == end or ids[after[at]] != right:
            continue
        swallowed = after[at]
        ids[at], ids[swallowed] = merged, _GONE
        after[at] = after[swallowed]
        if after[at] < end:
            before[after[at]] = at
            if entry := candidate(at):
                heappush(heap, entry)
        if before[at] >= 0 and (entry := candidate(before[at])):
            heappush(heap, entry)
    return [i for i in ids if i != _GONE]
