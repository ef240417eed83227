"""ELSA: hashes tell how alike a key is to the query; only keys that are alike enough are scored.

Here: the estimate, the threshold, and how it is learned. The hashes are in ../keys/hashing.py, what
is done with the keys that are kept in ../keys/choosing.py. Not here: the hardware's short numbers.
"""

import math

import numpy as np
from tqdm import tqdm

from minitx import fast, ledger
from minitx.errors import MinitxError
from minitx.model import Attend
from minitx.shared.sparse_attention import SparseAttention, Visible, per_key
from minitx.skip.elsa.hashing import angle_bias, cosines, distance, sign_hash
from minitx.state import Layer
from minitx.technique import swap, technique, wrap
from minitx.tree import Part, float_type, part, table


@technique(level="scores", exact=False, neutral={"p": 0.0}, event=("keys kept", "keys seen"))
def elsa(
    lm,
    *,
    p: float = 1.0,
    t: float | None = None,
    k: int | None = None,
    theta_bias: float | None = None,
    stories: int = 8,
    min_visible: int = 1,
    seed: int = 0,
):
    """Hashes tell how alike keys are to the query; only those alike enough are scored exactly.

    Paper: Tae Jun Ham, Yejin Lee, Seong Hoon Seo, Soosung Kim, Hyunji Choi, Sung Jun Jung and
        Jae W. Lee, 2021, "ELSA: Hardware-Software Co-design for Efficient, Lightweight
        Self-Attention Mechanism in Neural Networks", ISCA 2021, doi 10.1109/ISCA52012.2021.00060.
        It has no causal models and no growing cache: all about what a query sees was chosen here.
    Kind: approximate.
    Skips or precomputes: the exact score, the exponential and the value row of each key whose
        estimated similarity to the query is too low. Each key's hash of k bits and its norm |K_y|
        are made once, when the key enters the cache.
    Offline: A = A1 (x) A2 (x) ..., random and orthogonal, one for all layers and heads, of factors
        as small as the head width d allows: 4, 4, 4 for 64, one of d if that is prime. k bits, by
        default d: for fewer the first rows of A, for more further random A. theta_bias is the 80th
        percentile of estimated minus true angle over pairs of standard normal vectors, simulated
        for each d and k. t, for each layer and query head, from the softmax weights w and the
        scores before 1/sqrt(d), s = q . K, of calibration stories in the dense model: of the keys
        with w > p / n, n those that the query sees, take the one with the least w, of none the key
        with the most; its s / (|q| max|K|) is the query's sample, and t the mean of all samples.
        The paper leaves open what to do for none, and the order of averaging. min_visible leaves
        out queries that see fewer keys, whose samples are extreme. t=NUMBER for all heads takes the
        place of p, and needs no stories.
    Online: h(x) = (A x >= 0), after the rotation. sim_y = |K_y| cos(max(0, pi / k * ham_y -
        theta_bias)), with ham_y the number of bits in which h(q) and h(K_y) differ, and the cosine
        from a table. Key y is kept if sim_y > t max|K|, the maximum over all keys that the query
        sees; where none is, the one with the largest sim, of equals the earliest (chosen here).
        Softmax and values run over the kept keys with exact scores.
    Saves: when one token is decoded, with r keys kept on average and f the sum of the factors'
        sizes (10 for d = 32), d f + S + 2 r d multiply-adds for each query head in the place of
        2 S d, and d f + d for each key head; d f as often as k takes A. Bits are compared in words
        of up to 64 and are no multiply-adds: "bits compared" counts them. Of the cache,
        S (k / 8 + 4) bytes are read for each key head (k / 8 made whole; float32) and 8 r d for
        each query head, in the place of 8 S d for each key head. A prompt saves nothing: for many
        rows the product of all is faster than gathering, and "keys kept" of "keys seen" says what
        hardware could skip.
    Neutral: p=0, which is t = -infinity and not the mean of the formula, keeps every key; so does
        any t below -1.
    Not for: wall time in NumPy: finding the kept keys and gathering them takes longer than BLAS
        takes for all, up to 2,048 keys at d = 32, and at 4,096 with a tenth of them kept it takes
        about as long. p above 0 on a model without a tokenizer to read stories with, where t=NUMBER
        is to be given.
    """
    _check(p, k, theta_bias, stories, min_visible, seed)
    config, dtype = lm.model.config, float_type(lm.model)
    d, heads = config.head_width, (config.layers, config.heads)
    k = d if k is None else k
    if theta_bias is None:
        theta_bias = angle_bias(d, k, seed)
    if t is None and p > 0:
        from minitx.training.calibration import texts_for  # only where thresholds are learned

        texts = texts_for("elsa", lm, stories, "give one threshold for all heads, such as t=0.3")
        thresholds = learn(lm, p, texts, min_visible)  # (L, H)
    else:
        thresholds = np.full(heads, -math.inf if t is None else t)
    thresholds, cos = thresholds.astype(dtype), cosines(k, theta_bias).astype(dtype)

    def change(attn: Part, index: int) -> Part:
        hashed = sign_hash(d, k, seed, dtype)  # the same arrays for all, in parts of this layer
        choose = AlikeKeys(hashed, theta_bias, cos, thresholds[index])
        return swap(attn, Attend, lambda dense: SparseAttention(choose, dense.scale))

    return wrap(lm, "attn", change)


