"""The memory layout of a model's large matrices: column-major, all in one block.

One row times a matrix (in, out) is ``out`` dot products with its columns. If the matrix is
column-major, every column is contiguous and the weights are read in one sequential sweep, which is
what memory is fastest at. BLAS's product of a row with a row-major matrix of a few hundred rows and
columns takes 1.5 to 2.7 times as long. All matrices go into one block, in the order in which they
are used, because the system backs a block of many MB with large pages but not its pieces.

Techniques work on row-major matrices, as NumPy makes them. So the layout is changed last, when a
model is loaded (``minitx.load``) or changed (``technique.apply``). No number changes: ``w`` keeps
its shape and entries and gets other strides, which ``fast.matmul`` looks at.

A part declares by ``matrix_layout`` how its matrix ``w`` should be stored: "column-major"
(``Linear``, ``Head``), "row-major" for a part that reads selected rows (some twenty times slower
column-major), or None for a matrix that stays as it is.
"""

from dataclasses import replace

import numpy as np

from minitx import fast
from minitx.tree import Part, rebuild, walk

LINE = 64  # bytes of a cache line
LARGE_PAGE = 2 << 20  # bytes


def to_column_major(root: Part) -> Part:
    """A copy of the tree in which each matrix of more than ``fast.LARGE`` numbers has the layout
    that its part declares: column-major (all in one block) or row-major. The same tree if that is
    already the case."""
    by_row = large_matrices(root, "row-major")
    if not all(w.flags.c_contiguous for w in by_row.values()):
        root = replaced(root, {key: np.ascontiguousarray(w) for key, w in by_row.items()})
    found = large_matrices(root)
    if all(w.flags.f_contiguous for w in found.values()):
        return root
    block = aligned(sum(map(whole_lines, found.values())))
    new, a = {}, 0
    for key, w in found.items():
        columns = block[a : a + w.nbytes].view(w.dtype).reshape(w.shape[::-1])  # (out, in)
        columns[:] = w.T
        new[key] = columns.T
        a += whole_lines(w)
    return replaced(root, new)


def to_row_major(root: Part) -> Part:
    """A copy of the tree in which matrices that are declared column-major are row-major; the same
    tree if they already are."""
    return replaced(root, {k: np.ascontiguousarray(w) for k, w in large_matrices(root).items()})


def large_matrices(root: Part, layout: str = "column-major") -> dict[int, np.ndarray]:
    """The large matrices of parts that declare this layout, by id, in the order of the tree; a
    shared matrix appears once."""
    matrices = (node.w for _, node in walk(root) if node.matrix_layout == layout)
    return {id(w): w for w in matrices if w.size > fast.LARGE}


def replaced(root: Part, new: dict[int, np.ndarray]) -> Part:
    """A copy of the tree with new arrays for the matrices with these ids."""

    def change(node: Part) -> Part | None:
        if node.matrix_layout is None or new.get(id(node.w), node.w) is node.w:
            return None
        return replace(node, w=new[id(node.w)])

    return rebuild(root, change)


def aligned(size: int) -> np.ndarray:
    """``size`` bytes (uint8) that start at a large-page boundary."""
    block = np.empty(size + LARGE_PAGE, np.uint8)  # pages that are never written take no memory
    a = -block.__array_interface__["data"][0] % LARGE_PAGE
    return block[a : a + size]


def whole_lines(w) -> int:
    """The size of an array in bytes, rounded up to whole cache lines."""
    return -(-w.nbytes // LINE) * LINE
