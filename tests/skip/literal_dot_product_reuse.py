"""Dot-product reuse, literally: one token, one slice and one output at a time.

Python lists, dicts and floats; nothing here is shared with minitx.
"""


def product(x, w):
    """x w for a vector x and a matrix w[input][output]."""
    return [sum(x[i] * w[i][j] for i in range(len(x))) for j in range(len(w[0]))]


def sign_bits(x, planes):
    """Which side of each of the planes[input][bit] the vector x is on."""
    return tuple(value > 0 for value in product(x, planes))


def products(xs, w, slices=1, planes=None, size=None):
    """x W for each of xs [token][input], and for each token and slice whether it was reused.
    planes[slice][input][bit]: of the LSH form; None: only equal slices share a product."""
    s = len(w) // slices
    tables = [{} for _ in range(slices)]
    results, hits = [], []
    for x in xs:
        y, found = [0.0] * len(w[0]), []
        for i in range(slices):
            piece, rows = x[i * s : (i + 1) * s], w[i * s : (i + 1) * s]
            code = tuple(piece) if planes is None else sign_bits(piece, planes[i])
            found.append(code in tables[i])
            if code in tables[i]:
                term = tables[i][code]
            else:
                term = product(piece, rows)
                if size is None or len(tables[i]) < size:
                    tables[i][code] = term
            y = [a + b for a, b in zip(y, term)]
        results.append(y)
        hits.append(found)
    return results, hits


def centroid_products(xs, w, planes):
    """Deep Reuse as the paper has it: of all the xs, those in one bucket share the product of their
    mean. Not causal: the product of an early token contains later ones."""
    buckets = {}
    for t, x in enumerate(xs):
        buckets.setdefault(sign_bits(x, planes), []).append(t)
    results = [None] * len(xs)
    for tokens in buckets.values():
        mean = [sum(xs[t][i] for t in tokens) / len(tokens) for i in range(len(w))]
        for t in tokens:
            results[t] = product(mean, w)
    return results
