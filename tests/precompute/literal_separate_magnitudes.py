"""separate_magnitudes, literally: one output's weights, Python lists.

Nothing in it is shared with minitx.
"""


def separate(column, bits, share):
    """(codes, scale, {row: large weight}) of the weights of one output."""
    k = max(round(share * len(column)), 1 if share else 0)
    by_size = sorted(range(len(column)), key=lambda row: -abs(column[row]))  # ties: the lower row
    large = {row: column[row] for row in by_size[:k]}
    rest = [0.0 if row in large else w for row, w in enumerate(column)]
    scale = max(abs(w) for w in rest) / (2 ** (bits - 1) - 1) or 1.0
    return [round(w / scale) for w in rest], scale, large


def weights(column, bits, share):
    """The weights of one output as they are multiplied."""
    codes, scale, large = separate(column, bits, share)
    return [large[row] if row in large else code * scale for row, code in enumerate(codes)]
