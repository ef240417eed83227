"""Exercise 11: Lookup tables (35 minutes)

Exercise 10 quantized the weights to small integers. If the inputs are integers as well, there are
few different products, and few different dot products of short vectors: compute them all once, and
look them up. That is what LUTIN does, and one table serves all matrices of a model.

Integers of b bits go from -2^(b-1) to 2^(b-1) - 1: with 3 bits from -4 to 3. d of them are packed
into one code. First each integer becomes a digit that is not negative, then the bits of the digits
are concatenated, the first integer in the lowest bits:

    digit_j = v_j + 2^(b-1)                              from 0 to 2^b - 1
    code    = digit_0 + digit_1 * 2^b + ... + digit_(d-1) * 2^(b (d-1))

A vector of n integers is cut into groups of d; if d does not divide n, the last group is filled up
with the integer 0, which adds nothing to a dot product. (Not with the digit 0: that is -2^(b-1).)

    pack(v, b, d) -> codes             v (n,) integers, codes (n / d rounded up,) integers

Inputs have ba bits and weights bw bits. The table holds the dot product of the d integers of each
input code with the d integers of each weight code:

    make_table(ba, bw, d) -> table     (2^(ba d), 2^(bw d)) integers: table[input code, weight code]

A dot product of long vectors is then a sum of table entries, one for each pair of codes. For a
matrix with F outputs, column o of w_codes holds the codes of output o:

    dot(x_codes, w_codes, table) -> y  x_codes (groups,), w_codes (groups, F), y (F,)
    y[o] = sum over groups g of  table[x_codes[g], w_codes[g, o]]

A table of small entries may be stored in np.int8, to fit into the processor's cache. The sum may
not fit into np.int8, so it needs a wider dtype.

By hand, with ba = 3, bw = 2, d = 2: the inputs (3, -1, 1) have the digits 7, 3 and 5, and a 0 with
the digit 4 fills up the second group, so the codes are 7 + 3 * 8 = 31 and 5 + 4 * 8 = 37.

    >>> x_codes = pack(np.array([3, -1, 1]), 3, 2)
    >>> x_codes.tolist()
    [31, 37]

The weights (0, 1, 0) of one output have the digits 2, 3, 2 and 2, and the codes 2 + 3 * 4 = 14 and
2 + 2 * 4 = 10. The entry for the codes 31 and 14 is 3 * 0 - 1 * 1 = -1, that for 37 and 10 is 0.

    >>> w_codes = pack(np.array([0, 1, 0]), 2, 2)[:, None]      # (groups, 1): one output
    >>> table = make_table(3, 2, 2)
    >>> table.shape, int(table[31, 14]), int(table[37, 10])
    ((64, 16), -1, 0)
    >>> dot(x_codes, w_codes, table).tolist()
    [-1]

Source: Lin et al., "LUTIN", ISLPED 2024. (Of the paper we know the abstract and a reader's notes;
in which order integers are packed is ours.)
"""

from types import SimpleNamespace

import numpy as np

from minitx.learn.exercise import Exercise, Mistake
from minitx.precompute.lut_product import dequantize, quantize_inputs, quantize_weights
from minitx.shared.table_lookup import (
    as_rows,
    constant_matrices,
    count_reads,
    replace_matrices,
    weight_and_bias,
)
from minitx.tree import Part, part


# solution
def pack(v, b, d):
    """v (n,) integers of b bits -> codes (n / d rounded up,)"""
    v = np.pad(v, (0, -len(v) % d))  # with the integer 0
    digits = v.reshape(-1, d) + 2 ** (b - 1)  # (groups, d)
    return digits @ 2 ** (b * np.arange(d))


def make_table(ba, bw, d):
    """Bits of an input, bits of a weight, integers per code -> (2^(ba d), 2^(bw d)) integers"""

    def integers(b):  # of each code, (2^(b d), d)
        codes = np.arange(2 ** (b * d))[:, None]
        digits = codes // 2 ** (b * np.arange(d)) % 2**b
        return digits - 2 ** (b - 1)

    return integers(ba) @ integers(bw).T


