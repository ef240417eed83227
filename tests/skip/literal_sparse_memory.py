"""Attention over a memory of fixed size with LRU eviction: one token, one head, one key at a time.

Written from the paper's steps on Python lists in float64; independent of minitx's code.
"""

import math
from collections import defaultdict


def dot(x, y):
    return sum(a * b for a, b in zip(x, y))


class Memory:
    """The slots of one key head: lists of keys, values, tokens, and the last access of each."""

    def __init__(self, slots, keep, threshold, scale, buckets=None):
        self.slots, self.keep, self.threshold, self.scale = slots, keep, threshold, scale
        self.buckets = buckets  # (x, is_key) -> one bucket per hash table; None: scan all slots
        self.keys, self.values, self.token, self.last = [], [], [], []
        self.t = -1
        self.evicted = []

    def write(self, key, value):
        self.t += 1
        if len(self.keys) < self.slots:  # a free slot
            for column in (self.keys, self.values, self.token, self.last):
                column.append(None)
            slot = len(self.keys) - 1
        else:  # the least recently accessed one; ties go to the oldest token
            slot = min(range(self.slots), key=lambda i: (self.last[i], self.token[i]))
            self.evicted.append(self.token[slot])
        self.keys[slot], self.values[slot] = key, value
        self.token[slot] = self.last[slot] = self.t

    def candidates(self, query):
        slots = range(len(self.keys))
        if self.buckets is None:
            return list(slots)
        tables = [defaultdict(list) for _ in self.buckets(query, False)]
        for slot in slots:
            for table, bucket in zip(tables, self.buckets(self.keys[slot], True)):
                table[bucket].append(slot)
        found = set()
        for table, bucket in zip(tables, self.buckets(query, False)):
            found |= set(table[bucket])
        for slot in sorted(slots, key=lambda i: -self.token[i]):  # too few: add the latest tokens
            if len(found) < self.keep:
                found.add(slot)
        return sorted(found)

    def read(self, queries):
        """For each query head (output, {token: weight}). Then mark what was accessed."""
        found, accessed = [], set()
        for query in queries:
            scores = {i: dot(query, self.keys[i]) * self.scale for i in self.candidates(query)}
            best = sorted(scores, key=lambda i: (-scores[i], i))[: self.keep]  # the top k
            top = max(scores[i] for i in best)
            weights = {i: math.exp(scores[i] - top) for i in best}
            total = sum(weights.values())
            weights = {i: w / total for i, w in weights.items()}
            columns = range(len(self.values[0]))
            out = [sum(w * self.values[i][c] for i, w in weights.items()) for c in columns]
            found.append((out, {self.token[i]: w for i, w in weights.items()}))
            accessed |= {i for i, w in weights.items() if w > self.threshold}
        for i in accessed:
            self.last[i] = self.t
        return found


def attention(q, k, v, scale, slots, keep, threshold=0.005, buckets=None):
    """All heads of one sequence, q[H][T][d], k and v[K][T][d], from its first token on. Returns
    (output[H][T][d], tokens read [H][T], the memory of each key head at the end)."""
    G = len(q) // len(k)
    memories = [
        Memory(
            slots,
            keep,
            threshold,
            scale,
            buckets and (lambda x, is_key, h=h: buckets(x, is_key, h)),
        )
        for h in range(len(k))
    ]
    out = [[] for _ in q]
    read = [[] for _ in q]
    for t in range(len(k[0])):
        for h, memory in enumerate(memories):
            memory.write(k[h][t], v[h][t])
            group = range(h * G, (h + 1) * G)
            for member, (row, weights) in zip(group, memory.read([q[m][t] for m in group])):
                out[member].append(row)
                read[member].append(set(weights))
    return out, read, memories


def buckets_of(x, planes, bits):
    """LSH: one bucket per ``bits`` hyperplanes, the sides of them that x is on."""
    sides = [dot(plane, x) > 0 for plane in planes]
    return [tuple(sides[i : i + bits]) for i in range(0, len(sides), bits)]


class LeastRecentlyAccessed:
    """The paper's ring of slots, O(1) per access: an access moves a slot to the back, the front one
    is evicted next."""

    def __init__(self, slots):
        self.next = {i: (i + 1) % slots for i in range(slots)}
        self.before = {i: (i - 1) % slots for i in range(slots)}
        self.front = 0

    def access(self, slot):
        if slot == self.front:
            self.front = self.next[slot]  # the ring turns, so the slot is now at the back
            return
        a, b = self.before[slot], self.next[slot]
        self.next[a], self.before[b] = b, a
        back = self.before[self.front]
        self.next[back], self.before[slot] = slot, back
        self.next[slot], self.before[self.front] = self.front, slot
