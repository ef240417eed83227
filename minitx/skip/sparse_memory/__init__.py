"""Sparse memory: a cache of N slots, of which each query reads the K nearest.

The reads, the eviction and the undoing of the paper, for a decoder. The slots are in slots.py, the
kinds of index in nearest.py and kd_trees.py. Not here: what the paper trains (an LSTM that writes
and erases), and its rollback for back-propagation, which became ``rewind``.
"""

from typing import Literal

from minitx.errors import MinitxError
from minitx.model import Attend, Attention
from minitx.shared.sparse_attention import SparseAttention, Visible, per_key
from minitx.skip.sparse_memory.kd_trees import KDTrees
from minitx.skip.sparse_memory.nearest import Linear, best, longest_key, random_lsh
from minitx.skip.sparse_memory.slots import Slots
from minitx.state import Layer
from minitx.technique import swap, technique
from minitx.tree import Part, float_type, part, walk


@technique(
    level="scores",
    exact=False,
    neutral={"K": 1 << 40, "N": None, "index": "linear"},
    demo={"K": 3, "N": 10},
    event="keys evicted",
)
def sparse_memory(
    lm,
    *,
    K: int = 16,
    N: int | None = None,
    delta: float = 0.005,
    index: Literal["linear", "lsh", "kd-tree"] = "linear",
    b: int = 8,
    L: int = 40,
    augment: bool = True,
    trees: int = 4,
    checks: int | None = 32,
    seed: int = 0,
):
    """Each query reads only the K keys nearest to it; of N keys the longest unread is forgotten.

    Paper: Jack Rae, Jonathan Hunt, Tim Harley, Ivo Danihelka, Andrew Senior, Greg Wayne, Alex
        Graves and Timothy Lillicrap, 2016, "Scaling Memory-Augmented Neural Networks with Sparse
        Reads and Writes", NIPS 2016, arXiv 1610.09027 (SAM). It is about a memory beside an LSTM,
        trained with it. That the memory is a decoder's keys and values, matched by the one and
        returning the other, was chosen here (Memorizing Transformers, arXiv 2203.08913, look so for
        past keys), with alpha = 1 and gamma = 0: nothing is written back into slots that were read.
        No figure of the paper's is about a transformer.
    Kind: approximate. The weights stay as they are.
    Skips or precomputes: the exponential and the value row of all keys but K; with an index, the
        exact score too of keys that it does not find; of all keys, those evicted.
    Offline: random planes (lsh), and a bound R of the length of keys from the weights,
        sqrt(D) ||diag(g) W_k||_2 + |c W_k + b| with the norm's gain g and bias c.
    Online: each key head has N slots. A token t takes a free slot or that of the least last access,
        of equals the oldest token (equation 6 of the paper read literally says the most recent, its
        text the least recent), and is written before it is read. Each query head then takes
        candidates from the index, scores them exactly and keeps the K best, of equals the
        smaller slot; softmax runs over these alone. last = t for the slot written and for all that
        weigh more than delta in a query head of the group. A prompt goes the same way, row by row
        as soon as the slots are full. A journal notes what each token changed, so that rewinding
        undoes it bit for bit. Slots hold numbers of tokens and copies of keys; the model's own
        cache keeps every row, where an undone eviction finds it: what is bounded by N is what can
        be read, and the index.
        index=linear: all slots are candidates. lsh: those that share a bucket with the query in one
        of L tables of b sign bits. kd-tree: what a best-bin-first search in several trees looks at
        until it has seen ``checks`` keys (None: until it is sure, which is exact). The keys
        [k, sqrt(R^2 - |k|^2)] and queries [R q / |q|, 0] are indexed, in which the nearest key is
        the one of the largest product. augment=false hashes the directions of keys alone. If the
        weights do not tell R, lsh does so too, and trees are built anew when a longer key comes.
        Fewer candidates than K are filled up with the latest tokens.
    Saves: one token decoded takes, with n = min(S, N) and r = min(S, K), n d + 2 r d multiply-adds
        a query head in the place of 2 S d: less if K is under half of S. lsh takes c d in the place
        of n d for c candidates, but L b d to hash a query and L b (d + 1) to hash a key, and reads
        L bytes (b > 8: 2 L) for each slot. Trees are here to be looked at: all their distances come
        from one product, and "points checked" says how many were asked for. N bounds n; it takes
        N (d + 4) numbers of four bytes a key head, and a journal of up to 2 + G K numbers a token.
        Eviction and sorting are not counted. A prompt saves nothing where it is chosen in blocks
        (all scores are computed), and else n d for each row, after which all are computed too.
    Neutral: index=linear with K no context reaches and N=None, the context: every key is kept.
    Not for: batches of prompts of different lengths, where something can be evicted or the index
        is of trees. Wall time in NumPy, up to contexts of 4,096: choosing costs more than it saves,
        and a prompt goes row by row once slots are full. With N fixed (256) a token's time grows
        slowly, and breaks even at about 8,000 keys. lsh is slower at every context that was tried,
        and misses many of the K best: R is several times the length of most keys, so all angles are
        near 90 degrees. augment=false found more of them on one text of the shipped stories model,
        from somewhat more candidates. The k-d trees that the paper uses leave hardly a key unseen
        at the widths of heads (kd_trees.looked_at), and a search cut off finds few of the K best. N
        near K: recency of use, not weight, decides who goes, so keep N well above K times the query
        heads of a group.
    """
    d = lm.model.config.head_width
    _check(K, N, delta, b, L, trees, checks, seed)
    context = lm.model.config.context
    N = context if N is None else min(N, context)
    dtype = float_type(lm.model)
    attentions = [node for _, node in walk(lm) if type(node) is Attention]
    bounds = {id(attn.attend): longest_key(attn) for attn in attentions}

    def chooser(dense: Attend) -> SparseAttention:
        R = bounds.get(id(dense))
        if index == "lsh":
            found = random_lsh(d, b, L, R if augment else None, seed, dtype)
        else:
            found = Linear() if index == "linear" else KDTrees(R, K, checks, trees, seed)
        return SparseAttention(NearestKeys(found, K, N, delta, dense.scale, context), dense.scale)

    return swap(lm, Attend, chooser)


