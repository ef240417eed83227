"""A3: sorted key columns tell which keys are worth a dot product.

Each query looks at both ends of every sorted column, where its largest and smallest products are,
adds up the few most extreme of them key by key, and takes the keys whose sum is positive. Exact
scores then follow, and a second choice among them. The sorting is in ../keys/sorted_columns.py, the
optional fixed-point arithmetic and exponential tables in ../keys/fixed_point.py.
"""

import math
from typing import Literal

import numpy as np

from minitx.errors import MinitxError
from minitx.model import Attend
from minitx.shared.sparse_attention import SparseAttention, Visible
from minitx.skip.a3.fixed_point import FixedPoint, Rounded
from minitx.skip.a3.greedy_search import GreedySearch
from minitx.skip.a3.sorted_columns import Columns, remembered
from minitx.state import Layer
from minitx.technique import swap, technique
from minitx.tree import Part, part

SETTINGS = {"conservative": (1 / 2, 5.0), "aggressive": (1 / 8, 10.0)}  # M and T
PLAIN = SETTINGS["conservative"]


@technique(
    level="scores",
    exact=False,
    neutral={"M": None, "T": 0.0},
    event=("keys kept", "keys seen"),
)
def a3(
    lm,
    *,
    setting: Literal["custom", "conservative", "aggressive"] = "custom",
    M: float | None = PLAIN[0],
    T: float = PLAIN[1],
    rebuild: int = 0,
    exp: Literal["exact", "tables"] = "exact",
    i: int | None = None,
    f: int = 4,
):
    """Sorted key columns tell, by a greedy search, which keys are worth a dot product.

    Paper: Ham et al., 2020, "A3: Accelerating Attention Mechanisms in Neural Networks with
        Approximation", HPCA 2020, https://arxiv.org/abs/2002.10941, sections III and IV. The
        moment at which the gate is read is unconfirmed (the paper's wording leaves it open), and
        so are the widths of the exponential's tables. Of a cache that grows, and of queries that
        do not find a candidate, the paper says nothing: what is done then was chosen here, and so
        were keys in pieces, which only make the search faster.
    Kind: approximate. The weights stay as they are.
    Skips or precomputes: the exact score, the exponential and the value row of each key that the
        search does not find; then the exponential and value row of each whose score is too low.
        Sorted columns of the keys are kept up to date as keys come.
    Offline: nothing.
    Online: each column j of the keys (rotated, one copy for each key head) is kept in ascending
        order, with the row of each number. So the products q_j k_ij that are extreme stand at its
        ends. M n iterations (M is a share of the n keys that the query sees; at least 1, rounded)
        each take the largest product left, and add it to greedy_i if positive; then, if the sum of
        all that was taken, this one included, is not negative (the gate: the reading after the
        largest was chosen here), the smallest, and add it if negative. Candidates have
        greedy_i > 0; where there are none, the key with the largest greedy_i (of equals the
        earliest) is kept. They are scored exactly, and those with s_max - s_i <= ln(100 / T) are
        weighed: at least T percent of the heaviest. setting=conservative is M=0.5 T=5,
        setting=aggressive M=0.125 T=10. A new key is inserted, which equals sorting anew;
        rebuild=B sorts only when B keys have come, and those of the unfinished block are always
        candidates. Keys that a query does not see are stepped over and not counted as iterations.
        i and f: q / sqrt(d), k and v are rounded to i integer and f fraction bits (the paper: 4 and
        4), exponentials and weights to 2 f fraction bits. exp=tables: exponentials from two tables
        of 2^(2f) entries, for -x with 2 f fraction bits.
    Saves: when one token is decoded, for each query head 2 n d multiply-adds become
        2 (d ceil(n / b) + R b) + 2 c d, c candidates, with b = isqrt(n) and R = d + ceil(M n / b)
        (but no more than d ceil(n / b)), equal products apart: about 2 M n + 4 d sqrt(n) in the
        place of the paper's 2 M n, which "products by the paper" counts. Values of candidates that
        T drops are not read: c d of the last term become those of "keys kept". The cache grows
        by 8 d bytes a key and key head, twice the keys. A new key moves half of each column on
        average ("sorted numbers moved"), for one query a head, so sorting weighs more here than
        in the paper, where many queries share it. A prompt saves nothing: all scores are computed.
    Neutral: M=None and T=0 (with i=None and exp=exact): candidate selection is passed by, and none
        is dropped. A large M is not neutral: it finds the keys with positive scores.
    Not for: wall time in NumPy. Finding candidates takes many small steps, and several times as
        long as dense attention at every context that was tried (256 to 4,000 keys). Fixed point
        and tables are slower still: they show what the arithmetic does. Heads whose scores are all
        low, or all high: what counts is a sum above 0, wherever the others are.
    """
    M, T = _check(setting, M, T, rebuild, i, f)
    rounded = None if i is None else Rounded(i, f)

    def choose(dense: Attend) -> SparseAttention:
        keys = SearchedKeys(GreedySearch(), M, rebuild, dense.scale, rounded)
        if rounded is None and exp == "exact":
            return SparseAttention(keys, dense.scale, T / 100)
        other = FixedPoint(exp == "tables", f, rounded)
        return SparseAttention(keys, dense.scale, T / 100, other)

    return swap(lm, Attend, choose)


