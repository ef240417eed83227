"""Exercise 10: Quantization (25 minutes)

A weight is a float of 32 bits, and every weight is read from memory for every token. Store small
integers instead, the codes, and for a group of weights one float that they share, the scale:

    weight  is about  code * scale

With b bits, codes go from -q to q, where q = 2^(b - 1) - 1: from -127 to 127 with 8 bits, from -7
to 7 with 4. The scale is as small as it can be so that the weight of the largest absolute value in
the group still gets a code, q or -q:

    scale = (largest absolute value in the group) / q
    code  = weight / scale, rounded to the nearest integer (np.rint)

If all weights of a group are 0, the scale would be 0, and 0 / 0 is NaN. Such a group gets the scale
1.

W is stored (inputs, outputs). For each output, each run of `group` consecutive inputs is a group:
so W[0 : group, 0] is a group, W[group : 2 * group, 0] the next one. `group` divides the inputs.

    quantize(W, bits, group) -> codes, scales

    W      (inputs, outputs)           floats; bits is the b from above
    codes  (inputs, outputs)           integers, in an integer dtype: np.int8 for at most 8 bits
    scales (inputs / group, outputs)   floats

The way back also serves codes that do not lie around 0. Then a third array says for each group
which code stands for the weight 0, the zero point:

    weight = (code - zero point) * scale

    dequantize(codes, scales, zero_points) -> W

    codes        (inputs, outputs)           np.int8
    scales       (inputs / group, outputs)   the size of a group follows from the shapes
    zero_points  (inputs / group, outputs)   np.int8; all 0 for codes from your quantize
    W            (inputs, outputs)           floats

Codes and zero points use all of np.int8, from -128 to 127, and so a difference of two may not fit
into np.int8: 100 - (-100) is 200, which NumPy silently turns into -56.

By hand, four inputs, one output, 4 bits (q = 7), groups of two: the largest in the first group is
1.4, so its scale is 0.2, and 0.6 / 0.2 = 3. In the second group the scale is 0.1, and 0.32 / 0.1 =
3.2 is rounded to 3. On the way back, 0.32 has become 0.3.

    >>> W = np.array([[0.6], [-1.4], [0.7], [0.32]])
    >>> codes, scales = quantize(W, 4, 2)
    >>> codes.tolist(), scales.round(3).tolist()
    ([[3], [-7], [7], [3]], [[0.2], [0.1]])
    >>> dequantize(codes, scales, np.zeros((2, 1), np.int8)).round(2).tolist()
    [[0.6], [-1.4], [0.7], [0.3]]

With a zero point of 5, the codes 5 and 15 are 0 and 10 scales away from the weight 0:

    >>> codes, zero_points = np.array([[5], [15]], np.int8), np.array([[5]], np.int8)
    >>> dequantize(codes, np.array([[0.1]]), zero_points).round(2).tolist()
    [[0.0], [1.0]]

Source: round-to-nearest with groups is common practice; these are the groups of "Q8_0" in llama2.c
(Karpathy, 2023).
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from minitx.learn.exercise import Exercise, Mistake
from minitx.learn.outcomes import unpack
from minitx.model import Linear
from minitx.technique import swap
from minitx.tree import walk


# solution
def quantize(W, bits, group):
    """W (inputs, outputs) -> codes (inputs, outputs), scales (inputs / group, outputs)"""
    q = 2 ** (bits - 1) - 1
    groups = W.reshape(-1, group, W.shape[1])  # (inputs / group, group, outputs)
    scales = abs(groups).max(axis=1) / q
    scales[scales == 0] = 1
    codes = np.rint(groups / scales[:, None])
    return codes.reshape(W.shape).astype(np.int8), scales


def dequantize(codes, scales, zero_points):
    """codes (inputs, outputs), scales and zero_points (inputs / group, outputs) -> W"""
    group = len(codes) // len(scales)
    differences = codes.astype(int) - np.repeat(zero_points, group, axis=0)
    return differences * np.repeat(scales, group, axis=0)


# end of solution


def quantize_in_loops(W, bits, group):
    """Group by group, weight by weight."""
    inputs, outputs = W.shape
    codes, scales = np.zeros((inputs, outputs), int), np.zeros((inputs // group, outputs))
    for o in range(outputs):
        for i in range(inputs // group):
            members = range(i * group, (i + 1) * group)
            largest = max(abs(W[j, o]) for j in members)
            scales[i, o] = largest / (2 ** (bits - 1) - 1) if largest > 0 else 1
            for j in members:
                codes[j, o] = round(W[j, o] / scales[i, o])
    return codes, scales


def dequantize_in_loops(codes, scales, zero_points):
    """Weight by weight."""
    (inputs, outputs), group = codes.shape, len(codes) // len(scales)
    W = np.zeros((inputs, outputs))
    for j in range(inputs):
        for o in range(outputs):
            i = j // group
            W[j, o] = (int(codes[j, o]) - int(zero_points[i, o])) * scales[i, o]
    return W


in_loops = SimpleNamespace(quantize=quantize_in_loops, dequantize=dequantize_in_loops)


def flawed_quantize(
    W,
    bits,
    group,
    *,
    absolute=True,
    levels="2^(b-1) - 1",
    rounding="rint",
    along="inputs",
    zero_group="1",
    integers=True,
):
    q = {"2^(b-1) - 1": 2 ** (bits - 1) - 1, "2^(b-1)": 2 ** (bits - 1), "2^b - 1": 2**bits - 1}
    rows = W.T if along == "outputs" else W
    groups = rows.reshape(-1, group, rows.shape[1])
    scales = (abs(groups) if absolute else groups).max(axis=1) / q[levels]
    if zero_group == "1":
        scales[scales == 0] = 1
    codes = (groups / scales[:, None]).reshape(rows.shape)
    if along == "outputs":
        codes, scales = codes.T, scales.T
    if rounding != "none":
        codes = getattr(np, rounding)(codes)
        codes = codes.astype(np.int8) if integers else codes
    return codes, scales


def flawed_dequantize(codes, scales, zero_points, *, zero="before", spread="repeat", wide=True):
    group = len(codes) // len(scales)
    if spread == "repeat":
        scales, zero_points = (np.repeat(x, group, axis=0) for x in (scales, zero_points))
    else:
        scales, zero_points = (np.tile(x, (group, 1)) for x in (scales, zero_points))
    if wide:
        codes, zero_points = codes.astype(int), zero_points.astype(int)
    return {
        "before": lambda: (codes - zero_points) * scales,
        "after": lambda: codes * scales - zero_points,
        "ignored": lambda: codes * scales,
    }[zero]()


MISTAKES = (
    Mistake(
        "The scale comes from the largest weight of the group; take the largest absolute value, "
        "for it may be a negative weight.",
        absolute=False,
    ),
    Mistake(
        "The largest code is 2^(b-1), one too many: q = 2^(b-1) - 1, which is 7 for 4 bits.",
        levels="2^(b-1)",
    ),
    Mistake(
        "The largest code is 2^b - 1, as if no code were negative: q = 2^(b-1) - 1, which is 7 for "
        "4 bits.",
        levels="2^b - 1",
    ),
    Mistake(
        "The codes are cut off toward 0 (astype(int) does that); round to the nearest with np.rint "
        "first.",
        rounding="trunc",
    ),
    Mistake("The codes are rounded down; round to the nearest with np.rint.", rounding="floor"),
    Mistake("The codes are not rounded: they are to be integers.", rounding="none"),
    Mistake(
        "The codes are still floats, and floats save no memory: end with .astype(np.int8).",
        integers=False,
    ),
    Mistake(
        "Your groups lie along the outputs. A group is a run of inputs, down a column of W, for "
        "one output.",
        along="outputs",
    ),
    Mistake(
        "A group of zeros gets the scale 0, and 0 / 0 is NaN: give it the scale 1.", zero_group="0"
    ),
    Mistake(
        "dequantize subtracts the zero point after scaling; it is a code, so subtract it before.",
        zero="after",
    ),
    Mistake(
        "dequantize ignores the zero points: subtract them from the codes first.", zero="ignored"
    ),
    Mistake(
        "dequantize gives neighbouring inputs different scales, in turns (np.tile); a group is "
        "neighbours, so repeat each scale (np.repeat).",
        spread="tile",
    ),
    Mistake(
        "Code minus zero point overflows in np.int8: make them wider integers or floats first.",
        wide=False,
    ),
)


def observe(answer, W, bits, group, codes, scales, zero_points):
    """Both functions, each by itself. The codes of a group whose scale is 0 are not looked at:
    which integer NaN becomes depends on the machine."""
    returned = unpack(answer.quantize(W, bits, group), "quantize", "codes", "scales")
    my_codes, my_scales = map(np.asarray, returned)
    integers = my_codes.dtype.kind in "iu"
    if my_codes.shape == W.shape and my_scales.shape == (len(W) // group, W.shape[1]):
        my_codes = np.where(np.repeat(my_scales, group, axis=0) == 0, 0, my_codes)
    return {
        "codes": my_codes,
        "codes are integers": integers,
        "scales": my_scales,
        "dequantized": answer.dequantize(codes, scales, zero_points),
    }


def cases(rng):
    """4, 3 and 5 bits; groups with a largest weight of either sign, and a group of zeros."""
    for bits, n, group, outputs in ((4, 2, 2, 4), (3, 3, 2, 2), (5, 2, 3, 6)):
        W = weights(rng, bits, n, group, outputs)
        codes = rng.integers(-128, 128, W.shape).astype(np.int8)
        scales = rng.uniform(0.1, 2, (n, outputs))
        zero_points = rng.integers(-128, 128, scales.shape).astype(np.int8)
        yield W, bits, group, codes, scales, zero_points


def weights(rng, bits, n, group, outputs):
    """(n * group, outputs). Scales are powers of 2, so that division is exact, and no weight lies
    in the middle between two codes: whoever rounds and divides otherwise gets the same codes."""
    q = 2 ** (bits - 1) - 1
    W = rng.integers(1 - q, q, (n, group, outputs)) + rng.uniform(-0.4, 0.4, (n, group, outputs))
    W[:, 0] = rng.choice([-q, q], (n, outputs))  # the largest absolute value of its group
    W[:, 1] = q / 2 + 0.2  # so that the largest of all is not far below
    W = rng.permuted(W, axis=1) * 2.0 ** rng.integers(-3, 3, (n, 1, outputs))
    W[0, :, 0] = 0
    return W.reshape(n * group, outputs)


# In the model ------------------------------------------------------------------------------------


def restored(answer, w, bits, group=32):
    """A matrix quantized and dequantized by the student's functions: float64."""
    codes, scales = answer.quantize(w.astype(np.float64), bits, group)
    codes = np.asarray(codes, np.int8)
    return answer.dequantize(codes, scales, np.zeros(np.shape(scales), np.int8))