def dot(x_codes, w_codes, table):
    """x_codes (groups,), w_codes (groups, F), table -> (F,)"""
    entries = table[x_codes[:, None], w_codes]  # (groups, F)
    return entries.sum(axis=0, dtype=int)


# end of solution


def pack_in_loops(v, b, d):
    """Integer by integer."""
    v = list(v)
    while len(v) % d:
        v.append(0)
    codes = []
    for g in range(0, len(v), d):
        codes.append(sum((int(v[g + j]) + 2 ** (b - 1)) * 2 ** (b * j) for j in range(d)))
    return np.array(codes)


def make_table_in_loops(ba, bw, d):
    """Pair of codes by pair of codes."""

    def integers(code, b):
        return [(code >> b * j) % 2**b - 2 ** (b - 1) for j in range(d)]

    table = np.zeros((2 ** (ba * d), 2 ** (bw * d)), int)
    for i in range(len(table)):
        for j in range(len(table[0])):
            table[i, j] = sum(a * w for a, w in zip(integers(i, ba), integers(j, bw)))
    return table


def dot_in_loops(x_codes, w_codes, table):
    """Entry by entry."""
    groups, F = w_codes.shape
    y = np.zeros(F, int)
    for o in range(F):
        for g in range(groups):
            y[o] += int(table[x_codes[g], w_codes[g, o]])
    return y


in_loops = SimpleNamespace(pack=pack_in_loops, make_table=make_table_in_loops, dot=dot_in_loops)


def flawed_pack(v, b, d, *, offset=True, padding="integer", first="low", twos=False):
    filler = -(2 ** (b - 1)) if padding == "digit" else 0
    v = np.pad(v, (0, -len(v) % d), constant_values=filler).reshape(-1, d)
    if first == "high":
        v = v[:, ::-1]
    if twos:
        digits = v % 2**b
    else:
        digits = v + 2 ** (b - 1) if offset else v
    return digits @ 2 ** (b * np.arange(d))


def flawed_table(ba, bw, d, *, signed=True, twos=False, shape="inputs first"):
    def integers(b):
        digits = np.arange(2 ** (b * d))[:, None] // 2 ** (b * np.arange(d)) % 2**b
        if twos:
            return np.where(digits < 2 ** (b - 1), digits, digits - 2**b)
        return digits - 2 ** (b - 1) if signed else digits

    table = integers(ba) @ integers(bw).T
    return table if shape == "inputs first" else table.T


def flawed_dot(x_codes, w_codes, table, *, wide=True, read="inputs first"):
    i, j = x_codes[:, None], w_codes
    entries = table[i, j] if read == "inputs first" else table[j, i]
    return entries.sum(axis=0, dtype=int if wide else table.dtype)


MISTAKES = (
    Mistake(
        "pack leaves integers negative, so they overwrite the bits of their neighbours: add "
        "2^(b-1) to each first.",
        offset=False,
    ),
    Mistake(
        "The last group is filled up with the digit 0, and that is the integer -2^(b-1). Fill up "
        "with the integer 0 before you make digits.",
        padding="digit",
    ),
    Mistake(
        "The digits are in the opposite order: the first integer of a group is in the lowest bits.",
        first="high",
    ),
    Mistake(
        "Your digits are those of two's complement (the integer modulo 2^b); here a digit is the "
        "integer plus 2^(b-1).",
        twos=True,
    ),
    Mistake(
        "make_table multiplies digits as if they were the integers: subtract 2^(b-1) from each "
        "digit first.",
        signed=False,
    ),
    Mistake(
        "The table is transposed: its rows are the input codes, its columns the weight codes.",
        shape="weights first",
    ),
    Mistake(
        "dot reads table[weight code, input code]; it is table[input code, weight code].",
        read="weights first",
    ),
    Mistake(
        "The sum overflows: it is added up in the dtype of the table, np.int8. Add up in a wider "
        "one, such as int.",
        wide=False,
    ),
)


def observe(answer, x, ba, bw, d, x_codes, w_codes, table):
    """Each function by itself: dot reads a table and codes that are right."""
    return {
        "codes": answer.pack(x, ba, d),
        "table": answer.make_table(ba, bw, d),
        "dot": answer.dot(x_codes, w_codes, table),
    }


