"""Loop perforation over positions, literally: one token at a time.

Python lists and floats; nothing here is shared with minitx.
"""


def ffn_outputs(xs, ffn, stride, fill):
    """What is added to the residual stream of each token. ffn(x): the output for one token."""
    out, last = [], None
    for i, x in enumerate(xs):
        if i % stride == 0:
            last = ffn(x)
            out.append(last)
        elif fill == "copy":
            out.append(last)
        else:
            out.append([0.0 for _ in x])
    return out
