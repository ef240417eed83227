"""``minitx cost lut-bit-serial``: reads, additions, multiplications and bytes with tables of signed
sums, indexed by the weights' bits."""

from typing import Annotated

from minitx.lab.lookup_work import LookupCost, Work, over_blocks, packed_bytes
from minitx.lab.shape import Shape
from minitx.technique import between


def lut_bit_serial(inputs: int, outputs: int, bits: int, group: int) -> Work:
    """One matrix. Half of each table is computed, one addition an entry; the other half is its
    negative."""
    groups = -(-inputs // group)
    reads, computed = bits * groups * outputs, groups << group - 1
    return Work(
        multiplications=2 * outputs,  # a scale and a zero point per output
        additions=reads + computed,
        reads=reads,
        weight_bytes=packed_bytes(reads * group),
        computed=computed,
    )


def cost(
    shape: Shape,
    *,
    bits: Annotated[int, "bits of a weight", between(1, 8)] = 4,
    group: Annotated[int, "inputs that share a table", between(1, 8)] = 4,
) -> LookupCost:
    work = over_blocks(shape, lambda i, o: lut_bit_serial(i, o, bits, group))
    return LookupCost(
        "lut_bit_serial",
        shape,
        dict(bits=bits, group=group),
        work,
        (
            f"{work.computed:,} table entries are computed for each token; they take no memory in "
            "between",
        ),
    )
