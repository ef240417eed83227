"""separate_signs, literally: one token and one output, Python lists.

Nothing in it is shared with minitx.
"""


def split(numbers):
    """(positive parts, negative parts), both >= 0."""
    return [max(a, 0) for a in numbers], [max(-a, 0) for a in numbers]


def dot(a, b):
    return sum(p * q for p, q in zip(a, b))


def difference_of_sums(x, w):
    """x . w by two sums of unsigned weights."""
    plus, minus = split(w)
    return dot(x, plus) - dot(x, minus)


def quantize(numbers, bits):
    """(signed integers, scale)."""
    largest = 2 ** (bits - 1) - 1
    scale = max(abs(a) for a in numbers) / largest or 1.0
    return [round(a / scale) for a in numbers], scale


def unsigned_product(x, w, bits):
    """(y, up, down): two sums of products of unsigned integers, neither of which ever falls."""
    xi, xs = quantize(x, 8)
    wi, ws = quantize(w, bits)
    x_plus, x_minus = split(xi)
    w_plus, w_minus = split(wi)
    up = dot(x_plus, w_plus) + dot(x_minus, w_minus)
    down = dot(x_plus, w_minus) + dot(x_minus, w_plus)
    return (up - down) * xs * ws, up, down