def _check(K, N, delta, b, L, trees, checks, seed) -> None:
    least = {"K": K, "N": N, "b": b, "L": L, "trees": trees, "checks": checks}
    found = None
    for name, value in least.items():
        if value is not None and value < 1:
            found = f"{name}={value}; a whole number of at least 1 is needed"
    if b > 16:
        found = f"b={b}; at most 16 bits are needed, since a bucket of more has no key in it"
    if seed < 0:
        found = f"seed={seed}; a whole number of at least 0 is needed"
    if not 0 <= delta <= 1:
        found = f"delta={delta:g}; a share of attention from 0 to 1 is needed"
    if found:
        raise MinitxError(f"sparse_memory has {found}.")


@part
class NearestKeys(Part):
    """Chooses the K best of the keys that the index finds among those that are still remembered.

    Nothing is ever evicted where N reaches the context. Then it makes no difference what was read
    before, so there are no slots, and rows are chosen many at once and in batches of any kind
    (unless the index itself has a history).
    """

    index: Part
    K: int
    N: int
    delta: float
    scale: float  # 1 / sqrt(d)
    context: int

    @property
    def has_history(self) -> bool:
        """Which keys are still there depends on which were read."""
        return self.context > self.N or self.index.history

    one_sequence = has_history

    def keeps_all(self, S: int) -> bool:
        """Keys of now are to be kept, and none of those to come may depend on what was read."""
        return type(self.index) is Linear and S <= self.K and self.context <= self.N

    def remember(self, k, layer: Layer):
        """What the index knows of each key; with the slots around it where there are any."""
        facts = per_key(self.index, k, self.index.remember, layer)  # each (..., K, S, any)
        if not self.has_history:
            return facts
        if layer.start is not None:
            raise MinitxError(
                "sparse_memory cannot forget by use, nor grow trees, in a batch of prompts of "
                "different lengths; run them one by one, or with N=None and another index."
            )
        source = tuple(a.reshape(-1, *a.shape[k.ndim - 2 :]) for a in (k, *facts))

        def make() -> Slots:
            return Slots(source, self.index, self.K, self.N, self.delta)

        if layer.remember:
            slots = layer.memory.recall(self, make)
        else:
            slots = make()
        slots.source = source  # which has grown
        for t in range(slots.count, int(layer.tokens.array[0])):  # skipped this layer: nobody read
            slots.write(t)
        return slots

    def __call__(self, q, k, known, visible: Visible):
        *lead, H, T, d = q.shape
        heads = k.shape[-3]
        q = q.reshape(*lead, heads, H // heads, T, d) * self.scale  # (..., K, G, T, d)
        if isinstance(known, Slots):
            kept = known.run(q.reshape(-1, *q.shape[-3:]), visible)  # (M, G, T, S)
            return kept.reshape(*q.shape[:-1], visible.S)
        facts = [a[..., : visible.S, :] for a in known]
        return best(self.index, self.K, q, k, facts, visible)[0]
