"""Table lookup instead of products, literally: every kind for one token, with Python lists.

Nothing in it is shared with minitx. A matrix is a list of rows, one for each input.
"""


def rint(x):
    """To the nearest whole number; from the middle to the even one, as Python's round does."""
    return round(x)


def whole(x, bits):
    """(whole numbers, scale) of a list."""
    most = 2 ** (bits - 1) - 1
    scale = max(abs(a) for a in x) / most or 1.0
    return [max(-most, min(most, rint(a / scale))) for a in x], scale


def columns(w):
    return [list(column) for column in zip(*w)]


def code(digits, bits):
    """Several whole numbers as one, the first in the low bits, none of them negative."""
    return sum((digit + 2 ** (bits - 1)) << (bits * j) for j, digit in enumerate(digits))


def digits_of(number, bits, d):
    return [(number >> (bits * j)) % 2**bits - 2 ** (bits - 1) for j in range(d)]


def in_groups(x, d):
    """Lists of d, the last filled up with the value 0."""
    x = x + [0] * (-len(x) % d)
    return [x[i : i + d] for i in range(0, len(x), d)]


def dot(a, b):
    return sum(p * q for p, q in zip(a, b))


def product(x, w, ba, bw, d):
    """(y, acc, input codes, weight codes by output, reads by group and output)."""
    table = [
        [dot(digits_of(ca, ba, d), digits_of(cw, bw, d)) for cw in range(2 ** (bw * d))]
        for ca in range(2 ** (ba * d))
    ]
    xi, xs = whole(x, ba)
    ca = [code(group, ba) for group in in_groups(xi, d)]
    y, acc, codes, reads = [], [], [], []
    for column in columns(w):
        wi, ws = whole(column, bw)
        cw = [code(group, bw) for group in in_groups(wi, d)]
        read = [table[a][c] for a, c in zip(ca, cw)]
        codes.append(cw)
        reads.append(read)
        acc.append(sum(read))
        y.append(sum(read) * (xs * ws))
    return y, acc, ca, codes, columns(reads)


def folded(x, w, ba, d):
    """The weights themselves in the tables."""
    xi, xs = whole(x, ba)
    ca = [code(group, ba) for group in in_groups(xi, d)]
    y = []
    for column in columns(w):
        tables = [
            [dot(digits_of(c, ba, d), group) for c in range(2 ** (ba * d))]
            for group in in_groups(column, d)
        ]
        y.append(sum(tables[s][c] for s, c in enumerate(ca)) * xs)
    return y


def nearest(x, prototypes):
    """The number of the nearest prototype, the smaller of two."""
    distances = [sum((a - b) ** 2 for a, b in zip(x, p)) for p in prototypes]
    return distances.index(min(distances))


def centroid(x, w, prototypes):
    """``prototypes[c]`` is the list of those of part c."""
    V = len(prototypes[0][0])
    parts = in_groups(x, V)
    codes = [nearest(part, prototypes[c]) for c, part in enumerate(parts)]
    y = []
    for column in columns(w):
        weights = in_groups(column, V)
        y.append(sum(dot(prototypes[c][j], weights[c]) for c, j in enumerate(codes)))
    return y, codes


def bit_serial(x, u, zero, scale, b, g):
    """(y, the tables, index by bit, group and output)."""
    groups = in_groups(x, g)
    tables = [
        [sum(a if m >> j & 1 else -a for j, a in enumerate(group)) for m in range(2**g)]
        for group in groups
    ]
    index = [[[] for _ in groups] for _ in range(b)]
    y = []
    for n, column in enumerate(columns(u)):
        total = 0
        for i in range(b):
            bits = in_groups([value >> i & 1 for value in column], g)
            s = 0
            for r, group in enumerate(bits):
                m = sum(bit << j for j, bit in enumerate(group))
                index[i][r].append(m)
                s += tables[r][m]
            total += 2**i * (s + sum(x)) / 2
        y.append(scale[n] * (total - zero[n] * sum(x)))
    return y, tables, index
