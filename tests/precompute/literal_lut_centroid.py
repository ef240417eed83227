"""lut_centroid, literally: one token, Python lists, one loop per sum.

Nothing in it is shared with minitx. A matrix w is a list of rows, one for each input;
``centroids[c]`` is the list of the centroids of segment c.
"""


def segments_of(x, length):
    """Lists of ``length``, the last padded with 0."""
    padded = x + [0] * (-len(x) % length)
    return [padded[i : i + length] for i in range(0, len(padded), length)]


def nearest(segment, centroids):
    """The index of the nearest centroid; ties go to the lower index."""
    distances = [sum((a - b) ** 2 for a, b in zip(segment, m)) for m in centroids]
    return distances.index(min(distances))


def lut_centroid(x, w, centroids):
    """(y, code of each segment)."""
    length = len(centroids[0][0])
    columns = [segments_of(list(column), length) for column in zip(*w)]
    # offline: table[c][j][o] = centroid j of segment c times that segment's weights of output o
    table = [
        [[sum(a * b for a, b in zip(centroid, column[c])) for column in columns] for centroid in of]
        for c, of in enumerate(centroids)
    ]
    # online: find the nearest centroids, add up their rows
    codes = [nearest(segment, centroids[c]) for c, segment in enumerate(segments_of(x, length))]
    y = [0.0] * len(columns)
    for c, code in enumerate(codes):
        for o in range(len(y)):
            y[o] += table[c][code][o]
    return y, codes
