"""``minitx cost lut``: reads, additions, multiplications and bytes of each kind of table lookup.

For one token and all matrices of the blocks, not the head. Multiplications by scales count, and
rounding the inputs as one multiplication each; what is added up while prototypes are compared, and
the making of codes by shifting bits, do not. Bytes are of packed codes; NumPy keeps a code in one,
two or four bytes.
"""

from dataclasses import asdict, dataclass

from minitx.lab.block_matrices import block_matrices, notes
from minitx.lab.evaluate import table
from minitx.lab.shape import Shape
from minitx.precompute.lut.product_table import folded_bytes, groups, largest_entry, table_bytes


@dataclass(frozen=True)
class Work:
    """What one kind takes for one token."""

    multiplications: int
    additions: int
    reads: int
    table_bytes: int  # that stay in memory
    weight_bytes: int  # weights, or codes that stand for them
    made: int = 0  # table entries that are made for each token

    def __add__(self, other: "Work") -> "Work":
        pairs = zip(asdict(self).values(), asdict(other).values())
        return Work(*(a + b for a, b in pairs))

    def __mul__(self, times: int) -> "Work":
        return Work(*(times * a for a in asdict(self).values()))


def dense(D: int, N: int) -> Work:
    """A product with a matrix (D, N) of float32."""
    return Work(D * N, D * N, 0, 0, 4 * D * N)


def product(D: int, N: int, ba: int, bw: int, d: int) -> Work:
    """Without the table, which all matrices share: see ``shared_table``."""
    reads = groups(D, d) * N
    return Work(D + 2 * N, reads, reads, 0, packed(reads * bw * d))


def shared_table(ba: int, bw: int, d: int, entry: int | None = None) -> int:
    """Bytes of the one table, with entries of ``entry`` bytes, or as many as they need (None)."""
    return table_bytes(ba, bw, d) if entry is None else entry << d * (ba + bw)


def folded(D: int, N: int, ba: int, d: int, entry: int) -> Work:
    reads = groups(D, d) * N
    return Work(D + N, reads, reads, folded_bytes(D, N, ba, d, entry), 0)


def centroid(D: int, N: int, Kc: int, V: int, entry: int) -> Work:
    """Prototypes are kept in float32."""
    reads = groups(D, V) * N
    tables = groups(D, V) * Kc * (N * entry + 4 * V)
    return Work(groups(D, V) * V * Kc, reads, reads, tables, 0)


def bit_serial(D: int, N: int, bits: int, g: int, half: bool) -> Work:
    R = groups(D, g)
    reads, made = bits * R * N, R << g - half
    return Work(2 * N, reads + made, reads, 0, packed(reads * g), made)


def packed(bits: int) -> int:
    return -(-bits // 8)


@dataclass(frozen=True)
class LutCost:
    """Every kind, for one model."""

    shape: Shape
    options: dict
    kinds: dict[str, Work]
    shared: int  # bytes of the table of ``product``

    def notes(self) -> list[str]:
        o = self.options
        most = largest_entry(o["ba"], o["bw"], o["d"])
        return [
            *notes(self.shape),
            f"the entries of product's table reach {most:,}, so it takes {self.shared:,} bytes",
            "product's additions are of whole numbers, the others' of floating point numbers",
            "bit-serial makes its tables anew for each token; they take no memory in between",
        ]

    def as_dict(self) -> dict:
        kinds = {name: asdict(work) for name, work in self.kinds.items()}
        found = {"technique": "lut", "shape": asdict(self.shape), "options": self.options}
        return found | {"kinds": kinds, "shared_table": self.shared, "notes": self.notes()}

    def __str__(self) -> str:
        rows = [["one token", "multiplications", "additions", "reads", "tables", "weights, codes"]]
        for name, w in self.kinds.items():
            numbers = w.multiplications, w.additions, w.reads, w.table_bytes, w.weight_bytes
            rows.append([name, *(f"{n:,}" for n in numbers)])
        return "\n".join([*self.shape.heading(self.notes()), table(rows)])


def cost(
    shape: Shape,
    *,
    ba: int = 4,
    bw: int = 4,
    d: int = 2,
    Kc: int = 16,
    V: int = 32,
    g: int = 4,
    half: bool = True,
    entry: int = 1,
) -> LutCost:
    """entry: bytes of an entry of folded and centroid tables (minitx keeps 4)."""
    from minitx.precompute.lut import check  # the ranges of the technique

    check(ba=(ba, 2, 8), bw=(bw, 2, 8), d=(d, 1, 16), Kc=(Kc, 1, 65536), V=(V, 1, 4096))
    check(g=(g, 1, 8), entry=(entry, 1, 8))
    shared = shared_table(ba, bw, d)

    def summed(kind, *options) -> Work:
        found = Work(0, 0, 0, 0, 0)
        for m in block_matrices(shape):
            found += kind(m.inputs, m.outputs, *options) * m.count
        return found

    kinds = {
        "dense": summed(dense),
        "product": summed(product, ba, bw, d) + Work(0, 0, 0, shared, 0),
        "folded": summed(folded, ba, d, entry),
        "centroid": summed(centroid, Kc, V, entry),
        "bit-serial": summed(bit_serial, bw, g, half),
    }
    options = dict(ba=ba, bw=bw, d=d, Kc=Kc, V=V, g=g, half=half, entry=entry)
    return LutCost(shape, options, kinds, shared)
