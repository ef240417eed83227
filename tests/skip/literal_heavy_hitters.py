"""H2O for one key head and its query heads, step by step, in the paper's words and Python loops."""

import math


def keep(acc, heavy, recent):
    """The rows that stay, by their accumulated attention: the latest, and the heaviest others."""
    rows = list(range(len(acc)))
    latest = rows[len(rows) - recent :] if recent else []
    older = rows[: len(rows) - recent]
    heaviest = sorted(older, key=lambda row: (-acc[row], row))[:heavy]
    return sorted(heaviest) + latest


def run(steps, heavy, recent):
    """steps: for each step (queries of each head, keys, values) of its new tokens, as lists
    queries[head][token], keys[token], values[token]. Returns the outputs [step][head][token] and
    the positions that are cached after each step."""
    cache, acc, outputs, cached, position = [], [], [], [], 0
    for queries, keys, values in steps:
        if len(cache) > heavy + recent:
            rows = keep(acc, heavy, recent)
            cache, acc = [cache[row] for row in rows], [acc[row] for row in rows]
        first = position
        for k, v in zip(keys, values):
            cache.append((position, k, v))
            acc.append(0.0)
            position += 1
        outputs.append([])
        for head in queries:
            outputs[-1].append([])
            for t, q in enumerate(head):
                seen = [row for row, entry in enumerate(cache) if entry[0] <= first + t]
                scores = [sum(a * b for a, b in zip(q, cache[row][1])) for row in seen]
                scores = [score / math.sqrt(len(q)) for score in scores]
                weights = [math.exp(score - max(scores)) for score in scores]
                total = sum(weights)
                out = [0.0] * len(cache[0][2])
                for row, weight in zip(seen, weights):
                    acc[row] += weight / total
                    for i, number in enumerate(cache[row][2]):
                        out[i] += weight / total * number
                outputs[-1][-1].append(out)
        cached.append([entry[0] for entry in cache])
    return outputs, cached