def _check(setting, M, T, rebuild, i, f) -> tuple[float | None, float]:
    """M and T; MinitxError if something is out of range."""
    found = None
    if setting != "custom" and (M, T) not in (PLAIN, SETTINGS[setting]):
        found = f"setting={setting}, which brings its own M and T; give the one or the others"
    elif M is not None and not (0 < M < math.inf):
        found = f"M={M:g}; a share above 0, or None (no candidate selection), is needed"
    elif not 0 <= T <= 100:
        found = f"T={T:g}; a percentage from 0 (off) to 100 is needed"
    elif rebuild < 0:
        found = f"rebuild={rebuild}; 0 (insert each key) or a number of keys is needed"
    elif i is not None and not 1 <= i <= 8:
        found = f"i={i}; a whole number from 1 to 8, or None (no fixed point), is needed"
    elif not 1 <= f <= 8:
        found = f"f={f}; a whole number from 1 to 8 is needed"
    if found:
        raise MinitxError(f"a3 has {found}.")
    return (M, T) if setting == "custom" else SETTINGS[setting]


@part
class SearchedKeys(Part):
    """Chooses the keys that the greedy search finds, and those that are not sorted yet."""

    search: Part
    M: float | None  # pops on each side, as a share of the keys seen
    rebuild: int  # keys that have to come before they are sorted, or 0
    scale: float  # 1 / sqrt(d)
    rounded: Part | None = None

    def keeps_all(self, S: int) -> bool:
        return self.M is None

    def remember(self, k, layer: Layer) -> Columns | None:
        if self.M is None:
            return None
        S = k.shape[-2]
        if self.rebuild:  # up to the last full block; of a padded batch, of any row's
            start = 0 if layer.start is None else layer.start
            S -= np.min(np.maximum(S - start, 1) % self.rebuild)
        k = k[..., :S, :]
        return remembered(self, self.rounded(k) if self.rounded else k, layer)

    def __call__(self, q, k, known, visible: Visible):
        shape = *q.shape[:-3], k.shape[-3], -1, visible.T  # (..., K, G, T)
        q = q.reshape(*shape, q.shape[-1])
        shape = *q.shape[:-1], visible.S
        if known is None:
            return visible.hide(np.ones(shape, bool), False)
        own = visible.own + 1  # (T,): all keys up to the query's own
        end = (
            own - visible.count % self.rebuild if self.rebuild else own
        )  # of the keys sorted for it
        M = np.maximum(1, np.rint(self.M * visible.count)).astype(int)
        rows = [np.broadcast_to(x, shape[:-1]) for x in (own - visible.count, end, M)]
        q = self.rounded(q * self.scale) if self.rounded else q
        greedy = self.search(q, known.until(visible.S), *rows, visible.S)  # (..., K, G, T, S)
        kept = greedy > 0
        if self.rebuild:
            kept |= visible.hide(np.arange(visible.S) >= rows[1][..., None], False)
        none = np.nonzero(~kept.any(-1))  # the paper does not say what is done then
        kept[(*none, visible.hide(greedy).argmax(-1)[none])] = True
        return kept