def _check(p, k, theta_bias, stories, min_visible, seed) -> None:
    found = None
    if not 0 <= p < math.inf:
        found = f"p={p:g}; a number from 0 (keep all) is needed, such as 1"
    elif k is not None and not 1 <= k <= LONGEST:
        found = f"k={k}; a whole number of bits from 1 to {LONGEST} is needed"
    elif theta_bias is not None and not 0 <= theta_bias <= math.pi:
        found = f"theta_bias={theta_bias:g}; an angle from 0 to pi is needed"
    elif stories < 1:
        found = f"stories={stories}; at least 1 is needed"
    elif min_visible < 1:
        found = f"min_visible={min_visible}; a whole number of at least 1 is needed"
    elif seed < 0:
        found = f"seed={seed}; a whole number from 0 is needed"
    if found:
        raise MinitxError(f"elsa has {found}.")


LONGEST = 4096  # bits: as long as a key of 128 numbers


# Online ------------------------------------------------------------------------------------------


@part
class AlikeKeys(Part):
    """Chooses the keys whose estimated similarity to the query is above a share t of what a key of
    the largest norm could have. The query's norm would stand on both sides, so it is not needed."""

    hash: Part
    theta_bias: float  # that the table has in it
    cosines: np.ndarray = table()  # (k + 1,) by the number of bits that differ
    t: np.ndarray = table()  # (H,)

    def keeps_all(self, S: int) -> bool:
        return bool((self.t < -1).all())  # no similarity is below -max|K|

    def remember(self, k, layer: Layer):
        """Hashes (..., K, S, W) and norms (..., K, S) of all keys so far."""
        return per_key(self, k, self.of_keys, layer)

    def of_keys(self, k):
        ledger.count(k.size)
        return self.hash(k), np.sqrt(np.einsum("...d,...d->...", k, k))

    def __call__(self, q, k, known, visible: Visible):
        hashes, norms = known[0][..., : visible.S, :], known[1][..., : visible.S]
        sim = visible.hide(self.similarity(q, hashes, norms), -math.inf)  # (..., K, G, T, S)
        t = self.t.reshape(sim.shape[-4], -1, 1, 1)  # (K, G, 1, 1)
        kept = sim > t * largest_seen(norms, visible)
        none = np.nonzero(~kept.any(-1))
        if len(none[0]):
            kept[(*none, sim[none].argmax(-1))] = True
            ledger.event("queries without a key alike enough", len(none[0]))
        return kept

    def similarity(self, q, hashes, norms):
        """Estimates of (q / |q|) . K_y: for q (..., H, T, d) -> (..., K, G, T, S)"""
        *lead, H, T, _ = q.shape
        K, S = norms.shape[-2:]
        mine = self.hash(q).reshape(*lead, K, H // K, T, 1, -1)  # (..., K, G, T, 1, W)
        ham = distance(mine, hashes[..., None, None, :, :])  # (..., K, G, T, S)
        ledger.count(ham.size, cache_bytes=hashes.nbytes + norms.nbytes)
        ledger.event("bits compared", ham.size * (len(self.cosines) - 1))
        sim = self.cosines.take(ham, mode="clip")  # without a check of each number, so faster
        sim *= norms[..., None, None, :]
        return sim


def largest_seen(norms, visible: Visible):
    """The largest of the norms (..., K, S) of the keys that each query sees, (..., K, 1, T, 1) or
    with 1 for T: a later key must not raise an earlier query's bar."""
    norms = norms[..., None, None, :]  # (..., K, 1, 1, S)
    if visible.mask is not None:
        norms = visible.hide(np.repeat(norms, visible.T, -2), 0)
    return norms.max(-1, keepdims=True)


# Offline -----------------------------------------------------------------------------------------

SHOWN_AFTER = 1.0  # seconds before a progress bar appears


def learn(lm, p: float, texts, min_visible: int = 1) -> np.ndarray:
    """Thresholds t (L, H) in float64, from what queries and keys of this model are in the texts
    (lists of ids). MinitxError if no query of them sees ``min_visible`` keys."""
    found: list[list[np.ndarray]] = []

    def change(attn: Part, index: int) -> Part:
        found.append([])
        return swap(attn, Attend, lambda dense: Witness(dense, p, min_visible, found[index]))

    model = wrap(lm.model, "attn", change)
    for ids in tqdm(texts, desc="elsa", unit="story", delay=SHOWN_AFTER):
        model.hidden(ids)
    if not any(map(np.size, found[0])):
        raise MinitxError(
            f"elsa has min_visible={min_visible}, but no query of the calibration stories sees so "
            f"many keys: the longest has {max(map(len, texts))} tokens."
        )
    return np.array([np.concatenate(layer, -1).mean(-1, dtype=np.float64) for layer in found])


@part
class Witness(Part):
    """Dense attention that notes what each query says about its head's threshold."""

    dense: Part
    p: float
    min_visible: int
    found: list  # arrays (H, queries)

    def __call__(self, q, k, v, layer: Layer):
        T = q.shape[-2]  # a whole text
        for a, b, end in fast.causal_blocks(T, T):
            visible = Visible(b - a, end)
            noted = samples(q[:, a:b], k[:, :end], self.p, self.dense.scale, visible)  # (H, b - a)
            self.found.append(noted[:, max(self.min_visible - 1 - a, 0) :])
        return self.dense(q, k, v, layer)


def samples(q, k, p: float, scale: float, visible: Visible):
    """For each query q (H, T, d) of one text over its keys k (K, S, d) the cosine-like number
    (H, T) that would just let pass all keys that weigh more than p times the average."""
    (H, T, d), (K, S, _) = q.shape, k.shape
    w = fast.attention_weights(q, k, scale, visible.mask).reshape(K, H // K, T, S)
    w /= w.sum(-1, keepdims=True)
    relevant = w > p / visible.count[..., None]
    least = np.where(relevant, w, 2).argmin(-1)  # 2: more than any weight
    y = np.where(relevant.any(-1), least, w.argmax(-1))  # (K, G, T)
    q = q.reshape(K, H // K, T, d)
    s = np.einsum("kgtd,kgtd->kgt", q, k[np.arange(K)[:, None, None], y])
    longest = largest_seen(np.linalg.norm(k, axis=-1), visible)[..., 0]  # (K, 1, T or 1)
    most = np.linalg.norm(q, axis=-1) * longest
    return np.divide(s, most, out=np.zeros_like(s), where=most > 0).reshape(H, T)
