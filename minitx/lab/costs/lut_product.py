"""``minitx cost lut-product``: reads, additions, multiplications and bytes with one table of all
short dot products."""

from typing import Annotated

from minitx.lab.lookup_work import LookupCost, Work, over_blocks, packed_bytes
from minitx.lab.shape import Shape
from minitx.precompute.lut_product import groups, largest_entry, table_bytes
from minitx.technique import between


def lut_product(inputs: int, outputs: int, weight_bits: int, length: int) -> Work:
    """One matrix, without the table, which all matrices share."""
    reads = groups(inputs, length) * outputs
    return Work(
        multiplications=inputs + 2 * outputs,  # quantize each input; two scales per output
        additions=reads,
        reads=reads,
        weight_bytes=packed_bytes(reads * weight_bits * length),
    )


def cost(
    shape: Shape,
    *,
    input_bits: Annotated[int, "bits of an input", between(2, 8)] = 4,
    weight_bits: Annotated[int, "bits of a weight", between(2, 8)] = 4,
    length: Annotated[int, "integers packed into one code", between(1, 16)] = 2,
) -> LookupCost:
    work = over_blocks(shape, lambda i, o: lut_product(i, o, weight_bits, length))
    size = table_bytes(input_bits, weight_bits, length)
    largest = largest_entry(input_bits, weight_bits, length)
    return LookupCost(
        "lut_product",
        shape,
        dict(input_bits=input_bits, weight_bits=weight_bits, length=length),
        work + Work(table_bytes=size),
        (
            f"the table's entries reach {largest:,}, so it takes {size:,} bytes",
            "additions are of integers",
        ),
    )
