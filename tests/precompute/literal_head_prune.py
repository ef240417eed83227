"""Head pruning, literally: derivatives by finite differences, and one head at a time.

Python lists and floats; nothing here is shared with minitx.
"""


def slopes_of_text(loss, gates, step=1e-4):
    """d loss / d gate of each head [layer][head], by central differences. loss(gates) -> float."""
    found = []
    for layer, heads in enumerate(gates):
        found.append([])
        for head in range(len(heads)):
            around = []
            for change in (step, -step):
                moved = [list(row) for row in gates]
                moved[layer][head] += change
                around.append(loss(moved))
            found[-1].append((around[0] - around[1]) / (2 * step))
    return found


def importance(losses, gates, step=1e-4):
    """The paper's: the mean over texts of |d loss / d gate|. losses: a function per text."""
    slopes = [slopes_of_text(loss, gates, step) for loss in losses]
    return [
        [sum(abs(text[layer][h]) for text in slopes) / len(slopes) for h in range(len(heads))]
        for layer, heads in enumerate(gates)
    ]


# Three readings of the formula, for one head: slopes[text][token], what each token contributes to
# the derivative of its text's loss.


def per_text(slopes):
    """The paper: absolute values of whole texts."""
    return sum(abs(sum(text)) for text in slopes)


def per_token(slopes):
    """The authors' code: absolute values of single tokens."""
    return sum(abs(slope) for text in slopes for slope in text)


def per_batch(slopes):
    """BERTology scripts: the absolute value of the sum over a whole batch."""
    return abs(sum(slope for text in slopes for slope in text))


def lowest_first(scores, alive, count):
    """The next ``count`` heads (layer, head) to go, one after the other."""
    alive = [list(row) for row in alive]
    gone = []
    for _ in range(count):
        best = None
        for layer, row in enumerate(alive):
            for head, lives in enumerate(row):
                if not lives or sum(row) == 1:
                    continue
                if best is None or scores[layer][head] < scores[best[0]][best[1]]:
                    best = (layer, head)
        if best is None:
            break
        gone.append(best)
        alive[best[0]][best[1]] = False
    return gone


def attention(q, k, v, scale, key_head):
    """Causal attention [head][token][feature] of query heads, each with its key head."""
    from math import exp

    out = []
    for h, queries in enumerate(q):
        keys, values = k[key_head[h]], v[key_head[h]]
        out.append([])
        for t, query in enumerate(queries):
            scores = [scale * sum(a * b for a, b in zip(query, key)) for key in keys[: t + 1]]
            weights = [exp(score - max(scores)) for score in scores]
            total = sum(weights)
            out[-1].append(
                [
                    sum(w / total * value[i] for w, value in zip(weights, values))
                    for i in range(len(values[0]))
                ]
            )
    return out
