"""Sparse reads of a memory of N slots, literally: one token, one head, one key at a time.

Written on Python lists in float64 from the paper's steps; nothing in it is shared with minitx.
"""

import math
from collections import defaultdict


def dot(x, y):
    return sum(a * b for a, b in zip(x, y))


class Memory:
    """The slots of one key head: lists of keys, values, tokens, and the last access of each."""

    def __init__(self, N, K, delta, scale, buckets=None):
        self.N, self.K, self.delta, self.scale = N, K, delta, scale
        self.buckets = buckets  # of a key or query: one for each table; None: look at all
        self.keys, self.values, self.token, self.last = [], [], [], []
        self.t = -1
        self.evicted = []

    def write(self, key, value):
        self.t += 1
        if len(self.keys) < self.N:
            for many in (self.keys, self.values, self.token, self.last):
                many.append(None)
            slot = len(self.keys) - 1
        else:
            slot = min(range(self.N), key=lambda i: (self.last[i], self.token[i]))
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
        for slot in sorted(slots, key=lambda i: -self.token[i]):
            if len(found) < self.K:
                found.add(slot)
        return sorted(found)

    def read(self, queries):
        """For each query head (output, {token: weight}); then the accesses are marked."""
        found, used = [], set()
        for query in queries:
            scores = {i: dot(query, self.keys[i]) * self.scale for i in self.candidates(query)}
            best = sorted(scores, key=lambda i: (-scores[i], i))[: self.K]
            top = max(scores[i] for i in best)
            weights = {i: math.exp(scores[i] - top) for i in best}
            total = sum(weights.values())
            weights = {i: w / total for i, w in weights.items()}
            columns = range(len(self.values[0]))
            out = [sum(w * self.values[i][c] for i, w in weights.items()) for c in columns]
            found.append((out, {self.token[i]: w for i, w in weights.items()}))
            used |= {i for i, w in weights.items() if w > self.delta}
        for i in used:
            self.last[i] = self.t
        return found


def attention(q, k, v, scale, N, K, delta=0.005, buckets=None):
    """All heads of one sequence: q[H][T][d], k and v[K][T][d], from its first token on. Gives
    (output[H][T][d], tokens read [H][T], one memory for each key head as it is at the end)."""
    G = len(q) // len(k)
    memories = [
        Memory(N, K, delta, scale, buckets and (lambda x, key, h=h: buckets(x, key, h)))
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


def signs(x, planes, b):
    """One bucket for each b of the planes: the signs of the projections of x."""
    bits = [dot(plane, x) > 0 for plane in planes]
    return [tuple(bits[i : i + b]) for i in range(0, len(bits), b)]


class LeastRecentlyAccessed:
    """The paper's ring of slots: an access moves a slot to the back, the front one goes next."""

    def __init__(self, N):
        self.next = {i: (i + 1) % N for i in range(N)}
        self.before = {i: (i - 1) % N for i in range(N)}
        self.front = 0

    def access(self, slot):
        if slot == self.front:
            self.front = self.next[slot]  # so that the slot, which stays in place, is the back
            return
        a, b = self.before[slot], self.next[slot]
        self.next[a], self.before[b] = b, a
        back = self.before[self.front]
        self.next[back], self.before[slot] = slot, back
        self.next[slot], self.before[self.front] = self.front, slot
