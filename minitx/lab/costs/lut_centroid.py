"""``minitx cost lut-centroid``: reads, additions, multiplications and bytes with inputs replaced by
centroids."""

from typing import Annotated

from minitx.lab.lookup_work import LookupCost, Work, over_blocks
from minitx.lab.shape import Shape
from minitx.technique import between


def lut_centroid(inputs: int, outputs: int, centroids: int, length: int, entry: int) -> Work:
    """One matrix; its centroids are float32, its table entries take ``entry`` bytes."""
    segments = -(-inputs // length)
    return Work(
        multiplications=segments * length * centroids,  # distances to all centroids
        additions=segments * outputs,
        reads=segments * outputs,
        table_bytes=segments * centroids * (outputs * entry + 4 * length),
    )


def cost(
    shape: Shape,
    *,
    centroids: Annotated[int, "centroids of each input segment", between(1, 65536)] = 16,
    length: Annotated[int, "numbers in an input segment", between(1, 4096)] = 32,
    entry: Annotated[int, "bytes of a table entry; minitx keeps 4", between(1, 8)] = 1,
) -> LookupCost:
    """The defaults are LUT-NN's for BERT."""
    return LookupCost(
        "lut_centroid",
        shape,
        dict(centroids=centroids, length=length, entry=entry),
        over_blocks(shape, lambda i, o: lut_centroid(i, o, centroids, length, entry)),
        ("q, k and v share their centroids, as do gate and up; here each matrix counts its own",),
    )