def into_model(lm, answer):
    """Every matrix of the blocks as what is left of it after 8 bits."""
    return swap(lm, Linear, lambda m: replace(m, w=restored(answer, m.w, 8).astype(np.float32)))


def show(answer):
    """The error of a matrix with fewer and fewer bits."""
    import minitx

    model = minitx.load("stories").model
    w = model.stack.blocks[0].attn.qkv.v.w
    count = sum(node.w.size for _, node in walk(model) if type(node) is Linear)
    lines = [
        f"All matrices of the blocks, {count:,} weights in groups of 32, and what your functions "
        "make of one of them:",
        f"  float32  {4 * count:9,} bytes",
    ]
    for bits in (8, 4, 3, 2):
        size = count * bits // 8 + count // 32 * 4
        error = np.sqrt(((restored(answer, w, bits) - w) ** 2).mean() / (w**2).mean())
        lines.append(f"  {bits} bits   {size:9,} bytes  relative error {error:5.1%}")
    return "\n".join(lines)


EXERCISE = Exercise(
    title="Quantization",
    minutes=25,
    difficulty="medium",
    names=("quantize", "dequantize"),
    cases=lambda rng: list(cases(rng)),
    observe=observe,
    flawed={"quantize": flawed_quantize, "dequantize": flawed_dequantize},
    mistakes=MISTAKES,
    hints=(
        "W.reshape(-1, group, outputs) has the groups side by side: (groups, group, outputs). The "
        "scales are a maximum over the axis in the middle. For the way back, np.repeat gives each "
        "input the scale of its group.",
        "scales = abs(groups).max(axis=1) / q, then 1 where that is 0; codes = np.rint(groups / "
        "scales[:, None]), reshaped to the shape of W, as np.int8. dequantize: make the codes "
        "wider with astype(int), subtract np.repeat(zero_points, group, axis=0), multiply by the "
        "scales repeated in the same way.",
    ),
    library="minitx/precompute/quantize/__init__.py: quantize_groups_symmetric",
    into_model=into_model,
    same_as={"quantize": {"bits": 8, "group_size": 32, "run": "load"}},
    show=show,
    saves=(
        "It saves memory and memory reads: 8 bits take about a quarter of them. It saves no "
        "multiply-adds, unless codes are multiplied with codes; exercise 11 does that by table."
    ),
)