def cases(rng):
    """With a last group that is full, and not; sums that do not fit into np.int8."""
    for ba, bw, d, n, F in ((3, 2, 2, 5, 3), (2, 2, 3, 7, 2), (4, 3, 1, 20, 3)):
        x = rng.integers(-(2 ** (ba - 1)), 2 ** (ba - 1), n)
        w = rng.integers(-(2 ** (bw - 1)), 2 ** (bw - 1), (n, F))
        if d == 1:  # only large ones, of one sign
            x, w = abs(x) // 2 + 4, abs(w) // 2 + 2
            x, w = np.minimum(x, 7), np.minimum(w, 3)
        w_codes = np.stack([pack(column, bw, d) for column in w.T], axis=1)
        table = make_table(ba, bw, d).astype(np.int8)
        yield x, ba, bw, d, pack(x, ba, d), w_codes, table


# In the model ------------------------------------------------------------------------------------

BITS, LENGTH = 4, 2  # of both inputs and weights


@part
class StudentTable(Part):
    """x @ w + b from integers of 4 bits, packed and added up by the student's functions."""

    table: np.ndarray
    codes: np.ndarray  # (groups, out) of the weights
    scale: np.ndarray  # (out,)
    b: np.ndarray | None
    answer: object

    def __call__(self, x):
        rows = as_rows(x, x.shape[-1])
        xi, xs = quantize_inputs(rows, BITS)  # (n, in) integers, a scale for each row
        acc = np.array([self.sums(row.astype(int)) for row in xi])  # (n, out)
        reads = len(rows) * self.codes.size
        count_reads(rows.size + 2 * acc.size, reads, self.codes.nbytes)
        return dequantize(acc, xs, self.scale, self.b, slice(None), x)

    def sums(self, integers):
        x_codes = np.asarray(self.answer.pack(integers, BITS, LENGTH))
        return self.answer.dot(x_codes, self.codes.astype(int), self.table)


def into_model(lm, answer):
    """All matrices of the last block by table, as the library does it."""
    table = np.asarray(answer.make_table(BITS, BITS, LENGTH)).astype(np.int16)

    def make(node):
        w, b = weight_and_bias(node)
        wi, ws = quantize_weights(w, BITS)
        codes = [answer.pack(column.astype(int), BITS, LENGTH) for column in wi.T]
        codes = np.stack(codes, axis=1).astype(np.uint8)  # two integers of 4 bits: a byte
        return StudentTable(table, codes, ws.astype(w.dtype), b, answer)

    return replace_matrices(lm, constant_matrices("exercise 11", lm, 1, False), make)


EXERCISE = Exercise(
    title="Lookup tables",
    minutes=35,
    difficulty="hard",
    names=("pack", "make_table", "dot"),
    cases=lambda rng: list(cases(rng)),
    observe=observe,
    flawed={"pack": flawed_pack, "make_table": flawed_table, "dot": flawed_dot},
    mistakes=MISTAKES,
    hints=(
        "make_table needs the way back from a code to its integers. All codes are 0, 1, 2, ...; "
        "code // 2^(b j) moves digit j to the lowest bits, and % 2^b cuts off what is above it. "
        "If both sides have their integers as rows, the table is a matrix product.",
        "pack: np.pad(v, (0, -len(v) % d)) fills up, reshape(-1, d) makes groups, add 2 ** (b - 1),"
        " multiply by 2 ** (b * np.arange(d)) and sum. dot: table[x_codes[:, None], w_codes] is "
        "(groups, F), a read for each; its sum over the groups needs dtype=int.",
    ),
    library="minitx/precompute/lut_product/__init__.py: ProductTable",
    into_model=into_model,
    same_as={"lut_product": {"input_bits": 4, "weight_bits": 4, "length": 2, "layers": 1}},
    saves=(
        "Multiply-adds, in the last of 8 blocks: half as many reads and additions take their "
        "place. On hardware where a read from the cache is cheap, that pays; in NumPy it is slower."
    ),
)
