"""A semantic cache as a list that is searched from end to end, with sums over Python floats."""

import math


class Cache:
    """entries: [number, fields, embedding, answer], the least recently used one first."""

    def __init__(self, table, generate, threshold, room, audit):
        self.table = table  # the embedding of each token
        self.generate = generate  # (ids, fields) -> answer
        self.threshold, self.room, self.audit = threshold, room, audit
        self.entries = []
        self.made = self.hits = self.audited = self.wrong = 0

    def request(self, ids, fields):
        """The answer, and whether it was stored."""
        e = self.embed(ids)
        entry, similarity = self.nearest(e, fields)
        if similarity < self.threshold:
            answer = self.generate(ids, fields)
            self.store(e, fields, answer)
            return answer, False
        self.entries.remove(entry)
        self.entries.append(entry)
        self.hits += 1
        if self.hits % self.audit:
            return entry[3], True
        answer = self.generate(ids, fields)
        self.audited += 1
        if answer != entry[3]:
            self.wrong += 1
            self.store(e, fields, answer)
        return answer, True

    def embed(self, ids):
        mean = [math.fsum(float(self.table[i][d]) for i in ids) / len(ids) for d in range(self.D)]
        length = math.sqrt(math.fsum(x * x for x in mean))
        return [x / length for x in mean]

    @property
    def D(self):
        return len(self.table[0])

    def nearest(self, e, fields):
        best, most = None, -math.inf
        for entry in sorted(self.entries, key=lambda entry: entry[0]):
            if entry[1] == fields:
                cosine = math.fsum(a * b for a, b in zip(e, entry[2]))
                cosine = round(cosine * 2**20) / 2**20
                if cosine > most:
                    best, most = entry, cosine
        return best, most

    def store(self, e, fields, answer):
        entry, similarity = self.nearest(e, fields)
        if similarity >= 1:
            self.entries.remove(entry)
        elif len(self.entries) == self.room:
            self.entries.pop(0)
        self.made += 1
        self.entries.append([self.made, fields, e, answer])
