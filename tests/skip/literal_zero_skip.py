"""Zero skipping, literally: one token, one neuron and one output at a time.

Python lists and floats; nothing here is shared with minitx.
"""


def down(h, w, b):
    """y = h w + b for one token h (F,), w [neuron][output]; also how many rows of w were read."""
    y, read = list(b), 0
    for neuron, value in enumerate(h):
        if value == 0:
            continue
        read += 1
        for i, weight in enumerate(w[neuron]):
            y[i] += value * weight
    return y, read
