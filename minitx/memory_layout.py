"""Where the large matrices of a model lie in memory: by columns, all of them in one block.

One row times a matrix (in, out) is ``out`` dot products with its columns. Where each column lies in
one piece, and the next one behind it, the weights are read from end to end, which is what memory is
good at: for matrices of a few hundred rows and columns that lie by rows, BLAS takes 1.5 to 2.7
times as long. All of them go into one block in the order in which they are used, since the system
gives large pages to a block of many MB and none to its pieces.

Techniques change matrices that lie as they are written, by rows. So placing them is the last step
when a model is loaded (``minitx.load``) or changed (``technique.apply``). It changes no number:
``w`` has the same shape and entries and other strides. ``ops.linear`` looks at these.

A part says by ``layout`` how its matrix ``w`` is best read: "columns" (``Linear``, ``Head``),
"rows" for one that reads a selection of its rows (which by columns takes some twenty times as
long), or None for a matrix that stays as it is.
"""

from dataclasses import replace

import numpy as np

from minitx import fast
from minitx.tree import Part, rebuild, walk

LINE = 64  # bytes of a cache line
LARGE_PAGE = 2 << 20  # bytes


def to_column_major(root: Part) -> Part:
    """A copy of the tree in which each matrix of more than ``fast.LARGE`` numbers is stored as its
    part reads it: column-major, all of them in one block, or row-major. The very same tree if that
    is so already."""
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
    """A copy of the tree in which these matrices lie by rows, as NumPy makes them; the very same
    tree if they do already."""
    return replaced(root, {k: np.ascontiguousarray(w) for k, w in large_matrices(root).items()})


def large_matrices(root: Part, layout: str = "column-major") -> dict[int, np.ndarray]:
    """The large matrices of every part that is read so by their ids, in the order of the tree, one
    that stands in two places once."""
    matrices = (node.w for _, node in walk(root) if node.layout == layout)
    return {id(w): w for w in matrices if w.size > fast.LARGE}


def replaced(root: Part, new: dict[int, np.ndarray]) -> Part:
    """A copy of the tree with other arrays for those matrices whose ids these are."""

    def change(node: Part) -> Part | None:
        if node.layout is None or new.get(id(node.w), node.w) is node.w:
            return None
        return replace(node, w=new[id(node.w)])

    return rebuild(root, change)


def aligned(size: int) -> np.ndarray:
    """So many bytes (uint8) from the beginning of a large page, if the system gives one here."""
    block = np.empty(size + LARGE_PAGE, np.uint8)  # what is never written takes no memory
    a = -block.__array_interface__["data"][0] % LARGE_PAGE
    return block[a : a + size]


def whole_lines(w) -> int:
    """The bytes of an array, rounded up to whole cache lines."""
    return -(-w.nbytes // LINE) * LINE
